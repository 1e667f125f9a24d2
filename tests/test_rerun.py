"""Layers without a closed form, which run again, and passes that are repeated: on what there was at first."""

from __future__ import annotations

import contextlib
import copy
import random

import pytest
import torch
from backprop import B, C, K, M, assert_is_the_gradient, by_backprop, float64, losses  # noqa: F401
from torch import nn

import frog_cuda as frog


class Bilinear(nn.Module):
    """A layer without a closed form, after something that happens to its input."""

    def __init__(self, happens):
        super().__init__()
        self.a, self.b, self.f = nn.Linear(M, M), nn.Bilinear(M, M, 4), nn.Linear(4, C)
        self.happens, self.state, self.calls = happens, None, 0
        self.register_buffer("moving", torch.ones(()))
        self.generator = torch.Generator().manual_seed(7)

    def forward(self, x):
        self.calls += 1
        if self.happens == "input written":
            x = x.sub_(1).div_(2)
        elif self.happens == "buffer moves":
            self.moving.add_(0.5)
            x = x * self.moving
        elif self.happens == "own generator":
            x = x + torch.rand(x.shape, generator=self.generator)
        elif self.happens == "python's numbers":
            x = x * random.random()
        elif self.happens == "state kept":
            x = x if self.state is None else x + self.state
            self.state = x.detach() * 2
        h = self.a(x).tanh()
        out = self.b(h, x)
        return self.f(out)


@pytest.mark.parametrize("perturb, chunk_size", [("activity", None), ("activity", 40), ("weight", None), ("weight", 40)])
@pytest.mark.parametrize("happens", ["input written", "buffer moves", "own generator", "python's numbers", "state kept"])
def test_passes_that_change_something(happens, perturb, chunk_size):
    """A layer runs again, and so do passes, on what was there at first; state in attributes is the exception for passes."""
    if happens == "state kept" and chunk_size is not None:
        pytest.skip("the model's own business: a pass for each chunk")
    x, y = torch.randn(B, M), torch.randint(0, C, (B,))
    model = Bilinear(happens)
    random.seed(3)
    expected = copy.deepcopy(model)
    losses(expected(x.clone()), y).mean().backward()
    random.seed(3)
    given = x.clone()
    frog.ForwardGradient(model, losses, k=K, perturb=perturb, chunk_size=chunk_size)(given, y)
    for p, q in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(model.moving, expected.moving)
    if chunk_size is None:
        assert model.calls == expected.calls == 1
    written = x.clone().sub_(1).div_(2) if happens == "input written" else x
    assert torch.equal(given, written)


