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

#: x (B, C, *s), outputs, kernel, and stride, padding and dilation where they are not 1, 0 and 1
SHAPES = {
    "1d": ((2, 3, 19), 5, (4,), dict(stride=(2,), padding=(3,))),
    "2d": ((2, 3, 7, 5), 9, (3, 3), dict(padding=(1, 1))),
    "2d, one place": ((3, 5, 3, 3), 33, (3, 3), {}),
    "2d, strided and dilated": ((1, 4, 13, 11), 7, (3, 2), dict(stride=(2, 3), padding=(2, 0), dilation=(2, 1))),
    "2d, mostly padding": ((2, 2, 1, 2), 3, (5, 5), dict(padding=(4, 4))),
    "pointwise": ((1, 67, 3, 3), 8, (1, 1), {}),
    "3d": ((1, 2, 4, 5, 3), 4, (2, 3, 2), dict(stride=(1, 2, 1), padding=(1, 0, 1))),
    "many rows": ((3, 2, 9, 9), 65, (3, 3), dict(padding=(1, 1))),
}


@pytest.fixture(scope="module")
def kernels():
    kernels = Kernels("convolution")
    yield kernels
    kernels.close()


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def sizes_of(x: Tensor, kernel, options) -> tuple[Tensor, list[list[int]], tuple[int, ...]]:
    """The kernel's sizes, three of each; stride, padding and dilation; spatial shape of the result."""
    n = len(kernel)
    stride, padding, dilation = (
        list(options.get(name, (usual,) * n)) for name, usual in (("stride", 1), ("padding", 0), ("dilation", 1))
    )
    result = tuple(
        (s + 2 * p - d * (m - 1) - 1) // t + 1
        for s, m, t, p, d in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    )
    lists = ((x.shape[2:], 1), (kernel, 1), (result, 1), (stride, 1), (padding, 0), (dilation, 1))
    sizes = [[missing] * (3 - n) + [*values] for values, missing in lists]
    return torch.tensor(sizes), [stride, padding, dilation], result


def sampled(
    kernels, name, shape, distribution, *, k=2, first=0, offset=2**33 + 5, add=False, split=0, skew=False, seed=0, x=None
) -> Tensor:
    """Runs the kernel, compares its result and returns it."""
    dtype, (x_shape, out, kernel, options) = DTYPES[name], SHAPES[shape] if isinstance(shape, str) else shape
    x = randn(*x_shape, dtype=dtype, seed=1) if x is None else x
    sizes, places, result = sizes_of(x, kernel, options)
    before = randn(k, x.shape[0], out, *result, dtype=dtype, seed=2)
    (dy,) = kernels.run(
        f"sampled_convolution_{name}",
        Skewed(x) if skew else x,
        STATE,
        sizes,
        InOut(before) if add else Out(before.shape, dtype, dtype.itemsize if skew else 0),
        *(x.shape[0], x.shape[1], out, k, first, DISTRIBUTIONS.index(distribution), offset, add, split),
        seed=seed,
    )
    numel = out * x.shape[1] * torch.Size(kernel).numel()
    how = dict(offset=offset, first=first, distribution=distribution, dtype=torch.float64)
    w = ops.sample_tangents(STATE, k, numel, **how).view(k, out, x.shape[1], *kernel)
    rest = (*places, False, [0] * len(kernel), 1)
    exact = torch.stack([torch.convolution(x.double(), v, None, *rest) for v in w])
    own = torch.stack([torch.convolution(x, v.to(dtype), None, *rest) for v in w])
    if add:
        exact, own = exact + before.double(), own + before
    if dtype == torch.float64:
        assert_close64(dy, exact)
    elif dtype == torch.float32:
        # as in test_cuda_linear.py: a sum that cancels is held to what sums of so many terms are like
        terms = numel // out
        assert_close32(dy, exact, FLOAT32_BOUND * max(1.0, terms**0.5 / exact.abs().max().item()))
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
def test_added_to_what_is_there(kernels, name, distribution):
    sampled(kernels, name, "2d", distribution, add=True)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", DTYPES)
