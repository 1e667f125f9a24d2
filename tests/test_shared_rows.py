"""Layers whose output has a single row for all samples, such as the embedding of positions in GPT-2 and BERT."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close64
from torch import nn

import frog_cuda as frog


class WithPositions(nn.Module):
    """(B, 4) tokens -> (B, 3); the positions are embedded once, (1, 4, 6), and go through a layer of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(9, 6), nn.Embedding(4, 6)
        self.place, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        position = torch.tanh(self.place(self.positions(torch.arange(4).unsqueeze(0))))
        return self.last(torch.tanh(self.tokens(x) + position).sum(1))


def setting(rows=5):
    torch.manual_seed(0)
    return WithPositions().double(), torch.randint(0, 9, (rows, 4)), torch.randint(0, 3, (rows,))


def per_sample(output, target):
    return F.cross_entropy(output, target, reduction="none")


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("aggregate", ["orthogonal", "mean"])
@pytest.mark.parametrize("tangents", ["normal", "orthonormal"])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(chunk_size=2),
        dict(shared_across_batch=False),
        dict(per_sample=False),
        dict(per_sample=False, shared_across_batch=False),
    ],
    ids=str,
)
def test_equals_the_simulated_estimate(rows, aggregate, tangents, options):
    model, x, y = setting(rows)
    fg = frog.ForwardGradient(model, per_sample, k=3, aggregate=aggregate, tangents=tangents, **options)
    simulated = frog.simulate(fg, x, y)
    fg(x, y)
    assert_close64(fg.last.directional_derivatives, simulated.directional_derivatives)
    for name, p in model.named_parameters():
        assert_close64(p.grad, simulated.gradients[name])


@pytest.mark.parametrize("options", [dict(), dict(shared_across_batch=False), dict(per_sample=False)], ids=str)
def test_exact_with_as_many_tangents_as_activities(options):
    """The projection onto everything is the gradient itself: the shares of all samples in the common row add up."""
    model, x, y = setting()
    # one derivative for the batch under shared tangents cannot tell the samples apart, so exactness needs a single sample there
    x, y = (x[:1], y[:1]) if options == dict(per_sample=False) else (x, y)
    fg = frog.ForwardGradient(model, per_sample, k=24 + 24 + 24 + 3, **options)
    simulated = frog.simulate(fg, x, y)
    fg(x, y)
    assert fg.last.n == 75
    for name, p in model.named_parameters():
        assert_close64(p.grad, simulated.true_gradients[name], 1e-6)  # conditioning of 75 random tangents in 75 dimensions


def test_custom_aggregation():
    model, x, y = setting()
    mean = frog.ForwardGradient(model, per_sample, k=3, aggregate="mean")
    custom = frog.ForwardGradient(model, per_sample, k=3, aggregate=lambda v, d: d.T @ v / 3)
    mean(x, y)
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    custom(x, y)
    for name, p in model.named_parameters():
        assert_close64(p.grad, expected[name])


def test_other_numbers_of_rows_are_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.Flatten(0, 1), nn.Linear(4, 2), nn.Unflatten(0, (-1, 2)), nn.Flatten())
    x, y = torch.randn(5, 2, 3), torch.zeros(5, dtype=torch.int64)
    fg = frog.ForwardGradient(model, per_sample, k=2)
    for call in (fg, lambda *a: frog.simulate(fg, *a)):
        with pytest.raises(ValueError, match="output of 2 has 10 rows, but there are 5 losses"):
            call(x, y)
