"""The CUDA kernels of sampled_convolution_, run on the host, against the library's convolution in float64."""

from __future__ import annotations

import pytest
import torch
from cuda_on_cpu.client import InOut, Kernels, Out, Skewed
from helpers import FLOAT32_BOUND, assert_as_good_as_torch, assert_close32, assert_close64
from torch import Tensor

from frog_cuda import ops

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
DISTRIBUTIONS = ["normal", "rademacher"]
STATE = torch.tensor([-7, 3])

#: x (B, C, *s), outputs, kernel, and what is not 1, 0, 1, 0, 1 and False of stride, padding, dilation, output_padding,
#: groups and transposed
SHAPES = {
    "1d": ((2, 3, 19), 5, (4,), dict(stride=(2,), padding=(3,))),
    "2d": ((2, 3, 7, 5), 9, (3, 3), dict(padding=(1, 1))),
    "2d, one place": ((3, 5, 3, 3), 33, (3, 3), {}),
    "2d, strided and dilated": ((1, 4, 13, 11), 7, (3, 2), dict(stride=(2, 3), padding=(2, 0), dilation=(2, 1))),
    "2d, mostly padding": ((2, 2, 1, 2), 3, (5, 5), dict(padding=(4, 4))),
    "pointwise": ((1, 67, 3, 3), 8, (1, 1), {}),
    "3d": ((1, 2, 4, 5, 3), 4, (2, 3, 2), dict(stride=(1, 2, 1), padding=(1, 0, 1))),
    "many rows": ((3, 2, 9, 9), 65, (3, 3), dict(padding=(1, 1))),
    "two groups": ((2, 6, 7, 5), 10, (3, 2), dict(padding=(1, 0), groups=2)),
    "groups of more than a tile": ((3, 4, 9, 9), 2 * 67, (3, 3), dict(padding=(1, 1), groups=2)),
    "depthwise": ((2, 5, 7, 6), 5, (3, 3), dict(stride=(2, 1), padding=(1, 1), groups=5)),
    "depthwise, three outputs of a channel": ((1, 4, 11), 12, (5,), dict(dilation=(2,), groups=4)),
    "transposed 1d": ((2, 3, 9), 5, (4,), dict(stride=(3,), padding=(2,), transposed=True)),
    "transposed 2d": (
        (2, 3, 4, 5),
        7,
        (3, 2),
        dict(stride=(2, 3), padding=(1, 0), output_padding=(1, 2), transposed=True),
    ),
    "transposed, each place in one window": ((1, 9, 3, 2), 65, (2, 2), dict(stride=(2, 2), transposed=True)),
    "transposed, dilated": ((1, 2, 5, 4), 3, (3, 4), dict(stride=(3, 2), padding=(2, 1), dilation=(2, 3), transposed=True)),
    "transposed 3d": (
        (1, 2, 3, 2, 4),
        3,
        (2, 3, 2),
        dict(stride=(2, 1, 2), padding=(0, 1, 1), output_padding=(1, 0, 0), transposed=True),
    ),
    "transposed, two groups": ((2, 6, 4, 3), 10, (3, 3), dict(stride=(2, 2), padding=(1, 1), groups=2, transposed=True)),
    "transposed, depthwise": ((2, 5, 5, 4), 5, (3, 3), dict(stride=(2, 1), padding=(1, 0), groups=5, transposed=True)),
    "transposed, mostly padding": ((1, 2, 1, 2), 3, (5, 6), dict(padding=(2, 3), stride=(1, 2), transposed=True)),
    "transposed, pointwise": ((1, 67, 3, 3), 8, (1, 1), dict(stride=(2, 1), transposed=True)),
    "transposed, many rows": ((3, 2, 7, 7), 65, (3, 3), dict(transposed=True)),
}
GROUPED = ((1, 2 * 29, 4, 4), 6, (3, 3), dict(padding=(1, 1), groups=2))
TRANSPOSED = ((1, 2 * 29, 4, 4), 6, (3, 3), dict(padding=(1, 1), groups=2, transposed=True))


@pytest.fixture(scope="module")
def kernels():
    kernels = Kernels("convolution")
    yield kernels
    kernels.close()


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


