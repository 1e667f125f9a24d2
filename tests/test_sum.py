"""tangent_sum against its reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import assert_close32, assert_close64

from frog_cuda import ops, reference

K = 3


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


SUFFIXES = [None, (), (7,), (5, 7), (2, 5, 7)]


@pytest.mark.parametrize("first, second", list(itertools.product(SUFFIXES, SUFFIXES)))
@pytest.mark.parametrize("two", [True, False], ids=["a and b", "a alone"])
def test_every_mix(first, second, two):
    a, b = draw(K, 2, 5, 7), draw(K, 2, 5, 7, seed=1) if two else None
    va, vb = (None if s is None else draw(K, *s, seed=2 + i) for i, s in enumerate((first, second)))
    assert_close64(ops.tangent_sum(a, va, b, vb, alpha=-0.7), reference.tangent_sum(a, va, b, vb, alpha=-0.7))


@pytest.mark.parametrize(
    "shape, suffix", [((300, 700), (700,)), ((70000,), (70000,)), ((3, 0), (0,)), ((), ()), ((9, 3001), (3001,))]
)
@pytest.mark.parametrize("threads", [1, 3])
def test_sizes_and_threads(shape, suffix, threads):
    a, b = draw(K, *shape, dtype=torch.float32), draw(K, *shape, seed=1, dtype=torch.float32)
    va = draw(K, *suffix, seed=2, dtype=torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_close32(ops.tangent_sum(a, va, b), reference.tangent_sum(a, va, b))
    finally:
        torch.set_num_threads(before)


def test_operands_are_left_alone_and_may_be_strided():
    a, b = draw(7, 5, K).permute(2, 0, 1), draw(K, 7, 10, seed=1)[..., ::2]
    kept = a.clone(), b.clone()
    assert_close64(ops.tangent_sum(a, draw(5, K, seed=2).t(), b), reference.tangent_sum(a, draw(5, K, seed=2).t(), b))
    assert torch.equal(a, kept[0]) and torch.equal(b, kept[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_wide(dtype):
    a, b, va = (draw(K, 5, 7, seed=i, dtype=dtype) for i in range(3))
    exact = reference.tangent_sum(a, va, b)
    assert torch.equal(ops.tangent_sum(a, va, b), exact.to(torch.float32).to(dtype))


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(a=torch.zeros(())), r"a has shape \(\), expected \(k, \*\)"),
        (dict(a=torch.zeros(0, 5)), "k is 0"),
        (dict(a=torch.zeros(2, 5, dtype=torch.int64)), "a has dtype Long"),
        (dict(b=torch.zeros(2, 4)), r"b has shape \(2, 4\), expected \(2, 5\)"),
        (dict(b=torch.zeros(3, 5)), r"b has shape \(3, 5\), expected \(2, 5\)"),
        (dict(va=torch.zeros(2, 4)), r"va has shape \(2, 4\), expected \(k, \*s\) with k = 2"),
        (dict(vb=torch.zeros(3, 5)), r"vb has shape \(3, 5\), expected \(k, \*s\) with k = 2"),
    ],
)
def test_bad_input(change, match):
    with pytest.raises(RuntimeError, match="tangent_sum: " + match):
        ops.tangent_sum(**dict(a=torch.zeros(2, 5)) | change)
