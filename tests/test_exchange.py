"""Other tensors in place of a model's own, which come back."""

from __future__ import annotations

import copy

import pytest
import torch
from backprop import B, C, K, M, float64, losses  # noqa: F401
from torch import nn

import frog_cuda as frog


class Aliased(nn.Module):
    """A module, with a buffer, under two names."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Linear(M, M), nn.BatchNorm1d(M).eval(), nn.Tanh())
        self.b, self.f = self.a, nn.Bilinear(M, M, C)

    def forward(self, x):
        return self.f(self.b(self.a(x)), x)


@pytest.mark.parametrize("perturb, chunk_size", [("activity", None), ("activity", 40), ("weight", None), ("weight", 40)])
def test_a_module_of_two_names(perturb, chunk_size):
    model = Aliased()
    model.a[1].train()
    own = [*model.parameters(), *model.buffers()]
    expected, x, y = copy.deepcopy(model), torch.randn(B, M), torch.randint(0, C, (B,))
    losses(expected(x), y).mean().backward()
    fg = frog.ForwardGradient(model, losses, k=K, perturb=perturb, chunk_size=chunk_size, per_sample=False)
    fg(x, y)
    frog.coverage(model, x)
    assert all(a is b for a, b in zip((*model.parameters(), *model.buffers()), own, strict=True))
    for p, q in zip(model.parameters(), expected.parameters()):
        assert p.grad is not None
        if perturb == "weight":
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9)
    for a, b in zip(model.buffers(), expected.buffers()):
        torch.testing.assert_close(a, b)
