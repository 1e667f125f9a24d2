from __future__ import annotations

import pytest
import torch
from against_func import check, draw

REDUCTIONS = {
    "sum": lambda x: x.sum(),
    "sum over axes": lambda x: x.sum(0) + x.sum((0, -1), keepdim=True).sum(0),
    "sum in another dtype": lambda x: x.float().sum(1, dtype=torch.float64),
    "sum over no axes": lambda x: x.sum(dim=[]),
    "mean": lambda x: x.mean() + x.mean(-1) + x.mean((0, 1), keepdim=True).sum(),
    "amax with ties": lambda x: x.round().mul(x.sign()).add(x * 0).amax(0) + x.relu().amax(0),
    "amin": lambda x: x.amin((0, 1)),
    "max with indices": lambda x: x.max(1),
    "median": lambda x: x.median(),
    "var": lambda x: x.var() + x.var(1) + x.var(0, correction=0).sum() + x.var((0, 1), keepdim=True).sum(),
    "std": lambda x: x.std() + x.std(1, unbiased=False),
    "var_mean": lambda x: torch.var_mean(x, 1),
    "norms": lambda x: x.norm() + x.norm(dim=1) + x.norm(p=1, dim=0).sum() + torch.linalg.vector_norm(x, 3),
    "logsumexp": lambda x: x.logsumexp(1) + x.logsumexp((0, 1)),
    "logsumexp over no axes": lambda x: x.logsumexp((), keepdim=True),
    "cumsum": lambda x: x.cumsum(0) * x.cumsum(-1),
    "prod": lambda x: x.prod() + x.prod(1),
    "cumprod": lambda x: x.cumprod(1),
    "nansum": lambda x: x.nansum(1),
    "sort": lambda x: x.sort(1),
    "topk": lambda x: x.topk(2, 1),
    "trace": lambda x: x[:, :2][:2].trace(),
    "argmax": lambda x: x.argmax(1),
    "any": lambda x: (x > 0).any(1),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(name):
    check(REDUCTIONS[name], draw(7, 33))
    check(REDUCTIONS[name], draw(33, 7).t(), k=1)


@pytest.mark.parametrize("reduce", [torch.sum, torch.mean, torch.Tensor.logsumexp], ids=["sum", "mean", "logsumexp"])
def test_scalars(reduce):
    check(lambda x: reduce(x, 0), draw())
    check(lambda x: reduce(x, -1), draw(1))


def test_empty_batch():
    check(lambda x: x.sum(), draw(0, 5))
    check(lambda x: x.sum(1), draw(0, 5))


def test_logsumexp_of_infinities():
    x = draw(3, 4)
    x[0] = -torch.inf
    check(lambda x: x.logsumexp(1)[1:], x)


def test_std_of_constant_rows_follows_pytorch():
    x = draw(3, 4)
    x[1] = 2.0
    check(lambda x: x.std(1), x)


@pytest.mark.parametrize("shape, dim", [((3, 4), 1), ((3, 4), (0, 1)), ((4,), None), ((3, 0), 1)], ids=str)
def test_the_euclidean_norm_of_zeros_does_not_move(shape, dim):
    x = draw(*shape)
    x[..., : max(1, shape[0] - 2)] = 0
    x[0] = 0
    check(lambda v: torch.linalg.vector_norm(v, 2, dim, keepdim=dim is not None), x)
