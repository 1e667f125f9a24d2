"""ForwardGradient: equal to the simulated estimate, whatever the model, the tangents and the aggregation."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close32, assert_close64
from torch import nn

import frog_cuda as frog

K = 5
DISTRIBUTIONS = [
    "normal",
    "rademacher",
    "sphere",
    "orthonormal",
    frog.tangents.Cone(30),
    "standard_basis",
    frog.tangents.VaryingLength(0.1, 3),
]


def per_sample(output, target):
    return F.cross_entropy(output, target, reduction="none")


def mlp(dtype=torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 33), nn.ReLU(), nn.Linear(33, 9), nn.Tanh(), nn.Linear(9, 5)).to(dtype)


def batch(rows=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 7, generator=generator, dtype=dtype), torch.randint(0, 5, (rows,), generator=generator)


def grads(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check(fg: frog.ForwardGradient, x, y) -> frog.simulated.Simulated:
    """Forward mode gives what backprop and the same tangents give: loss, derivatives, coefficients and gradients."""
    fg.model.zero_grad()
    simulated = frog.simulate(fg, x, y)
    loss = fg(x, y)
    assert_close64(loss, simulated.loss)
    assert_close64(fg.last.directional_derivatives, simulated.directional_derivatives)
    found = grads(fg.model)
    assert set(found) == set(simulated.gradients)
    largest = max(g.abs().max() for g in simulated.gradients.values())
    for name, g in found.items():  # relative to the whole gradient: a parameter's own may be zero up to rounding
        assert (g - simulated.gradients[name]).abs().max() <= 1e-10 * largest, name
    return simulated


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
@pytest.mark.parametrize("aggregate", ["orthogonal", "mean", "max_normalized"])
@pytest.mark.parametrize("loss_fn", [per_sample, F.cross_entropy], ids=["per-sample", "scalar"])
@pytest.mark.parametrize(
    "options",
    [
        dict(perturb="weight"),
        dict(perturb="weight", chunk_size=2),
        dict(perturb="activity"),
        dict(perturb="activity", chunk_size=2),
        dict(perturb="activity", per_sample=False),
        dict(perturb="activity", per_sample=False, shared_across_batch=False),
        dict(perturb="activity", shared_across_batch=False),
    ],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()),
)
def test_equals_the_simulated_estimate(distribution, aggregate, loss_fn, options):
    fg = frog.ForwardGradient(mlp(), loss_fn, k=K, tangents=distribution, aggregate=aggregate, seed=3, **options)
    if distribution == "standard_basis" and options == dict(perturb="activity", shared_across_batch=False):
        with pytest.raises(ValueError, match="standard basis"):
            fg(*batch())
        return
    fg.step = 4
    for _ in range(2):  # a second step may use what the first one learned of the model
        check(fg, *batch())


@pytest.mark.parametrize("aggregate", list(frog.aggregate._NAMES))
@pytest.mark.parametrize("perturb", ["weight", "activity"])
def test_every_aggregation(perturb, aggregate):
    for k in (1, K):
        fg = frog.ForwardGradient(mlp(), per_sample, k=k, perturb=perturb, aggregate=aggregate)
        for _ in range(2):
            check(fg, *batch())


@pytest.mark.parametrize("perturb", ["weight", "activity"])
def test_one_projection_over_all_layers(perturb):
    """G and d belong to the concatenation of all layers: the estimate is the projection of the whole gradient."""
    model, (x, y) = mlp(), batch(1)
    fg = frog.ForwardGradient(model, per_sample, k=K, perturb=perturb, seed=1)
    simulated = check(fg, x, y)
    if perturb == "weight":
        n = sum(p.numel() for p in model.parameters())
        v = frog.tangents.sample("normal", K, n, seed=1, dtype=torch.float64)
        g = torch.cat([simulated.true_gradients[name].flatten() for name, _ in model.named_parameters()])
        estimate = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert_close64(estimate, v.T @ torch.linalg.solve(v @ v.T, v @ g), 1e-9)
    else:
        n = 33 + 9 + 5
        v = frog.tangents.sample("normal", K, n, seed=1, dtype=torch.float64)
    assert fg.last.n == n and fg.last.gram.shape == (K, K) and int(fg.last.rank) == K
    assert_close64(fg.last.gram, v @ v.T)


@pytest.mark.parametrize("perturb", ["weight", "activity"])
def test_exact_with_as_many_tangents_as_dimensions(perturb):
    model = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2)).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    fg = frog.ForwardGradient(model, lambda o, t: ((o - t) ** 2).sum(1), k=30, perturb=perturb)
    simulated = check(fg, x, y)
    assert int(fg.last.rank) == fg.last.n if perturb == "activity" else fg.last.n == 26
    for name, p in model.named_parameters():
        assert_close64(p.grad, simulated.true_gradients[name], 1e-7)  # conditioning of 26 random tangents in 26 dimensions


class Zoo(nn.Module):
    """Convolutions, both norms, dropout, a tied weight, a frozen layer, one that takes no part, an in-place activation."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.bn, self.c2 = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, stride=2)
        self.ln, self.fc, self.drop = nn.LayerNorm(6), nn.Linear(6, 6), nn.Dropout(0.3)
        self.unused, self.frozen = nn.Linear(3, 3), nn.Linear(6, 6).requires_grad_(False)
        self.fc2, self.head = nn.Linear(6, 6), nn.Linear(6, 5, bias=False)
        self.fc2.weight = self.fc.weight

    def forward(self, x):
        x = self.ln(self.c2(F.relu(self.bn(self.c1(x)), inplace=True)).mean((2, 3)))
        return self.head(self.fc2(x + self.frozen(self.drop(torch.tanh(self.fc(x))))))


