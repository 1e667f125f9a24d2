"""sampled_convolution_ against its reference; rules built on it are in test_rules_convolution.py."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers import assert_close32, assert_close64

from frog_cuda import ops, reference

K = 3


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


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
    # images in stretches, the second of three; places in stretches
    "large": ((67, 4, 65, 63), (67, 3, 65, 63), dict(kernel=[3, 3], stride=[1, 1], padding=[1, 1], dilation=[1, 1])),
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
@pytest.mark.parametrize("name", ["2d", "strided", "many channels", "large"])
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
    ],
)
def test_bad_input_of_sampled_leaves_all_as_it_was(change, message):
    shape, x_shape, options = SAMPLED["2d"]
    target = torch.ones(K, *shape)
    with pytest.raises(RuntimeError, match=message):
        ops.sampled_convolution_(**(dict(self=target, x=torch.ones(x_shape), state=STATE, **options) | change))
    assert torch.equal(target, torch.ones(K, *shape))
