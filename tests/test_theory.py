"""The theory of multi-tangent forward gradients (Flügel et al., arXiv 2410.17764, sections 3 and A.1), measured.

Algebraic statements hold for every draw and are checked for every draw, in float64. Statements about expectations are checked
on N independent draws (steps 0 .. N-1 of a fixed seed): the mean over draws must lie within SIGMAS = 5 standard errors of its
value, the standard error being the draws' own standard deviation over sqrt(N). By the central limit theorem a right closed form
fails that with probability 6e-7; seeds are fixed, so a test that passed once passes always. Each statistical check is shown, in
this file, to reject a value that is a little off.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

import frog_cuda as frog
from frog_cuda.aggregate import mean_chi, scaling_correction

SIGMAS = 5.0
#: float64 rounding: the 1e-10 that the project holds itself to
EXACT = 1e-10

DISTRIBUTIONS = {
    "normal": frog.tangents.Normal(),
    "rademacher": frog.tangents.Rademacher(),
    "sphere": frog.tangents.Sphere(),
    "orthonormal": frog.tangents.Orthonormal(),
    "cone": frog.tangents.Cone(30.0),
    "standard_basis": frog.tangents.StandardBasis(),
    "varying_length": frog.tangents.VaryingLength(0.5, 2.0),
}
ALL = pytest.mark.parametrize("name", DISTRIBUTIONS)


def gradient(n: int) -> Tensor:
    """A gradient of no special direction: entries of different size and sign."""
    return torch.sin(torch.arange(1.0, n + 1, dtype=torch.float64)) * torch.linspace(0.3, 2, n, dtype=torch.float64)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Thousands of tiny operations: waking a second thread for each costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    draws.cache_clear()


@functools.cache
def draws(spec, k: int, n: int, count: int) -> Tensor:
    """(count, k, n): what a run of ``count`` steps would draw."""
    return torch.stack([frog.tangents.sample(spec, k, n, seed=7, step=s, dtype=torch.float64) for s in range(count)])


def estimates(spec, v: Tensor, g: Tensor) -> Tensor:
    """Estimates of g (n,) from tangents v (N, k, n): (N, n). Each draw is a sample with tangents of its own."""
    how = frog.aggregate.resolve(spec)
    gram = v @ v.mT if how.needs_gram else None
    c, _ = how.coefficients(gram, (v @ g).T, v.shape[2])  # (k, N)
    return torch.einsum("kb,bkn->bn", c, v)


def cosines(estimate: Tensor, g: Tensor) -> Tensor:
    return (estimate @ g) / (estimate.norm(dim=1) * g.norm())


def assert_mean(values: Tensor, expected: Tensor | float) -> None:
    """The mean over draws (first axis) is ``expected`` within SIGMAS standard errors, in every entry."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    error = values.std(dim=0) / math.sqrt(len(values))
    # Quantities that do not vary at all (|v|^2 of Rademacher tangents) are left rounding errors alone
    difference, bound = (values.mean(0) - expected).abs(), SIGMAS * error + EXACT * expected.abs()
    assert (difference <= bound).all(), f"off by {(difference / error).max():.1f} standard errors"


