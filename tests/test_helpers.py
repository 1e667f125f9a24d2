"""The comparisons themselves: each accepts what is right and rejects what is wrong."""

import pytest
import torch
from helpers import assert_as_good_as_torch, assert_close32, assert_close64, relative_error

X = torch.linspace(-2, 2, 33, dtype=torch.float64)


def test_relative_error():
    assert relative_error(X, X) == 0
    assert relative_error(X[:0], X[:0]) == 0
    assert relative_error(X + 1e-3, X) == pytest.approx(5e-4)
    assert relative_error(torch.ones(2), torch.zeros(2)) == float("inf")
    nan = torch.tensor([1.0, float("nan")])
    assert relative_error(nan, nan) == 0
    with pytest.raises(AssertionError, match="shape"):
        relative_error(X, X[:, None])


def test_assert_close64():
    assert_close64(X * (1 + 1e-12), X)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close64(X * (1 + 1e-9), X)
    with pytest.raises(AssertionError, match="dtype"):
        assert_close64(X.float(), X)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close64(torch.full_like(X, float("nan")), X)


def test_assert_close32():
    assert_close32(X.float(), X)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close32((X * (1 + 1e-4)).float(), X)
    with pytest.raises(AssertionError, match="dtype"):
        assert_close32(X, X)
    with pytest.raises(AssertionError, match="float64"):
        assert_close32(X.float(), X.float())


def test_assert_as_good_as_torch():
    half = X.bfloat16()
    assert_as_good_as_torch(half, half, X)
    with pytest.raises(AssertionError, match="relative error"):
        assert_as_good_as_torch((X * 1.05).bfloat16(), half, X)
    with pytest.raises(AssertionError, match="dtype"):
        assert_as_good_as_torch(X.half(), half, X)
