"""Guided tangents: random ones beside stored vectors, in one projection; what is remembered, and what is refused."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close32, assert_close64
from torch import Tensor, nn

import frog_cuda as frog
from frog_cuda.tangents import Guided, Piece, TangentSet, sample

K = 3
CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
BASES = pytest.mark.parametrize("base", ["normal", "rademacher"])


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 20), nn.BatchNorm1d(20), nn.Tanh(), nn.Dropout(0.2), nn.Linear(20, 4)).to(dtype)


def data(step: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return random(9, 7, seed=step).to(dtype), torch.arange(9) % 4


def forward_gradient(tangents: Guided, model: nn.Module | None = None, **options) -> frog.ForwardGradient:
    model = net() if model is None else model
    return frog.ForwardGradient(model, nn.CrossEntropyLoss(), k=K, perturb="weight", tangents=tangents, seed=5, **options)


def flat(named: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in named.values()])


@BASES
@pytest.mark.parametrize("aggregate", ["orthogonal", lambda v, d: d @ v], ids=["orthogonal", "custom"])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_forward_equals_simulated_with_more_and_more_remembered(base, aggregate, chunk_size):
    """With 0, 1, 2 and again 2 estimates remembered, beside one vector of the user's."""
    model = net()
    vectors = {name: random(*p.shape, seed=i) for i, (name, p) in enumerate(model.named_parameters())}
    tangents = Guided(2, vectors=vectors, base=base)
    fg = forward_gradient(tangents, model, aggregate=aggregate, chunk_size=chunk_size)
    for step in range(4):
        simulated = frog.simulate(fg, *data(step))
        model.zero_grad()
        loss = fg(*data(step))
        assert fg.last.directional_derivatives.shape == (K + min(step, 2) + 1,)
        assert_close64(loss, simulated.loss)
        assert_close64(fg.last.directional_derivatives, simulated.directional_derivatives)
        assert_close64(fg.last.gram, simulated.estimate.gram)
        estimate = {name: p.grad for name, p in model.named_parameters()}
        assert list(estimate) == list(simulated.gradients)
        assert_close64(flat(estimate), flat(simulated.gradients))
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad


def test_the_estimate_is_the_projection_onto_the_joint_span():
    """Against a least-squares solution with all k + 2 tangents stored, the vectors at an acute angle to each other."""
    model = nn.Linear(12, 5, dtype=torch.float64)
    x, target = random(6, 12), random(6, 5, seed=1)
    n = 65
    u = random(2, n)
    u[1] = u[0] + 0.1 * u[1]
    fg = frog.ForwardGradient(model, nn.MSELoss(), k=K, perturb="weight", tangents=Guided(vectors=1e-9 * u), seed=2)
    fg(x, target)
    g = flat(dict(enumerate(torch.autograd.grad(nn.functional.mse_loss(model(x), target), list(model.parameters())))))
    v = torch.cat([sample("normal", K, n, seed=2, dtype=torch.float64), u])
    expected = v.T @ torch.linalg.lstsq(v.T, g.unsqueeze(1)).solution.squeeze(1)
    assert_close64(flat(dict(enumerate(p.grad for p in model.parameters()))), expected)
    scaled = u * (n**0.5 / u.norm(dim=1, keepdim=True))
    assert_close64(fg.last.directional_derivatives[K:], scaled @ g)
    assert int(fg.last.rank) == K + 2


def quadratic(x: Tensor) -> Tensor:
    return (torch.arange(1, 1 + x.numel(), dtype=x.dtype).view(x.shape) * x**2).sum()


@pytest.mark.parametrize("simulate", [False, True])
def test_a_vector_along_the_gradient_makes_it_exact(simulate):
    x = random(4, 5)
    true = 2 * torch.arange(1, 21, dtype=torch.float64).view(4, 5) * x
    for vectors in (true, true.flatten(), true.unsqueeze(0), {"x": true}, lambda: true, torch.stack([x, true, x])):
        value, estimate = frog.forward_gradient(
            quadratic, x, k=2, tangents=Guided(vectors=vectors, base="rademacher"), simulate=simulate
        )
        assert_close64(value, quadratic(x))
        assert_close64(estimate, true)


