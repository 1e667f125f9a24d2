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


class Apart(nn.Module):
    """(B, 4) -> (B, 6): one output of a layer is viewed alone, one after another layer has read it, and one before."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, 6) for n in (4, 6, 6, 6, 6, 6))

    def forward(self, x):
        first, second, third, fourth, fifth, last = self.layers
        x = second(first(x)).unflatten(1, (2, 3)).flatten(1)
        y = third(x)
        x = fourth(y) + y.unflatten(1, (2, 3)).flatten(1)
        z = fifth(x)
        return last(z.unflatten(1, (2, 3)).flatten(1)) + z


def squares(out, _):
    return out.square().sum(1)


def estimator(model):
    return frog.ForwardGradient(model, squares, k=3, perturb="activity")


def test_tangents_that_are_added_in_place_are_the_same_bits():
    """Where nothing took an activity tangent along in the pass before, it is added to what the layer returns."""
    torch.manual_seed(0)
    model, x = Apart(), torch.randn(5, 4)
    first, second = estimator(model), estimator(model)
    added = first._method._added
    first.derivatives(x, None)
    assert {name for name, _ in added} == {"layers.1", "layers.4"}  # what layers.2 returned went through a layer before
    again = first.derivatives(x, None)
    second.step = 1
    assert torch.equal(second.derivatives(x, None), again)
    assert torch.equal(second.last.directional_derivatives, first.last.directional_derivatives)


def test_what_others_keep_is_not_perturbed_later():
    """Hooks of all modules and a ``forward`` that was replaced have a layer's output before its activity tangent is added."""
    torch.manual_seed(0)
    model, seen = Apart().double(), []
    fg, x, layer = estimator(model), torch.randn(5, 4, dtype=torch.float64), model.layers[1]
    fg.derivatives(x, None)

    def keep(given):
        seen.append((given, nn.Linear.forward(layer, given)))
        return seen[-1][1]

    handle = nn.modules.module.register_module_forward_hook(
        lambda module, given, out: seen.append((given[0], out)) if module is layer else None
    )
    fg.derivatives(x, None)
    handle.remove()
    layer.forward = keep
    fg.derivatives(x, None)
    assert len(seen) == 2
    for given, out in seen:
        assert_close64(out.tangents, given.tangents @ layer.weight.detach().T)


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


def _on_the_layer(model):
    inner = model[0].forward
    model[0].forward = lambda x: 2 * inner(x)
    return lambda: delattr(model[0], "forward")


def _on_its_class(model):
    inner = nn.Linear.forward
    nn.Linear.forward = lambda self, x: 2 * inner(self, x)
    return lambda: setattr(nn.Linear, "forward", inner)


def _on_all_modules(model):
    return nn.modules.module.register_module_forward_hook(
        lambda module, given, out: 2 * out if isinstance(module, nn.Linear) else None
    ).remove


@pytest.mark.parametrize("early", [False, True], ids=["after construction", "before"])
@pytest.mark.parametrize("change", [_on_the_layer, _on_its_class, _on_all_modules])
def test_layers_whose_results_others_change_have_no_closed_form(change, early):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    undo = change(model) if early else None
    fg = frog.ForwardGradient(model, squares, k=11)
    if undo is None:
        fg(x, None)  # as it was; what is known of this pass must not serve the next
        undo = change(model)
    model.zero_grad()
    try:
        fg(x, None)
        expected = torch.autograd.grad(squares(model(x), None).mean(), list(model.parameters()))
    finally:
        undo()
    for p, g in zip(model.parameters(), expected, strict=True):
        assert_close64(p.grad, g, 1e-7)
    model.zero_grad()
    fg(x, None)
    expected = torch.autograd.grad(squares(model(x), None).mean(), list(model.parameters()))
    for p, g in zip(model.parameters(), expected, strict=True):
        assert_close64(p.grad, g, 1e-7)
    assert all(s.call is None for s in fg.last.trace.segments), "closed forms again"


def test_a_class_whose_forward_was_replaced_keeps_what_it_returns():
    """As in :func:`test_what_others_keep_is_not_perturbed_later`."""
    torch.manual_seed(0)
    model, seen, inner = Apart().double(), [], nn.Linear.forward
    fg, x = estimator(model), torch.randn(5, 4, dtype=torch.float64)
    fg.derivatives(x, None)

    def keep(self, given):
        seen.append((self, given, inner(self, given)))
        return seen[-1][2]

    nn.Linear.forward = keep
    try:
        fg.derivatives(x, None)
    finally:
        nn.Linear.forward = inner
    _, given, out = next(entry for entry in seen if entry[0] is model.layers[1])
    assert_close64(out.tangents, given.tangents @ model.layers[1].weight.detach().T)
