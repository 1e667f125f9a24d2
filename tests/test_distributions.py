"""Distributions of tangents: determinism, exact geometry, moments, replay against stored, bad input.

Bounds on moments are SIGMAS = 5 standard errors of a mean over independent draws (steps of one seed). The kernels' own
statistics are the subject of test_tangents.py, supplied tangents that of test_supplied_tangents.py.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from helpers import assert_close64
from torch import Tensor

from frog_cuda import tangents as dist
from frog_cuda.tangents import Piece, Supplied, TangentSet, resolve, sample

SIGMAS = 5.0
CPU = torch.device("cpu")
DISTRIBUTIONS = {
    "normal": dist.Normal(),
    "rademacher": dist.Rademacher(),
    "sphere": dist.Sphere(),
    "orthonormal": dist.Orthonormal(),
    "cone": dist.Cone(60.0),
    "standard_basis": dist.StandardBasis(),
    "varying_length": dist.VaryingLength(0.25, 4.0),
}
ALL = pytest.mark.parametrize("name", DISTRIBUTIONS)
SIZES = [1, 7, 33, 1025]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Thousands of tiny operations: waking a second thread for each costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    draws.cache_clear()


def draw(name: str, k: int, n: int, step: int = 0, seed: int = 11) -> Tensor:
    return sample(DISTRIBUTIONS[name], k, n, seed=seed, step=step, dtype=torch.float64)


@functools.cache
def draws(name: str, k: int, n: int, count: int) -> Tensor:
    """(count, k, n): what a run of ``count`` steps would draw."""
    return torch.stack([draw(name, k, n, step) for step in range(count)])


def assert_mean(values: Tensor, expected: Tensor | float) -> None:
    """The mean over draws (first axis) is ``expected`` within SIGMAS standard errors, in every entry; where nothing varies
    (|v|^2 of Rademacher tangents), up to float64 rounding."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    error = values.std(dim=0) / math.sqrt(len(values))
    difference = (values.mean(0) - expected).abs()
    assert (difference <= SIGMAS * error + 1e-10 * expected.abs().max()).all(), f"{(difference / error).max():.1f} errors off"