def test_error_under_a_constant_gradient_falls_as_projections_onto_a_growing_subspace():
    """What the last estimate misses is orthogonal to it, and k random tangents hold k / (n - 1) of its square on average:
    E[1 - cos^2] = (1 - k / n) (1 - k / (n - 1))^t after t steps more. The mean of 300 runs lies within 6 standard errors."""
    n, k, steps, runs = 24, 3, 6, 300
    g = random(n)
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(n, dtype=torch.float64))
    model.forward = lambda _: model.weight @ g
    misses = torch.zeros(runs, steps, dtype=torch.float64)
    for run in range(runs):
        fg = frog.ForwardGradient(model, lambda out, _: out, k=k, perturb="weight", tangents=Guided(1), seed=run)
        for step in range(steps):
            fg.derivatives(None, None)
            misses[run, step] = 1 - F.cosine_similarity(fg.gradients()["weight"], g, dim=0) ** 2
    assert (misses.diff(dim=1) < 0).all()
    expected = (1 - k / n) * (1 - k / (n - 1)) ** torch.arange(steps)
    assert ((misses.mean(0) - expected).abs() < 6 * misses.std(0) / runs**0.5).all()


def test_vectors_are_read_at_every_step():
    """A momentum buffer that changes in place counts with its present values, also after the step that read it."""
    calls = []
    buffer = {"0.weight": random(20, 7)}
    fg = forward_gradient(Guided(vectors=lambda: calls.append(0) or buffer))
    for step in range(2):
        expected = buffer["0.weight"].clone()
        fg.derivatives(*data())
        before = fg.gradients()
        buffer["0.weight"].copy_(random(20, 7, seed=9))
        assert_close64(flat(fg.gradients()), flat(before))
        piece = fg._method.pieces[0]
        drawn = fg._tangents.draw(piece, torch.float64, K)[0]
        assert_close64(drawn / drawn.norm(), expected / expected.norm())
        assert len(calls) == step + 1


def test_no_vectors_yet():
    """As before the first step of an optimizer: what is left are the random tangents."""
    plain = frog.ForwardGradient(net(), nn.CrossEntropyLoss(), k=K, perturb="weight", seed=5)
    torch.manual_seed(3)
    plain(*data())
    for nothing in (lambda: None, {}, dict, torch.zeros(sum(p.numel() for p in net().parameters())), Guided(1)):
        fg = forward_gradient(nothing if isinstance(nothing, Guided) else Guided(vectors=nothing))
        torch.manual_seed(3)
        fg(*data())
        assert fg.last.directional_derivatives.shape == (K,)
        for p, q in zip(fg.model.parameters(), plain.model.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)


