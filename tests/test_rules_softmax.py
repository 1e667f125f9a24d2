from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from against_func import check, draw, dual
from torch import nn

FUNCTIONS = {
    "F.softmax": lambda x, d: F.softmax(x, d),
    "torch.softmax": lambda x, d: torch.softmax(x, d),
    "Tensor.softmax": lambda x, d: x.softmax(d),
    "F.log_softmax": lambda x, d: F.log_softmax(x, dim=d),
    "Tensor.log_softmax": lambda x, d: x.log_softmax(d),
    "nn.Softmax": lambda x, d: nn.Softmax(d)(x),
    "F.softmin": lambda x, d: F.softmin(x, d),
    "dtype": lambda x, d: F.softmax(x.float(), d, dtype=torch.float64) + x.log_softmax(d, dtype=torch.float64),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dim", [0, 1, -1, -2])
def test_softmax(name, dim):
    fn = FUNCTIONS[name]
    check(lambda x: fn(x, dim), draw(7, 33))
    check(lambda x: fn(x, dim), draw(33, 7).t(), k=1)
    check(lambda x: fn(x, dim), draw(0, 5))
    check(lambda x: fn(x, dim), draw(1, 1))


def test_masked_rows():
    def fn(x):
        return x.masked_fill(x > 0.5, -torch.inf).softmax(1)

    check(fn, draw(7, 33))


def test_scalars_and_errors():
    check(lambda x: x.softmax(0), draw())
    with pytest.raises(IndexError):
        dual(draw(3)).softmax(2)


def test_implicit_dim_is_pytorchs():
    with pytest.warns(UserWarning, match="Implicit dimension"):
        check(lambda x: F.softmax(x), draw(7, 5))
