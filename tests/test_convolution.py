"""convolution_jvp and sampled_convolution_ against their references; rules built on them are in test_rules_convolution.py."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close32, assert_close64

import frog_cuda as frog
from frog_cuda import ops, reference

K = 3
#: x, weight, options
SHAPES = {
    "2d": ((2, 4, 7, 5), (6, 4, 3, 3), dict(stride=[1, 1], padding=[1, 1], dilation=[1, 1], output_padding=[0, 0])),
    "strided": ((2, 4, 9, 9), (6, 4, 3, 3), dict(stride=[2, 2], padding=[1, 0], dilation=[1, 2], output_padding=[0, 0])),
    "grouped": (
        (2, 4, 7, 5),
        (6, 2, 3, 3),
        dict(stride=[1, 1], padding=[0, 0], dilation=[1, 1], output_padding=[0, 0], groups=2),
    ),
    "transposed": (
        (2, 4, 5, 5),
        (4, 6, 3, 3),
        dict(stride=[2, 2], padding=[1, 1], dilation=[1, 1], output_padding=[1, 0], transposed=True),
    ),
    "1d": ((2, 3, 9), (6, 3, 4), dict(stride=[1], padding=[2], dilation=[1], output_padding=[0])),
    "3d": ((1, 2, 4, 5, 3), (6, 2, 2, 2, 2), dict(stride=[1] * 3, padding=[0] * 3, dilation=[1] * 3, output_padding=[0] * 3)),
    "empty": ((0, 4, 7, 5), (6, 4, 3, 3), dict(stride=[1, 1], padding=[1, 1], dilation=[1, 1], output_padding=[0, 0])),
}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def neighbours(k: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x and dx one behind the other, as the other operators leave them."""
    both = draw(1 + k, *shape, dtype=dtype)
    return both[0], both[1:]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("together", [True, False], ids=["neighbours", "apart"])
@pytest.mark.parametrize("name", SHAPES)
def test_against_the_reference(name, together, dtype):
    x_shape, w_shape, options = SHAPES[name]
    x, dx = neighbours(K, x_shape, dtype)
    if not together:
        dx = dx.clone()
    w, b = draw(*w_shape, seed=2, dtype=dtype), draw(6, seed=3, dtype=dtype)
    same = assert_close64 if dtype == torch.float64 else assert_close32
    for bias in (b, None):
        for got, expected in zip(
            ops.convolution_jvp(x, dx, w, bias, **options), reference.convolution_jvp(x, dx, w, bias, **options), strict=True
        ):
            same(got, expected)


def test_results_are_neighbours_for_the_next_layer():
    _, w_shape, options = SHAPES["2d"]
    w = draw(*w_shape, dtype=torch.float32)
    x, dx = neighbours(K, (2, 4, 40, 40), torch.float32)
    y, dy = ops.convolution_jvp(x, dx, w, **options)
    assert y.data_ptr() + y.numel() * 4 == dy.data_ptr() and y.is_contiguous() and dy.is_contiguous()
    assert y.nbytes >= 1 << 16  # smaller memory may lie idle when it is freed
    del x, dx
    kept = dy.clone()
    del y
    x, dx = (t.mul_(2) for t in neighbours(K, (2, 4, 40, 40), torch.float32))
    for _ in range(20):  # whoever takes freed memory next
        ops.convolution_jvp(x, dx, w, **options)
    assert torch.equal(dy, kept)