def test_momentum_of_an_optimizer():
    model = net(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def buffers() -> dict[str, Tensor]:
        named = model.named_parameters()
        return {name: optimizer.state[p]["momentum_buffer"] for name, p in named if p in optimizer.state}

    fg = forward_gradient(Guided(vectors=buffers), model)
    for step in range(3):
        optimizer.zero_grad()
        fg(*data(0, torch.float32))
        optimizer.step()
        assert fg.last.directional_derivatives.shape == (K + (step > 0),)


def test_dependent_and_zero_vectors():
    """Copies, opposites and combinations are dropped, zeros left out; the projection is that onto the span."""
    a, b = random(2, 20)
    x = random(20, seed=4)
    _, expected = frog.forward_gradient(quadratic, x, k=2, tangents=Guided(vectors=torch.stack([a, b])), seed=1)
    many = torch.stack([a, a, -1e6 * a, torch.zeros(20).double(), b, a - 2 * b])
    _, estimate = frog.forward_gradient(quadratic, x, k=2, tangents=Guided(vectors=many), seed=1)
    assert_close64(estimate, expected)
    model = nn.Linear(20, 1, bias=False, dtype=torch.float64)
    tangents = Guided(vectors=many)
    fg = frog.ForwardGradient(model, lambda out, _: (out**2).sum(), k=2, perturb="weight", tangents=tangents)
    fg(x.unsqueeze(0), None)
    assert fg.last.directional_derivatives.shape == (2 + 5,) and int(fg.last.rank) == 2 + 2
    with torch.no_grad():  # nothing remembered of a gradient of zeros
        model.weight.zero_()
    fg = frog.ForwardGradient(model, lambda out, _: (out**2).sum(), k=2, perturb="weight", tangents=Guided(2))
    fg(x.unsqueeze(0), None)
    fg(x.unsqueeze(0), None)
    assert fg.last.directional_derivatives.shape == (2,)


def test_more_tangents_than_dimensions_are_exact():
    x = random(4)
    _, estimate = frog.forward_gradient(quadratic, x, k=3, tangents=Guided(vectors=random(5, 4, seed=1)))
    assert_close64(estimate, 2 * torch.arange(1, 5).double() * x, 1e-9)


def test_vectors_of_any_magnitude_in_float32_and_low_precision():
    model = net(torch.float32).eval()
    exact = net().eval()
    vectors = {name: random(*p.shape, seed=i, dtype=torch.float32) for i, (name, p) in enumerate(model.named_parameters())}
    wide = {name: v.double() for name, v in vectors.items()}
    fg64 = forward_gradient(Guided(vectors=wide), exact)
    simulated = frog.simulate(fg64, *data())
    for scale in (1e-15, 1.0, 1e15):
        fg = forward_gradient(Guided(vectors={name: v * scale for name, v in vectors.items()}), model)
        fg.derivatives(*data(0, torch.float32))
        assert_close32(flat(fg.gradients()), flat(simulated.gradients))
    for dtype in (torch.bfloat16, torch.float16):
        tiny = {name: v * 1e-15 for name, v in vectors.items()}
        fg = forward_gradient(Guided(vectors=tiny), model, tangent_dtype=dtype)
        fg.derivatives(*data(0, torch.float32))
        cosine = F.cosine_similarity(flat(fg.gradients()).double(), flat(simulated.gradients), dim=0)
        assert cosine > 0.99  # each derivative is rounded to 8 bits or more


class Sometimes(nn.Module):
    """The second layer takes part when ``on``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.never = (nn.Linear(7, 4, dtype=torch.float64) for _ in range(3))
        self.on = True

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + (self.second(x).tanh() if self.on else 0)


def test_parameters_that_do_not_always_take_part():
    fg = forward_gradient(Guided(2), Sometimes())
    for step, on in enumerate([False, True, False, True, True]):
        fg.model.on = on
        simulated = frog.simulate(fg, *data(step))
        fg.derivatives(*data(step))
        found = fg.gradients()
        assert set(found) == {f"{layer}.{p}" for layer in ("first", "second")[: 1 + on] for p in ("weight", "bias")}
        assert_close64(flat(found), flat(simulated.gradients))
        assert fg.last.directional_derivatives.shape == (K + min(step, 2),)
    fg.model.on = False
    fg._memory.guides.clear()
    fg._memory.take({"second.bias": random(4)})  # zero on all that takes part now
    fg.derivatives(*data())
    assert fg.last.directional_derivatives[K] == 0 and int(fg.last.rank) == K


def test_update_and_accumulate_agree_and_leave_what_is_remembered_alone():
    a, b = forward_gradient(Guided(2)), forward_gradient(Guided(2))
    for step in range(4):
        torch.manual_seed(step)
        a.derivatives(*data(step))
        a.update_(0.1)
        torch.manual_seed(step)
        b.model.zero_grad()
        b(*data(step))
        with torch.no_grad():
            for p in b.model.parameters():
                p -= 0.1 * p.grad
                p.grad.fill_(torch.nan)  # its own, not what is remembered
        for g in b.gradients().values():
            g.fill_(torch.nan)
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert_close64(p.detach(), q.detach())


def test_grad_accumulates():
    fg = forward_gradient(Guided(1))
    fg(*data(0))
    first = {name: p.grad.clone() for name, p in fg.model.named_parameters()}
    fg(*data(1))
    second = fg.gradients()
    for name, p in fg.model.named_parameters():
        assert_close64(p.grad, first[name] + second[name])


def test_chunks_change_nothing():
    """But roundings: libraries multiply the stored vectors, and other numbers of them otherwise."""
    found = {}
    for chunk_size in (None, 1, 2, 7):
        fg = forward_gradient(Guided(3), chunk_size=chunk_size)
        torch.manual_seed(0)
        for step in range(5):
            fg.derivatives(*data(step))
            fg.update_(0.1)
        found[chunk_size] = flat(fg.gradients()), fg.model[1].running_mean, fg.model[1].num_batches_tracked.double()
    for values in found.values():
        for actual, expected in zip(values, found[None], strict=True):
            assert_close64(actual, expected)


def test_a_resumed_run_repeats_the_uninterrupted_one():
    def steps(fg: frog.ForwardGradient, first: int, count: int) -> None:
        for step in range(first, first + count):
            torch.manual_seed(step)
            fg.derivatives(*data(step, torch.float32))
            fg.update_(0.1)

    whole = forward_gradient(Guided(2), net(torch.float32))
    steps(whole, 0, 3)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    resumed = forward_gradient(Guided(2), copy.deepcopy(whole.model))
    steps(whole, 3, 3)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    steps(resumed, 3, 3)
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert resumed.step == whole.step == 6


def test_states_that_do_not_fit():
    fg = forward_gradient(Guided(1))
    fg(*data())
    state = fg.state_dict()
    other = forward_gradient(Guided(1))
    kept = state["previous"][0]
    parts = kept["parts"]
    with_parts = lambda parts: state | {"previous": [{"scale": 1.0, "parts": parts}]}  # noqa: E731
    bad = [
        ({"seed": 0, "step": 0}, ValueError, r"keys \['seed', 'step'\]; expected 'previous', 'seed' and 'step'"),
        (state | {"previous": 3}, TypeError, "no list of mappings"),
        (state | {"previous": [parts]}, TypeError, "no list of mappings of 'scale' and 'parts'"),
        (state | {"previous": [kept, kept]}, ValueError, "holds 2 previous estimates; expected at most 1"),
        (state | {"previous": [kept | {"scale": -1}]}, ValueError, r"\['scale'\] is -1; expected a number > 0"),
        (with_parts({"nothing": parts["0.bias"]}), ValueError, r"\[0\] is not of the parameters that are perturbed: 0.weight"),
        (with_parts(parts | {"0.bias": 1.0}), ValueError, r"\['0.bias'\] is float; expected a floating tensor \(20,\)"),
        (with_parts(parts | {"0.bias": parts["0.bias"][:3]}), ValueError, r"is \(3,\) torch.float64; expected a floating"),
        (with_parts(parts | {"0.bias": parts["0.bias"] / 0}), FloatingPointError, r"\['previous'\]\[0\] has NaN.*0.bias"),
    ]
    for given, error, message in bad:
        with pytest.raises(error, match=message):
            other.load_state_dict(given)
        assert other.step == 0 and not other._memory.guides
    with pytest.raises(ValueError, match=r"keys \['previous', 'seed', 'step'\]; expected 'seed' and 'step'"):
        frog.ForwardGradient(net(), nn.CrossEntropyLoss(), k=1).load_state_dict(state)


@pytest.mark.parametrize("vectors,error,message", [
    (random(24), ValueError, r"vectors has shape \(24,\); expected \(25,\) or \(m, \*\(25,\)\)"),
    (torch.ones(25, dtype=torch.int64), TypeError, "vectors has dtype torch.int64; expected a floating point"),
    (torch.ones(25, device="meta"), ValueError, "vectors is on meta, but what is perturbed is on cpu"),
    ({"wieght": random(5, 4)}, ValueError, "vectors has wieght, not perturbed; accepted are weight, bias"),
    ({"weight": random(4, 5)}, ValueError, r"vectors\['weight'\] has shape \(4, 5\); expected \(5, 4\) or \(m, \*\(5, 4\)\)"),
    ({"weight": None}, TypeError, r"vectors\['weight'\] is of type NoneType; expected a tensor"),
    ({"weight": random(2, 5, 4), "bias": random(3, 5)}, ValueError, "vectors disagree in number: weight: 2, bias: 3"),
    (lambda: [random(25)], TypeError, "vectors is a callable that returned a list"),
    (torch.stack([random(25), random(25).index_fill(0, torch.tensor([22]), float("nan"))]), FloatingPointError,
     r"vectors\[1\] has NaN, infinite or too large elements at bias"),
])  # fmt: skip
def test_vectors_that_do_not_fit(vectors, error, message):
    fg = frog.ForwardGradient(nn.Linear(4, 5).double(), nn.MSELoss(), k=1, perturb="weight", tangents=Guided(vectors=vectors))
    with pytest.raises(error, match=message):
        fg(random(2, 4), random(2, 5))
    assert fg.step == 0 and fg.model.weight.grad is None


def test_bad_arguments_are_named():
    make = lambda **options: frog.ForwardGradient(  # noqa: E731
        net(), nn.CrossEntropyLoss(), **{"k": 1, "perturb": "weight", "tangents": Guided(1)} | options
    )
    for arguments, error, message in [
        (dict(previous=-1), ValueError, "previous is -1; expected an integer >= 1"),
        (dict(previous=1.0), TypeError, "previous is 1.0 of type float"),
        (dict(previous=False, vectors={}), TypeError, "previous is False of type bool"),
        (dict(), ValueError, "previous is 0 and vectors is None; expected one of them"),
        (dict(vectors=3), TypeError, "Guided: vectors is of type int; accepted are"),
        (dict(previous=1, base="sphere"), ValueError, "base is 'sphere'; accepted are 'normal' and 'rademacher'"),
    ]:
        with pytest.raises(error, match=message):
            Guided(**arguments)
    with pytest.raises(ValueError, match=r"Guided is for perturb='weight'; estimates for activities belong to the samples"):
        make(perturb="activity")
    for aggregate in ("mean", "sum", "mean_times_dim", "max", "max_normalized", "mean_of_top_k"):
        with pytest.raises(ValueError, match=r"aggregate is \w+; Guided tangents go with 'orthogonal' or a callable"):
            make(aggregate=aggregate)
        with pytest.raises(ValueError, match="Guided tangents go with"):
            frog.forward_gradient(quadratic, random(3), k=1, tangents=Guided(vectors=random(3)), aggregate=aggregate)
    with pytest.raises(ValueError, match="Guided: no closed-form length correction"):
        make(scaling_correction=True)
    with pytest.raises(ValueError, match="second moment of chosen vectors"):
        Guided(1).second_moment(3)
    with pytest.raises(ValueError, match="SeedLog: the vectors of Guided tangents"):
        frog.SeedLog("never-written", make())
    with pytest.raises(ValueError, match="cuda_graph: Guided tangents hold other vectors in every step"):
        frog.cuda_graph.check(Guided(1), torch.device("cuda"), 1, None)
    with pytest.raises(ValueError, match=r"frog_cuda.tangents.Guided\(previous\)"):
        frog.tangents.resolve("guided")
    with pytest.raises(ValueError, match="Guided.* needs estimates that ForwardGradient remembers"):
        frog.forward_gradient(quadratic, random(3), k=1, tangents=Guided(1))
    with pytest.raises(ValueError, match="Guided.* needs estimates that ForwardGradient remembers"):
        sample(Guided(1), 1, 3)


def test_an_estimate_that_is_not_finite_is_not_remembered():
    fg = forward_gradient(Guided(1), net(torch.float32), aggregate=lambda v, d: (d @ v) * 3e38)
    with pytest.raises(FloatingPointError):
        fg(*data(0, torch.float32))
    assert fg.step == 0 and fg.last is None and not fg._memory.guides
    assert all(p.grad is None for p in fg.model.parameters())


def test_tangent_set_piece_by_piece():
    """Drawn, combined and updated pieces are those of all tangents stored; the Gram matrix over several blocks, too."""
    pieces = [Piece("a", (300, 501), 0), Piece("b", (), 150300), Piece("c", (7,), 150301)]
    n = 150308
    u = random(2, n)
    drawn = TangentSet(Guided(vectors=u, base="rademacher"), K, 1, 2, CPU, n, pieces)
    v = sample(Guided(vectors=u, base="rademacher"), K, n, seed=1, step=2, dtype=torch.float64)
    assert torch.equal(v[:K], sample("rademacher", K, n, seed=1, step=2, dtype=torch.float64))
    assert_close64(v[K:], u * (n**0.5 / u.norm(dim=1, keepdim=True)))
    c = random(K + 2)
    for piece in pieces:
        part = v[:, piece.offset : piece.offset + piece.numel]
        stored = drawn.draw(piece, torch.float64)
        assert_close64(stored, part.reshape(-1, *piece.shape))  # a scale is a sum, here over pieces
        for first, count in [(0, 2), (1, 3), (3, 2), (4, 1)]:
            assert torch.equal(drawn.draw(piece, torch.float64, first, count), stored[first : first + count])
        combined = drawn.combine(piece, c, torch.float64)
        assert_close64(combined.flatten(), c @ part)
        assert_close64(drawn.gram(piece), part @ part.T)
        target = torch.ones(piece.shape, dtype=torch.float64)
        drawn.axpy_(target, piece, c, -2.0)
        assert_close64(target, 1 - 2 * combined)
    assert drawn.passes(0, K, 2) == ([range(2), range(2, 3)], [range(3, 5)])
    assert drawn.passes(1, 2, None) == ([range(1, 3)], [range(3, 5)])


def test_the_comparison_runs(tmp_path):
    """benchmarks/guided.py: each method gets the same time, and the files hold what was measured."""
    command = [sys.executable, str(ROOT / "benchmarks" / "guided.py"), "--quick", "--output", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "guided.json").read_text())["results"]
    assert [r["task"] for r in results] == ["digits", "sphere", "rosenbrock", "styblinski_tang"]
    table = (tmp_path / "guided.md").read_text()
    for r in results:
        assert [m["method"] for m in r["methods"]] == ["normal", "Guided(1)", "Guided(4)", "Guided(vectors=momentum)"]
        for m in r["methods"]:
            spent = m["steps"] * m["ms_per_step"] / 1e3
            assert abs(spent - r["seconds"]) <= m["ms_per_step"] / 1e3 or m["steps"] == 24
            assert -1 <= m["cosine"] <= 1 and m["lowest"] <= m["loss"] <= m["highest"] and len(m["curve"]) == len(m["seconds"])
            assert f"{m['rate']:g}" in m["scores"] and m["method"] in table
    assert (tmp_path / "guided.png").read_bytes().startswith(b"\x89PNG")