def test_wherever_memory_starts(kernels, name, distribution):
    sampled(kernels, name, "2d", distribution, skew=True)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("offset", [0, 4, 1021, 2**40 + 64 * 3, 2**62 + 63])
def test_offsets(kernels, distribution, offset):
    for name in ("float32", "bfloat16"):
        sampled(kernels, name, ((2, 16, 3, 3), 34, (2, 2), {}), distribution, offset=offset, k=1)  # 64 columns
        sampled(kernels, name, "2d", distribution, offset=offset, k=1)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("add", [False, True])
def test_columns_divided_among_blocks(kernels, name, distribution, add):
    for split in (64, 128, 4096):
        sampled(kernels, name, ((1, 29, 4, 4), 9, (3, 3), dict(padding=(1, 1))), distribution, split=split, add=add)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_long_rows(kernels, distribution):
    """More columns than signs are drawn at a time."""
    for name in ("float32", "bfloat16"):
        sampled(kernels, name, ((1, 260, 3, 2), 3, (3, 2), dict(padding=(1, 0))), distribution, k=1, split=8192)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_chunk_of_tangents_is_part_of_the_whole(kernels, distribution):
    whole = sampled(kernels, "float32", "2d", distribution, k=9, first=2**32 - 9)
    part = sampled(kernels, "float32", "2d", distribution, k=3, first=2**32 - 5)
    assert torch.equal(part, whole[4:7])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_same_bits_whatever_the_order_of_threads(kernels, distribution):
    found = [sampled(kernels, "bfloat16", "many rows", distribution, seed=seed, k=1) for seed in (0, 1, 2)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_infinite_inputs_reach_the_patches_that_hold_them(kernels, distribution):
    x = torch.zeros(1, 1, 5, 5)
    x[0, 0, 0, 0] = float("inf")
    sizes, _, result = sizes_of(x, (3, 3), {})
    numbers = (1, 1, 2, 1, 0, DISTRIBUTIONS.index(distribution), 0, False, 0)
    (dy,) = kernels.run("sampled_convolution_float32", x, STATE, sizes, Out((1, 1, 2, *result)), *numbers)
    assert dy[..., 0, 0].isinf().all()
    assert torch.equal(dy.flatten(3)[..., 1:], torch.zeros(1, 1, 2, 8))


@pytest.mark.parametrize("add", [False, True])
def test_standard_basis(kernels, add):
    x, out, kernel, options = randn(2, 3, 7, 5), 4, (3, 2), dict(padding=(1, 0), stride=(2, 1))
    sizes, places, result = sizes_of(x, kernel, options)
    offset, numel = 11, 4 * 3 * 6
    state = torch.tensor([0, offset, offset + numel - 1, offset - 1, offset + numel, offset + 40])
    before = randn(5, 2, out, *result, seed=2)
    target = InOut(before) if add else Out(before.shape, torch.float64)
    (dy,) = kernels.run("sampled_convolution_float64", x, state, sizes, target, 2, 3, out, 5, 1, 2, offset, add, 0)
    v = ops.sample_tangents(state, 5, numel, offset=offset, first=1, distribution="standard_basis", dtype=torch.float64)
    rest = (*places, False, [0, 0], 1)
    exact = torch.stack([torch.convolution(x, w, None, *rest) for w in v.view(5, out, 3, *kernel)])
    assert_close64(dy, exact + before if add else exact)


def test_what_a_kernel_cannot_refuse_is_nan(kernels):
    x = torch.ones(1, 2, 4, 4)
    sizes, _, result = sizes_of(x, (3, 3), {})
    for code, state in ((0, [1, 2**32]), (1, [1, -1]), (2, [-4, -5])):
        target = Out((2, 1, 3, *result))
        args = (1, 2, 3, 2, 0, code, 0, False, 0)
        (dy,) = kernels.run("sampled_convolution_float32", x, torch.tensor(state), sizes, target, *args)
        assert dy.isnan().all()
