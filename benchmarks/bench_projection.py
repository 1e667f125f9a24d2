"""Coefficients of the orthogonal projection from the Gram matrix, beside torch.linalg."""

from __future__ import annotations

import pytest
import torch
from conftest import Compare
from torch import Tensor

import frog_cuda as frog


@pytest.mark.parametrize("k", [1, 4, 16, 64])
@pytest.mark.parametrize("r", [1, 64])
def test_project(k: int, r: int, compare: Compare) -> None:
    generator = torch.Generator().manual_seed(k)
    v = torch.randn(k, 4 * k + 8, generator=generator, dtype=torch.float64)
    gram, d = v @ v.T, torch.randn(k, r, generator=generator, dtype=torch.float64)

    def against() -> Tensor:
        return torch.cholesky_solve(d, torch.linalg.cholesky(gram))

    compare(
        lambda: frog.ops.cholesky_project(gram, d),
        against,
        table="op",
        op="project",
        against_name="torch.linalg.cholesky, no pivots",
        case=f"k = {k}, {r} right-hand sides",
    )
    c, rank = frog.ops.cholesky_project(gram, d)
    assert rank.item() == k
    torch.testing.assert_close(c, torch.linalg.solve(gram, d), rtol=1e-8, atol=1e-10)