def test_strided_operands():
    x_shape, w_shape, options = SHAPES["2d"]
    x = draw(*x_shape).contiguous(memory_format=torch.channels_last)
    dx, w = draw(*x_shape, K).permute(4, 0, 1, 2, 3), draw(*w_shape).contiguous(memory_format=torch.channels_last)
    for got, expected in zip(
        ops.convolution_jvp(x, dx, w, **options), reference.convolution_jvp(x, dx, w, **options), strict=True
    ):
        assert_close64(got, expected)


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(x=torch.zeros(4, 5)), r"x has shape \(4, 5\)"),
        (dict(x=torch.zeros(2, 4, 7, 5, dtype=torch.int64)), "x has dtype Long"),
        (dict(weight=torch.zeros(6, 4, 3)), r"weight has shape \(6, 4, 3\)"),
        (dict(weight=torch.zeros(6, 4, 3, 3).double()), "weight has dtype Double, expected Float"),
        (dict(dx=torch.zeros(3, 2, 4, 7, 6)), r"dx has shape \(3, 2, 4, 7, 6\)"),
        (dict(dx=torch.zeros(0, 2, 4, 7, 5)), "k is 0"),
        (dict(dx=torch.zeros(3, 2, 4, 7, 5).double()), "dx has dtype Double, expected Float"),
        (dict(bias=torch.zeros(5)), r"bias has shape \(5,\), expected \(6,\)"),
        (dict(weight=torch.zeros(6, 5, 3, 3)), r"x has shape \(2, 4, 7, 5\), expected 5 channels"),
        (dict(groups=4), r"groups is 4 and weight has shape \(6, 4, 3, 3\)"),
        (dict(groups=0), "groups is 0"),
        (dict(groups=2), "expected 8 channels"),
        (dict(transposed=True), "expected 6 channels"),
        (dict(stride=[1, 1, 1]), "stride has 3 elements, expected 2"),
        (dict(stride=[1, 0]), "stride holds 0"),
        (dict(padding=[-1, 0]), "padding holds -1"),
        (dict(dilation=[1, 0]), "dilation holds 0"),
        (dict(weight=torch.zeros(6, 4, 3, 9)), "the kernel spans 9 places of axis 1, but the padded image has 7"),
        (dict(dilation=[5, 1]), "the kernel spans 11 places of axis 0, but the padded image has 9"),
    ],
)
def test_bad_input(change, match):
    arguments = dict(x=torch.zeros(2, 4, 7, 5), dx=torch.zeros(3, 2, 4, 7, 5), weight=torch.zeros(6, 4, 3, 3))
    with pytest.raises(RuntimeError, match="convolution_jvp: .*" + match):
        ops.convolution_jvp(**arguments | SHAPES["2d"][2] | change)


@pytest.mark.parametrize("together", [True, False], ids=["neighbours", "apart"])
@pytest.mark.parametrize("transposed", [False, True])
def test_large_results_are_those_of_each_image(together, transposed):
    """The library gets some images at a time, in numbers that do not divide; how many does not show."""
    images, k = 37, 2
    w, options = draw(8, 8, 3, 3, dtype=torch.float32), dict(stride=[1, 1], padding=[1, 1], dilation=[1, 1])
    options |= dict(output_padding=[0, 0], transposed=transposed)
    x, dx = neighbours(k, (images, 8, 64, 64), torch.float32)
    assert x.nbytes > 2 * (2 << 20)  # several calls even for the value alone
    if not together:
        dx = dx.clone()
    y, dy = ops.convolution_jvp(x, dx, w, draw(8, dtype=torch.float32), **options)
    assert y.data_ptr() + y.nbytes == dy.data_ptr()
    for at in (0, 1, 17, images - 1):
        some = [t[..., at : at + 1, :, :, :] for t in (x, dx)]
        exact = reference.convolution_jvp(*some, w, draw(8, dtype=torch.float32), **options)
        assert_close32(y[at : at + 1], exact[0])
        assert_close32(dy[:, at : at + 1], exact[1])
    one = ops.convolution_jvp(x, dx[1:], w, draw(8, dtype=torch.float32), **options)
    assert torch.equal(one[0], y) and torch.equal(one[1], dy[1:])


#: images so small that most of the kernel lies in the padding, which is left out: x, weight, stride, padding, dilation, groups
SMALL = {
    "2x2": ((5, 33, 2, 2), (17, 33, 3, 3), [1, 1], [1, 1], [1, 1], 1),
    "many": ((70, 16, 2, 2), (101, 16, 3, 3), [1], [1], [1], 1),
    "strided": ((7, 18, 3, 4), (20, 18, 5, 7), [2, 1], [2, 3], [1, 1], 1),
    "dilated": ((4, 16, 3, 3), (16, 16, 3, 3), [1, 1], [2, 2], [2, 2], 1),
    "grouped": ((6, 48, 2, 2), (51, 16, 3, 3), [1, 1], [1, 1], [1, 1], 3),
    "1d": ((6, 16, 2), (18, 16, 5), [1], [2], [1], 1),
    "3d": ((4, 16, 2, 2, 2), (20, 16, 3, 3, 3), [1] * 3, [1] * 3, [1] * 3, 1),
}