ZOO_OPTIONS = [
    dict(perturb="weight"),
    dict(perturb="weight", chunk_size=2),
    dict(perturb="activity", per_sample=False, shared_across_batch=False),
    dict(perturb="activity", per_sample=False, chunk_size=3),
    dict(perturb="activity", per_sample=False, layers=[["c1", "bn"], ["c2", "ln"], ["fc"], ["head"]]),
    dict(perturb="activity", layers=["fc", "head"]),
    dict(perturb="weight", layers=lambda name, module: name.startswith("c")),
]


@pytest.mark.parametrize("options", ZOO_OPTIONS, ids=range(len(ZOO_OPTIONS)))
def test_any_model(options):
    torch.manual_seed(0)
    model = Zoo().double()
    reference = copy.deepcopy(model)
    x, y = torch.randn(8, 1, 8, 8, dtype=torch.float64), torch.randint(0, 5, (8,))
    start = torch.get_rng_state()
    fg = frog.ForwardGradient(model, per_sample, k=K, **options)
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    frog.simulate(fg, x, y)
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers()), "simulate moved a buffer"
    assert torch.equal(torch.get_rng_state(), start), "simulate drew random numbers"
    check(fg, x, y)
    after = torch.get_rng_state()
    torch.set_rng_state(start)
    reference(x)
    assert torch.equal(torch.get_rng_state(), after), "not the random numbers of one plain pass"
    for (name, b), (_, expected) in zip(model.named_buffers(), reference.named_buffers(), strict=True):
        assert torch.allclose(b, expected), f"{name} was not updated exactly once"
    assert model.unused.weight.grad is None and model.frozen.weight.grad is None
    assert all(type(p) is nn.Parameter for p in model.parameters())
    for (name, p), (_, expected) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert torch.equal(p, expected), f"{name} changed"


