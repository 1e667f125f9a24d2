"""cholesky_project: the coefficients of the orthogonal projection, for every rank and conditioning."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close64, relative_error

from frog_cuda import ops, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def tangents(k: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(k, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def project(v: torch.Tensor, g: torch.Tensor, **how: float) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Coefficients (k, r), projection (n, r) and rank for tangents (k, n) and gradients (n, r)."""
    c, rank = ops.cholesky_project(v @ v.T, v @ g, **how)
    return c, v.T @ c, int(rank)


def exact_projection(v: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """P_U g by a QR decomposition of the tangents themselves, which no Gram matrix squares."""
    lengths = v.norm(dim=1, keepdim=True)
    unit = torch.where(lengths > 0, v / lengths, 0.0)
    _, singular, directions = torch.linalg.svd(unit, full_matrices=False)
    basis = directions[singular > 1e-6 * singular[0]] if len(v) else directions
    return basis.T @ (basis @ g)


@pytest.mark.parametrize("r", [1, 7, 33, 1025])
@pytest.mark.parametrize("k", [1, 2, 7, 33, 64, 65, 150])
def test_independent_tangents(k, r):
    v, g = tangents(k, 2 * k + 5), tangents(2 * k + 5, r, seed=1)
    c, projection, rank = project(v, g)
    assert rank == k and c.shape == (k, r) and c.dtype == torch.float64
    assert_close64(c, torch.linalg.pinv(v.T) @ g)
    assert_close64(projection, exact_projection(v, g))
    expected, expected_rank = reference.cholesky_project(v @ v.T, v @ g)
    assert_close64(c, expected)
    assert int(expected_rank) == rank


@pytest.mark.parametrize("k", [1, 7, 33, 65])
def test_as_many_tangents_as_dimensions_give_the_gradient_itself(k):
    v, g = tangents(k, k), tangents(k, 3, seed=1)
    _, projection, rank = project(v, g, rtol=0.0)
    assert rank == k
    # Squaring the condition number of V in its Gram matrix costs twice its digits
    assert relative_error(projection, g) < 1e-14 * torch.linalg.cond(v).item() ** 2


@pytest.mark.parametrize("k, n", [(2, 1), (7, 3), (33, 7), (64, 40), (80, 33)])
def test_more_tangents_than_dimensions(k, n):
    """The span is everything, so the projection is the gradient; the surplus tangents get coefficient 0."""
    v, g = tangents(k, n), tangents(n, 4, seed=1)
    c, projection, rank = project(v, g)
    assert rank == n
    assert (c.abs().sum(1) > 0).sum() == n
    assert relative_error(projection, g) < 1e-9


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [3, 0, 5, 1, 4, 2]])
def test_dependent_equal_and_zero_tangents(order):
    v = tangents(6, 20)
    v[1] = v[0]
    v[2] = v[0] - 3 * v[3]
    v[4] = 0
    v = v[order]
    g = tangents(20, 3, seed=1)
    c, projection, rank = project(v, g)
    assert rank == 3
    assert_close64(projection, exact_projection(v, g))
    assert not c[order.index(4)].any()
    expected, expected_rank = reference.cholesky_project(v @ v.T, v @ g)
    assert int(expected_rank) == 3
    assert_close64(v.T @ expected, projection)


def test_nothing_but_zero_tangents():
    c, rank = ops.cholesky_project(torch.zeros(3, 3), torch.zeros(3, 2))
    assert int(rank) == 0 and not c.any()


def test_lengths_of_tangents_do_not_matter():
    """P_U depends on the span alone (Flügel et al., section 3.4), so neither must its rank."""
    v, g = tangents(8, 30), tangents(30, 5, seed=1)
    lengths = torch.logspace(-12, 12, 8, dtype=torch.float64)[:, None]
    _, plain, _ = project(v, g)
    c, scaled, rank = project(lengths * v, g)
    assert rank == 8
    assert_close64(scaled, plain)
    assert_close64(c * lengths, torch.linalg.pinv(v.T) @ g)


def test_rtol_is_the_squared_sine_below_which_a_tangent_counts_as_dependent():
    for sine in (1e-2, 1e-3):
        v = torch.tensor([[1.0, 0.0], [(1 - sine**2) ** 0.5, sine]], dtype=torch.float64)
        g = torch.tensor([[2.0], [3.0]], dtype=torch.float64)
        _, projection, rank = project(v, g, rtol=sine**2 / 4)
        assert rank == 2 and relative_error(projection, g) < 1e-9
        _, projection, rank = project(v, g, rtol=sine**2 * 4)
        assert rank == 1
        assert_close64(projection, exact_projection(v[:1], g))


def test_rank_of_nearly_dependent_tangents_is_the_reference_rank():
    v = tangents(12, 50)
    for i, closeness in enumerate(torch.logspace(-1, -6, 6)):
        v[6 + i] = v[i] + closeness * v[6 + i]
    for rtol in (1e-4, 1e-7, 1e-9):
        g = v @ v.T
        _, rank = ops.cholesky_project(g, tangents(12, 1), rtol=rtol)
        _, expected = reference.cholesky_project(g, tangents(12, 1), rtol=rtol)
        assert int(rank) == int(expected)


