"""What simulate says is what the next call estimates, or it raises."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from backprop import B, C, M, float64, losses  # noqa: F401
from torch import nn

import frog_cuda as frog


def assert_next_call(fg, x, y):
    """Returns what was simulated."""
    simulated = frog.simulate(fg, x, y)
    loss = fg(x, y)
    torch.testing.assert_close(simulated.loss, loss)
    assert simulated.estimate.n == fg.last.n
    found = fg.gradients()
    assert set(simulated.gradients) == set(found)
    for name, g in found.items():
        torch.testing.assert_close(simulated.gradients[name].to_dense(), g.to_dense(), rtol=1e-7, atol=1e-9)
    return simulated


class Heads(nn.Module):
    """The loss reads one head; a layer is never called, another only for a constant."""

    def __init__(self):
        super().__init__()
        self.body, self.first, self.second = nn.Linear(M, M), nn.Linear(M, C), nn.Linear(M, C)
        self.idle, self.constant = nn.Linear(M, M), nn.Linear(M, M)

    def forward(self, x):
        with torch.no_grad():
            shift = self.constant(x)
        h = F.dropout(torch.tanh(self.body(x)), 0.5) + shift
        return self.first(h), self.second(h)


@pytest.mark.parametrize("tangents", ["normal", "orthonormal", frog.tangents.LowRank(1)])
@pytest.mark.parametrize("aggregate", ["mean", "orthogonal"])
def test_parameters_that_run_but_do_not_reach_the_loss(tangents, aggregate):
    model, x, y = Heads(), torch.randn(B, M), torch.randint(0, C, (B,))
    fg = frog.ForwardGradient(
        model, lambda out, y: losses(out[0], y), k=3, perturb="weight", tangents=tangents, aggregate=aggregate
    )
    simulated = assert_next_call(fg, x, y)
    assert {"second.weight", "first.bias"} <= set(simulated.gradients)
    assert not any(name.startswith(("idle", "constant")) for name in simulated.gradients)
    assert "second.weight" not in simulated.true_gradients


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(M))

    def forward(self, x):
        return x.mul_(self.scale)


class Aliased(nn.Module):
    """``then`` has what an in-place layer returns, and what it was given: the same memory."""

    def __init__(self, then):
        super().__init__()
        self.a, self.i, self.f, self.then = nn.Linear(M, M), InPlace(), nn.Linear(M, C), then

    def forward(self, x):
        h = self.a(x)
        return self.f(self.then(h, self.i(h)))


@pytest.mark.parametrize("then", [lambda h, z: z.tanh_() + h, lambda h, z: h.tanh_() + z, lambda h, z: h.t().tanh_().t() + z])
def test_outputs_that_are_written_and_read_elsewhere_are_refused(then):
    x, y = torch.randn(B, M), torch.randint(0, C, (B,))
    fg = frog.ForwardGradient(Aliased(then), losses, k=3)
    with pytest.raises(RuntimeError, match="simulate: the output of a layer is written in place"):
        frog.simulate(fg, x, y)


@pytest.mark.parametrize("then", [lambda h, z: z.tanh_(), lambda h, z: z.sin().mul_(2)])
def test_outputs_that_are_written_alone(then):
    x, y = torch.randn(B, M), torch.randint(0, C, (B,))
    assert_next_call(frog.ForwardGradient(Aliased(then), losses, k=3), x, y)


class Cut(nn.Module):
    def __init__(self, called):
        super().__init__()
        self.layer, self.called = nn.Linear(M, C), called

    def forward(self, x):
        return self.layer(x).detach() if self.called else x[:, :C]


@pytest.mark.parametrize("perturb", ["weight", "activity"])
@pytest.mark.parametrize("called", [False, True])
def test_a_loss_that_depends_on_nothing(perturb, called):
    fg, x, y = frog.ForwardGradient(Cut(called), losses, k=2, perturb=perturb), torch.randn(B, M), torch.randint(0, C, (B,))
    with pytest.raises(ValueError, match="loss_fn: the result does not depend on anything that is perturbed"):
        frog.simulate(fg, x, y)
    if not called:
        with pytest.raises(ValueError, match="loss_fn: the result does not depend on anything that is perturbed"):
            fg(x, y)


@pytest.mark.parametrize("perturb", ["weight", "activity"])
def test_another_default_device(perturb):
    model, x, y = nn.Sequential(nn.Linear(M, M), nn.Tanh(), nn.Linear(M, C)), torch.randn(B, M), torch.randint(0, C, (B,))
    torch.set_default_device("meta")
    try:
        for options in ({}, {"shared_across_batch": False}) if perturb == "activity" else ({},):
            assert_next_call(frog.ForwardGradient(model, losses, k=2, perturb=perturb, **options), x, y)
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("perturb", ["weight", "activity"])
def test_sparse_gradients(perturb):
    model = nn.Sequential(nn.Embedding(9, M, sparse=True), nn.Linear(M, C))
    simulated = assert_next_call(
        frog.ForwardGradient(model, losses, k=3, perturb=perturb), torch.arange(B), torch.randint(0, C, (B,))
    )
    assert not simulated.true_gradients["0.weight"].is_sparse
