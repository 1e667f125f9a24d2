"""tangent_combine_samples: combinations with coefficients of their own for every sample of a batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_good_as_torch, assert_close32, assert_close64
from test_tangents import DISTRIBUTIONS, DTYPES, state_for, state_of

import frog_cuda as frog
from frog_cuda import ops, reference


def coefficients(k: int, batch: int) -> torch.Tensor:
    return torch.randn(k, batch, dtype=torch.float64, generator=torch.Generator().manual_seed(k + batch))


#: samples shorter than a group, of the length from which on they are summed in registers, and longer than a thread's share
SIZES = [(1, 1), (33, 1), (7, 5), (33, 255), (3, 256), (2, 4095), (3, 4096), (2, 20000)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 5, 33])
@pytest.mark.parametrize("batch, numel", SIZES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_against_stored_tangents(distribution, batch, numel, k, dtype):
    offset, c = 1021, coefficients(k, batch)
    state = state_for(distribution, k + 2, batch * numel, offset)
    how = dict(offset=offset, first=2, distribution=distribution)
    v = ops.sample_tangents(state, k, batch * numel, dtype=torch.float64, **how).view(k, batch, numel)
    actual = ops.tangent_combine_samples(state, c, numel, dtype=dtype, **how)
    exact = torch.einsum("kb,kbm->bm", c, v)
    assert actual.shape == (batch, numel)
    if dtype == torch.float64:
        assert_close64(actual, exact)
    elif dtype == torch.float32:
        assert_close32(actual, exact)
    else:
        assert_as_good_as_torch(actual, exact.to(dtype), exact)


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_against_the_reference(distribution):
    c = coefficients(3, 5)
    how = dict(offset=9, first=1, distribution=distribution)
    exact = reference.tangent_combine_samples(state_of(-9, 3), c, 41, **how)
    assert_close32(ops.tangent_combine_samples(state_of(-9, 3), c, 41, **how), exact)
    assert_close32(ops.tangent_combine_samples(state_of(-9, 3), c.T.contiguous().T, 41, **how), exact)


@pytest.mark.parametrize("numel", [100, 5000])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_same_bits_whatever_the_threads(distribution, numel):
    threads, batch, found = torch.get_num_threads(), 50, []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            state = state_for(distribution, 4, batch * numel, 7)
            how = dict(offset=7, distribution=distribution)
            found.append(ops.tangent_combine_samples(state, coefficients(4, batch), numel, **how))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_empty():
    assert ops.tangent_combine_samples(state_of(0), torch.ones(2, 0), 3).shape == (0, 3)
    assert ops.tangent_combine_samples(state_of(0), torch.ones(2, 3), 0).shape == (3, 0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda f: f(state_of(0), torch.ones(3), 5), r"coefficients has shape \(3,\), expected \(k, B\) with k >= 1"),
        (lambda f: f(state_of(0), torch.ones(0, 3), 5), r"coefficients has shape \(0, 3\)"),
        (lambda f: f(state_of(0), torch.ones(2, 3, dtype=torch.int64), 5), "coefficients has dtype Long"),
        (lambda f: f(state_of(0), torch.ones(2, 3), -5), "numel is -5"),
        (lambda f: f(state_of(0), torch.ones(2, 3), 2**62), "numel is 4611686018427387904 in each of 3 samples"),
        (lambda f: f(state_of(0), torch.ones(2, 3), 5, offset=-1), "offset is -1"),
        (lambda f: f(state_of(0, -1), torch.ones(2, 3), 5), "step is -1"),
        (lambda f: f(state_of(0), torch.ones(2, 3), 5, dtype=torch.bool), "dtype is Bool"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(RuntimeError, match=message):
        call(ops.tangent_combine_samples)


def test_unknown_distribution():
    with pytest.raises(ValueError, match="distribution is 'cauchy'"):
        ops.tangent_combine_samples(state_of(0), torch.ones(2, 3), 5, distribution="cauchy")


# ---- in activity perturbation, where tangents are not shared


def estimate(model, **options):
    x = torch.randn(9, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(model[0].weight.dtype)
    options = dict(k=6, shared_across_batch=False) | options
    fg = frog.ForwardGradient(model, lambda o, t: F.cross_entropy(o, t, reduction="none"), **options)
    fg(x, torch.arange(9) % 5)
    return fg


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(7, 33), torch.nn.Tanh(), torch.nn.LayerNorm(33), torch.nn.Linear(33, 5)).to(
        dtype
    )


def flat_gradient(fg) -> torch.Tensor:
    return torch.cat([g.flatten() for _, g in sorted(fg.gradients().items())])


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("tangents", ["normal", "rademacher", "sphere", "orthonormal"])
@pytest.mark.parametrize("aggregate", ["orthogonal", "mean"])
def test_gradients_are_those_of_stored_tangents(aggregate, tangents, per_sample):
    """Nothing is kept of a step's tangents, and keeping them gives the same."""
    own = estimate(net(), tangents=tangents, aggregate=aggregate, per_sample=per_sample)
    assert not any(segment.tangents for segment in own.last.trace.segments)
    exact = frog.simulate(estimate(net(), tangents=tangents, aggregate=aggregate, per_sample=per_sample), *again())
    own(*again())
    stored = torch.cat([g.flatten() for _, g in sorted(exact.gradients.items())])
    assert_close64(flat_gradient(own), stored)


def again():
    return torch.randn(9, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64), torch.arange(9) % 5


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", [1, 500, 1 << 17])
def test_same_bits_whatever_the_chunk(dtype, per_sample, block, monkeypatch):
    monkeypatch.setattr("frog_cuda.segments._GRAM_BLOCK", block)  # of which one sample, some or all make a block
    found = [estimate(net(dtype), chunk_size=chunk, per_sample=per_sample) for chunk in (None, 1, 4)]
    for other in found[1:]:
        assert torch.equal(found[0].last.gram, other.last.gram)
        assert torch.equal(flat_gradient(found[0]), flat_gradient(other))


def test_tangents_that_were_rounded_are_kept():
    fg = estimate(net(torch.float32), tangent_dtype=torch.bfloat16)
    assert all(v.dtype == torch.bfloat16 for segment in fg.last.trace.segments for v in segment.tangents)
    assert all(len(segment.tangents) == 1 for segment in fg.last.trace.segments)
