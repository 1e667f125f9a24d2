"""The matrix products of csrc/cpu/product.h where they are cut into blocks: of rows, of the inner dimension, of columns."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_as_good_as_torch, assert_close32, assert_close64
from torch import Tensor

from frog_cuda import ops, reference


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def stacked(rows: int, k: int, features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and dx as a layer before would return them: neighbours in memory, without being views of one tensor."""
    both = randn(1 + k, rows, features, seed=1, dtype=dtype)
    eye = torch.eye(features, dtype=dtype)
    x, dx, _ = ops.linear_jvp(both[0].contiguous(), both[1:].contiguous(), eye, k=k)
    assert dx.data_ptr() == x.data_ptr() + x.numel() * x.element_size()
    return x, dx


# rows of a task: 192; a packed panel is 1024 deep and 16 to 64 wide
@pytest.mark.parametrize(
    ("rows", "k", "features", "out"),
    [
        (15, 1, 3, 5),
        (16, 1, 1, 1),
        (67, 2, 33, 130),
        (193, 1, 20, 64),
        (5, 7, 1025, 70),
        (40, 4, 2100, 10),
        (200, 2, 1024, 17),
        (800, 3, 70, 130),
        (500, 6, 1030, 21),
    ],
)
@pytest.mark.parametrize("apart", [False, True], ids=["neighbours", "apart"])
def test_rows_depth_and_columns_in_blocks(rows, k, features, out, apart):
    for dtype, check in ((torch.float64, assert_close64), (torch.float32, assert_close32)):
        x, dx = stacked(rows, k, features, dtype)
        if apart:
            dx = dx.clone()
        w, b, v = randn(out, features, seed=2, dtype=dtype), randn(out, seed=3, dtype=dtype), randn(k, out, seed=4, dtype=dtype)
        given = dict(x=x, dx=dx, weight=w, bias=b, activity=v, dbias=randn(k, out, seed=5, dtype=dtype), k=k)
        y, dy, _ = ops.linear_jvp(**given)
        exact_y, exact_dy, _ = reference.linear_jvp(**given)
        check(y, exact_y)
        check(dy, exact_dy)


@pytest.mark.parametrize("perturbed", [False, True], ids=["products", "and added tangents"])
def test_bfloat16_tangents_in_stretches(perturbed):
    """More rows than are widened at a time; held to PyTorch's own product and sum."""
    rows, k, features, out = 700, 3, 600, 500
    x, w = randn(rows, features, seed=1, dtype=torch.float32), randn(out, features, seed=2, dtype=torch.float32) / 24
    dx = randn(k, rows, features, seed=3, dtype=torch.bfloat16)
    more = dict(dbias=randn(k, out, seed=4, dtype=torch.float32), activity=randn(k, rows, out, seed=5, dtype=torch.bfloat16))
    given = dict(x=x, dx=dx, weight=w, k=k, **(more if perturbed else {}))
    y, dy, _ = ops.linear_jvp(**given)
    exact_y, exact_dy, _ = reference.linear_jvp(**given)
    assert dy.dtype == torch.bfloat16
    assert_close32(y, exact_y)
    torchs = dx @ w.T.bfloat16()
    if perturbed:
        torchs = torchs + more["dbias"][:, None].bfloat16() + more["activity"]
    assert_as_good_as_torch(dy, torchs, exact_dy)


@pytest.mark.parametrize(("rows", "out", "features"), [(1, 100, 70000), (128, 13, 1100), (129, 13, 1100), (16, 1030, 65)])
def test_gradients_in_blocks_of_columns(rows, out, features):
    for dtype, check in ((torch.float64, assert_close64), (torch.float32, assert_close32)):
        g, x = randn(rows, out, seed=6, dtype=dtype), randn(rows, features, seed=7, dtype=dtype)
        check(ops.linear_gradient(g, x), reference.linear_gradient(g, x))


def test_the_number_of_threads_changes_no_bit():
    x, dx = stacked(70, 6, 300, torch.float32)
    many = stacked(600, 5, 40, torch.float32)
    w, g = randn(200, 300, seed=8, dtype=torch.float32), randn(16, 900, seed=9, dtype=torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append((*ops.linear_jvp(x, dx, w, k=6)[:2], ops.linear_gradient(g, g)))
            found[-1] += ops.linear_jvp(*many, w[:, :40], k=5)[:2]
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)
