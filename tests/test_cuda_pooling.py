"""The CUDA kernel of max_pool_jvp, run on the host, against the float64 reference."""

from __future__ import annotations

import math

import pytest
import torch
from cuda_on_cpu.client import Kernels, Out
from cuda_on_cpu.pairs import NAMES, given, randn, result
from test_pooling import CASES, INF, NAN, same

from frog_cuda import reference

F32 = torch.float32
PAIRS = [
    (torch.float64, torch.float64),
    (torch.float64, F32),
    (F32, torch.float64),
    (F32, F32),
    (F32, torch.bfloat16),
    (torch.bfloat16, F32),
    (torch.bfloat16, torch.float16),
    (torch.float16, torch.float16),
]


@pytest.fixture(scope="module")
def kernels():
    kernels = Kernels("pooling")
    yield kernels
    kernels.close()


def run(kernels, x, dx, o, want_indices=True, skew=False, seed=0):
    axes = len(o["kernel"])
    shape = reference.max_pool_jvp(x, dx[:1], **o)[0].shape  # what the host computes before the launch
    geometry = [[1, 1, 1, 0, 1, 1] for _ in range(3 - axes)]
    for j in range(axes):
        entries = (o[name][j] for name in ("kernel", "stride", "padding", "dilation"))
        geometry.append([x.shape[x.dim() - axes + j], *entries, shape[len(shape) - axes + j]])
    outs = [result(shape, x.dtype, skew), result((len(dx), *shape), dx.dtype, skew)]
    indices = Out(tuple(shape), torch.int64) if want_indices else None
    name = f"max_pool_{NAMES[x.dtype]}_{dx.dtype.itemsize}"
    planes = math.prod(x.shape[: x.dim() - axes])
    return kernels.run(name, *given((x, dx), skew), *outs, indices, torch.tensor(geometry), planes, len(dx), seed=seed)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("k", [1, 3, 9])
def test_every_case(kernels, name, k):
    shape, o = CASES[name]
    x, dx = randn(*shape, dtype=F32, seed=1), randn(k, *shape, dtype=F32, seed=2)
    same(run(kernels, x, dx, o), reference.max_pool_jvp(x, dx, **o, want_indices=True))
    same(run(kernels, x, dx, o, want_indices=False), reference.max_pool_jvp(x, dx, **o)[:2])


@pytest.mark.parametrize("dtype, tangent_dtype", PAIRS, ids=str)
@pytest.mark.parametrize("skew", [False, True], ids=["aligned", "skewed"])
def test_types(kernels, dtype, tangent_dtype, skew):
    shape, o = CASES["3x3 stride 2, padded"]
    x, dx = randn(*shape, dtype=dtype, seed=1), randn(5, *shape, dtype=tangent_dtype, seed=2)
    same(run(kernels, x, dx, o, skew=skew), reference.max_pool_jvp(x, dx, **o, want_indices=True))


@pytest.mark.parametrize("dtype", [torch.float64, F32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["2", "3x3 stride 2, padded", "3-D"])
def test_ties_infinity_and_nan(kernels, name, dtype):
    shape, o = CASES[name]
    values = torch.tensor([0.0, -0.0, 1.0, NAN, -INF, INF, -1.0, NAN, 1.0, -INF])
    x = values[torch.randint(10, shape, generator=torch.Generator().manual_seed(2))].to(dtype)
    dx = randn(2, *shape, dtype=F32 if dtype in (F32, torch.bfloat16, torch.float64) else dtype, seed=2)
    same(run(kernels, x, dx, o), reference.max_pool_jvp(x, dx, **o, want_indices=True))
    only = torch.full(shape, -INF, dtype=dtype)
    same(run(kernels, only, dx, o), reference.max_pool_jvp(only, dx, **o, want_indices=True))


def test_the_same_bits_in_any_order_of_threads(kernels):
    shape, o = CASES["mixed"]
    x, dx = randn(*shape, dtype=F32, seed=1), randn(3, *shape, dtype=F32, seed=2)
    first, *others = [run(kernels, x, dx, o, seed=seed) for seed in (0, 1, 2)]
    for other in others:
        same(other, first)