@pytest.mark.parametrize("options", ZOO_OPTIONS, ids=range(len(ZOO_OPTIONS)))
def test_simulate_leaves_the_latest_estimate(options):
    """Of the same batch, whose shapes fit, and of a smaller one."""
    torch.manual_seed(0)
    fg = frog.ForwardGradient(Zoo().double(), per_sample, k=K, aggregate="mean", **options)
    x, y = torch.randn(8, 1, 8, 8, dtype=torch.float64), torch.randint(0, 5, (8,))
    fg.derivatives(x, y)
    expected = fg.gradients()
    for rows in (8, 3):
        simulated = frog.simulate(fg, x[:rows], y[:rows])
        assert all(torch.equal(g, expected[name]) for name, g in fg.gradients().items())
    fg.derivatives(x[:3], y[:3])
    assert_close64(simulated.estimate.gram, fg.last.gram)


@pytest.mark.parametrize("options", ZOO_OPTIONS, ids=range(len(ZOO_OPTIONS)))
def test_the_gram_matrix_of_an_earlier_call(options):
    """Replayed where it can be, and never that of a later call."""
    torch.manual_seed(0)
    fg, same = (frog.ForwardGradient(Zoo().double(), per_sample, k=K, aggregate="mean", **options) for _ in range(2))
    x, y = torch.randn(8, 1, 8, 8, dtype=torch.float64), torch.randint(0, 5, (8,))
    fg(x, y)
    first = fg.last
    fg(x, y)
    same(x, y)
    if options["perturb"] == "weight":
        assert torch.equal(first.gram, same.last.gram)
    else:
        with pytest.raises(RuntimeError, match="gram: a later call took the place of these activities"):
            first.gram  # noqa: B018
    assert not torch.equal(fg.last.gram, same.last.gram)


def test_groups_get_layer_local_gradients():
    """A group's inner parameters get the gradient that backprop inside the group gives from its output's estimate."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 5)).double()
    x, y = batch()
    fg = frog.ForwardGradient(model, per_sample, k=3, layers=[["0", "2"], ["4"]])
    check(fg, x, y)
    c = fg.last.coefficients  # (k, B)
    v = frog.tangents.sample("normal", 3, 4 + 5, dtype=torch.float64)
    inner = model[:3]
    model.zero_grad()
    inner(x).backward(c.T @ v[:, :4] / len(x))
    expected = [p.grad.clone() for p in inner.parameters()]
    model.zero_grad()
    fg.accumulate_()
    for p, e in zip(inner.parameters(), expected, strict=True):
        assert_close64(p.grad, e)


def test_batch_norm_cross_terms():
    """Per-sample derivatives miss what batch statistics mix between samples; one derivative for the batch does not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)

    def loss_fn(output, target):
        return ((output - target) ** 2).sum(1)

    exact = frog.ForwardGradient(model, loss_fn, k=50, per_sample=False, shared_across_batch=False)
    simulated = check(exact, x, y)
    for name, p in model.named_parameters():
        assert (p.grad - simulated.true_gradients[name]).abs().max() < 1e-7
    model.zero_grad()
    frog.ForwardGradient(model, loss_fn, k=50)(x, y)
    assert (model[0].weight.grad - simulated.true_gradients["0.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize("perturb", ["weight", "activity"])
def test_float32_and_low_precision_tangents(perturb):
    x, y = batch(33)
    exact = frog.simulate(frog.ForwardGradient(mlp(), per_sample, k=K, perturb=perturb), x, y)
    single = frog.ForwardGradient(mlp(torch.float32), per_sample, k=K, perturb=perturb)
    single(x.float(), y)
    assert single.last.directional_derivatives.dtype == torch.float64
    assert_close32(single.last.directional_derivatives.float(), exact.directional_derivatives)
    low = frog.ForwardGradient(mlp(torch.float32), per_sample, k=K, perturb=perturb, tangent_dtype=torch.bfloat16)
    low(x.float(), y)
    for name, p in low.model.named_parameters():
        assert p.grad.dtype == torch.float32
        cosine = F.cosine_similarity(p.grad.double().flatten(), exact.gradients[name].flatten(), 0)
        assert cosine > 0.99, name  # bfloat16 keeps 8 bits; five layers of rounding stay within a few per cent


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("group", [None, [["0", "1", "2"], ["4"]]], ids=["innermost", "groups"])
def test_estimates_below_what_float16_can_hold(shared, group):
    """Tangents are of size one; a mean over many losses leaves each activity a gradient far below float16's smallest number."""
    x, y = batch(33)
    options = dict(k=K, shared_across_batch=shared, layers=group)
    grads: list[torch.Tensor] = []
    coefficients = torch.empty(0)
    for dtype in (None, torch.float16):
        model = mlp(torch.float32)
        fg = frog.ForwardGradient(model, lambda o, t: 1e-6 * per_sample(o, t), tangent_dtype=dtype, **options)
        fg.derivatives(x.float(), y)
        if grads:  # derivatives were rounded all the way; what follows is not
            fg.last.base_coefficients.copy_(coefficients)
        coefficients = fg.last.base_coefficients.clone()
        fg.accumulate_()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]).double())
    assert grads[0].abs().max() < 1e-5
    assert F.cosine_similarity(*grads, 0) > 1 - 1e-5