@pytest.mark.skipif(frog.build_info()["simd"] == "baseline", reason="the library multiplies")
@pytest.mark.parametrize(
    "x_shape, w_shape, direct",
    [
        ((4, 16, 2, 2), (16, 16, 3, 3), True),
        ((3, 16, 2, 2), (16, 16, 3, 3), False),  # few images
        ((4, 15, 2, 2), (16, 15, 3, 3), False),  # few channels
        ((4, 16, 2, 2), (15, 16, 3, 3), False),  # few filters
        ((4, 16, 3, 3), (16, 16, 3, 3), False),  # seven places in nine of each axis
    ],
)
def test_which_images_are_small(x_shape, w_shape, direct):
    x, dx = neighbours(1, x_shape, torch.float32)
    w = draw(*w_shape, dtype=torch.float32)
    with torch.profiler.profile() as profile:
        ops.convolution_jvp(x, dx, w, stride=[1, 1], padding=[1, 1], dilation=[1, 1], output_padding=[0, 0])
    assert any(e.key == "aten::convolution" for e in profile.key_averages()) != direct


def test_small_images_of_any_number_have_the_same_bits():
    """They are taken 128 at a time where there are 2048 channels."""
    x, dx = neighbours(1, (96, 2048, 2, 2), torch.float32)
    w, options = draw(17, 2048, 3, 3, dtype=torch.float32), dict(stride=[1, 1], padding=[1, 1], dilation=[1, 1])
    y, dy = ops.convolution_jvp(x, dx, w, output_padding=[0, 0], **options)
    for at in (0, 30, 92):
        some, moved = ops.convolution_jvp(x[at : at + 4], dx[:, at : at + 4], w, output_padding=[0, 0], **options)
        assert torch.equal(some, y[at : at + 4]) and torch.equal(moved, dy[:, at : at + 4])


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_no_channels_make_no_channels_as_in_pytorch(axes):
    x, w = torch.empty(2, 0, *[5] * axes), torch.empty(4, 0, *[2] * axes)
    for padding, bias in ((0, None), (1, torch.ones(4))):
        options = dict(stride=[1] * axes, padding=[padding] * axes, dilation=[1] * axes, output_padding=[0] * axes)
        y, dy = ops.convolution_jvp(x, torch.empty(3, *x.shape), w, bias, **options)
        assert y.shape == torch.convolution(x, w, bias, **options, transposed=False, groups=1).shape == (2, 0, *y.shape[2:])
        assert dy.shape == (3, *y.shape)
        with pytest.raises(RuntimeError, match="its first axis must be at least 1"):
            transposed = torch.empty(0, 4, *w.shape[2:])
            ops.convolution_jvp(x, torch.empty(3, *x.shape), transposed, bias, transposed=True, **options)
    with pytest.raises(RuntimeError, match="expected .filters, 0, .* with a filter and a channel at least"):
        ops.narrow_convolution(x, w, stride=[1] * axes, padding=[0] * axes, dilation=[1] * axes)
    for add, expected in ((True, 7.7), (False, 0.0)):
        moved = torch.full((3, 2, 4, *[4] * axes), 7.7)
        how = dict(kernel=[2] * axes, stride=[1] * axes, padding=[0] * axes, dilation=[1] * axes, add=add)
        assert bool((ops.sampled_convolution_(moved, x, torch.tensor([0, 0]), **how) == expected).all())


