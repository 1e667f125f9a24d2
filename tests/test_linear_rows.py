"""The operator linear_rows, which csrc/cpu/linear.cpp registers beside linear_jvp."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_as_good_as_torch, assert_close32, assert_close64

from frog_cuda import build_info, ops, reference


def inputs(shape, out, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in (shape, (out, shape[-1]))]


@pytest.mark.parametrize(
    ("shape", "out"),
    [((1,), 1), ((5, 7), 33), ((3, 2, 1025), 70), ((33, 7), 1025), ((0, 3), 4), ((3, 0), 4), ((200, 40), 130), ((4, 3), 0)],
    ids=str,
)
def test_against_the_reference(shape, out):
    for dtype, check in ((torch.float64, assert_close64), (torch.float32, assert_close32)):
        x, weight = inputs(shape, out, dtype)
        actual = ops.linear_rows(x, weight)
        assert actual.is_contiguous() and actual.shape == (*shape[:-1], out)
        check(actual, reference.linear_rows(x, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_good_as_pytorchs(dtype):
    x, weight = inputs((33, 7), 65, dtype)
    assert_as_good_as_torch(ops.linear_rows(x, weight), x @ weight.T, reference.linear_rows(x, weight))


def test_non_contiguous():
    x, weight = inputs((33, 14), 9)
    x, weight = x.T.contiguous().T[:, ::2], weight[:, 1::2]
    assert_close64(ops.linear_rows(x, weight), reference.linear_rows(x, weight))


@pytest.mark.skipif(build_info()["simd"] == "baseline", reason="without vector kernels this is the library's product")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_row_has_the_bits_it_has_alone(dtype):
    for features, out in ((64, 256), (300, 7), (1500, 100)):
        x, weight = inputs((700, features), out, dtype)
        whole = ops.linear_rows(x, weight)
        for rows in (1, 2, 3, 4, 5, 6, 7, 8, 15, 16, 100, 513):
            assert torch.equal(ops.linear_rows(x[:rows], weight), whole[:rows]), (features, out, rows)
            assert torch.equal(ops.linear_rows(x[3 : 3 + rows], weight), whole[3 : 3 + rows]), (features, out, rows)


@pytest.mark.parametrize(
    ("x", "weight", "match"),
    [
        (torch.zeros(3, 4), torch.zeros(4), r"weight has shape \(4,\), expected \(out, in\)"),
        (torch.zeros(3, 4), torch.zeros(2, 5), r"x has shape \(3, 4\), expected \(\*, 5\)"),
        (torch.tensor(1.0), torch.zeros(2, 1), r"x has shape \(\), expected \(\*, 1\)"),
        (torch.zeros(3, 4), torch.zeros(2, 4).double(), "weight has dtype Double, expected Float"),
        (torch.zeros(3, 4).long(), torch.zeros(2, 4).long(), "x has dtype Long"),
    ],
    ids=range(5),
)
def test_bad_input(x, weight, match):
    with pytest.raises(RuntimeError, match=match):
        ops.linear_rows(x, weight)