@pytest.mark.parametrize("perturb", ["weight", "activity"])
def test_bfloat16_model(perturb):
    x, y = batch(16)
    model = mlp(torch.bfloat16)
    frog.ForwardGradient(model, lambda o, t: per_sample(o.float(), t), k=K, perturb=perturb)(x.bfloat16(), y)
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())


def test_chunks_do_not_change_the_tangents():
    x, y = batch()
    for perturb in ("weight", "activity"):
        results = []
        for chunk in (None, 1, 2, 5, 99):
            fg = frog.ForwardGradient(mlp(), per_sample, k=K, perturb=perturb, chunk_size=chunk)
            fg(x, y)
            results.append((fg.last.directional_derivatives, fg.last.gram, grads(fg.model)["0.weight"]))
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert_close64(b, a)


def test_inputs_and_targets_of_any_form():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4).double(), nn.Linear(2, 4).double()

        def forward(self, x, z=None):
            return {"logits": self.a(x) + self.b(z)}

    x, z = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    target = {"y": torch.randn(5, 4, dtype=torch.float64)}

    def loss_fn(output, target):
        return ((output["logits"] - target["y"]) ** 2).mean(1)

    for perturb in ("weight", "activity"):
        found = []
        for input in ((x, z), {"x": x, "z": z}):
            torch.manual_seed(0)
            fg = frog.ForwardGradient(Two(), loss_fn, k=3, perturb=perturb)
            check(fg, input, target)
            found.append(fg.model.a.weight.grad)
        assert torch.equal(*found)


def test_sequences_share_tangents_across_the_batch_only():
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)).double()
    x, y = torch.randn(6, 5, 3, dtype=torch.float64), torch.randn(6, 5, 2, dtype=torch.float64)
    for shared in (True, False):
        fg = frog.ForwardGradient(model, lambda o, t: ((o - t) ** 2).mean((1, 2)), k=3, shared_across_batch=shared)
        check(fg, x, y)
        assert fg.last.n == 5 * 4 + 5 * 2
        model.zero_grad()


def test_supplied_tangents():
    x, y = batch()
    names = [n for n, _ in mlp().named_parameters()]
    for perturb in ("weight", "activity"):
        model = mlp()
        if perturb == "weight":
            given = {n: torch.randn(K, *p.shape, dtype=torch.float64) for n, p in model.named_parameters()}
        else:
            given = {n: torch.randn(K, m, dtype=torch.float64) for n, m in (("0", 33), ("2", 9), ("4", 5))}
        by_name = frog.ForwardGradient(model, per_sample, k=K, perturb=perturb, tangents=given)
        simulated = check(by_name, x, y)
        flat = torch.cat([v.flatten(1) for v in given.values()], 1)
        model.zero_grad()
        for tangents in (flat, lambda k, n, generator, flat=flat: flat):
            fg = frog.ForwardGradient(model, per_sample, k=K, perturb=perturb, tangents=tangents)
            check(fg, x, y)
            assert_close64(fg.gradients()[names[0]], simulated.gradients[names[0]])
            model.zero_grad()
        if perturb == "weight":
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
            by_name.update_(0.5)
            for n, p in model.named_parameters():
                assert_close64(before[n] - p, 0.5 * simulated.gradients[n])