def test_assert_mean_can_fail():
    values = torch.randn(10_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_mean(values, 0.0)
    with pytest.raises(AssertionError, match="errors off"):
        assert_mean(values, 0.1)  # ten standard errors


# A pure function of seed and step


@ALL
@pytest.mark.parametrize("n", SIZES)
def test_repeats(name, n):
    k = min(4, n)
    for seed, step in [(0, 0), (5, 2**32 - 1), (-1, 3), (2**64 - 1, 3)]:
        v = draw(name, k, n, step, seed)
        assert v.shape == (k, n) and v.dtype == torch.float64
        assert torch.equal(v, draw(name, k, n, step, seed))
    assert torch.equal(draw(name, k, n, seed=-1), draw(name, k, n, seed=2**64 - 1))  # the same 64 bits


@ALL
def test_threads_change_nothing(name):
    v = draw(name, 5, 40_000)
    torch.set_num_threads(2)
    try:
        assert torch.equal(v, draw(name, 5, 40_000))
    finally:
        torch.set_num_threads(1)


@ALL
def test_seeds_and_steps_are_unrelated(name):
    """Cosines between tangents of different draws have mean 0 and variance 1/n; 5 standard deviations each."""
    n, k = 4096, 4
    draws = [draw(name, k, n, step, seed) for seed, step in [(0, 0), (0, 1), (1, 0), (1, 1), (2**32, 0), (0, 2**31)]]
    units = [v / v.norm(dim=1, keepdim=True) for v in draws]
    for a in range(len(draws)):
        for b in range(a):
            assert not torch.equal(draws[a], draws[b])
            if name != "standard_basis":  # cosines of axes are 0 or 1
                assert (units[a] @ units[b].T).abs().max() <= SIGMAS / math.sqrt(n)
    if name == "standard_basis":  # 4 of 4096 axes: two draws have one in common with probability 0.4 %
        axes = [set(v.argmax(1).tolist()) for v in draws]
        assert len(set().union(*axes)) >= 6 * k - 1


@ALL
def test_moments_of_neighbouring_steps_are_unrelated(name):
    """The same element over steps s and s + 1: E[v_s v_{s+1}] = E[v]^2, which is 0, or 1/n^2 for axes."""
    v = torch.stack([draw(name, 2, 6, step) for step in range(2_001)])
    assert_mean(v[:-1, 0] * v[1:, 0], 1 / 36 if name == "standard_basis" else 0.0)


def test_larger_k_extends_a_draw():
    """Base tangents do not depend on how many there are; nor do unit tangents and cones."""
    for name in ("normal", "rademacher", "sphere", "orthonormal", "cone", "varying_length"):
        assert_close64(draw(name, 7, 33)[:3], draw(name, 3, 33), 1e-12)


# Geometry, for every draw


@ALL
@pytest.mark.parametrize("n", [7, 33, 1025])
def test_lengths(name, n):
    for step in range(20):
        lengths = draw(name, 5, n, step).norm(dim=1)
        if name == "rademacher":
            assert_close64(lengths, torch.full((5,), math.sqrt(n), dtype=torch.float64), 1e-12)
        elif name == "varying_length":
            assert ((lengths >= 0.25 * (1 - 1e-12)) & (lengths <= 4.0 * (1 + 1e-12))).all()
        elif name != "normal":
            # orthonormal loses digits with the condition of G, at worst about 1e4 for k = 5 of n = 7
            assert_close64(lengths, torch.ones(5, dtype=torch.float64), 1e-11)


def test_rademacher_values():
    assert set(draw("rademacher", 3, 1025).unique().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("k,n", [(1, 1), (1, 7), (2, 2), (5, 7), (7, 7), (16, 33), (33, 33), (16, 1025)])
def test_orthonormal(k, n):
    for step in range(20):
        v = draw("orthonormal", k, n, step)
        assert (v @ v.T - torch.eye(k, dtype=torch.float64)).abs().max() <= 1e-9


def test_orthonormal_spans_what_normal_tangents_span():
    v, z = draw("orthonormal", 4, 9), draw("normal", 4, 9)
    assert torch.linalg.matrix_rank(torch.cat([v, z]), rtol=1e-9).item() == 4
    assert (v[0] @ z[0]).item() == pytest.approx(z[0].norm().item())  # Gram-Schmidt: the first keeps its direction


@pytest.mark.parametrize("angle", [0.5, 10, 45.0, np.float32(60), 90])
@pytest.mark.parametrize("n", [2, 7, 1025])
def test_cone(angle, n):
    cone, cos = dist.Cone(angle), math.cos(math.radians(angle))
    for step in range(10):
        v = sample(cone, 6, n, seed=11, step=step, dtype=torch.float64)
        assert_close64(v.norm(dim=1), torch.ones(6, dtype=torch.float64), 1e-9)
        assert (v[1:] @ v[0] - cos).abs().max() <= 1e-9
        assert_close64(v[0], sample("sphere", 6, n, seed=11, step=step, dtype=torch.float64)[0], 1e-12)
    assert sample(cone, 1, 1).abs().item() == 1  # one tangent needs no second dimension


def test_cone_directions_are_uniform_around_the_axis():
    """Between two tangents: cos^2 + sin^2 <u_i, u_j> with <u_i, u_j> of mean 0 and mean square 1/(n - 1)."""
    n, cos2 = 6, 0.25
    v = draws("cone", 3, n, 3_000)
    across = ((v[:, 1] * v[:, 2]).sum(1) - cos2) / (1 - cos2)
    assert_mean(across, 0.0)
    assert_mean(across**2, 1 / (n - 1))


@pytest.mark.parametrize("n", [1, 2, 7, 33])
def test_standard_basis_axes_differ(n):
    """For every k <= n: one 1 in each row, no two in a column."""
    for k in range(1, n + 1):
        for step in range(5):
            v = draw("standard_basis", k, n, step)
            assert set(v.unique().tolist()) <= {0.0, 1.0}
            assert v.sum(1).eq(1).all() and v.sum(0).le(1).all()
    assert torch.equal(v.sum(0), torch.ones(n, dtype=torch.float64))  # k = n: each axis once


@pytest.mark.parametrize("k,n", [(1, 10), (3, 10), (9, 10), (10, 10)])
def test_standard_basis_is_uniform(k, n):
    """Tangent i is each axis with probability 1/n, whatever i; and each ordered pair of axes comes with 1 / (n (n - 1))."""
    v = draws("standard_basis", k, n, 4_000)  # (N, k, n)
    # N / n = 400 picks each: 5 standard errors of a binomial are near enough to normal ones
    assert_mean(v, torch.full((k, n), 1 / n, dtype=torch.float64))
    if k > 1:
        pairs = torch.einsum("ba,bc->bac", v[:, 0], v[:, -1])
        uniform = (1 - torch.eye(n, dtype=torch.float64)) / (n * (n - 1))
        assert_mean(pairs, uniform)


def test_standard_basis_of_a_huge_vector():
    """The axes of 2^40 elements are k integers, and a piece sees those that fall into it."""
    n, k = 2**40, 300
    drawn = TangentSet(dist.StandardBasis(), k, 1, 2, CPU, n)
    axes = drawn.state
    assert len(axes.unique()) == k and axes.min() >= 0 and axes.max() < n
    # mean of k uniform numbers: standard deviation n / sqrt(12 k)
    assert abs(axes.double().mean().item() / n - 0.5) <= SIGMAS / math.sqrt(12 * k)
    for i in (0, 17, 299):
        piece = Piece("x", (5,), int(axes[i]) - 2)
        v = drawn.draw(piece, torch.float64)
        assert v[i].tolist() == [0, 0, 1, 0, 0]
        assert v.sum().item() == ((axes >= piece.offset) & (axes < piece.offset + 5)).sum().item()
        assert torch.equal(drawn.gram(piece), v @ v.T)


def test_varying_length_is_uniform_in_its_bounds():
    """Lengths: mean (low + high)/2, variance (high - low)^2 / 12, independent of the tangent's index and of each other."""
    low, high = 0.25, 4.0
    v = draws("varying_length", 3, 5, 4_000)
    lengths = (v.norm(dim=2) - (low + high) / 2) / ((high - low) / math.sqrt(12))
    assert_mean(lengths, torch.zeros(3, dtype=torch.float64))
    assert_mean(torch.einsum("bi,bj->bij", lengths, lengths), torch.eye(3, dtype=torch.float64))
    assert lengths.abs().max() > 0.99 * math.sqrt(3)  # comes close to both ends
    directions = torch.nn.functional.normalize(v, dim=2)
    assert_close64(directions, draws("sphere", 3, 5, 4_000), 1e-12)
    assert_mean(lengths[:, :, None] * directions, 0.0)


def test_fixed_length():
    v = sample(dist.VaryingLength(3, 3), 4, 9, dtype=torch.float64)
    assert_close64(v.norm(dim=1), torch.full((4,), 3.0, dtype=torch.float64), 1e-12)


# Moments


@ALL
@pytest.mark.parametrize("k,n", [(1, 6), (3, 6), (6, 6), (4, 7)])
def test_second_moment(name, k, n):
    """(1/k) sum_i E[v_i v_i^T] = s I."""
    v = draws(name, k, n, 2_000)
    expected = DISTRIBUTIONS[name].second_moment(n) * torch.eye(n, dtype=torch.float64)
    assert_mean(v.mT @ v / k, expected)
    with pytest.raises(AssertionError):  # sharp enough to see a third too much
        assert_mean(v.mT @ v / k, 1.33 * expected)


ENERGY = [(name, k, n) for name in DISTRIBUTIONS for k, n in [(1, 6), (3, 6), (6, 6), (9, 6), (1, 2), (2, 2)]]


@pytest.mark.parametrize("name,k,n", [e for e in ENERGY if e[1] <= e[2] or e[0] not in ("orthonormal", "standard_basis")])
def test_energy(name, k, n):
    """E |V V^T g|^2 / |g|^2, whatever the direction of g."""
    distribution = DISTRIBUTIONS[name]
    v = draws(name, k, n, 2_000)
    # an axis, the diagonal, and neither
    for g in (torch.eye(n)[0], torch.ones(n), torch.linspace(-1, 2, n)):
        g = g.double() / g.double().norm()
        total = torch.einsum("bkn,bk->bn", v, v @ g)
        assert_mean(total.square().sum(1), distribution.energy(k, n))


def test_energy_by_hand():
    assert dist.Normal().energy(1, 1) == 3  # E z^4
    assert dist.Rademacher().energy(1, 5) == 5
    assert dist.Sphere().energy(1, 5) == pytest.approx(1 / 5)
    assert dist.Orthonormal().energy(5, 5) == dist.StandardBasis().energy(5, 5) == 1
    assert dist.VaryingLength(2, 2).energy(3, 5) == pytest.approx(16 * dist.Sphere().energy(3, 5))
    assert dist.Cone(90).energy(2, 5) == pytest.approx(2 / 5)  # two orthonormal tangents
    assert dist.Cone(1e-9).energy(3, 5) == pytest.approx(9 / 5)  # three times the same: |3 v v^T g|^2


# Replayed piece by piece == stored


@ALL
@pytest.mark.parametrize("sizes", [(1,), (7, 33), (1, 1025, 7), (64, 1024, 1)])
def test_pieces_and_chunks(name, sizes):
    """Slices of the vector and chunks of k are columns and rows of what `sample` stores, bit for bit."""
    n = sum(sizes)
    distribution, k = DISTRIBUTIONS[name], min(5, n)
    drawn = TangentSet(distribution, k, 11, 3, CPU, n)
    whole = Piece("whole", (n,), 0)
    base = drawn.draw(whole, torch.float64)
    mixing = distribution.mixing(drawn.gram(whole), 11, 3)
    stored = base if mixing is None else mixing.T @ base
    assert torch.equal(stored, draw(name, k, n, step=3))
    assert (mixing is not None) == distribution.mixed
    c = torch.linspace(-1, 2, k, dtype=torch.float64)
    base_c = c if mixing is None else mixing @ c
    gram = torch.zeros(k, k, dtype=torch.float64)
    offset = 0
    for i, size in enumerate(sizes):
        piece = Piece(str(i), (size,) if size % 7 or size == 7 else (7, size // 7), offset)
        assert piece.numel == size
        columns = slice(offset, offset + size)
        part = drawn.draw(piece, torch.float64)
        assert part.shape == (k, *piece.shape)
        assert torch.equal(part.flatten(1), base[:, columns])
        for first in range(k):
            rest = drawn.draw(piece, torch.float64, first)
            assert torch.equal(rest, part[first:])
            assert torch.equal(drawn.draw(piece, torch.float64, first, 1), part[first : first + 1])
        combined = drawn.combine(piece, base_c, torch.float64)
        assert combined.shape == piece.shape
        assert (combined.flatten() - c @ stored[:, columns]).abs().max() <= 1e-10 * (c.abs() @ stored.abs()).max()
        target = torch.ones(piece.shape, dtype=torch.float64)
        drawn.axpy_(target, piece, base_c, -0.5)
        assert_close64(target, 1 - 0.5 * combined)
        gram += drawn.gram(piece)
        offset += size
    assert_close64(gram, base @ base.T)
    assert_close64(gram, drawn.gram(whole))


@ALL
def test_combine_in_every_dtype(name):
    """Rounded once, from sums in more than half precision: each entry within eps of the largest possible sum."""
    piece = Piece("x", (5, 7), 13)
    drawn = TangentSet(DISTRIBUTIONS[name], 4, 0, 0, CPU, 100)
    c = torch.tensor([0.3, -1.7, 0.9, 2.2], dtype=torch.float64)
    base = drawn.draw(piece, torch.float64)
    exact = torch.einsum("k,kab->ab", c, base)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        combined = drawn.combine(piece, c, dtype)
        assert combined.dtype == dtype
        assert (combined.double() - exact).abs().max() <= torch.finfo(dtype).eps * max(1.0, exact.abs().max().item())
        target = torch.full((5, 7), 0.5, dtype=dtype)
        drawn.axpy_(target, piece, c, 1.0)
        assert (target.double() - 0.5 - exact).abs().max() <= torch.finfo(dtype).eps * (0.5 + exact.abs().max().item())


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_sample(name, dtype):
    """Base tangents are drawn in float32 and rounded; mixed ones are rounded before and after mixing with weights of their
    float32 values: two roundings of eps/2, the first magnified by the mixing's condition (below 2 here)."""
    exact = draw(name, 4, 1025)
    v = sample(DISTRIBUTIONS[name], 4, 1025, seed=11, dtype=dtype)
    assert v.dtype == dtype
    if DISTRIBUTIONS[name].mixed:
        assert (v.double() - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()
        assert (v.double().norm(dim=1) / exact.norm(dim=1) - 1).abs().max() <= 2 * torch.finfo(dtype).eps
    else:
        assert torch.equal(v, exact.to(dtype))


def test_default_dtype_and_device():
    v = sample("normal", 2, 3)
    assert v.dtype == torch.float32 and v.device == CPU
    assert torch.equal(v, sample(dist.Normal(), 2, 3, seed=0, step=0, device=CPU))


# What is accepted

NAMES = "normal, rademacher, sphere, orthonormal, standard_basis, varying_length"


def test_names_and_objects():
    for name in NAMES.split(", "):
        made = resolve(name)
        assert type(made).__name__ == name.title().replace("_", "")
        assert resolve(made) is made
    assert resolve("varying_length") == dist.VaryingLength(0.5, 2.0)
    for source in (torch.ones(2, 3), {"a": torch.ones(2, 3)}, lambda k, n, generator: None):
        made = resolve(source)
        assert isinstance(made, Supplied) and made.source is source


@pytest.mark.parametrize("spec,error,message", [
    ("gaussian", ValueError, f"tangents is 'gaussian'; accepted names are {NAMES}$"),
    ("Normal", ValueError, f"accepted names are {NAMES}"),
    ("cone", ValueError, r"cones need their angle: frog_cuda.tangents.Cone\(angle\)"),
    (dist.Sphere, TypeError, r"tangents is the class Sphere; expected an object: Sphere\(...\)"),
    (dist.Cone, TypeError, r"tangents is the class Cone; expected an object: Cone\(...\)"),
    (None, TypeError, f"tangents is of type NoneType; accepted are a name \\({NAMES}\\)"),
    (3, TypeError, "tangents is of type int"),
    ([torch.ones(2, 3)], TypeError, "tangents is of type list"),
])  # fmt: skip
def test_unknown_distributions(spec, error, message):
    with pytest.raises(error, match=message):
        resolve(spec)
    with pytest.raises(error, match=message):
        sample(spec, 2, 3)


@pytest.mark.parametrize("angle", [0, -10, 90.001, math.nan, math.inf, "30", None, True, 30j])
def test_cone_angles(angle):
    with pytest.raises(ValueError, match=r"Cone: angle is .*; expected degrees in \(0, 90\]"):
        dist.Cone(angle)


@pytest.mark.parametrize(
    "low,high", [(0, 1), (-1, 1), (2, 1), (1, math.inf), (math.nan, 1), (1, math.nan), ("1", 2), (True, 2)]
)
def test_varying_length_bounds(low, high):
    with pytest.raises(ValueError, match="VaryingLength: low and high are .*; expected 0 < low <= high"):
        dist.VaryingLength(low, high)


@pytest.mark.parametrize("arguments,error,message", [
    (dict(k=0), ValueError, "k is 0; expected an integer >= 1"),
    (dict(k=-3), ValueError, "k is -3; expected an integer >= 1"),
    (dict(k=2.0), TypeError, "k is 2.0 of type float; expected an integer >= 1"),
    (dict(k=True), TypeError, "k is True of type bool"),
    (dict(k="2"), TypeError, "k is '2' of type str"),
    (dict(k=None), TypeError, "k is None of type NoneType"),
    (dict(n=0), ValueError, "n is 0; expected an integer >= 1"),
    (dict(n=3.0), TypeError, "n is 3.0 of type float"),
    (dict(seed=2**64), ValueError, f"seed is {2**64}; expected a 64-bit integer"),
    (dict(seed=-(2**63) - 1), ValueError, f"seed is -{2**63 + 1}; expected a 64-bit integer"),
    (dict(seed=1.0), TypeError, "seed is 1.0 of type float; expected a 64-bit integer"),
    (dict(seed=None), TypeError, "seed is None of type NoneType"),
    (dict(seed=False), TypeError, "seed is False of type bool"),
    (dict(step=-1), ValueError, r"step is -1; expected an integer in \[0, 2\^32\)"),
    (dict(step=2**32), ValueError, rf"step is {2**32}; expected an integer in \[0, 2\^32\)"),
    (dict(step=0.5), TypeError, "step is 0.5 of type float"),
    (dict(dtype=torch.int32), TypeError, "dtype is torch.int32; expected a floating point torch.dtype"),
    (dict(dtype=torch.complex64), TypeError, "dtype is torch.complex64"),
    (dict(dtype="float32"), TypeError, "dtype is 'float32'"),
])  # fmt: skip
@pytest.mark.parametrize("spec", ["normal", "sphere", torch.ones(2, 3)])
def test_bad_arguments_of_sample(spec, arguments, error, message):
    with pytest.raises(error, match=message):
        sample(spec, **{"k": 2, "n": 3, **arguments})


def test_numpy_integers_are_integers():
    v = sample("normal", np.int64(2), np.int32(3), seed=np.uint64(2**64 - 1), step=np.int64(4))
    assert torch.equal(v, sample("normal", 2, 3, seed=-1, step=4))


@pytest.mark.parametrize("spec,k,n,message", [
    ("orthonormal", 4, 3, "k is 4, but only 3 orthonormal tangents fit into 3 dimensions"),
    ("standard_basis", 4, 3, "k is 4, but there are only 3 coordinate axes"),
    (dist.Cone(30), 2, 1, "a cone needs at least 2 dimensions, got 1"),
])  # fmt: skip
def test_more_than_fit(spec, k, n, message):
    with pytest.raises(ValueError, match=message):
        sample(spec, k, n)
