"""Steps as CUDA graphs. Without a GPU a stand-in replays by running the step again on the graph's own memory, which shows all
but the capture itself; tests marked ``cuda`` show that."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import frog_cuda as frog
from frog_cuda import cuda_graph
from frog_cuda._deferred import deferred, require


class StandIn:
    def capture(self, body):
        self._body = body

    def replay(self):
        self._body()


@pytest.fixture
def stand_in(monkeypatch):
    """Graphs that run on the CPU."""
    monkeypatch.setattr(cuda_graph, "Graph", StandIn)
    monkeypatch.setattr(cuda_graph, "check", lambda *arguments: None)


@pytest.mark.parametrize("perturb", ["weight", "activity"])
@pytest.mark.parametrize("before", [0, 1])
def test_goes_on_after_a_call_that_failed(stand_in, perturb, before):
    fg = frog.ForwardGradient(net(), nn.CrossEntropyLoss(), k=3, perturb=perturb, per_sample=False, cuda_graph=True)
    x, target = batch(0)
    for _ in range(before):
        fg(x, target)
    for rows in (5, 7):
        bad, classes = batch(1, rows)
        with pytest.raises(FloatingPointError):
            fg(bad * float("nan"), classes)
        losses = [fg(x, target) for _ in range(3)]
        assert all(loss.isfinite() for loss in losses)
    assert fg._graphs is not None and any(step is not None for step in fg._graphs._steps.values())


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 4)).double()


def batch(step: int, rows: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (rows,), generator=generator)


def train(cuda_graph: bool, steps: int = 6, set_to_none: bool = True, device: str = "cpu", **options) -> list[torch.Tensor]:
    """Losses of every step, then parameters, buffers and gradients at the end."""
    model = net().to(device)
    fg = frog.ForwardGradient(model, nn.CrossEntropyLoss(), k=3, seed=5, cuda_graph=cuda_graph, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    seen = []
    for step in range(steps):
        optimizer.zero_grad(set_to_none)
        x, target = batch(step)
        seen.append(fg(x.to(device), target.to(device)))
        seen.append(fg.last.directional_derivatives.clone())
        optimizer.step()
        assert fg.step == step + 1
    return [*seen, *(p.detach().clone() for p in model.parameters()), *(b.clone() for b in model.buffers())]


OPTIONS = pytest.mark.parametrize(
    "options",
    [
        dict(perturb="weight"),
        dict(perturb="activity", per_sample=False),
        dict(perturb="weight", tangents="orthonormal"),
        dict(perturb="activity", tangents=frog.tangents.Cone(40.0), aggregate="mean", per_sample=False),
        dict(perturb="weight", tangents="rademacher", aggregate=lambda v, d: d @ v),
    ],
    ids=["weight", "activity", "orthonormal", "cone", "custom"],
)


@OPTIONS
@pytest.mark.parametrize("set_to_none", [True, False])
def test_equals_steps_without_graphs(stand_in, options, set_to_none):
    for a, b in zip(train(True, set_to_none=set_to_none, **options), train(False, **options), strict=True):
        assert torch.equal(a, b)


@pytest.mark.cuda
@OPTIONS
def test_equals_steps_without_graphs_on_a_gpu(options):
    for a, b in zip(train(True, device="cuda", **options), train(False, device="cuda", **options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def graphed(**options) -> tuple[nn.Module, frog.ForwardGradient]:
    model = net()
    return model, frog.ForwardGradient(model, nn.CrossEntropyLoss(), k=3, perturb="weight", cuda_graph=True, **options)


def test_gradients_add_up(stand_in):
    model, fg = graphed()
    plain = frog.ForwardGradient(net(), nn.CrossEntropyLoss(), k=3, perturb="weight")
    for step in range(4):
        fg(*batch(step)), plain(*batch(step))
    for p, q in zip(model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_each_shape_and_mode_has_a_graph(stand_in):
    _, fg = graphed()
    plain = frog.ForwardGradient(net(), nn.CrossEntropyLoss(), k=3, perturb="weight")
    for step in range(12):
        for each in (fg, plain):
            each.model.train(step % 4 < 2)
        assert torch.equal(fg(*batch(step, 5 + step % 2)), plain(*batch(step, 5 + step % 2)))
    assert len(fg._graphs._steps) == 4 and all(fg._graphs._steps.values())


@pytest.mark.parametrize("cleared", [True, False])
def test_nan_is_named_and_leaves_gradients_alone(stand_in, cleared):
    model, fg = graphed()
    for step in range(3):
        fg(*batch(step))
    if cleared:
        model.zero_grad()
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    x, target = batch(3)
    x[0, 0] = float("nan")
    statistics = {name: b.clone() for name, b in model.named_buffers()}
    with pytest.raises(FloatingPointError, match="the loss: not all of 1 values are finite"):
        fg(x, target)
    assert fg.step == 3
    for p, was in zip(model.parameters(), before, strict=True):
        assert p.grad is None if was is None else torch.equal(p.grad, was)
    with torch.no_grad():
        for name, b in model.named_buffers():
            b.copy_(statistics[name])
    model.zero_grad()
    loss = fg(*batch(3))
    other, again = graphed()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, b in other.named_buffers():
            b.copy_(statistics[name])
    again.load_state_dict(fg.state_dict() | {"step": 3})
    assert torch.equal(loss, again(*batch(3)))
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_a_resumed_run_draws_what_it_would_have(stand_in):
    model, fg = graphed()
    for step in range(4):
        fg(*batch(step))
    assert fg.step == 4
    fg.load_state_dict({"seed": 0, "step": 2})
    model.zero_grad()
    fg(*batch(2))
    derivatives = fg.last.directional_derivatives.clone()
    fg.load_state_dict({"seed": 0, "step": 2})
    fg(*batch(2))
    assert torch.equal(fg.last.directional_derivatives, derivatives)


def test_update_follows_a_graphed_step(stand_in):
    _, fg = graphed()
    plain = frog.ForwardGradient(net(), nn.CrossEntropyLoss(), k=3, perturb="weight")
    for step in range(4):
        for each in (fg, plain):
            each.model.zero_grad()
            each(*batch(step))
            each.update_(0.1)
    for p, q in zip(fg.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_what_cannot_be_a_graph_is_named():
    with pytest.raises(ValueError, match="cuda_graph: the model's parameters are on cpu"):
        graphed()
    check = lambda distribution, **o: cuda_graph.check(distribution, torch.device("cuda"), **{"k": 4, "chunk_size": None} | o)  # noqa: E731
    for distribution in (
        frog.tangents.StandardBasis(),
        frog.tangents.VaryingLength(),
        frog.tangents.Supplied(torch.ones(4, 3)),
    ):
        with pytest.raises(ValueError, match=f"{type(distribution).__name__} tangents are made anew on the CPU"):
            check(distribution)
    with pytest.raises(ValueError, match="chunk_size is 2 with k = 4"):
        check(frog.tangents.Normal(), chunk_size=2)
    check(frog.tangents.Normal(), chunk_size=4)


@pytest.mark.parametrize("dropout", [False, True])
def test_layers_that_run_twice(stand_in, dropout):
    """Where random numbers are drawn, as dropout does, their second run would need the same ones."""

    def step(cuda_graph, count=4):
        torch.manual_seed(0)
        first = nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.5 if dropout else 0.0)).double()
        if not dropout:
            first[1].eval()
        model = nn.Sequential(first, nn.Linear(9, 4).double())
        options = dict(layers=[["0"], ["1"]], per_sample=False, cuda_graph=cuda_graph)
        fg = frog.ForwardGradient(model, nn.CrossEntropyLoss(), k=3, **options)
        for i in range(count):
            fg(*batch(i))
        return [p.grad for p in model.parameters()]

    if dropout:
        with pytest.raises(NotImplementedError, match="cuda_graph: 0 have no closed-form gradient"):
            step(True)
    else:
        for a, b in zip(step(True), step(False), strict=True):
            assert torch.equal(a, b)


def test_inputs_that_are_no_values_are_named(stand_in):
    _, fg = graphed()
    with pytest.raises(TypeError, match="cuda_graph: input or target holds a bytearray"):
        fg(batch(0)[0], bytearray(3))


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 4))


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.LayerNorm(8), nn.Flatten(), nn.Linear(24, 4))


class Reading(nn.Module):
    def forward(self, x):
        return x * x.sum().item()


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build"))]


def step_without_values(model, shape, perturb, device="cpu", tangents="normal"):
    """One step on tensors that have no values: reading one raises."""
    with FakeTensorMode(), torch.device(device):
        fg = frog.ForwardGradient(model(), nn.CrossEntropyLoss(), k=3, perturb=perturb, tangents=tangents)
        x, target = torch.empty(shape), torch.zeros(shape[0], dtype=torch.long)
        drawn = fg.tangent_set(((x,), {}))
        with deferred() as conditions, torch.no_grad():
            found = fg._gradients_of(drawn, fg._estimate(drawn, ((x,), {}), target), ((x,), {}))
        assert {g.device.type for g in found.values()} == {device}
        return len(conditions)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("perturb", ["weight", "activity"])
@pytest.mark.parametrize("tangents", ["normal", "rademacher", "sphere", "orthonormal", frog.tangents.Cone(40.0)], ids=str)
@pytest.mark.parametrize("model, shape", [(convolutional, (5, 3, 8, 8)), (transformer, (5, 3, 8))], ids=["conv", "transformer"])
@pytest.mark.filterwarnings("ignore:activity perturbation")
def test_a_step_reads_no_value_from_the_device(model, shape, perturb, tangents, device):
    if device == "cuda" and (model, perturb) == (transformer, "activity") and not torch.cuda.is_available():
        pytest.skip("its layers run a second time with autograd, whose engine asks for a real device")
    assert 3 <= step_without_values(model, shape, perturb, device, tangents) <= cuda_graph._MOST_CONDITIONS


def test_reading_a_value_would_be_noticed():
    with pytest.raises(DataDependentOutputException):
        step_without_values(lambda: nn.Sequential(Reading(), nn.Linear(6, 4)), (5, 6), "weight")


def test_deferred_conditions_are_collected_not_raised():
    failed = torch.tensor(False)
    with pytest.raises(ValueError, match="now"):
        require(failed, lambda: ValueError("now"))
    with deferred() as conditions:
        require(failed, lambda: ValueError("later"))
        with ThreadPoolExecutor(1) as other, pytest.raises(ValueError, match="now"):  # collects nothing
            other.submit(require, failed, lambda: ValueError("now")).result()
        require(torch.tensor(True), lambda: ValueError("never"))
    assert [bool(c.passed) for c in conditions] == [False, True] and "later" in str(conditions[0].error())