class Convolution:
    """What the kernel and torch.convolution are told of one: ``weight`` its shape, ``result`` the sizes of its axes."""

    def __init__(self, x: Tensor, out: int, kernel, options) -> None:
        n, usual = len(kernel), dict(stride=1, padding=0, dilation=1, output_padding=0)
        stride, padding, dilation, more = (list(options.get(name, (value,) * n)) for name, value in usual.items())
        groups, transposed = options.get("groups", 1), options.get("transposed", False)
        channels = x.shape[1]
        self.weight = (channels, out // groups, *kernel) if transposed else (out, channels // groups, *kernel)
        self.numel = torch.Size(self.weight).numel()
        self.terms = channels // groups * torch.Size(kernel).numel()
        self.rest = (stride, padding, dilation, transposed, more, groups)
        meta = x.to("meta"), torch.empty(self.weight, dtype=x.dtype, device="meta")
        self.result = tuple(torch.convolution(*meta, None, *self.rest).shape[2:])
        lists = ((x.shape[2:], 1), (kernel, 1), (self.result, 1), (stride, 1), (padding, 0), (dilation, 1))
        self.sizes = torch.tensor([[missing] * (3 - n) + [*values] for values, missing in lists])
        self.numbers = (x.shape[0], groups, channels // groups, out // groups, transposed)

    def all(self, x: Tensor, weights: Tensor) -> Tensor:
        return torch.stack([torch.convolution(x, w.view(self.weight), None, *self.rest) for w in weights])


def sampled(
    kernels, name, shape, distribution, *, k=2, first=0, offset=2**33 + 5, add=False, split=0, skew=False, seed=0
) -> Tensor:
    """Runs the kernel, compares its result and returns it."""
    dtype, (x_shape, out, kernel, options) = DTYPES[name], SHAPES[shape] if isinstance(shape, str) else shape
    x = randn(*x_shape, dtype=dtype, seed=1)
    how = Convolution(x, out, kernel, options)
    before = randn(k, x.shape[0], out, *how.result, dtype=dtype, seed=2)
    (dy,) = kernels.run(
        f"sampled_convolution_{name}",
        Skewed(x) if skew else x,
        STATE,
        how.sizes,
        InOut(before) if add else Out(before.shape, dtype, dtype.itemsize if skew else 0),
        *(*how.numbers, k, first, DISTRIBUTIONS.index(distribution), offset, add, split),
        seed=seed,
    )
    v = ops.sample_tangents(STATE, k, how.numel, offset=offset, first=first, distribution=distribution, dtype=torch.float64)
    exact, own = how.all(x.double(), v), how.all(x, v.to(dtype))
    if add:
        exact, own = exact + before.double(), own + before
    if dtype == torch.float64:
        assert_close64(dy, exact)
    elif dtype == torch.float32:
        # as in test_cuda_linear.py: a sum that cancels is held to what sums of so many terms are like
        assert_close32(dy, exact, FLOAT32_BOUND * max(1.0, how.terms**0.5 / exact.abs().max().item()))
    else:
        assert_as_good_as_torch(dy, own, exact)
    return dy


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(kernels, shape, name, distribution):
    sampled(kernels, name, shape, distribution, seed=len(shape))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_tangents_have_the_bits_of_the_cpu(kernels, transposed, groups, name, distribution):
    """Each image has one element, so that each result is one element of a tangent."""
    dtype, kernel, offset = DTYPES[name], (3, 2), 2**40 + 1021
    x = torch.eye(4, dtype=dtype).view(4, 4, 1, 1) if transposed else torch.eye(24, dtype=dtype).view(24, 4, *kernel)
    how = Convolution(x, 70, kernel, dict(groups=groups, transposed=transposed))
    target = Out((2, x.shape[0], 70, *how.result), dtype)
    numbers = (*how.numbers, 2, 0, DISTRIBUTIONS.index(distribution), offset, False, 0)
    (dy,) = kernels.run(f"sampled_convolution_{name}", x, STATE, how.sizes, target, *numbers)
    v = ops.sample_tangents(STATE, 2, how.numel, offset=offset, distribution=distribution).to(dtype)
    assert torch.equal(dy.double(), how.all(x.double(), v.double()))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", ["2d", "two groups", "transposed, two groups"])
def test_added_to_what_is_there(kernels, shape, name, distribution):
    sampled(kernels, name, shape, distribution, add=True)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", DTYPES)
def test_wherever_memory_starts(kernels, name, distribution):
    for shape in ("2d", "depthwise", "transposed 2d"):
        sampled(kernels, name, shape, distribution, skew=True)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("offset", [0, 4, 1021, 2**40 + 64 * 3, 2**62 + 63])
def test_offsets(kernels, distribution, offset):
    for name in ("float32", "bfloat16"):
        sampled(kernels, name, ((2, 16, 3, 3), 34, (2, 2), {}), distribution, offset=offset, k=1)  # 64 columns
        sampled(kernels, name, "2d", distribution, offset=offset, k=1)
        sampled(kernels, name, ((1, 32, 3, 3), 34, (2, 2), dict(groups=2)), distribution, offset=offset, k=1)
        sampled(kernels, name, ((1, 8, 3, 3), 34, (2, 2), dict(groups=2, transposed=True)), distribution, offset=offset, k=1)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("add", [False, True])
def test_columns_divided_among_blocks(kernels, name, distribution, add):
    for split in (64, 128, 4096):
        sampled(kernels, name, ((1, 29, 4, 4), 9, (3, 3), dict(padding=(1, 1))), distribution, split=split, add=add)
    sampled(kernels, name, GROUPED, distribution, split=128, add=add)
    sampled(kernels, name, TRANSPOSED, distribution, split=128, add=add)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_columns_divided_as_on_a_gpu(kernels, distribution):
    """In groups and transposed: more columns than a block has at least."""
    for groups in (1, 2):
        for transposed in (False, True):
            options = dict(groups=groups, transposed=transposed)
            sampled(kernels, "bfloat16", ((1, 300 * groups, 2, 3), 2 * groups, (2, 2), options), distribution, k=1)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_long_rows(kernels, distribution):
    """More columns than signs are drawn at a time."""
    for name in ("float32", "bfloat16"):
        sampled(kernels, name, ((1, 260, 3, 2), 3, (3, 2), dict(padding=(1, 0))), distribution, k=1, split=8192)
        large = dict(padding=(11, 11), transposed=True)
        sampled(kernels, name, ((1, 2, 2, 2), 3, (24, 23), large), distribution, k=1, split=8192)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("shape", ["2d", "two groups", "transposed, two groups"])
def test_a_chunk_of_tangents_is_part_of_the_whole(kernels, shape, distribution):
    whole = sampled(kernels, "float32", shape, distribution, k=9, first=2**32 - 9)
    part = sampled(kernels, "float32", shape, distribution, k=3, first=2**32 - 5)
    assert torch.equal(part, whole[4:7])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("shape", ["many rows", "groups of more than a tile", "transposed, many rows"])
def test_same_bits_whatever_the_order_of_threads(kernels, shape, distribution):
    found = [sampled(kernels, "bfloat16", shape, distribution, seed=seed, k=1) for seed in (0, 1, 2)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("by", [1, 2, 3, 5, 7, 64, 641, 46341, 2**30 - 1, 2**30, 2**30 + 1, 2**31 - 1])
def test_quotients(kernels, by):
    last = 2**31 - 1
    near = [multiple + more for multiple in (0, by, last // 2 // by * by, last // by * by) for more in (-1, 0, 1)]
    random = torch.randint(0, last, (1000,), generator=torch.Generator().manual_seed(by)).tolist()
    numbers = torch.tensor([n for n in [*near, last, *random] if 0 <= n <= last])
    (found,) = kernels.run("quotients", numbers, Out(numbers.shape, torch.int64), len(numbers), by)
    assert torch.equal(found, numbers // by)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("transposed", [False, True])
def test_infinite_inputs_reach_the_patches_that_hold_them(kernels, transposed, distribution):
    x = torch.zeros(1, 2, 5, 5)
    x[0, 1, 0, 0] = float("inf")
    how = Convolution(x, 4, (3, 3), dict(groups=2, transposed=transposed))
    numbers = (*how.numbers, 1, 0, DISTRIBUTIONS.index(distribution), 0, False, 0)
    (dy,) = kernels.run("sampled_convolution_float32", x, STATE, how.sizes, Out((1, 1, 4, *how.result)), *numbers)
    hit = torch.zeros(dy.shape, dtype=torch.bool)
    side = 3 if transposed else 1
    hit[:, :, 2:, :side, :side] = True
    assert not dy[hit].isfinite().any()  # NaN where a part of the element that infinity is multiplied with is 0
    assert not dy[~hit].any()


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", DTYPES)
def test_standard_basis(kernels, name, transposed, groups, add):
    dtype = DTYPES[name]
    x, out = randn(2, 4, 7, 5, dtype=dtype), 8
    how = Convolution(x, out, (3, 2), dict(padding=(1, 0), stride=(2, 1), groups=groups, transposed=transposed))
    offset, hits = 11, [*range(0, how.numel, 5), how.numel - 1, -1, how.numel]
    state, k = torch.tensor([0, *(offset + at for at in hits)]), len(hits)
    before = randn(k, 2, out, *how.result, dtype=dtype, seed=2)
    target = InOut(before) if add else Out(before.shape, dtype)
    numbers = (*how.numbers, k, 1, 2, offset, add, 0)
    (dy,) = kernels.run(f"sampled_convolution_{name}", x, state, how.sizes, target, *numbers)
    v = ops.sample_tangents(state, k, how.numel, offset=offset, first=1, distribution="standard_basis", dtype=torch.float64)
    exact = how.all(x.double(), v)
    assert torch.equal(dy.double(), ((exact + before.double()) if add else exact).to(dtype).double())


def test_what_a_kernel_cannot_refuse_is_nan(kernels):
    x = torch.ones(1, 2, 4, 4)
    for transposed in (False, True):
        how = Convolution(x, 4, (3, 3), dict(groups=2, transposed=transposed))
        for code, state in ((0, [1, 2**32]), (1, [1, -1]), (2, [-4, -5])):
            target, numbers = Out((2, 1, 4, *how.result)), (*how.numbers, 2, 0, code, 0, False, 0)
            (dy,) = kernels.run("sampled_convolution_float32", x, torch.tensor(state), how.sizes, target, *numbers)
            assert dy.isnan().all()
