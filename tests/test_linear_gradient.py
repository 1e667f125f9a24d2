"""The operator linear_gradient, which csrc/cpu/linear.cpp registers beside linear_jvp."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_as_good_as_torch, assert_close32, assert_close64

from frog_cuda import ops, reference


def inputs(rows, out, features, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    shapes = ((rows, out), (rows, features))
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 33, 5), (1, 1025, 33), (64, 7, 1025), (0, 3, 4), (3, 0, 4)], ids=str)
def test_against_the_reference(shape):
    for dtype, check in ((torch.float64, assert_close64), (torch.float32, assert_close32)):
        arguments = inputs(*shape, dtype)
        actual = ops.linear_gradient(*arguments)
        assert actual.is_contiguous()
        check(actual, reference.linear_gradient(*arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_good_as_pytorchs(dtype):
    g, x = inputs(33, 7, 65, dtype)
    assert_as_good_as_torch(ops.linear_gradient(g, x), g.T @ x, reference.linear_gradient(g, x))


def test_non_contiguous():
    g, x = inputs(33, 7, 65)
    assert_close64(ops.linear_gradient(g.T.contiguous().T, x[:, ::2]), reference.linear_gradient(g, x[:, ::2]))


@pytest.mark.parametrize(
    ("gradient", "x", "match"),
    [
        (torch.zeros(3), torch.zeros(3, 2), r"gradient has shape \(3,\), expected \(rows, features\)"),
        (torch.zeros(3, 2), torch.zeros(4, 2), r"x has shape \(4, 2\), expected .* the same number of rows"),
        (torch.zeros(3, 2), torch.zeros(3, 2).double(), "x has dtype Double, expected Float"),
        (torch.zeros(3, 2).long(), torch.zeros(3, 2).long(), "gradient has dtype Long"),
    ],
    ids=range(4),
)
def test_bad_input(gradient, x, match):
    with pytest.raises(RuntimeError, match=match):
        ops.linear_gradient(gradient, x)