class Tree(nn.Module):
    """A layer without a closed form that calls itself."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(M))

    def forward(self, x, n=2):
        y = torch.tanh(x * self.w)
        return y if n == 0 else self(y, n - 1) + x


class Scaled(nn.Module):
    """A parameter before an inner layer, and numbers that are drawn."""

    def __init__(self, inner, dropped=0.0):
        super().__init__()
        self.scale, self.inner, self.dropped = nn.Parameter(torch.randn(M)), inner, dropped

    def forward(self, x):
        return self.inner(nn.functional.dropout(x * self.scale, self.dropped)).tanh()


@pytest.mark.parametrize("inner", [lambda: nn.Linear(M, M), lambda: Tree()], ids=["linear", "tree"])
def test_a_layer_within_a_layer(inner):
    model = nn.Sequential(Scaled(inner()), nn.Linear(M, C))
    assert_is_the_gradient(model, torch.randn(B, M), torch.randint(0, C, (B,)), layers=["0", "0.inner", "1"])


@pytest.mark.parametrize("layers", [["0", "1"], [["0", "1"]]], ids=["layer", "pass"])
@pytest.mark.parametrize("chunk_size", [None, 40])
def test_numbers_that_a_layer_draws_are_drawn_again(layers, chunk_size):
    model = nn.Sequential(Scaled(nn.Identity(), 0.5), nn.Linear(M, C))
    x, y = torch.randn(B, M), torch.randint(0, C, (B,))
    torch.manual_seed(7)
    expected = by_backprop(model, x, y)
    torch.manual_seed(7)
    frog.ForwardGradient(model, losses, k=K, layers=layers, chunk_size=chunk_size)(x, y)
    after = torch.rand(1)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-7, atol=1e-9)
    torch.manual_seed(7)
    model(x)
    assert torch.equal(after, torch.rand(1))


def test_parameters_that_have_moved():
    model, x, y = nn.Sequential(Tree(), nn.Linear(M, C)), torch.randn(B, M), torch.randint(0, C, (B,))
    fg = frog.ForwardGradient(model, losses, k=2)
    fg(x, y)
    with torch.no_grad():
        model[0].w.add_(1)
    with pytest.raises(RuntimeError, match="parameters of 0 were changed after the forward pass"):
        fg.gradients()


class Twofold(Tree):
    """Whether it is given the same tensor twice makes a difference."""

    def forward(self, x, y):
        return torch.tanh(x * self.w) if x is y else y * self.w


def test_the_same_tensor_twice_is_the_same_again():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.f = Twofold(), nn.Linear(M, C)

        def forward(self, x):
            return self.f(self.a(x, x))

    assert_is_the_gradient(Model(), torch.randn(B, M), torch.randint(0, C, (B,)))


@pytest.mark.parametrize("layers", [None, ["0", "1"], [["0", "1.0"], ["1.2"]]])
def test_running_statistics_move_once_a_step(layers):
    model = nn.Sequential(nn.Linear(M, M), nn.Sequential(nn.Linear(M, M), nn.BatchNorm1d(M), nn.Linear(M, C)))
    expected, x, y = copy.deepcopy(model), torch.randn(B, M), torch.randint(0, C, (B,))
    before = copy.deepcopy(model.state_dict())
    for chunk_size in (None, 2):
        fg = frog.ForwardGradient(model, losses, k=4, layers=layers, per_sample=False, chunk_size=chunk_size)
        frog.simulate(fg, x, y)
        for name, b in model.named_buffers():
            assert torch.equal(b, before[name])
        fg.derivatives(x, y)
        for _ in range(2):
            fg.gradients()
        expected(x)
        for b, other in zip(model.buffers(), expected.buffers()):
            torch.testing.assert_close(b, other)
        before = copy.deepcopy(model.state_dict())


def test_several_modules_as_one_layer_run_again_on_what_there_was():
    model = Bilinear("input written")
    assert_is_the_gradient(model, torch.randn(B, M), torch.randint(0, C, (B,)), layers=[["a", "b"], ["f"]])


class Catching(nn.Module):
    """A model that goes on where a layer has raised."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.f = Tree(), Tree(), nn.Linear(M, C)

    def forward(self, x):
        for layer in (self.a, self.b):
            with contextlib.suppress(TypeError):
                layer(x, "not a number")
        return self.f(self.a(self.b(x, 0), 0))


class Moving(nn.Module):
    """A buffer that forward assigns, and one that it registers."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(M, C)
        self.register_buffer("h", torch.zeros(()))

    def forward(self, x):
        y = self.f(x)
        self.h = 0.9 * self.h + 0.1 * y.pow(2).mean()
        if "z" not in self._buffers:
            self.register_buffer("z", torch.ones(()))
        self.z = self.z + 1
        return y * self.z


@pytest.mark.parametrize("chunk_size", [None, 60])
@pytest.mark.parametrize("perturb", ["weight", "activity"])
@pytest.mark.parametrize(
    "model", [lambda: nn.Sequential(Tree(), nn.Linear(M, C)), Catching, Moving], ids=["tree", "catch", "move"]
)
def test_models_that_call_catch_and_assign(model, perturb, chunk_size):
    torch.manual_seed(4)
    model, x, y = model(), torch.randn(B, M), torch.randint(0, C, (B,))
    twin = copy.deepcopy(model)
    fg = frog.ForwardGradient(model, losses, k=K, perturb=perturb, chunk_size=chunk_size)
    for _ in range(2):
        model.zero_grad(), twin.zero_grad()
        losses(twin(x), y).mean().backward()
        fg(x, y)
        for b, other in zip(model.buffers(), twin.buffers(), strict=True):
            assert type(b) is torch.Tensor
            torch.testing.assert_close(b, other.detach())
            other.detach_()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-9)


def test_a_layer_that_calls_itself_beside_several_as_one():
    model = nn.Sequential(Tree(), nn.Linear(M, M), nn.Linear(M, C))
    x, y = torch.randn(B, M), torch.randint(0, C, (B,))
    assert_is_the_gradient(model, x, y, layers=["0", ["1", "2"]])
