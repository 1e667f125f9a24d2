"""Every aggregation against its formula with explicit tangents in float64; what they do with ties, zeros and bad input."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_close64
from torch import Tensor

from frog_cuda import aggregate as agg
from frog_cuda import ops
from frog_cuda.tangents import Cone, Normal, Orthonormal, Rademacher, StandardBasis, Supplied, VaryingLength

NAMES = ["orthogonal", "mean", "sum", "mean_times_dim", "max", "max_normalized", "mean_of_top_k"]
SHAPES = [(1, 1), (1, 7), (4, 33), (7, 33), (16, 1025)]  # (k, n)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def direct(name: str, v: Tensor, d: Tensor) -> Tensor:
    """The estimate (n,) as the definition writes it: v (k, n) float64, d (k,)."""
    k, n = v.shape
    terms = [d[i] * v[i] for i in range(k)]
    scores = [abs(d[i]) / v[i].norm() if v[i].norm() > 0 else torch.tensor(-1.0) for i in range(k)]
    ranking = sorted(range(k), key=lambda i: -float(scores[i]))
    if name == "orthogonal":
        return torch.linalg.pinv(v) @ d  # V^T pinv, the least-squares solution of smallest norm: P_U g
    if name == "mean":
        return sum(terms) / k
    if name == "sum":
        return sum(terms)
    if name == "mean_times_dim":
        return sum(terms) * (n / k)
    if name == "max":
        return terms[max(range(k), key=lambda i: abs(float(d[i])))]
    if name == "max_normalized":
        return terms[ranking[0]]
    assert name == "mean_of_top_k"
    top = math.ceil(k / 2)
    return sum(terms[i] for i in ranking[:top]) / top


def shared(spec, v: Tensor, d: Tensor) -> tuple[Tensor, Tensor | None]:
    """Coefficients from tangents that all samples share."""
    return agg.resolve(spec).coefficients(v @ v.T, d, v.shape[1])


# Against the definitions


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k,n", SHAPES)
def test_one_gradient(name, k, n):
    v, g = random(k, n) * torch.linspace(0.2, 3, k, dtype=torch.float64)[:, None], random(n, seed=1)
    assert_close64(agg.combine(name, v, v @ g), direct(name, v, v @ g))
    c, rank = shared(name, v, v @ g)
    assert c.shape == (k,) and c.dtype == torch.float64
    assert_close64(c @ v, direct(name, v, v @ g))
    assert (rank is not None) == (name == "orthogonal")
    assert rank is None or (rank.shape == () and rank.item() == k)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k,n", SHAPES)
def test_a_gradient_for_each_sample(name, k, n):
    """Derivatives (k, B), one set of tangents; samples disagree on which tangent is best."""
    v, g = random(k, n) * torch.linspace(0.2, 3, k, dtype=torch.float64)[:, None], random(n, 5, seed=1)
    expected = torch.stack([direct(name, v, v @ g[:, b]) for b in range(5)])
    assert_close64(agg.combine(name, v, v @ g), expected)
    c, rank = shared(name, v, v @ g)
    assert c.shape == (k, 5)
    assert_close64(c.T @ v, expected)
    assert rank is None or rank.shape == ()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k,n", SHAPES)
def test_tangents_for_each_sample(name, k, n):
    """Derivatives (k, B), Gram (B, k, k)."""
    v, g = random(5, k, n), random(5, n, seed=1)
    d = torch.einsum("bkn,bn->kb", v, g)
    c, rank = agg.resolve(name).coefficients(v @ v.mT, d, n)
    assert c.shape == (k, 5)
    expected = torch.stack([direct(name, v[b], d[:, b]) for b in range(5)])
    assert_close64(torch.einsum("kb,bkn->bn", c, v), expected)
    assert rank is None or (rank.shape == (5,) and rank.eq(k).all())


@pytest.mark.parametrize("name", NAMES)
def test_no_samples(name):
    v = random(3, 7)
    assert agg.combine(name, v, v.new_zeros(3, 0)).shape == (0, 7)
    c, _ = agg.resolve(name).coefficients(v.new_zeros(0, 3, 3), v.new_zeros(3, 0), 7)
    assert c.shape == (3, 0)


@pytest.mark.parametrize("name", NAMES)
def test_non_contiguous(name):
    v, g = random(9, 4).T, random(5, 9, seed=1).T
    assert not v.is_contiguous() and not g.is_contiguous()
    assert_close64(agg.combine(name, v, v @ g), agg.combine(name, v.contiguous(), v @ g))


@pytest.mark.parametrize("name", ["mean", "sum", "mean_times_dim"])
def test_combinations_need_no_gram(name):
    v, g = random(4, 9), random(9, seed=1)
    how = agg.resolve(name)
    assert not how.needs_gram
    c, _ = how.coefficients(None, v @ g, 9)
    assert_close64(c @ v, direct(name, v, v @ g))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(name, dtype):
    """The result has the tangents' dtype. Coefficients are computed in float64 and rounded once, products summed by PyTorch:
    each of k terms is off by two roundings, at most k 2 eps/2 of the largest term in total, and the sum by one more."""
    v = random(4, 33).to(dtype)
    d = v.double() @ random(33, seed=1)
    for derivatives in (d, d.unsqueeze(1)):
        e = agg.combine(name, v, derivatives)
        assert e.dtype == dtype
        expected = direct(name, v.double(), d)
        c, _ = shared(name, v.double(), d)
        largest = (c.abs()[:, None] * v.double().abs()).sum(0).max()
        assert (e.double().flatten() - expected).abs().max() <= 2 * torch.finfo(dtype).eps * largest
    assert not torch.equal(e.flatten().double(), expected)  # bits were lost: the bound was put to the test


# Choosing among tangents


def test_max_looks_at_derivatives_and_max_normalized_at_cosines():
    v = torch.tensor([[10.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    g = torch.tensor([1.0, 5.0], dtype=torch.float64)  # d = (10, 5), cosines in proportion 1 : 5
    assert agg.combine("max", v, v @ g).tolist() == [100.0, 0.0]
    assert agg.combine("max_normalized", v, v @ g).tolist() == [0.0, 5.0]
    assert agg.combine("max", v, -(v @ g)).tolist() == [-100.0, 0.0]


@pytest.mark.parametrize("name", ["max", "max_normalized"])
def test_a_tie_takes_exactly_one(name):
    v = torch.eye(3, 5, dtype=torch.float64)
    for d in (torch.tensor([2.0, -2.0, 2.0]), torch.zeros(3), torch.tensor([[1.0, 3.0], [1.0, 3.0], [0.5, -3.0]])):
        c, _ = shared(name, v, d.double())
        best = d.abs().max(0).values
        assert torch.equal(c.abs().sum(0), best.double())  # one tangent's, not the sum over the tied ones
        assert ((c == d.double()) | (c == 0)).all()


def test_mean_of_top_k_with_a_tie_takes_exactly_top():
    v = torch.eye(4, 6, dtype=torch.float64)
    c, _ = shared(agg.MeanOfTopK(3), v, torch.ones(4, dtype=torch.float64))
    assert sorted(c.tolist()) == pytest.approx([0.0, 1 / 3, 1 / 3, 1 / 3], abs=1e-15)


@pytest.mark.parametrize("top", [1, 2, 5, 6, 100])
def test_mean_of_top_k(top):
    """More than k means all k; all k is the mean; one is max_normalized."""
    v, g = random(6, 20), random(20, 3, seed=1)
    d = v @ g
    score = d.abs() / v.norm(dim=1)[:, None]
    expected = torch.zeros(3, 20, dtype=torch.float64)
    for b in range(3):
        for i in score[:, b].argsort(descending=True)[:top]:
            expected[b] += d[i, b] * v[i] / min(top, 6)
    actual = agg.combine(agg.MeanOfTopK(top), v, d)
    assert_close64(actual, expected)
    if top == 1:
        assert torch.equal(actual, agg.combine("max_normalized", v, d))
    if top >= 6:
        assert_close64(actual, agg.combine("mean", v, d))


@pytest.mark.parametrize("name", NAMES)
def test_zero_length_tangents_change_nothing_but_counts(name):
    """Derivative 0, direction undefined: no NaN. The projection drops them; means count them."""
    v, g = random(3, 9), random(9, seed=1)
    padded = torch.cat([torch.zeros(1, 9, dtype=torch.float64), v, torch.zeros(2, 9, dtype=torch.float64)])
    actual = agg.combine(name, padded, padded @ g)
    assert actual.isfinite().all()
    assert_close64(actual, direct(name, padded, padded @ g))
    alone = agg.combine(name, v, v @ g)
    factor = {"mean": 3 / 6, "mean_times_dim": 3 / 6}.get(name, 1.0)
    if name != "mean_of_top_k":  # which takes 3 of 6 here, 2 of 3 there
        assert_close64(actual, factor * alone)
    if name == "orthogonal":
        assert shared(name, padded, padded @ g)[1].item() == 3


@pytest.mark.parametrize("name", NAMES)
def test_only_zero_length_tangents(name):
    v = torch.zeros(3, 5, dtype=torch.float64)
    assert torch.equal(agg.combine(name, v, torch.zeros(3, dtype=torch.float64)), torch.zeros(5, dtype=torch.float64))


# The projection


def test_dependent_tangents_are_dropped():
    v = random(3, 9)
    g = random(9, 4, seed=1)
    doubled = torch.cat([v, 2 * v, v[:1] - 3 * v[1:2]])
    c, rank = shared("orthogonal", doubled, doubled @ g)
    assert rank.item() == 3
    assert (c != 0).sum(0).tolist() == [3, 3, 3, 3]
    assert_close64(c.T @ doubled, agg.combine("orthogonal", v, v @ g))


@pytest.mark.parametrize("spec,dtype,kept", [
    (agg.Orthogonal(), torch.float64, 2),  # default 1e-13
    (agg.Orthogonal(), torch.float32, 1),  # default 1e-7: such an angle is within the derivatives' rounding errors
    (agg.Orthogonal(), torch.bfloat16, 1),
    (agg.Orthogonal(rtol=1e-7), torch.float64, 1),
    (agg.Orthogonal(rtol=1e-11), torch.float32, 2),
    (agg.Orthogonal(rtol=0), torch.float32, 2),
])  # fmt: skip
def test_rtol(spec, dtype, kept):
    """Two tangents at an angle of 1e-5: the second is at squared relative distance 1e-10 from the first."""
    v = torch.tensor([[3.0, 0.0, 0.0], [5.0, 5e-5, 0.0]], dtype=torch.float64)
    g = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    c, rank = spec.coefficients(v @ v.T, v @ g, 3, dtype)
    assert rank.item() == kept
    expected = torch.tensor([1.0, 2.0 if kept == 2 else 0.0, 0.0], dtype=torch.float64)
    # one part in 1e-10 of the Gram matrix decides on the second element: 1e-16 / 1e-10, and 1e-5 where it is left out
    assert (c @ v - expected).abs().max() <= (1e-5 if kept == 2 else 3e-5)


def test_combine_takes_rtol_from_the_derivatives_dtype():
    v = torch.tensor([[3.0, 0.0], [5.0, 5e-5]], dtype=torch.float64)
    g = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert agg.combine("orthogonal", v, v @ g)[1].item() == pytest.approx(2.0, abs=1e-5)
    assert agg.combine("orthogonal", v, (v @ g).float())[1].abs().item() <= 1e-4


@pytest.mark.parametrize("rtol", [-1e-9, 1, math.nan, math.inf, "1e-7", True])
def test_rtol_out_of_range(rtol):
    with pytest.raises(ValueError, match=r"rtol is .*expected a number in \[0, 1\), or None"):
        agg.Orthogonal(rtol=rtol)


# Names, objects, callables


def test_names_and_objects_mean_the_same():
    objects = [agg.Orthogonal(), agg.Mean(), agg.Sum(), agg.MeanTimesDim(), agg.Max(), agg.MaxNormalized(), agg.MeanOfTopK()]
    assert [agg.resolve(name) for name in NAMES] == objects
    for how in objects:
        assert agg.resolve(how) is how


def test_custom_callable():
    """It gets what it is given, and its answer is the answer."""
    v, d = random(3, 7), random(3, seed=1)
    seen = []

    def median(tangents: Tensor, derivatives: Tensor) -> Tensor:
        seen.append((tangents, derivatives))
        return (derivatives[:, None] * tangents).median(0).values

    assert agg.resolve(median) is median
    assert torch.equal(agg.combine(median, v, d), (d[:, None] * v).median(0).values)
    assert seen[0][0] is v and seen[0][1] is d


def test_unknown_name_lists_the_accepted():
    with pytest.raises(ValueError, match="aggregate is 'frog'; accepted names are " + ", ".join(NAMES)):
        agg.resolve("frog")


def test_a_class_is_no_object():
    with pytest.raises(TypeError, match=r"aggregate is the class MeanOfTopK; expected an object: MeanOfTopK\(\)"):
        agg.resolve(agg.MeanOfTopK)


@pytest.mark.parametrize("spec", [None, 3, ["mean"], torch.ones(3)])
def test_other_types(spec):
    with pytest.raises(TypeError, match=f"aggregate is of type {type(spec).__name__}; accepted are a name"):
        agg.resolve(spec)


@pytest.mark.parametrize("top", [0, -1, 2.0, True, "2"])
def test_top_out_of_range(top):
    with pytest.raises(ValueError, match="top is .*expected an integer >= 1"):
        agg.MeanOfTopK(top)


@pytest.mark.parametrize("v,d", [
    (torch.ones(2, 3), torch.ones(3)),
    (torch.ones(2, 3), torch.ones(2, 1, 1)),
    (torch.ones(2, 3), torch.ones(())),
    (torch.ones(2, 3, 1), torch.ones(2)),
    (torch.ones(3), torch.ones(3)),
    (torch.ones(0, 3), torch.ones(0)),
])  # fmt: skip
def test_shapes_that_do_not_fit(v, d):
    with pytest.raises(ValueError, match=r"have shapes .*expected \(k, n\), and \(k,\) or \(k, B\), with k >= 1"):
        agg.combine("mean", v, d)


@pytest.mark.parametrize("spec", ["mean", "orthogonal", lambda v, d: v[0]])
def test_types_that_do_not_fit(spec):
    with pytest.raises(TypeError, match="tangents is list; expected a floating point tensor"):
        agg.combine(spec, [[1.0]], torch.ones(1))
    with pytest.raises(TypeError, match="tangents is torch.int64; expected a floating point tensor"):
        agg.combine(spec, torch.ones(2, 3, dtype=torch.int64), torch.ones(2))
    with pytest.raises(TypeError, match="derivatives is torch.int64; expected a floating point tensor"):
        agg.combine(spec, torch.ones(2, 3), torch.ones(2, dtype=torch.int64))


def test_negative_gram_is_refused():
    with pytest.raises(RuntimeError, match="negative or NaN diagonal"):
        agg.Orthogonal().coefficients(-torch.eye(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64), 3)


# Lengths


def test_mean_chi_known_values():
    """E chi_1 = sqrt(2/pi), E chi_2 = sqrt(pi/2), E chi_3 = 2 sqrt(2/pi), E chi_4 = 3/2 sqrt(pi/2)."""
    expected = [math.sqrt(2 / math.pi), math.sqrt(math.pi / 2), 2 * math.sqrt(2 / math.pi), 1.5 * math.sqrt(math.pi / 2)]
    assert [agg.mean_chi(k) for k in (1, 2, 3, 4)] == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("k", [1, 2, 50, 98, 99, 100, 101, 1000, 10**6, 10**9, 10**12])
def test_mean_chi_recurrence(k):
    """E chi_k E chi_{k+1} = k, from Gamma(x + 1) = x Gamma(x). Crosses the switch to the series at k = 100."""
    assert agg.mean_chi(k) * agg.mean_chi(k + 1) == pytest.approx(k, rel=1e-12)
    # Jensen: below the root mean square; variance of chi below 1/2
    assert k - 0.5 <= agg.mean_chi(k) ** 2 * (1 + 1e-12) and agg.mean_chi(k) ** 2 < k
    assert agg.mean_chi(k) < agg.mean_chi(k + 1)


def test_scaling_correction_by_hand():
    """n = 4, k = 2. Mean of normal tangents: k (n + k + 1) / k^2 = 14/4; Rademacher 2 * 5; orthonormal: half of |g|^2."""
    assert agg.scaling_correction("mean", Normal(), 2, 4) == pytest.approx(math.sqrt(4 / 14))
    assert agg.scaling_correction("sum", Rademacher(), 2, 4) == pytest.approx(math.sqrt(1 / 10))
    assert agg.scaling_correction("sum", Orthonormal(), 2, 4) == pytest.approx(math.sqrt(2))
    assert agg.scaling_correction("mean_times_dim", Orthonormal(), 2, 4) == pytest.approx(math.sqrt(2) / 2)
    assert agg.scaling_correction("orthogonal", StandardBasis(), 2, 4) == pytest.approx(math.sqrt(2))
    # E chi_2 = sqrt(pi/2), E chi_4 = 3/2 sqrt(pi/2)
    assert agg.scaling_correction("orthogonal", Normal(), 2, 4) == pytest.approx(1.5)
    assert agg.scaling_correction(agg.Orthogonal(), "normal", 2, 4) == pytest.approx(1.5)


@pytest.mark.parametrize("distribution", [Normal(), Rademacher(), Cone(20), VaryingLength()])
def test_nothing_to_correct_when_the_projection_is_exact(distribution):
    for k in (6, 7, 60):
        assert agg.scaling_correction("orthogonal", distribution, k, 6) == 1.0


def test_scaling_correction_in_large_dimensions():
    """No overflow and no lost digits: sqrt(n / k) up to 1 + 1/(4k)."""
    for n in (10**6, 10**9, 10**12):
        correction = agg.scaling_correction("orthogonal", "normal", 16, n)
        assert correction == pytest.approx(math.sqrt(n) / agg.mean_chi(16), rel=1 / n)


@pytest.mark.parametrize("name", ["max", "max_normalized", "mean_of_top_k"])
def test_no_closed_form(name):
    kind = type(agg.resolve(name)).__name__
    accepted = "orthogonal, mean, sum and mean_times_dim"
    with pytest.raises(ValueError, match=f"no closed form for {kind}; it exists for {accepted}"):
        agg.scaling_correction(name, Normal(), 2, 4)


@pytest.mark.parametrize("k,n", [(2, 4), (4, 4), (5, 4)])
@pytest.mark.parametrize("name", ["orthogonal", "mean", "sum", "mean_times_dim"])
def test_no_closed_form_for_supplied_tangents(name, k, n):
    """They may be dependent, so not even the projection of k >= n is known to be exact."""
    with pytest.raises(ValueError, match="no closed-form length correction for supplied tangents"):
        agg.scaling_correction(name, Supplied(torch.ones(k, n)), k, n)


def test_no_closed_form_for_a_callable():
    with pytest.raises(ValueError, match="no closed form for a custom aggregation"):
        agg.scaling_correction(lambda v, d: v[0], Normal(), 2, 4)


def test_scaling_correction_checks_its_arguments():
    with pytest.raises(ValueError, match="tangents is 'gaussian'; accepted names are normal"):
        agg.scaling_correction("mean", "gaussian", 2, 4)
    with pytest.raises(ValueError, match="k is 0; expected an integer >= 1"):
        agg.scaling_correction("mean", "normal", 0, 4)
    with pytest.raises(TypeError, match="n is 4.0 of type float; expected an integer >= 1"):
        agg.scaling_correction("mean", "normal", 2, 4.0)
    with pytest.raises(ValueError, match="k is 5, but only 4 orthonormal tangents fit"):
        agg.scaling_correction("mean", "orthonormal", 5, 4)


def test_gram_of_the_kernel_serves_the_projection():
    """float32 tangents: the kernel's float64 Gram of what was rounded is the exact one."""
    v = random(5, 1025).float()
    assert_close64(ops.gram(v), v.double() @ v.double().T)