@pytest.mark.parametrize("b, k, r", [(1, 1, 1), (7, 3, 5), (33, 16, 1), (5, 65, 7)])
def test_batches_are_independent_problems(b, k, r):
    v = torch.stack([tangents(k, k + 9, seed=s) for s in range(b)])
    if k > 1:
        v[-1, 1] = v[-1, 0]
    gram, d = v @ v.mT, torch.stack([tangents(k, r, seed=100 + s) for s in range(b)])
    c, rank = ops.cholesky_project(gram, d)
    assert c.shape == (b, k, r) and rank.shape == (b,) and rank.dtype == torch.int64
    for i in range(b):
        one, one_rank = ops.cholesky_project(gram[i], d[i])
        assert torch.equal(c[i], one) and rank[i] == one_rank and one_rank.shape == ()
    assert rank.tolist() == [k] * (b - 1) + [k - (k > 1)]


def test_empty_batch_and_no_right_hand_sides():
    c, rank = ops.cholesky_project(torch.empty(0, 3, 3), torch.empty(0, 3, 2))
    assert c.shape == (0, 3, 2) and rank.shape == (0,)
    c, rank = ops.cholesky_project(torch.eye(3), torch.empty(3, 0))
    assert c.shape == (3, 0) and int(rank) == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_solved_in_float64(dtype):
    v = tangents(5, 40)
    gram, d = (v @ v.T).to(dtype), (v @ tangents(40, 7, seed=1)).to(dtype)
    c, rank = ops.cholesky_project(gram, d)
    assert c.dtype == torch.float64 and int(rank) == 5
    assert_close64(c, torch.linalg.solve(gram.double(), d.double()))


def test_non_contiguous_arguments_are_read_right_and_left_alone():
    v = tangents(7, 30)
    gram, d = v @ v.T, v @ tangents(30, 5, seed=1)
    expected, _ = ops.cholesky_project(gram, d)
    wide = torch.zeros(7, 7, 2, dtype=torch.float64)
    wide[..., 0] = gram
    kept, kept_d = wide.clone(), d.clone()
    c, _ = ops.cholesky_project(wide[..., 0], d.T.contiguous().T)
    assert torch.equal(c, expected)
    assert torch.equal(wide, kept) and torch.equal(d, kept_d)
    # contiguous float64 is what the kernel works on: its factor must not end up in the argument
    kept = gram.clone()
    ops.cholesky_project(gram, d)
    assert torch.equal(gram, kept) and torch.equal(d, kept_d)


def test_same_bits_whatever_the_number_of_threads():
    v = torch.stack([tangents(9, 30, seed=s) for s in range(40)])
    gram, d = v @ v.mT, torch.stack([tangents(9, 3, seed=s) for s in range(40)])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, _ = ops.cholesky_project(gram, d)
        torch.set_num_threads(3)
        three, _ = ops.cholesky_project(gram, d)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, three)


EYE = torch.eye(3)
D = torch.ones(3, 2)


@pytest.mark.parametrize(
    "gram, d, rtol, message",
    [
        (torch.ones(3), D, 1e-7, r"gram has shape \(3,\), expected \(k, k\) or \(b, k, k\)"),
        (torch.ones(3, 4), D, 1e-7, r"gram has shape \(3, 4\)"),
        (torch.ones(0, 0), torch.ones(0, 2), 1e-7, r"gram has shape \(0, 0\)"),
        (EYE, torch.ones(3), 1e-7, r"derivatives has shape \(3,\), expected \(k, r\)"),
        (EYE, torch.ones(4, 2), 1e-7, r"derivatives has shape \(4, 2\)"),
        (EYE, torch.ones(1, 3, 2), 1e-7, r"derivatives has shape \(1, 3, 2\)"),
        (torch.stack([EYE, EYE]), torch.ones(3, 3, 2), 1e-7, r"derivatives has shape \(3, 3, 2\)"),
        (EYE, D, -0.1, "rtol is -0.1"),
        (EYE, D, 1.0, "rtol is 1"),
        (EYE, D, float("nan"), "rtol is nan"),
        (-EYE, D, 1e-7, "gram has a negative or NaN diagonal entry"),
        (EYE * float("nan"), D, 1e-7, "gram has a negative or NaN diagonal entry|NaN or infinite"),
        (torch.full((3, 3), float("inf")), D, 1e-7, "gram holds a NaN or infinite entry"),
        (EYE.long(), D, 1e-7, "gram has dtype Long"),
        (EYE, D.long(), 1e-7, "derivatives has dtype Long"),
        (EYE.to(torch.complex64), D, 1e-7, "gram has dtype ComplexFloat"),
    ],
)
def test_bad_input(gram, d, rtol, message):
    with pytest.raises(RuntimeError, match=message):
        ops.cholesky_project(gram, d, rtol=rtol)


def test_a_derivative_that_is_not_finite_stays_visible():
    """Not an error here: the caller checks derivatives and names the loss. It must not turn into a finite coefficient."""
    d = torch.tensor([[1.0, float("nan")], [2.0, 3.0], [0.0, 1.0]])
    c, _ = ops.cholesky_project(EYE, d)
    assert c[:, 0].isfinite().all() and c[0, 1].isnan()
