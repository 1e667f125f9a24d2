"""sample_blocks, gram_blocks and combine_blocks: many small pieces of the tangents in one call, each as by its own."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_as_good_as_torch, assert_close32, assert_close64
from test_tangents import DISTRIBUTIONS, DTYPES, state_for, state_of

from frog_cuda import ops, reference

#: lengths and offsets of blocks: none, one, of odd sizes that overlap, longer than a thread's share
BLOCKS = {
    "none": ([], []),
    "empty": ([0, 0], [7, 0]),
    "one": ([33], [1021]),
    "several": ([7, 1025, 0, 1, 33, 7], [5, 1021, 9, 2**40, 0, 5]),
    "long": ([20_000, 3, 8192, 9000], [8191, 70, 8192, 2**32]),
}


def calls(state, k, blocks, dtype, first, distribution):
    numels, offsets = BLOCKS[blocks]
    how = dict(first=first, distribution=distribution, dtype=dtype)
    return [ops.sample_tangents(state, k, n, offset=at, **how) for n, at in zip(numels, offsets, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 5, 33])
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_blocks_are_those_of_single_draws(distribution, blocks, k, dtype):
    state = state_for(distribution, k + 2, 1025, 1021)
    drawn = ops.sample_blocks(state, k, *BLOCKS[blocks], first=2, distribution=distribution, dtype=dtype)
    expected = [v.flatten() for v in calls(state, k, blocks, dtype, 2, distribution)]
    assert drawn.dtype == dtype and torch.equal(drawn, torch.cat([torch.empty(0, dtype=dtype), *expected]))


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_draws_against_the_reference(distribution):
    numels, offsets = BLOCKS["several"]
    how = dict(first=1, distribution=distribution)
    exact = reference.sample_blocks(state_of(-9, 3), 3, numels, offsets, **how)
    assert_close32(ops.sample_blocks(state_of(-9, 3), 3, numels, offsets, **how), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 5, 33])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_grams_are_those_of_single_blocks(blocks, k, dtype):
    numels, _ = BLOCKS[blocks]
    drawn = torch.randn(2 * k * sum(numels), generator=torch.Generator().manual_seed(k)).to(dtype)[::2]  # not contiguous
    grams = ops.gram_blocks(drawn, k, numels)
    assert grams.shape == (len(numels), k, k) and grams.dtype == torch.float64
    for gram, block, n in zip(grams, drawn.split([k * n for n in numels]), numels, strict=True):
        assert torch.equal(gram, ops.gram(block.reshape(k, n)))
    assert_close64(grams, reference.gram_blocks(drawn, k, numels))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 5, 33])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_combinations_against_the_reference(blocks, k, dtype):
    numels, _ = BLOCKS[blocks]
    generator = torch.Generator().manual_seed(k)
    drawn = torch.randn(2 * k * sum(numels), generator=generator).to(dtype)[::2]  # not contiguous
    c = torch.randn(k, generator=generator, dtype=torch.float64)
    found, exact = ops.combine_blocks(drawn, k, numels, c), reference.combine_blocks(drawn, k, numels, c)
    assert [tuple(v.shape) for v in found] == [(n,) for n in numels]
    for v, e, block in zip(found, exact, drawn.split([k * n for n in numels]), strict=True):
        assert v.dtype == dtype and torch.equal(v, ops.combine_blocks(block, k, [len(v)], c)[0])
        if dtype == torch.float64:
            assert_close64(v, e)
        elif dtype == torch.float32:
            assert_close32(v, e)
        elif v.numel():
            assert_as_good_as_torch(v, c.to(dtype) @ block.view(k, -1), e)


def test_threads_change_no_bit():
    draw = lambda: ops.sample_blocks(state_of(3, 1), 5, *BLOCKS["long"])  # noqa: E731
    threads, numels = torch.get_num_threads(), BLOCKS["long"][0]
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            drawn = draw()
            combined = torch.cat(ops.combine_blocks(drawn, 5, numels, torch.arange(5.0)))
            found.append([drawn, combined, ops.gram_blocks(drawn, 5, numels)])
        assert all(torch.equal(alone, together) for alone, together in zip(*found, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(k=0), "k is 0"),
        (dict(numels=[3, -1]), r"numel is -1; it must not be negative"),
        (dict(numels=[3]), "offsets has 2 elements, expected 1"),
        (dict(offsets=[0, -4]), "an offset is -4"),
        (dict(numels=[2**62, 2**62]), r"numels\[0\] is 4611686018427387904; .* below 2\^63 elements in all"),
        (dict(state=torch.tensor([1])), "state has 1 elements"),
        (dict(first=-1), "first is -1"),
        (dict(distribution="cauchy"), "distribution is 'cauchy'"),
        (dict(dtype=torch.int32), "dtype is Int"),
    ],
)
def test_bad_input_of_draws(change, match):
    arguments = dict(state=state_of(1, 2), k=3, numels=[3, 4], offsets=[0, 9])
    with pytest.raises((RuntimeError, ValueError), match="sample_blocks.*" + match if "distribution" not in change else match):
        ops.sample_blocks(**arguments | change)


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(k=0), "k is 0"),
        (dict(numels=[3, -1]), r"numels\[1\] is -1"),
        (dict(numels=[3, 5]), r"blocks has shape \(21,\), expected \(24,\)"),
        (dict(blocks=torch.zeros(3, 7)), r"blocks has shape \(3, 7\), expected \(21,\)"),
        (dict(blocks=torch.zeros(21, dtype=torch.int64)), "blocks has dtype Long"),
    ],
)
def test_bad_input_of_grams(change, match):
    with pytest.raises(RuntimeError, match="gram_blocks: .*" + match):
        ops.gram_blocks(**dict(blocks=torch.zeros(21), k=3, numels=[3, 4]) | change)


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(k=0), "k is 0"),
        (dict(numels=[3, 5]), r"blocks has shape \(21,\), expected \(24,\)"),
        (dict(coefficients=torch.ones(2)), "coefficients has 2 elements, expected 3"),
        (dict(coefficients=torch.ones(3, dtype=torch.int64)), "coefficients has dtype Long"),
        (dict(blocks=torch.zeros(21, dtype=torch.int64)), "blocks has dtype Long"),
    ],
)
def test_bad_input_of_combinations(change, match):
    with pytest.raises(RuntimeError, match="combine_blocks: .*" + match):
        ops.combine_blocks(**dict(blocks=torch.zeros(21), k=3, numels=[3, 4], coefficients=torch.ones(3)) | change)