@pytest.mark.parametrize("perturb", ["weight", "activity"])
def test_custom_aggregation(perturb):
    x, y = batch()
    shapes = []

    def custom(v, d):
        shapes.append((tuple(v.shape), tuple(d.shape)))
        return torch.linalg.solve(v @ v.T, d).t() @ v  # (n,) or (B, n)

    for options in (dict(), dict(tangents="sphere"), dict(per_sample=False), dict(per_sample=False, shared_across_batch=False)):
        own = frog.ForwardGradient(mlp(), per_sample, k=K, perturb=perturb, aggregate=custom, **options)
        simulated = check(own, x, y)
        known = frog.ForwardGradient(mlp(), per_sample, k=K, perturb=perturb, **options)
        known(x, y)
        for name, g in grads(known.model).items():
            assert_close64(simulated.gradients[name], g, 1e-9)
        assert own.last.coefficients is None
        assert shapes[-1][0] == (K, own.last.n)


def test_scaling_correction_scales():
    x, y = batch()
    for perturb in ("weight", "activity"):
        plain = frog.ForwardGradient(mlp(), per_sample, k=K, perturb=perturb)
        scaled = frog.ForwardGradient(mlp(), per_sample, k=K, perturb=perturb, scaling_correction=True)
        plain(x, y), check(scaled, x, y)
        factor = frog.aggregate.scaling_correction("orthogonal", frog.tangents.Normal(), K, plain.last.n)
        assert factor > 1
        for name, g in grads(scaled.model).items():
            assert_close64(g, grads(plain.model)[name] * factor)


class Scaled(nn.Module):
    """A parameter without axes, and a layer whose output has none beside the batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.scale = nn.Linear(7, 1, dtype=torch.float64), Scale()

    def forward(self, x):
        return self.scale(self.fc(x).squeeze(1))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x):
        return self.factor * x


@pytest.mark.parametrize(
    "aggregate", ["orthogonal", "mean", lambda v, d: torch.tensordot(d, v, ([0], [0]))], ids=["orthogonal", "mean", "custom"]
)
@pytest.mark.parametrize(
    "options",
    [
        dict(perturb="weight"),
        dict(perturb="weight", tangents={n: torch.ones(3, *p.shape).cumsum(0) for n, p in Scaled().named_parameters()}),
        dict(perturb="activity"),
        dict(perturb="activity", per_sample=False, shared_across_batch=False),
    ],
    ids=["weight", "supplied", "activity", "unshared"],
)
def test_parameters_and_outputs_without_axes(options, aggregate):
    def square(output, target):
        return (output - target) ** 2

    x, y = batch()
    check(frog.ForwardGradient(Scaled(), square, k=3, aggregate=aggregate, **options), x, y.double())


def test_what_it_prints():
    model = nn.Sequential(nn.Linear(3, 2))
    fg = frog.ForwardGradient(
        model, nn.MSELoss(), k=4, perturb="weight", tangents=frog.tangents.Cone(30), aggregate="mean", seed=7
    )
    fg(torch.randn(5, 3), torch.randn(5, 2))
    expected = "k=4, perturb='weight', tangents=Cone(angle=30), aggregate=Mean(), seed=7, step=1)"
    assert repr(fg) == f"ForwardGradient(Sequential, {expected}"
