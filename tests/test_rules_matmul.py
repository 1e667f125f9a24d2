from __future__ import annotations

import pytest
import torch
from against_func import check, draw


@pytest.mark.parametrize(
    "shapes",
    [((7, 33), (33, 5)), ((33,), (33, 5)), ((7, 33), (33,)), ((33,), (33,)), ((2, 7, 33), (33, 5)), ((7, 33), (2, 33, 5)),
     ((4, 1, 7, 3), (2, 3, 5)), ((3,), (2, 3, 5)), ((2, 7, 3), (3,)), ((0, 3), (3, 5)), ((1, 1), (1, 1))],
    ids=str,
)  # fmt: skip
def test_matmul_of_all_ranks(shapes):
    a, b = draw(*shapes[0], seed=1), draw(*shapes[1], seed=2)
    check(torch.matmul, a, b)
    check(torch.matmul, a, b, k=1)
    check(lambda x: x @ b, a)
    check(lambda x: a @ x, b)


def test_products_with_a_summand():
    a, b, c = draw(7, 33, seed=1), draw(33, 5, seed=2), draw(5, seed=3)
    check(torch.addmm, c, a, b)
    check(lambda *t: torch.addmm(*t, beta=2, alpha=0.5), c, a, b)
    check(lambda x: torch.addmm(c, x, b, alpha=0.5), a)
    check(lambda x: torch.addmm(x, a, b, beta=3), c)
    check(torch.baddbmm, draw(2, 7, 5), draw(2, 7, 3, seed=4), draw(2, 3, 5, seed=5))
    check(torch.addmv, draw(7), draw(7, 3, seed=4), draw(3, seed=5))


def test_other_products():
    a, b = draw(7, 33, seed=1), draw(33, 5, seed=2)
    check(lambda x, y: torch.einsum("ij,jk->ki", x, y), a, b)
    check(lambda x, y: torch.einsum("bij,bkj->bik", x, y), draw(2, 3, 4), draw(2, 5, 4, seed=3))
    check(torch.outer, draw(7), draw(5, seed=3))
    check(torch.bmm, draw(2, 3, 4), draw(2, 4, 5, seed=3))
    check(torch.mv, a, draw(33))
    check(torch.dot, draw(33), draw(33, seed=3))
    check(torch.kron, draw(2, 3), draw(3, 2, seed=3))
    check(lambda x, y: torch.tensordot(x, y, dims=1), draw(2, 3, 4), draw(4, 5, seed=3))
    check(lambda x: torch.linalg.solve(x @ x.t() + torch.eye(4, dtype=x.dtype), x), draw(4, 4))


def test_non_contiguous_factors():
    check(torch.matmul, draw(33, 7).t(), draw(5, 33).t())
