"""ForwardGradient in a training loop: a good citizen among optimizers and checkpoints, with nothing left behind in autograd."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close64
from test_forward_gradient import K, batch, grads, mlp, per_sample

import frog_cuda as frog


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=0.02),
        lambda p: torch.optim.AdamW(p, lr=0.02),
        lambda p: torch.optim.RMSprop(p, lr=0.005),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
        lambda p: torch.optim.NAdam(p, lr=0.02),
    ],
    ids=["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam"],
)
def test_optimizers_reduce_the_loss(make):
    model, (x, y) = mlp(torch.float32), batch(32, torch.float32)
    optimizer = make(model.parameters())
    fg = frog.ForwardGradient(model, per_sample, k=16)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(fg(x, y).item())
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("tangents", ["normal", "rademacher", "sphere", "standard_basis"])
@pytest.mark.parametrize("aggregate", ["orthogonal", "mean", lambda v, d: d @ v / len(v)], ids=["orthogonal", "mean", "custom"])
def test_update_is_a_step_of_sgd(tangents, aggregate):
    x, y = batch()
    models = [mlp(), mlp()]
    fgs = [frog.ForwardGradient(m, per_sample, k=K, perturb="weight", tangents=tangents, aggregate=aggregate) for m in models]
    optimizer = torch.optim.SGD(models[0].parameters(), lr=0.1)
    versions = [p._version for p in models[1].parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        fgs[0](x, y)
        optimizer.step()
        fgs[1].derivatives(x, y)
        fgs[1].update_(0.1)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_close64(b, a)
        assert b.grad is None
    # autograd must notice that a value it may have saved was overwritten
    assert all(p._version > v for p, v in zip(models[1].parameters(), versions, strict=True))


@pytest.mark.parametrize("perturb", ["weight", "activity"])
def test_a_resumed_run_repeats_bit_for_bit(perturb):
    def run(steps, model, fg):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            fg(*batch(16, torch.float32))
            optimizer.step()

    whole = mlp(torch.float32)
    run(6, whole, frog.ForwardGradient(whole, per_sample, k=4, perturb=perturb, seed=11))
    half = mlp(torch.float32)
    fg = frog.ForwardGradient(half, per_sample, k=4, perturb=perturb, seed=11)
    run(3, half, fg)
    saved = copy.deepcopy((half.state_dict(), fg.state_dict()))
    again = mlp(torch.float32)
    again.load_state_dict(saved[0])
    resumed = frog.ForwardGradient(again, per_sample, k=4, perturb=perturb)
    resumed.load_state_dict(saved[1])
    run(3, again, resumed)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("perturb", ["weight", "activity"])
def test_accumulates_like_backward(perturb):
    model, (x, y) = mlp(), batch()
    fg = frog.ForwardGradient(model, per_sample, k=K, perturb=perturb)
    fg(x, y)
    first = {n: g.clone() for n, g in grads(model).items()}
    fg(x, y)
    second = fg.gradients()
    for name, g in grads(model).items():
        assert_close64(g, first[name] + second[name])
    assert fg.step == 2


def test_no_autograd_graph_and_no_retained_hooks():
    model, (x, y) = mlp(), batch()
    seen: list[torch.Tensor] = []
    for perturb in ("weight", "activity"):
        fg = frog.ForwardGradient(model, per_sample, k=K, perturb=perturb)
        loss = fg(x, y)
        assert not loss.requires_grad and loss.grad_fn is None and type(loss) is torch.Tensor
        assert all(p.requires_grad and p.grad_fn is None and p.grad.grad_fn is None for p in model.parameters())
        assert not any(m._forward_hooks for m in model.modules())
        with torch.autograd.graph.saved_tensors_hooks(seen.append, lambda t: t):
            fg(x, y)
        assert not seen
    F.cross_entropy(model(x), y).backward()  # the model still trains by backprop


def test_a_custom_aggregation_gives_gradients_that_are_the_callers():
    model = mlp()
    fg = frog.ForwardGradient(model, per_sample, k=K, perturb="weight", aggregate=lambda v, d: d @ v)
    fg.derivatives(*batch())
    once = {name: g.clone() for name, g in fg.gradients().items()}
    for times in (1, 2, 3):
        fg.accumulate_()
        for name, p in model.named_parameters():
            assert_close64(p.grad, times * once[name])
    model.zero_grad(set_to_none=False)
    fg.update_(0.1, momentum=0.9, weight_decay=0.5, nesterov=True)
    for name, g in fg.gradients().items():
        assert torch.equal(g, once[name])