def test_images_without_places_are_refused_as_by_pytorch():
    x, w = torch.zeros(4, 16, 0, 2), torch.zeros(16, 16, 3, 3)
    with pytest.raises(RuntimeError):
        F.conv2d(x, w, None, 1, 2)
    with pytest.raises(RuntimeError):
        options = dict(stride=[1, 1], padding=[2, 2], dilation=[1, 1], output_padding=[0, 0])
        ops.convolution_jvp(x, torch.zeros(2, 4, 16, 0, 2), w, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("together", [True, False], ids=["neighbours", "apart"])
@pytest.mark.parametrize("name", SMALL)
def test_small_images(name, together, dtype):
    x_shape, w_shape, stride, padding, dilation, groups = SMALL[name]
    options = dict(stride=stride, padding=padding, dilation=dilation, output_padding=[0] * len(stride), groups=groups)
    x, dx = neighbours(K, x_shape, dtype)
    if not together:
        dx = dx.clone()
    w, b = draw(*w_shape, seed=2, dtype=dtype), draw(w_shape[0], seed=3, dtype=dtype)
    same = assert_close64 if dtype == torch.float64 else assert_close32
    y, dy = ops.convolution_jvp(x, dx, w, b, **options)
    for got, expected in zip((y, dy), reference.convolution_jvp(x, dx, w, b, **options), strict=True):
        same(got, expected)
    if together:
        assert y.data_ptr() + y.nbytes == dy.data_ptr()
    # Neither other tangents nor threads nor how the weight lies change a bit
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, last = ops.convolution_jvp(x, dx[2:], w.movedim(0, -1).contiguous().movedim(-1, 0), b, **options)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, y) and torch.equal(last[0], dy[2])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("together", [True, False], ids=["neighbours", "apart"])
@pytest.mark.parametrize(
    "x_shape, kernel",
    [
        ((21, 16, 32, 32), (3, 3)),  # 273 images in several calls of the library, which would leave one over
        ((1, 4, 7, 7), (3, 3)),  # few images, for which PyTorch has another way
        ((1, 4, 64, 64), (3, 3)),  # a result large enough for several calls
        ((3, 8, 6, 6), (1, 1)),
        ((1, 8, 6, 6), (1, 1)),
        ((2, 3, 50), (1,)),
        ((2, 4, 5, 6, 6), (3, 1, 1)),
        ((1, 3, 16, 40, 40), (3, 3, 3)),
    ],
    ids=str,
)
def test_bits_do_not_depend_on_the_number_of_tangents(x_shape, kernel, together, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        axes = len(kernel)
        w = draw(64, x_shape[1], *kernel, dtype=torch.float32)
        options = dict(stride=[1] * axes, padding=[n // 2 for n in kernel], dilation=[1] * axes, output_padding=[0] * axes)
        x, dx = neighbours(40 if x_shape[0] == 1 else 12, x_shape, torch.float32)
        if not together:
            dx = dx.clone()
        value, whole = ops.convolution_jvp(x, dx, w, **options)
        for first in (0, 11):
            same, one = ops.convolution_jvp(x.clone(), dx[first : first + 1], w, **options)
            assert torch.equal(one[0], whole[first]) and torch.equal(same, value)
    finally:
        torch.set_num_threads(before)


# ---- sampled weight tangents

STATE = torch.tensor([-7, 3])
#: self without k, x, options
SAMPLED = {
    "1d": ((2, 5, 11), (2, 3, 19), dict(kernel=[4], stride=[2], padding=[3], dilation=[1])),
    "2d": ((2, 6, 7, 5), (2, 4, 7, 5), dict(kernel=[3, 3], stride=[1, 1], padding=[1, 1], dilation=[1, 1])),
    "strided": ((2, 6, 5, 3), (2, 4, 9, 9), dict(kernel=[3, 3], stride=[2, 2], padding=[1, 0], dilation=[1, 2])),
    "3d": ((1, 6, 3, 4, 2), (1, 2, 4, 5, 3), dict(kernel=[2] * 3, stride=[1] * 3, padding=[0] * 3, dilation=[1] * 3)),
    "empty": ((0, 6, 7, 5), (0, 4, 7, 5), dict(kernel=[3, 3], stride=[1, 1], padding=[1, 1], dilation=[1, 1])),
    # more than are drawn at a time; more filters than a strip has
    "many channels": ((3, 40, 4, 4), (3, 200, 4, 4), dict(kernel=[3, 3], stride=[1, 1], padding=[1, 1], dilation=[1, 1])),
    # taps that no image has
    "beside": ((9, 5, 1, 2), (9, 4, 1, 2), dict(kernel=[3, 3], stride=[1, 1], padding=[2, 1], dilation=[2, 1])),
    # images that are no whole panels, whatever the vectors
    "many images": ((41, 5, 3, 2), (41, 3, 3, 2), dict(kernel=[3, 3], stride=[1, 1], padding=[1, 1], dilation=[1, 1])),
    # images in stretches, the second of three; places in stretches
    "large": ((67, 4, 65, 63), (67, 3, 65, 63), dict(kernel=[3, 3], stride=[1, 1], padding=[1, 1], dilation=[1, 1])),
    "groups": ((3, 10, 4, 5), (3, 6, 4, 5), dict(kernel=[3, 3], stride=[1, 1], padding=[1, 1], dilation=[1, 1], groups=2)),
    # more groups than are drawn at a time
    "depthwise": (
        (3, 131, 3, 2),
        (3, 131, 5, 4),
        dict(kernel=[3, 3], stride=[2, 2], padding=[1, 1], dilation=[1, 1], groups=131),
    ),
    "two filters each": ((9, 66, 6), (9, 33, 7), dict(kernel=[2], stride=[1], padding=[0], dilation=[1], groups=33)),
    # groups of more filters, and of more channels, than are drawn at a time
    "wide groups": (
        (2, 260, 2, 3),
        (2, 480, 2, 3),
        dict(kernel=[3, 3], stride=[1, 1], padding=[1, 1], dilation=[1, 1], groups=2),
    ),
    "transposed": (
        (2, 6, 9, 11),
        (2, 4, 4, 5),
        dict(kernel=[4, 3], stride=[2, 2], padding=[1, 0], dilation=[1, 1], transposed=True, output_padding=[1, 0]),
    ),
    # places that nothing reaches, and strides along which no tap repeats
    "far apart": (
        (3, 5, 14, 13),
        (3, 4, 4, 3),
        dict(kernel=[2, 2], stride=[4, 5], padding=[0, 1], dilation=[1, 3], transposed=True, output_padding=[0, 1]),
    ),
    "transposed 3d": (
        (1, 6, 5, 4, 7),
        (1, 4, 3, 4, 3),
        dict(kernel=[3, 2, 3], stride=[2, 1, 2], padding=[1, 1, 0], dilation=[1, 2, 1], transposed=True, groups=2),
    ),
    # more filters, and more channels, than are drawn at a time
    "wide transposed": (
        (2, 700, 3, 2),
        (2, 210, 3, 3),
        dict(kernel=[3, 2], stride=[1, 1], padding=[1, 1], dilation=[1, 1], transposed=True),
    ),
    "depthwise transposed": (
        (67, 131, 8),
        (67, 131, 4),
        dict(kernel=[4], stride=[2], padding=[1], dilation=[1], transposed=True, groups=131),
    ),
}


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_against_the_reference(name, distribution, dtype, add):
    shape, x_shape, options = SAMPLED[name]
    x, before = draw(*x_shape, dtype=dtype), draw(K, *shape, seed=1, dtype=dtype)
    how = dict(options, offset=70, first=2, distribution=distribution, add=add)
    exact, actual = before.double().clone(), before.clone()
    reference.sampled_convolution_(exact, x, STATE, **how)
    assert ops.sampled_convolution_(actual, x, STATE, **how) is actual
    if dtype == torch.bfloat16:  # each sum is rounded to 8 bits
        largest = exact.abs().amax().item() if exact.numel() else 1.0
        torch.testing.assert_close(actual.double(), exact, rtol=0, atol=2**-7 * largest)
    else:
        # normal elements of the reference are exact, those drawn are float32
        assert_close32(actual.float(), exact)
    mixed = before.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(ops.sampled_convolution_(mixed, x, STATE, **how), actual)


def test_sampled_tangents_are_those_of_sample_tangents():
    """In float64 to its rounding, standard basis included."""
    shape, x_shape, options = SAMPLED["strided"]
    x = draw(*x_shape)
    for distribution, state in (("normal", STATE), ("standard_basis", torch.tensor([0, 71, 75, 69]))):
        how = dict(offset=70, first=1, distribution=distribution)
        moved = torch.full((K, *shape), float("nan"), dtype=torch.float64)
        ops.sampled_convolution_(moved, x, state, **options, **how, add=False)
        w = ops.sample_tangents(state, K, 6 * 4 * 9, dtype=torch.float64, **how).view(K, 6, 4, 3, 3)
        places = options["stride"], options["padding"], options["dilation"]
        exact = torch.stack([torch.convolution(x, v, None, *places, False, [0, 0], 1) for v in w])
        assert_close64(moved, exact)


PEAK = """
import resource, torch
from frog_cuda import ops
torch.set_num_threads(1)
def step(k, channels):
    moved, x = torch.zeros(k, 2, channels, 3, 3), torch.randn(2, channels, 3, 3)
    ops.sampled_convolution_(moved, x, torch.tensor([1, 2]), kernel=[3, 3], stride=[1, 1], padding=[1, 1], dilation=[1, 1])
step(2, 8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(16, 512)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_weight_tangents_are_never_all_there():
    """Sixteen of them would take 151 MB, one of them 9.4."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 9.4e6


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "name",
    ["2d", "strided", "many channels", "many images", "large", "depthwise", "wide groups", "transposed", "wide transposed"],
)
def test_bits_of_sampled_do_not_depend_on_tangents_images_or_threads(name, threads):
    shape, x_shape, options = SAMPLED[name]
    x, state, how = draw(*x_shape, dtype=torch.float32), torch.tensor([9, 4]), dict(offset=5, add=False)

    def convolved(x, k, first):
        moved = torch.empty(k, len(x), *shape[1:])
        return ops.sampled_convolution_(moved, x, state, **options, **how, first=first)

    whole = convolved(x, 5, 0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for first, k in ((0, 1), (1, 3), (4, 1)):
            assert torch.equal(convolved(x, k, first), whole[first : first + k])
        assert torch.equal(convolved(x[1:], 5, 0), whole[:, 1:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.ones(2, 4, 7, 5, dtype=torch.int64)), "x has dtype Long"),
        (dict(x=torch.ones(2, 4, 7, 5, dtype=torch.float64)), "self has dtype Float, expected Double"),
        (dict(x=torch.ones(2, 4)), r"x has shape \(2, 4\), expected \(batch, channels, \*\)"),
        (dict(self=torch.ones(2, 6, 7, 5)), r"self has shape \(2, 6, 7, 5\) and x has shape"),
        (dict(self=torch.ones(3, 2, 6, 7, 6)), r"self has shape \(3, 2, 6, 7, 6\), expected \(3, 2, 6, 7, 5\)"),
        (dict(self=torch.ones(0, 2, 6, 7, 5)), "k is 0"),
        (dict(kernel=[3]), "kernel has 1 elements, expected 2"),
        (dict(kernel=[3, 0]), "kernel holds 0; accepted are integers from 1"),
        (dict(stride=[0, 1]), "stride holds 0"),
        (dict(padding=[-1, 1]), "padding holds -1; accepted are integers from 0"),
        (dict(dilation=[1, 9]), "the kernel spans 19 places of axis 1, but the padded image has 7"),
        (dict(state=torch.tensor([1, -1])), "step is -1"),
        (dict(offset=-3), "offset is -3"),
        (dict(groups=0), "groups is 0; accepted is what divides 4 channels and 6 outputs"),
        (dict(groups=4), "groups is 4; accepted is what divides 4 channels and 6 outputs"),
        (dict(groups=3), "groups is 3; accepted"),
        (dict(output_padding=[0, 1]), "output_padding holds 1; accepted is 0 unless transposed"),
        (dict(output_padding=[0]), "output_padding has 1 elements, expected 2"),
        (dict(transposed=True, output_padding=[0, -1]), "output_padding holds -1"),
        (
            dict(transposed=True, output_padding=[0, 1]),
            "output_padding holds 1; accepted is less than the stride 1 or the dilation 1",
        ),
        (dict(transposed=True, stride=[2, 1]), r"self has shape \(3, 2, 6, 7, 5\), expected \(3, 2, 6, 13, 5\)"),
        (
            dict(transposed=True, padding=[1, 4]),
            "x has 5 places of axis 1, and its transposed convolution -1; accepted is at least 1",
        ),
    ],
)
def test_bad_input_of_sampled_leaves_all_as_it_was(change, message):
    shape, x_shape, options = SAMPLED["2d"]
    target = torch.ones(K, *shape)
    with pytest.raises(RuntimeError, match=message):
        ops.sampled_convolution_(**(dict(self=target, x=torch.ones(x_shape), state=STATE, **options) | change))
    assert torch.equal(target, torch.ones(K, *shape))
