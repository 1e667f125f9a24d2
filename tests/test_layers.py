"""What layers= takes: parameters that no inner module owns, and modules that are never called."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close64
from torch import nn

import frog_cuda as frog


class WithToken(nn.Module):
    """(B, 3, 4) -> (B, 2); token and scale belong to the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.scale = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(6))
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), 1, 4), x], 1)
        return self.last((torch.tanh(self.first(x)) * self.scale).mean(1))


class Borrows(nn.Module):
    """Uses the weights of ``inner`` without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(torch.tanh(F.linear(x, self.inner.weight, self.inner.bias)))


GROUPS = [["token", "first"], ["scale", "last"]]


def setting():
    torch.manual_seed(0)
    return WithToken().double(), torch.randn(5, 3, 4, dtype=torch.float64), torch.randint(0, 2, (5,))


def per_sample(output, target):
    return F.cross_entropy(output, target, reduction="none")


@pytest.mark.parametrize("perturb", ["weight", "activity"])
def test_a_parameter_in_a_group(perturb):
    model, x, y = setting()
    fg = frog.ForwardGradient(model, per_sample, k=3, perturb=perturb, layers=GROUPS)
    simulated = frog.simulate(fg, x, y)
    fg(x, y)
    assert set(simulated.gradients) == {name for name, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        assert_close64(p.grad, simulated.gradients[name])


def test_exact_with_as_many_tangents_as_activities():
    """token and scale reach the loss through the outputs that end their groups, so nothing of their gradient is missed."""
    model, x, y = setting()
    fg = frog.ForwardGradient(model, per_sample, k=4 * 6 + 2, layers=GROUPS)
    fg(x, y)
    expected = torch.autograd.grad(per_sample(model(x), y).mean(), list(model.parameters()))
    for p, g in zip(model.parameters(), expected, strict=True):
        assert_close64(p.grad, g, 1e-7)  # conditioning of 26 random tangents in 26 dimensions


def test_what_a_hook_of_all_modules_keeps_is_not_perturbed_later():
    """Such hooks see a layer's output before its activity tangent is added, which otherwise happens where the tangents are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Unflatten(1, (2, 3)), nn.Flatten()).double()
    x, seen = torch.randn(5, 4, dtype=torch.float64), []
    fg = frog.ForwardGradient(model, lambda out, _: out.square().sum(1), k=3, perturb="activity")
    handle = nn.modules.module.register_module_forward_hook(lambda m, given, out: seen.append((m, given[0], out)))
    try:
        fg.derivatives(x, None)
    finally:
        handle.remove()
    second, given, out = next(s for s in seen if s[0] is model[1])
    assert_close64(out.tangents, given.tangents @ second.weight.detach().T)


def test_weights_of_one_parameter():
    model, x, y = setting()
    frog.ForwardGradient(model, per_sample, k=4, perturb="weight", layers=["token"])(x, y)
    expected = torch.autograd.grad(per_sample(model(x), y).mean(), model.token)[0]
    assert_close64(model.token.grad, expected, 1e-7)
    assert all(p.grad is None for name, p in model.named_parameters() if name != "token")


def test_a_group_must_end_with_a_module():
    model, _, _ = setting()
    for layers in (["token", "first"], [["first", "token"]]):
        with pytest.raises(ValueError, match="'token' is a parameter; put it in a group that ends with the module"):
            frog.ForwardGradient(model, per_sample, k=2, layers=layers)


def test_a_layer_that_is_not_called_is_named_once():
    model = Borrows().double()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randint(0, 2, (5,))
    fg = frog.ForwardGradient(model, per_sample, k=2)
    with pytest.warns(UserWarning, match="inner were not called in the forward pass") as caught:
        fg(x, y)
    assert caught[0].filename == __file__, "the line of the call"
    with pytest.warns(UserWarning, match="inner were not called in the forward pass") as caught:
        frog.ForwardGradient(model, per_sample, k=2, chunk_size="auto", memory_budget=1 << 30).derivatives(x, y)
    assert caught[0].filename == __file__
    assert model.inner.weight.grad is None and model.last.weight.grad is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fg(x, y)
        frog.ForwardGradient(model, per_sample, k=2, layers=["last"])(x, y)
