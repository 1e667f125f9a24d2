"""What a model computes under ``no_grad`` is a constant."""

from __future__ import annotations

import copy

import pytest
import torch
from backprop import B, C, K, M, assert_is_the_gradient, float64, losses  # noqa: F401
from torch import nn

import frog_cuda as frog

pytestmark = pytest.mark.filterwarnings("ignore:activity perturbation. c were not called")


@torch.set_grad_enabled(False)
def exponential(h):
    return h.exp().mean(1, keepdim=True)


class Constant(nn.Module):
    """Something within is a constant for the gradient."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = nn.Linear(M, 4), nn.Linear(4, C), how
        self.c = nn.Linear(4, 1)
        self.inner = frog.nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("mean", torch.zeros(4))

    @torch.no_grad()
    def scale(self, h):
        return h.abs().mean(1, keepdim=True) + 0.1

    def forward(self, x):
        h = self.a(x).tanh()
        if self.how == "block":
            with torch.no_grad():
                scale = h.abs().mean(1, keepdim=True) + 0.1
                with torch.enable_grad():
                    h = h * 2
        elif self.how == "layers and jvp":
            with torch.no_grad():
                scale = self.inner(h.abs()).sum(1, keepdim=True).abs() + 1
                value, moved = frog.jvp(torch.sin, (x.sum(1, keepdim=True),), (torch.ones(1, len(x), 1),))
                scale = scale + moved[0] ** 2 + value**2
        elif self.how == "inference":
            with torch.inference_mode():
                scale = h.abs().mean(1, keepdim=True) + 0.1
            scale = scale.clone()
        elif self.how == "as it is":
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.training):
                h = h * 2
            before = torch.is_grad_enabled()
            torch.set_grad_enabled(False)
            scale = h.abs().mean(1, keepdim=True) + 0.1
            torch.set_grad_enabled(before)
        elif self.how == "layer":
            with torch.no_grad():
                scale = self.c(h).abs() + 1
        elif self.how == "decorator":
            scale = self.scale(h)
        elif self.how == "switch as decorator":
            scale = exponential(h)
        elif self.how == "made in the pass":

            @torch.set_grad_enabled(False)
            def constant(h):
                return h.abs().mean(1, keepdim=True) + 0.1

            h = h * 2  # making it stops nothing
            scale = constant(h)
        elif self.how == "on again":
            with torch.no_grad():
                scale = h.abs().mean(1, keepdim=True) + 0.1
                torch.set_grad_enabled(True)
                h = h * 2
        elif self.how == "made before":
            switch = torch.set_grad_enabled(False)
            torch.set_grad_enabled(True)
            with switch:
                scale = h.abs().mean(1, keepdim=True) + 0.1
        elif self.how == "switch":
            with torch.set_grad_enabled(not self.training):
                scale = h.exp().mean(1, keepdim=True)
        elif self.how == "written":
            scale = 1
            with torch.no_grad():
                h = h.mul_(2)  # its derivative stays as it was
                self.mean.mul_(0.9).add_(0.1 * h.mean(0))
        else:
            scale = torch.utils.checkpoint.checkpoint(self.scale.__wrapped__, self, h, use_reentrant=self.how == "reentrant")
        return self.b(h / scale)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("perturb", ["weight", "activity"])
@pytest.mark.parametrize(
    "how",
    [
        *("block", "inference", "as it is", "layer", "layers and jvp", "decorator", "switch", "switch as decorator"),
        *("made in the pass", "made before", "on again", "written", "reentrant", "checkpoint"),
    ],
)
def test_no_grad_within_a_model(how, perturb):
    x, y = torch.randn(B, M), torch.randint(0, C, (B,))
    model = Constant(how)
    methods = [getattr(owner, name) for owner in (torch.no_grad, torch.set_grad_enabled) for name in ("__enter__", "__exit__")]
    if how == "written":  # backprop refuses to differentiate tanh of what was overwritten
        twin = copy.deepcopy(model)
        h = twin.a(x).tanh()
        (losses(twin.b(h + h.detach()), y)).mean().backward()
        frog.ForwardGradient(model, losses, k=K, perturb=perturb)(x, y)
        for p, q in zip(model.parameters(), twin.parameters()):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(model.mean, 0.2 * h.detach().mean(0))
    else:
        assert_is_the_gradient(model, x, y, perturb=perturb)
    now = [getattr(owner, name) for owner in (torch.no_grad, torch.set_grad_enabled) for name in ("__enter__", "__exit__")]
    assert methods == now


def test_no_grad_within_a_function():
    """``forward_gradient`` estimates what backprop gives; ``jvp`` differentiates through, as ``torch.func.jvp`` does."""

    def fn(x):
        with torch.no_grad():
            scale = x.exp()
        return (x * scale).sum()

    x = torch.randn(M)
    _, estimate = frog.forward_gradient(fn, x, k=M)
    torch.testing.assert_close(estimate, x.exp())
    _, moved = frog.jvp(fn, (x,), (torch.eye(M),))
    torch.testing.assert_close(moved, x.exp() * (1 + x))
