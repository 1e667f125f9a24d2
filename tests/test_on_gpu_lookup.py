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
