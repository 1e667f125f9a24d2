"""On a GPU: operators that pick elements out of a tensor, against the same operator on the CPU."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error
from torch import Tensor

from frog_cuda import ops

pytestmark = pytest.mark.cuda

DEVICE = "cuda"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, dim", [(5, 1), (300, 65), (50257, 256)])
def test_embedding(rows, dim, dtype):
    w, indices = randn(rows, dim, dtype=dtype), torch.randint(rows, (40, 30), generator=torch.Generator().manual_seed(1))
    dw, state = randn(3, rows, dim, dtype=dtype, seed=1), torch.tensor([-11, 4])
    there = [t.to(DEVICE) for t in (indices, w, dw)]
    for actual, expected in zip(ops.embedding_jvp(*there, k=3), ops.embedding_jvp(indices, w, dw, k=3), strict=True):
        assert torch.equal(actual.cpu(), expected)
    for distribution in ("normal", "rademacher"):
        options = dict(k=5, first=1, distribution=distribution, weight_offset=1021)
        _, dy = ops.embedding_jvp(*there[:2], state=state.to(DEVICE), **options)
        _, expected = ops.embedding_jvp(indices, w, state=state, **options)
        # as sample_tangents is held to on two devices: 2 units in the last place of float32, or a rounding of the dtype
        assert relative_error(dy.cpu(), expected) <= max(2**-21, torch.finfo(dtype).eps)


def test_an_index_that_is_no_row_gives_nan():
    indices = torch.tensor([0, -1, 4, 5], device=DEVICE)
    w, dw = randn(5, 3).to(DEVICE), randn(2, 5, 3).to(DEVICE)
    state = torch.tensor([1, 2], device=DEVICE)
    found = [*ops.embedding_jvp(indices, w, dw, k=2), ops.embedding_jvp(indices, w, state=state, k=2, weight_offset=0)[1]]
    for t in found:
        assert t.isnan().all(-1).reshape(-1, 4).tolist() == [[False, True, False, True]] * (t.numel() // 12)


POOLINGS = {
    "3x3": ((2, 5, 31, 32), dict(kernel=[3, 3], stride=[2, 2], padding=[1, 1], dilation=[1, 1])),
    "many planes": ((64, 64, 16, 16), dict(kernel=[2, 2], stride=[2, 2], padding=[0, 0], dilation=[1, 1])),
    "one window": ((1, 1, 7, 7), dict(kernel=[7, 7], stride=[1, 1], padding=[0, 0], dilation=[1, 1])),
    "1-D": ((3, 4, 1000), dict(kernel=[3], stride=[1], padding=[1], dilation=[2], ceil_mode=True)),
    "3-D": ((2, 3, 9, 8, 7), dict(kernel=[3, 2, 2], stride=[2, 2, 1], padding=[1, 0, 1], dilation=[1, 2, 1])),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", POOLINGS)
@pytest.mark.parametrize("k", [1, 7, 64])
def test_max_pool(name, dtype, k):
    shape, options = POOLINGS[name]
    x, dx = randn(*shape, dtype=dtype), randn(k, *shape, seed=1)
    x[x.abs() < 0.01] = float("nan")
    expected = ops.max_pool_jvp(x, dx, **options, want_indices=True)
    for value in (x, x.mT.contiguous().mT):
        actual = ops.max_pool_jvp(value.to(DEVICE), dx.to(DEVICE), **options, want_indices=True)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.cpu(), e, rtol=0, atol=0, equal_nan=True)
