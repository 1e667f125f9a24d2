"""Sampling, Gram matrices and linear combinations: what is drawn, that it is always the same, how it is distributed."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from helpers import assert_as_good_as_torch, assert_close32, assert_close64
from scipy import stats

from frog_cuda import _host, ops, reference

SIZES = [1, 7, 33, 1025, 9000]  # the last crosses the 8192 elements that one thread draws at a time
OFFSETS = [0, 5, 8190, 2**32 + 17, 2**62 + 1023]
DISTRIBUTIONS = ["normal", "rademacher", "standard_basis"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# Counter, key and words of Philox4x32-10 as published with Random123 (kat_vectors).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def state_of(seed: int, step: int = 0) -> torch.Tensor:
    return torch.tensor([seed, step])


def state_for(distribution: str, k: int, numel: int, offset: int = 0) -> torch.Tensor:
    """[seed, step], or coordinates of which some fall into the range asked for, some beside it and two together"""
    if distribution != "standard_basis":
        return state_of(11, 4)
    hits = [offset + numel // 2, max(offset - 1, 0), offset + numel - 1, offset, offset + numel, offset + numel // 2]
    return torch.tensor((hits * k)[:k])


# ---- Philox


@pytest.mark.parametrize("counter, key, words", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, words):
    counters = np.array([counter], np.uint32)
    assert tuple(_host.philox(counters, *key)[0]) == words
    assert tuple(reference.philox4x32_10(counters, *key)[0]) == words


def test_philox_agrees_with_the_reference_everywhere():
    counters = np.random.default_rng(0).integers(0, 2**32, (1000, 4), np.uint32)
    np.testing.assert_array_equal(
        _host.philox(counters, 0x12345678, 0x9ABCDEF0), reference.philox4x32_10(counters, 0x12345678, 0x9ABCDEF0)
    )


# ---- what is drawn


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_sample_is_what_the_reference_draws(distribution, numel, offset):
    state = state_for(distribution, 5, numel, offset)
    drawn = ops.sample_tangents(state, 3, numel, offset=offset, first=2, distribution=distribution)
    exact = reference.sample_tangents(state, 3, numel, offset=offset, first=2, distribution=distribution)
    assert drawn.shape == (3, numel)
    if distribution == "normal":
        # Relative errors of the polynomials (csrc/distributions.h) add up to 2e-6
        assert_close32(drawn, exact)
    else:
        assert torch.equal(drawn.double(), exact)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("step, first", [(0, 0), (1, 0), (2**32 - 1, 2**32 - 2)])
def test_the_whole_range_of_seeds_steps_and_tangents(seed, step, first):
    for distribution in ("normal", "rademacher"):
        drawn = ops.sample_tangents(state_of(seed, step), 2, 300, first=first, distribution=distribution)
        exact = reference.sample_tangents(state_of(seed, step), 2, 300, first=first, distribution=distribution)
        assert_close32(drawn, exact)


def test_seed_step_tangent_and_offset_all_matter():
    seen = set()
    for seed in (0, 1, 2**32, -1):
        for step in (0, 1, 2**31):
            for first in (0, 1, 2**31):
                for offset in (0, 64, 2**35, 2**40):  # 2^35 elements are 2^32 calls: where the second counter word starts
                    drawn = ops.sample_tangents(state_of(seed, step), 1, 64, offset=offset, first=first)
                    seen.add(drawn.numpy().tobytes())
    assert len(seen) == 4 * 3 * 3 * 4


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_values_in_every_dtype(distribution, dtype):
    state = state_for(distribution, 3, 9000, 77)
    single = ops.sample_tangents(state, 3, 9000, offset=77, distribution=distribution)
    drawn = ops.sample_tangents(state, 3, 9000, offset=77, distribution=distribution, dtype=dtype)
    assert drawn.dtype == dtype and drawn.is_contiguous()
    assert torch.equal(drawn, single.to(dtype))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_same_values_whatever_the_slice_and_the_chunk_of_k(distribution):
    k, n, offset = 5, 20000, 3
    state = state_for(distribution, k, n, offset)
    whole = ops.sample_tangents(state, k, n, offset=offset, distribution=distribution)
    for start, count in [(0, 1), (1, 63), (63, 2), (1000, 1025), (8189, 8192), (19999, 1), (7, 0)]:
        part = ops.sample_tangents(state, k, count, offset=offset + start, distribution=distribution)
        assert torch.equal(part, whole[:, start : start + count])
    for first, count in [(0, 2), (2, 3), (4, 1)]:
        part = ops.sample_tangents(state, count, n, offset=offset, first=first, distribution=distribution)
        assert torch.equal(part, whole[first : first + count])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_whatever_the_number_of_threads(distribution, dtype):
    k, n = 4, 50001
    state = state_for(distribution, k, n)
    threads = torch.get_num_threads()
    hashes = set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            target = torch.linspace(-1, 1, n).to(dtype)
            ops.tangent_axpy_(target, state, torch.linspace(1, 2, k), alpha=0.1, distribution=distribution)
            results = [
                ops.sample_tangents(state, k, n, distribution=distribution, dtype=dtype),
                ops.tangent_combine(state, torch.linspace(1, 2, k), n, distribution=distribution, dtype=dtype),
                ops.tangent_gram(state, k, n, distribution=distribution),
                ops.gram(ops.sample_tangents(state, k, n, distribution=distribution, dtype=dtype)),
                target,
            ]
            hashes.add(hashlib.sha256(b"".join(r.view(torch.uint8).numpy().tobytes() for r in results)).hexdigest())
    finally:
        torch.set_num_threads(threads)
    assert len(hashes) == 1


# ---- how it is distributed. Seeds are fixed, so these either always pass or never; bounds are 5 standard errors of a true
# normal sample of that size, which a correct generator misses once in two million.

N = 1 << 22


@pytest.fixture(scope="module")
def normals() -> torch.Tensor:
    return ops.sample_tangents(state_of(2024), 2, N).double()


@pytest.mark.parametrize("power, moment, moment_of_square", [(1, 0, 1), (2, 1, 3), (3, 0, 15), (4, 3, 105), (6, 15, 10395)])
def test_moments_of_the_normal(normals, power, moment, moment_of_square):
    standard_error = math.sqrt((moment_of_square - moment**2) / N)
    for row in normals:
        assert abs((row**power).mean().item() - moment) < 5 * standard_error


@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_tails_of_the_normal(normals, limit):
    p = math.erfc(limit / math.sqrt(2))
    for row in normals:
        assert abs((row.abs() > limit).double().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / N)
    assert normals.abs().max() <= 5.78  # the outermost of 2^23 radii


def test_the_normal_against_its_distribution_function(normals):
    for row in normals:
        # The statistic exceeds 2.3 / sqrt(n) with probability 5e-5 (Kolmogorov)
        assert stats.kstest(row.numpy(), "norm").statistic < 2.3 / math.sqrt(N)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 16, 32, 64, 128])
@pytest.mark.parametrize("power", [1, 2])
def test_elements_are_uncorrelated_and_so_are_their_squares(normals, lag, power):
    x = normals[0] ** power
    x = (x - x.mean()) / x.std()
    assert abs((x[lag:] * x[:-lag]).mean().item()) < 5 / math.sqrt(N)


def test_the_two_elements_of_one_word_are_independent(normals):
    a, b = normals[0, 0::2], normals[0, 1::2]
    n = len(a)
    for f in (torch.abs, torch.sign, torch.square):
        for g in (torch.abs, torch.sign, torch.square):
            u, v = f(a), g(b)
            correlation = ((u - u.mean()) * (v - v.mean())).mean() / (u.std() * v.std())
            assert abs(correlation.item()) < 5 / math.sqrt(n)
    # A rotation of two independent normals is normal: what Box-Muller stands on
    assert stats.kstest(((a + b) / math.sqrt(2)).numpy(), "norm").statistic < 2.3 / math.sqrt(n)


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_tangents_steps_and_seeds_are_uncorrelated(distribution):
    rows = [
        ops.sample_tangents(state_of(seed, step), 3, 1 << 20, distribution=distribution)
        for seed, step in [(0, 0), (0, 1), (1, 0), (1 << 32, 0)]
    ]
    v = torch.cat(rows).double()
    n = v.shape[1]
    gram = v @ v.T / n
    off = gram - torch.diag(gram.diagonal())
    assert off.abs().max() < 5 / math.sqrt(n)


def test_rademacher_is_fair_in_every_bit(normals):
    v = ops.sample_tangents(state_of(5), 1, N, distribution="rademacher")[0]
    assert torch.equal(v.abs(), torch.ones_like(v))
    by_place = v.view(-1, 1024).double().mean(0)  # mean of each of the 1024 places within a group
    assert by_place.abs().max() < 5 / math.sqrt(N / 1024)
    for lag in (1, 31, 32, 64, 128, 512, 1024):
        assert abs((v[lag:] * v[:-lag]).double().mean().item()) < 5 / math.sqrt(N)


# ---- Gram matrices


@pytest.mark.parametrize("numel", [*SIZES, 100003])
@pytest.mark.parametrize("k", [1, 3, 4, 33])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_tangent_gram(distribution, k, numel):
    offset = 1021
    state = state_for(distribution, k, numel, offset)
    v = ops.sample_tangents(state, k, numel, offset=offset, distribution=distribution, dtype=torch.float64)
    gram = ops.tangent_gram(state, k, numel, offset=offset, distribution=distribution)
    assert torch.equal(gram, gram.T)
    assert_close64(gram, v @ v.T)
    assert_close64(
        ops.tangent_gram(state, 1, numel, offset=offset, first=k - 1, distribution=distribution), (v @ v.T)[-1:, -1:]
    )
    if numel == 1025:
        exact = reference.tangent_gram(state, k, numel, offset=offset, distribution=distribution)
        assert_close32(gram.float(), exact)  # the tangents themselves are float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 1025), (3, 7), (7, 33), (33, 1025), (5, 0), (3, 100003)])
def test_gram_of_given_tangents(shape, dtype):
    v = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = reference.gram(v)
    assert_close64(ops.gram(v), expected)
    assert_close64(ops.gram(v.T.contiguous().T), expected)
    assert_close64(ops.gram(torch.stack([v, v], 2)[..., 0]), expected)


def test_gram_of_nearly_dependent_float32_tangents_is_exact():
    """Products in double: float32 ones would lose the difference of length 1e-4 between the two."""
    a = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    b = a + 1e-4 * torch.randn(5000, generator=torch.Generator().manual_seed(1))
    g = ops.gram(torch.stack([a, b]))
    distance = (g[0, 0] - 2 * g[0, 1] + g[1, 1]).item()
    assert distance == pytest.approx((a.double() - b.double()).square().sum().item(), rel=1e-6)


# ---- linear combinations


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 5, 33])
@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_combine_and_axpy(distribution, numel, k, dtype):
    offset = 1021
    state = state_for(distribution, k + 2, numel, offset)
    c = torch.randn(k, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    v = ops.sample_tangents(state, k, numel, offset=offset, first=2, distribution=distribution, dtype=torch.float64)
    combined = ops.tangent_combine(state, c, numel, offset=offset, first=2, distribution=distribution, dtype=dtype)
    start = torch.randn(numel, generator=torch.Generator().manual_seed(1)).to(dtype)
    moved = start.clone()
    assert ops.tangent_axpy_(moved, state, c, alpha=-0.3, offset=offset, first=2, distribution=distribution) is moved
    expected, expected_moved = c @ v, start.double() - 0.3 * (c @ v)
    if dtype == torch.float64:
        assert_close64(combined, expected)
        assert_close64(moved, expected_moved)
    elif dtype == torch.float32:
        assert_close32(combined, expected)
        assert_close32(moved, expected_moved)
    else:
        assert_as_good_as_torch(combined, expected.to(dtype), expected)
        assert_as_good_as_torch(moved, expected_moved.to(dtype), expected_moved)


def test_combine_and_axpy_against_the_reference():
    c = torch.tensor([0.5, -2.0])
    for distribution in ("normal", "rademacher"):
        exact = reference.tangent_combine(state_of(-9, 3), c, 1025, offset=9, first=1, distribution=distribution)
        assert_close32(ops.tangent_combine(state_of(-9, 3), c, 1025, offset=9, first=1, distribution=distribution), exact)
        p, q = torch.ones(25, 41), torch.ones(25, 41, dtype=torch.float64)
        ops.tangent_axpy_(p, state_of(-9, 3), c, alpha=2.0, offset=9, first=1, distribution=distribution)
        reference.tangent_axpy_(q, state_of(-9, 3), c, alpha=2.0, offset=9, first=1, distribution=distribution)
        assert_close32(p, q)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_combine_does_not_depend_on_the_slice(distribution):
    state = state_for(distribution, 4, 20000)
    c = torch.linspace(-1, 2, 4)
    whole = ops.tangent_combine(state, c, 20000, distribution=distribution)
    for start, count in [(0, 1), (63, 1000), (8191, 9000)]:
        assert torch.equal(
            ops.tangent_combine(state, c, count, offset=start, distribution=distribution), whole[start : start + count]
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_axpy_into_a_tensor_that_is_not_contiguous(dtype):
    c = torch.tensor([1.0, 0.5])
    dense = torch.zeros(41, 25, dtype=dtype)
    ops.tangent_axpy_(dense, state_of(1), c)
    base = torch.zeros(25, 41, 2, dtype=dtype)
    ops.tangent_axpy_(base[..., 1].T, state_of(1), c)
    assert torch.equal(base[..., 1].T, dense)
    assert not base[..., 0].any()


def test_empty_and_non_contiguous_arguments():
    assert ops.sample_tangents(state_of(0), 3, 0).shape == (3, 0)
    assert torch.equal(ops.tangent_gram(state_of(0), 3, 0), torch.zeros(3, 3, dtype=torch.float64))
    assert ops.tangent_combine(state_of(0), torch.ones(2), 0).shape == (0,)
    assert ops.tangent_axpy_(torch.empty(0, 3), state_of(0), torch.ones(2)).shape == (0, 3)
    c = torch.tensor([1.0, 9.0, 2.0, 9.0])
    assert torch.equal(ops.tangent_combine(state_of(0), c[::2], 99), ops.tangent_combine(state_of(0), c[::2].clone(), 99))


# ---- bad input


ONE = torch.ones(1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ops.sample_tangents(state_of(0), 0, 5), "k is 0"),
        (lambda: ops.sample_tangents(state_of(0), -1, 5), "k is -1"),
        (lambda: ops.sample_tangents(state_of(0), 1, -5), "numel is -5"),
        (lambda: ops.sample_tangents(state_of(0), 1, 5, offset=-1), "offset is -1"),
        (lambda: ops.sample_tangents(state_of(0), 1, 5, offset=2**63 - 3), "offset is 9223372036854775805"),
        (lambda: ops.sample_tangents(state_of(0), 1, 5, first=-1), "first is -1"),
        (lambda: ops.sample_tangents(state_of(0), 2, 5, first=2**32 - 1), "first is 4294967295"),
        (lambda: ops.sample_tangents(state_of(0), 2, 5, first=2**63 - 1), "first is 9223372036854775807"),
        (lambda: ops.sample_tangents(state_of(0, -1), 1, 5), "step is -1"),
        (lambda: ops.sample_tangents(state_of(0, 2**32), 1, 5), "step is 4294967296"),
        (lambda: ops.sample_tangents(torch.zeros(2), 1, 5), "state has dtype Float, expected Long"),
        (lambda: ops.sample_tangents(torch.tensor(0), 1, 5), r"state has shape \(\)"),
        (lambda: ops.sample_tangents(torch.zeros(2, 1, dtype=torch.int64), 1, 5), r"state has shape \(2, 1\)"),
        (lambda: ops.sample_tangents(torch.tensor([1, 2, 3]), 1, 5), "state has 3 elements"),
        (lambda: ops.sample_tangents(torch.tensor([1, 2, 3, 4])[::2], 1, 5), "contiguous"),
        (lambda: ops.sample_tangents(state_of(0), 1, 5, dtype=torch.int64), "dtype is Long"),
        (lambda: ops.sample_tangents(state_of(0), 1, 5, dtype=torch.complex64), "dtype is ComplexFloat"),
        (lambda: torch.ops.frog_cuda.sample_tangents(state_of(0), 1, 5, 0, 0, 3, torch.float32), "distribution is 3"),
        (lambda: ops.sample_tangents(torch.tensor([1, 2]), 3, 5, distribution="standard_basis"), "state holds 2 coordinates"),
        (lambda: ops.sample_tangents(torch.tensor([1, -2]), 2, 5, distribution="standard_basis"), "coordinate 1 is -2"),
        (lambda: ops.tangent_gram(state_of(0), 0, 5), "tangent_gram: k is 0"),
        (lambda: ops.tangent_gram(state_of(0), 2, -1), "tangent_gram: numel is -1"),
        (lambda: ops.gram(torch.ones(3)), r"tangents has shape \(3,\)"),
        (lambda: ops.gram(torch.ones(0, 3)), "k is 0"),
        (lambda: ops.gram(torch.ones(2, 3, dtype=torch.int32)), "tangents has dtype Int"),
        (lambda: ops.gram(torch.ones(2, 3, dtype=torch.complex64)), "tangents has dtype ComplexFloat"),
        (lambda: ops.tangent_combine(state_of(0), torch.ones(0), 5), r"coefficients has shape \(0,\)"),
        (lambda: ops.tangent_combine(state_of(0), torch.ones(1, 1), 5), r"coefficients has shape \(1, 1\)"),
        (lambda: ops.tangent_combine(state_of(0), torch.ones(1, dtype=torch.int64), 5), "coefficients has dtype Long"),
        (lambda: ops.tangent_combine(state_of(0), ONE, -5), "numel is -5"),
        (lambda: ops.tangent_combine(state_of(0), ONE, 5, dtype=torch.bool), "dtype is Bool"),
        (lambda: ops.tangent_axpy_(torch.ones(3, dtype=torch.int64), state_of(0), ONE), "self has dtype Long"),
        (lambda: ops.tangent_axpy_(torch.ones(3), state_of(0), ONE, offset=-2), "offset is -2"),
        (lambda: ops.tangent_axpy_(torch.ones(3), state_of(0), ONE, offset=2**63 - 2), "offset is"),
        (lambda: ops.tangent_axpy_(torch.ones(3), state_of(0), torch.ones(1, 1)), r"coefficients has shape \(1, 1\)"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


def test_unknown_distribution():
    for call in (
        lambda: ops.sample_tangents(state_of(0), 1, 5, distribution="cauchy"),
        lambda: ops.tangent_gram(state_of(0), 1, 5, distribution="cauchy"),
        lambda: ops.tangent_combine(state_of(0), ONE, 5, distribution="cauchy"),
        lambda: ops.tangent_axpy_(torch.ones(3), state_of(0), ONE, distribution="cauchy"),
    ):
        with pytest.raises(ValueError, match="distribution is 'cauchy'; accepted are normal, rademacher, standard_basis"):
            call()


def test_bad_input_leaves_the_target_untouched():
    p = torch.ones(3)
    with pytest.raises(RuntimeError):
        ops.tangent_axpy_(p, state_of(0, -1), ONE)
    assert torch.equal(p, torch.ones(3))
