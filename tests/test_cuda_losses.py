"""The CUDA kernels of cross_entropy_jvp, mse_jvp and bce_jvp, run on the host, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from cuda_on_cpu.client import Kernels
from cuda_on_cpu.pairs import NAMES, PAIRS, check, given, name_of, randn, result
from torch import Tensor

from frog_cuda import reference

INF, NAN = float("inf"), float("nan")
each_pair = pytest.mark.parametrize("dtype, tangent_dtype", PAIRS, ids=lambda t: NAMES[t])
skewed = pytest.mark.parametrize("skew", [False, True], ids=["aligned", "skewed"])


@pytest.fixture(scope="module")
def kernels():
    kernels = Kernels("losses")
    yield kernels
    kernels.close()


def uniform(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)


# ---- cross entropy

OPTIONS = [{}, {"weight": True}, {"label_smoothing": 0.1}, {"weight": True, "label_smoothing": 1.0, "ignore_index": 1}]


def cross_entropy(kernels, x, dx, target, weight=None, ignore_index=-100, label_smoothing=0.0, skew=False, seed=0):
    (rows, classes), k = x.shape, dx.shape[0]
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    arguments = [*given((x, dx), skew), target, None if weight is None else weight.to(compute)]
    results = [result((rows,), x.dtype, skew), result((k, rows), dx.dtype, skew)]
    sizes = (rows, classes, k, ignore_index, label_smoothing)
    return kernels.run(f"cross_entropy_{name_of(x.dtype, dx.dtype)}", *arguments, *results, *sizes, seed=seed)


def case(rows, count, dtype, tangent_dtype, options, k=3):
    x, dx = 3 * randn(rows, count, dtype=dtype, seed=1), randn(k, rows, count, dtype=tangent_dtype, seed=2)
    target = torch.randint(count, (rows,), generator=torch.Generator().manual_seed(rows + count))
    if rows > 2:
        target[::3] = options.get("ignore_index", -100)
        target[1] = 0  # at least one is counted
    how = options | ({"weight": uniform(count, dtype=dtype) + 0.5} if "weight" in options else {})
    return x, dx, target, how


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ", ".join(o) or "plain")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rows, count", [(1, 7), (7, 33), (33, 10), (5, 1025), (3, 1040), (3, 9000), (2, 4101), (0, 5)])
def test_cross_entropy(kernels, rows, count, dtype, options):
    x, dx, target, how = case(rows, count, dtype, dtype, options)
    check(cross_entropy(kernels, x, dx, target, **how), reference.cross_entropy_jvp(x, dx, target, **how))


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[3]], ids=lambda o: ", ".join(o) or "plain")
@each_pair
@skewed
@pytest.mark.parametrize("count", [40, 8200])
def test_cross_entropy_of_each_type(kernels, dtype, tangent_dtype, options, skew, count):
    x, dx, target, how = case(4, count, dtype, tangent_dtype, options)
    got = cross_entropy(kernels, x, dx, target, skew=skew, **how)
    check(got, reference.cross_entropy_jvp(x, dx, target, **how))


@pytest.mark.parametrize("count", [10, 600, 9000])
@pytest.mark.parametrize("k", [1, 16])
def test_cross_entropy_and_numbers_of_tangents(kernels, k, count):
    x, dx, target, how = case(4, count, torch.float32, torch.float32, OPTIONS[2], k)
    first, other = (cross_entropy(kernels, x, dx, target, seed=seed, **how) for seed in (0, 1))
    check(first, reference.cross_entropy_jvp(x, dx, target, **how))
    assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("count", [5, 9000])
def test_ignored_samples_are_exactly_zero(kernels, count):
    x, dx = randn(3, count, dtype=torch.float32), randn(2, 3, count, dtype=torch.float32)
    x[1], dx[:, 1, 2] = NAN, INF
    loss, dloss = cross_entropy(kernels, x, dx, torch.tensor([2, -100, 4]))
    assert loss[1] == 0 and (dloss[:, 1] == 0).all()
    assert (loss[[0, 2]] > 0).all() and (dloss[:, [0, 2]] != 0).all()


@pytest.mark.parametrize("count", [5, 9000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_target_that_is_no_class_gives_nan(kernels, count, smoothing):
    x, dx = randn(4, count, dtype=torch.float32), randn(2, 4, count, dtype=torch.float32)
    loss, dloss = cross_entropy(kernels, x, dx, torch.tensor([0, -1, count, 1]), label_smoothing=smoothing)
    assert loss.isnan().tolist() == [False, True, True, False]
    assert dloss.isnan().tolist() == [[False, True, True, False]] * 2


@pytest.mark.parametrize("mean", [True, False], ids=["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@each_pair
@pytest.mark.parametrize("rows, k", [(1, 1), (7, 3), (1025, 2), (0, 2)])
def test_reduction(kernels, rows, k, weighted, mean, dtype, tangent_dtype):
    loss, dloss = uniform(rows, dtype=dtype), 1 + randn(k, rows, dtype=tangent_dtype, seed=1)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    weight = uniform(5, dtype=compute) + 0.5 if weighted else None
    target = torch.arange(rows) % 5
    target[1::4] = 3
    loss[target == 3], dloss[:, target == 3] = 0, 0  # ignored ones
    results = [result((), dtype, False), result((k,), tangent_dtype, False)]
    name = f"reduce_losses_{name_of(dtype, tangent_dtype)}"
    got = kernels.run(name, loss, dloss, target, weight, *results, rows, 5, k, 3, mean)
    kept = target[target != 3]
    total = (torch.ones(len(kept)) if weight is None else weight[kept]).double().sum() if mean else 1
    if rows == 0 and mean:
        assert all(t.isnan().all() for t in got)
    else:
        check(got, [loss.double().sum() / total, dloss.double().sum(1) / total], shift=1.0 if rows == 0 else 0.0)


def test_cross_entropy_of_extreme_logits(kernels):
    x = torch.tensor([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0], [0.0, -INF, 2.0], [-INF, -INF, 1.0]])
    dx, target = randn(2, 4, 3, dtype=torch.float32), torch.tensor([0, 1, 0, 2])
    check(cross_entropy(kernels, x, dx, target), reference.cross_entropy_jvp(x, dx, target))
    impossible = torch.tensor([[0.0, -INF]])
    loss, _ = cross_entropy(kernels, impossible, dx[:, :1, :2].contiguous(), torch.tensor([1]))
    assert loss.item() == INF


# ---- squared error


@pytest.mark.parametrize("which", ["dinput", "dtarget", "both"])
@each_pair
@skewed
@pytest.mark.parametrize("shape", [(1,), (33,), (7, 40), (0, 5)], ids=str)
def test_mse(kernels, shape, which, dtype, tangent_dtype, skew):
    a, b = randn(*shape, dtype=dtype, seed=1), randn(*shape, dtype=dtype, seed=2)
    da = randn(3, *shape, dtype=tangent_dtype, seed=3) if which != "dtarget" else None
    db = randn(3, *shape, dtype=tangent_dtype, seed=4) if which != "dinput" else None
    results = [result(shape, dtype, skew), result((3, *shape), tangent_dtype, skew)]
    got = kernels.run(f"mse_{name_of(dtype, tangent_dtype)}", *given((a, b, da, db), skew), *results, a.numel(), 3)
    check(got, reference.mse_jvp(a, da, b, db))


# ---- binary cross entropy


def bce(kernels, x, dx, target, weight=None, pos_weight=None, with_logits=True, skew=False):
    arguments = given((x, target, weight, pos_weight, dx), skew)
    results = [result(x.shape, x.dtype, skew), result(dx.shape, dx.dtype, skew)]
    name = f"bce_{name_of(x.dtype, dx.dtype)}"
    return kernels.run(name, *arguments, *results, x.numel(), dx.shape[0], with_logits)


@pytest.mark.parametrize("with_logits", [True, False], ids=["logits", "probabilities"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@each_pair
@skewed
@pytest.mark.parametrize("shape", [(33,), (7, 40), (0, 5)], ids=str)
def test_bce(kernels, shape, weighted, with_logits, dtype, tangent_dtype, skew):
    x = 3 * randn(*shape, dtype=dtype, seed=1) if with_logits else uniform(*shape, dtype=dtype, seed=1)
    dx, target = randn(5, *shape, dtype=tangent_dtype, seed=2), uniform(*shape, dtype=dtype, seed=3)
    if not with_logits:  # where the clamps do nothing
        x = x * 0.9 + 0.05
    how = {"with_logits": with_logits}
    if weighted:
        how["weight"] = uniform(*shape, dtype=dtype, seed=5)
        if with_logits:
            how["pos_weight"] = 3 * uniform(*shape, dtype=dtype, seed=6)
    got = bce(kernels, x, dx, target, skew=skew, **how)
    check(got, reference.bce_jvp(x, dx, target, **how))


def test_bce_at_the_ends(kernels):
    x, target = torch.tensor([0.0, 1.0, 0.0, 1.0, 1e-30, 0.5]), torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.5])
    dx = torch.ones(1, 6)
    got, exact = bce(kernels, x, dx, target, with_logits=False), reference.bce_jvp(x, dx, target, with_logits=False)
    for a, e in zip(got, exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-6)
    x, target = torch.tensor([100.0, -100.0, 100.0, -100.0]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    dx = torch.ones(1, 4)
    check(bce(kernels, x, dx, target), reference.bce_jvp(x, dx, target))


def test_an_input_that_is_no_probability_gives_nan(kernels):
    x = torch.tensor([0.5, -0.1, 1.1, NAN])
    loss, dloss = bce(kernels, x, torch.ones(1, 4), torch.tensor([0.5, 0.0, 1.0, 0.5]), with_logits=False)
    assert loss.isnan().tolist() == [False, True, True, True]
    assert dloss[0].isnan().tolist() == [False, True, True, True]