def test_assert_mean_can_fail():
    """A mean that is off by seven standard errors is found: even noise at the bound leaves two."""
    values = torch.randn(10_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_mean(values, 0.0)
    with pytest.raises(AssertionError, match="standard errors"):
        assert_mean(values, torch.tensor([0.0, 0.0, 0.1]))


# Unbiasedness (section 3.2): E[v v^T] = I


@pytest.mark.parametrize("name", ["normal", "rademacher"])
@pytest.mark.parametrize("k", [1, 4])
def test_mean_is_unbiased(name, k):
    g = gradient(12)
    v = draws(name, k, 12, 10_000)
    assert_mean(estimates("mean", v, g), g)
    assert_mean(estimates("sum", v, g), k * g)
    with pytest.raises(AssertionError):  # and the check is sharp enough to see 20 % too much
        assert_mean(estimates("mean", v, g), 1.2 * g)


@pytest.mark.parametrize("name", ["sphere", "orthonormal", "cone", "standard_basis"])
def test_mean_times_dim_is_unbiased_for_unit_tangents(name):
    """E[v v^T] = I/n there; a cone's tangents are each uniform on the sphere, only dependent on one another."""
    g = gradient(12)
    v = draws(DISTRIBUTIONS[name], 3, 12, 4_000)
    assert_mean(estimates("mean_times_dim", v, g), g)
    with pytest.raises(AssertionError):
        assert_mean(estimates("mean", v, g), g)


@pytest.mark.parametrize("name", ["normal", "rademacher", "orthonormal", "cone", "standard_basis", "varying_length"])
def test_projection_shrinks_by_k_over_n(name):
    """E[P_U] = k/n I: its trace is k, and no direction is preferred (rotations; for axes and signs permutations and flips).
    With n = 24, two Rademacher tangents are dependent with probability 2^-23."""
    n, k = 24, 3
    g = gradient(n)
    assert_mean(estimates("orthogonal", draws(DISTRIBUTIONS[name], k, n, 4_000), g), k / n * g)


# Directions (section 3, A.1): hold for every draw


@ALL
@pytest.mark.parametrize("aggregate", ["sum", "mean", "orthogonal", "mean_times_dim", "max", "max_normalized", "mean_of_top_k"])
@pytest.mark.parametrize("k", [1, 5])
def test_estimate_is_within_90_degrees(name, aggregate, k):
    """g^T V V^T g = |d|^2 >= 0; g^T P_U g = |P_U g|^2 >= 0; a part of the sum over d_i^2 for the others."""
    g = gradient(30)
    e = estimates(aggregate, draws(DISTRIBUTIONS[name], k, 30, 200), g)
    assert (e @ g >= -EXACT * e.norm(dim=1) * g.norm()).all()
    if name not in ("standard_basis", "rademacher"):  # those can be orthogonal to g, others only with probability 0
        assert (e @ g > 0).all()


@ALL
@pytest.mark.parametrize("aggregate", ["sum", "mean", "orthogonal"])
def test_descent_on_a_quadratic(name, aggregate):
    """f(x - t e) <= f(x) - t e.g + t^2 L |e|^2 / 2 with L the largest curvature; t = e.g / (L |e|^2) makes the decrease at
    least (e.g)^2 / (2 L |e|^2), for every draw."""
    n = 20
    a = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    a = a @ a.T
    curvature = torch.linalg.eigvalsh(a).max()
    x = gradient(n)

    def f(x):
        return 0.5 * x @ (a @ x) - x.sum()

    g = a @ x - 1
    for step in range(30):
        value, e = frog.forward_gradient(f, x, k=4, tangents=DISTRIBUTIONS[name], aggregate=aggregate, step=step)
        slope, square = e @ g, e @ e
        decrease = value - f(x - slope / (curvature * square) * e)
        assert decrease >= slope**2 / (2 * curvature * square) - EXACT * value.abs()
        assert slope > 0
    assert value.item() == f(x).item()


@pytest.mark.parametrize("aggregate", ["sum", "mean", "orthogonal"])
def test_descent_on_rosenbrock(aggregate):
    """A step small enough for the slope to decide: at least half the linear decrease."""

    def f(x):
        return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()

    x = torch.linspace(-1.2, 1.0, 10, dtype=torch.float64)
    (g,) = torch.autograd.grad(f(leaf := x.clone().requires_grad_()), leaf)
    for step in range(30):
        value, e = frog.forward_gradient(f, x, k=3, aggregate=aggregate, step=step)
        e = e / e.norm()
        t = 1e-4 * (e @ g) / g.norm()  # curvature is below 1e4, so t |curvature| / 2 is below half the slope
        assert f(x - t * e) <= value - t * (e @ g) / 2


# The projection P_U (section 3.4)


@pytest.mark.parametrize("k", [8, 9, 13, 40])
@pytest.mark.parametrize("name", ["normal", "sphere", "varying_length", "cone"])
def test_projection_is_exact_when_tangents_span_everything(name, k):
    n = 8
    g = gradient(n)
    e = estimates("orthogonal", draws(DISTRIBUTIONS[name], k, n, 50), g)
    # G has the squared condition of V; of 50 square draws the worst has about 1e2 times 50, hence 1e-16 * 2.5e7 = 3e-9
    assert ((e - g).norm(dim=1) <= 1e-8 * g.norm()).all()


@pytest.mark.parametrize("name", ["orthonormal", "standard_basis"])
def test_projection_and_sum_are_exact_for_a_whole_basis(name):
    g = gradient(8)
    v = draws(name, 8, 8, 50)
    for aggregate in ("orthogonal", "sum"):
        assert ((estimates(aggregate, v, g) - g).norm(dim=1) <= 1e-8 * g.norm()).all()


def test_projection_is_exact_with_dependent_tangents_that_span_everything():
    """Repeated, opposite, stretched, summed and zero tangents beside a basis."""
    n = 6
    g = gradient(n)
    basis = draws("normal", n, n, 50)
    v = torch.cat([basis[:, :1], -basis[:, :1], 1e3 * basis, basis[:, 1:3] + basis[:, 3:5], 0 * basis[:, :2], basis], 1)
    e = estimates("orthogonal", v[:, torch.randperm(v.shape[1], generator=torch.Generator().manual_seed(1))], g)
    assert ((e - g).norm(dim=1) <= 1e-8 * g.norm()).all()  # as above


@ALL
@pytest.mark.parametrize("k", [1, 2, 7, 15])
def test_no_combination_is_more_accurate_than_the_projection(name, k):
    """P_U g is the point of U closest to g: for every draw, mean, sum and anything else are at least as far away."""
    n = 16
    g = gradient(n)
    v = draws(DISTRIBUTIONS[name], k, n, 200)
    projection = estimates("orthogonal", v, g)
    error = (projection - g).norm(dim=1)
    slack = 1e-8 * g.norm()  # k = n - 1 tangents are nearly as badly conditioned as n
    for aggregate in ("mean", "sum", "mean_times_dim", "max", "max_normalized", "mean_of_top_k"):
        assert (error <= (estimates(aggregate, v, g) - g).norm(dim=1) + slack).all()
    c = torch.randn(200, k, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for size in (1e-6, 1e-2, 1.0):
        other = projection + size * torch.einsum("bk,bkn->bn", c, v)
        assert (error <= (other - g).norm(dim=1) + slack).all()
    assert (error <= g.norm() + slack).all()


@pytest.mark.parametrize("k", [1, 2, 7])
def test_projection_ignores_lengths_and_angles(k):
    """These distributions share their base tangents, and with them the span U."""
    n = 16
    g = gradient(n)
    expected = estimates("orthogonal", draws("normal", k, n, 50), g)
    same_span = ["sphere", "orthonormal", frog.tangents.VaryingLength(1e-3, 1e3)]
    same_span += [frog.tangents.Cone(angle) for angle in (90.0, 45.0, 10.0, 1.0)]
    for spec in same_span:
        e = estimates("orthogonal", draws(spec, k, n, 50), g)
        # a cone of 1 degree has condition 1/sin(1 degree) = 57 times that of the normal tangents, squared in G: 3e3 * 1e-13
        assert ((e - expected).norm(dim=1) <= 1e-9 * g.norm()).all(), spec
        assert k == 1 or not torch.allclose(
            estimates("sum", draws(spec, k, n, 50), g), estimates("sum", draws("normal", k, n, 50), g)
        )


@ALL
def test_projection_ignores_any_invertible_mixing(name):
    n, k = 16, 5
    g = gradient(n)
    v = draws(DISTRIBUTIONS[name], k, n, 50)
    expected = estimates("orthogonal", v, g)
    scales = torch.logspace(-4, 4, k, dtype=torch.float64)
    order = torch.tensor([3, 0, 4, 1, 2])
    shear = torch.eye(k, dtype=torch.float64) + torch.ones(k, k, dtype=torch.float64).tril(-1)
    mixings = {"stretched": torch.diag(scales), "reversed": -torch.eye(k, dtype=torch.float64), "sheared": shear}
    for what, mixing in mixings.items():
        e = estimates("orthogonal", mixing @ v, g)
        assert ((e - expected).norm(dim=1) <= 1e-9 * g.norm()).all(), what
    assert ((estimates("orthogonal", v[:, order], g) - expected).norm(dim=1) <= 1e-9 * g.norm()).all()


@ALL
def test_projection_is_a_projection(name):
    """P = P^T = P P, its trace the dimension of U, and it keeps every tangent."""
    n, k = 12, 5
    for step in range(20):
        v = frog.tangents.sample(DISTRIBUTIONS[name], k, n, seed=7, step=step, dtype=torch.float64)
        p = frog.aggregate.combine("orthogonal", v, v)  # row j: P e_j
        assert (p - p.T).abs().max() <= EXACT
        assert (p @ p - p).abs().max() <= EXACT
        assert (v @ p - v).norm() <= EXACT * v.norm()
        assert p.trace().item() == pytest.approx(torch.linalg.matrix_rank(v).item(), abs=1e-9)


# Expected cosines and lengths (DESIGN of the estimator: closed forms for normal tangents)

N = 4_000


@pytest.mark.parametrize("name", ["normal", "sphere"])
@pytest.mark.parametrize("aggregate", ["mean", "orthogonal", "sum"])
def test_cosine_of_one_tangent(name, aggregate):
    """cos = |<v, g>| / |v||g|, so E cos = E|u_1| on the sphere = E chi_1 / E chi_n = sqrt(2 / (pi n)) (1 + 1/(4n) + ..)."""
    n = 100
    g = gradient(n)
    values = cosines(estimates(aggregate, draws(name, 1, n, N), g), g)
    assert_mean(values, mean_chi(1) / mean_chi(n))
    approximation = math.sqrt(2 / (math.pi * n))
    assert abs(mean_chi(1) / mean_chi(n) / approximation - 1) <= 0.3 / n
    error = SIGMAS * values.std().item() / math.sqrt(N)
    assert abs(values.mean().item() - approximation) <= error + 0.3 / n * approximation


@pytest.mark.parametrize("k", [1, 4, 16])
def test_cosine_of_the_mean(k):
    """With u = d/|d|: cos = |d| / |V u|, and |V u|^2 = |d|^2 + chi^2_{n-1} independent of it. So cos^2 is Beta(k/2, (n-1)/2):
    E cos = E chi_k / E chi_{n+k-1}, E cos^2 = k / (n + k - 1).

    The paper's sqrt(k / (n + k + 1)) is off by a factor 1 - 1/(4k) + O(1/n): E chi_k = sqrt(k) (1 - 1/(4k) + 1/(32 k^2) ..).
    """
    n = 100
    g = gradient(n)
    values = cosines(estimates("mean", draws("normal", k, n, N), g), g)
    expected = mean_chi(k) / mean_chi(n + k - 1)
    assert_mean(values, expected)
    assert_mean(values**2, k / (n + k - 1))
    assert abs(expected / math.sqrt(k / (n + k + 1)) - 1) <= 1 / (4 * k) + 1.5 / n


@pytest.mark.parametrize("k", [1, 4, 16, 64])
def test_cosine_and_length_of_the_projection(k):
    """|P_U g|^2 / |g|^2 is Beta(k/2, (n-k)/2), and cos = |P_U g| / |g|: E = E chi_k / E chi_n, E cos^2 = k/n.

    sqrt(k/n) is off by a factor 1 - 1/(4k) + 1/(4n).
    """
    n = 100
    g = gradient(n)
    e = estimates("orthogonal", draws("normal", k, n, N // 2), g)
    ratio = e.norm(dim=1) / g.norm()
    assert (ratio - cosines(e, g)).abs().max() <= 1e-9
    expected = mean_chi(k) / mean_chi(n)
    assert_mean(ratio, expected)
    assert_mean(ratio**2, k / n)
    assert abs(expected / math.sqrt(k / n) - 1) <= 1 / (4 * k)


def test_more_tangents_are_better():
    """Nested draws: tangents 0 .. k-1 are the first ones of a larger k, so the error of P_U falls with k for every draw."""
    n = 32
    g = gradient(n)
    v = draws("normal", n, n, 50)
    last = g.norm().expand(50)
    for k in range(1, n + 1):
        error = (estimates("orthogonal", v[:, :k], g) - g).norm(dim=1)
        assert (error <= last + 1e-7 * g.norm()).all()
        last = error


# Length correction


@ALL
@pytest.mark.parametrize("aggregate", ["mean", "sum", "mean_times_dim"])
@pytest.mark.parametrize("k", [1, 6])
def test_corrected_length_of_combinations(name, aggregate, k):
    """The root of the mean squared length is that of the gradient."""
    n = 40
    g = gradient(n)
    e = estimates(aggregate, draws(DISTRIBUTIONS[name], k, n, N // 2), g)
    correction = scaling_correction(aggregate, DISTRIBUTIONS[name], k, n)
    assert_mean((correction * e.norm(dim=1) / g.norm()) ** 2, 1.0)


@ALL
@pytest.mark.parametrize("k", [1, 6])
def test_corrected_length_of_the_projection(name, k):
    """The mean length is that of the gradient where U is uniformly distributed, else the root of the mean squared length.
    With n = 40, two of six Rademacher tangents are dependent with probability 15 * 2^-39."""
    n, distribution = 40, DISTRIBUTIONS[name]
    g = gradient(n)
    e = estimates("orthogonal", draws(distribution, k, n, N // 2), g)
    ratio = scaling_correction("orthogonal", distribution, k, n) * e.norm(dim=1) / g.norm()
    assert_mean(ratio if distribution.uniform_span else ratio**2, 1.0)


def test_corrected_estimate_is_the_estimate_scaled():
    x = gradient(9)

    def f(x):
        return (x**3).sum()

    for aggregate in ("orthogonal", "mean", "sum", "mean_times_dim"):
        _, plain = frog.forward_gradient(f, x, k=4, aggregate=aggregate)
        _, scaled = frog.forward_gradient(f, x, k=4, aggregate=aggregate, scaling_correction=True)
        factor = scaling_correction(aggregate, "normal", 4, 9)
        assert (scaled - factor * plain).norm() <= EXACT * scaled.norm()
