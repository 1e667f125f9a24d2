"""The operator low_rank_combine (csrc/cpu/low_rank.cpp): every matrix against float64, and what it refuses."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import assert_as_good_as_torch, assert_close32, assert_close64

import frog_cuda
from frog_cuda import ops, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
#: heights and widths: no matrix, empty ones, odd sizes, one of several panels of columns
MATRICES = {
    "none": ([], []),
    "empty": ([0, 7, 0], [7, 0, 0]),
    "one": ([33], [7]),
    "several": ([7, 1, 1025, 33], [1025, 1, 7, 33]),
    "wide": ([5], [70_000]),
}


def operands(k, r, matrices, dtype, contiguous=True):
    heights, widths = MATRICES[matrices]
    n = k * r * (sum(heights) + sum(widths))
    generator = torch.Generator().manual_seed(n)
    factors = torch.randn(n if contiguous else 2 * n, generator=generator).to(dtype)[:: 1 if contiguous else 2]
    return factors, k, r, heights, widths, torch.randn(k, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k, r", [(1, 1), (1, 3), (7, 1), (5, 2), (33, 1), (43, 3)])  # the last: more rows than the tile takes
@pytest.mark.parametrize("matrices", MATRICES)
def test_against_the_reference(matrices, k, r, dtype):
    for contiguous in (True, False):
        arguments = operands(k, r, matrices, dtype, contiguous)
        _, _, _, heights, widths, c = arguments
        found, exact = ops.low_rank_combine(*arguments), reference.low_rank_combine(*arguments)
        assert [tuple(m.shape) for m in found] == list(zip(heights, widths, strict=True))
        sides = arguments[0].split([k * r * n for n in [*heights, *widths]])
        for m, e, left, right in zip(found, exact, sides[: len(found)], sides[len(found) :], strict=True):
            assert m.dtype == dtype
            if dtype == torch.float64:
                assert_close64(m, e)
            elif dtype == torch.float32:
                assert_close32(m, e)
            elif m.numel():
                weighted = left.view(k, -1) * c.to(dtype).unsqueeze(1)
                assert_as_good_as_torch(m, weighted.view(k * r, -1).T @ right.view(k * r, -1), e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_matrix_is_the_same_whatever_stands_beside_it(dtype):
    factors, k, r, heights, widths, c = operands(5, 2, "several", dtype)
    sides = factors.split([k * r * n for n in [*heights, *widths]])
    whole = ops.low_rank_combine(factors, k, r, heights, widths, c)
    for i, m in enumerate(whole):
        alone = torch.cat([sides[i], sides[len(heights) + i]])
        assert torch.equal(m, ops.low_rank_combine(alone, k, r, heights[i : i + 1], widths[i : i + 1], c)[0])


def test_the_fake_refuses_lengths_that_differ():
    with pytest.raises(RuntimeError, match="low_rank_combine: widths has 2 elements, expected 1, one for each of heights"):
        meta = torch.zeros(15, device="meta")
        ops.low_rank_combine(meta, 1, 1, [4], [5, 6], torch.ones(1, device="meta"))


def test_results_are_tensors_of_their_own():
    a, b = ops.low_rank_combine(torch.randn(2 * 800), 2, 1, [200, 200], [200, 200], torch.randn(2))
    before = b.clone()
    a.zero_()
    assert torch.equal(b, before) and a.untyped_storage().nbytes() == b.untyped_storage().nbytes() == 160_000


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(k=0), "k is 0"),
        (dict(r=0), "r is 0; expected at least 1"),
        (dict(r=2**62), r"r is 4611686018427387904; .* k r below 2\^63"),
        (dict(coefficients=torch.ones(2)), "coefficients has 2 elements, expected 3"),
        (dict(coefficients=torch.ones(3, 1)), r"coefficients has shape \(3, 1\)"),
        (dict(coefficients=torch.ones(3, dtype=torch.int64)), "coefficients has dtype Long"),
        (dict(heights=[4]), "widths has 2 elements, expected 1, one for each of heights"),
        (dict(heights=[4, -1]), r"heights\[1\] is -1; it must not be negative"),
        (dict(widths=[5, 2**62]), r"heights and then widths\[3\] is 4611686018427387904; .* below 2\^63 elements in all"),
        (dict(widths=[5, 7]), r"factors has shape \(108,\), expected \(114,\)"),
        (dict(factors=torch.zeros(6, 18)), r"factors has shape \(6, 18\), expected \(108,\)"),
        (dict(factors=torch.zeros(108, dtype=torch.int32)), "factors has dtype Int"),
        (dict(factors=torch.zeros(108, device="meta")), "arguments are on cpu and meta"),
    ],
)
def test_bad_input(change, match):
    arguments = dict(factors=torch.zeros(108), k=3, r=2, heights=[4, 3], widths=[5, 6], coefficients=torch.ones(3))
    with pytest.raises(RuntimeError, match="low_rank_combine: .*" + match):
        ops.low_rank_combine(**arguments | change)


@pytest.mark.skipif(frog_cuda.build_info()["simd"] == "baseline", reason="the library's products")
def test_threads_change_no_bit():
    found = []
    threads = torch.get_num_threads()
    try:
        for count, (name, k) in itertools.product((1, 3), (("several", 5), ("wide", 5), ("wide", 60))):
            torch.set_num_threads(count)
            found.append(ops.low_rank_combine(*operands(k, 2, name, torch.float32)))
    finally:
        torch.set_num_threads(threads)
    for alone, together in zip(found[:3], found[3:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
