"""Estimates with as many tangents as there are dimensions, held against ``loss.backward()``."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import frog_cuda as frog

#: samples, features, classes, enough tangents for all models here
B, M, C, K = 6, 5, 3, 160


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def losses(output, target):
    return F.cross_entropy(output, target, reduction="none")


def by_backprop(model, x, y, loss_fn=losses):
    state = copy.deepcopy(model.state_dict())
    loss_fn(model(x.clone()), y).mean().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.load_state_dict(state)
    model.zero_grad()
    return found


def assert_is_the_gradient(model, x, y, loss_fn=losses, tolerance=1e-7, **options):
    expected = by_backprop(model, x, y, loss_fn)
    frog.ForwardGradient(model, loss_fn, **{"k": K} | options)(x.clone(), y)
    for name, p in model.named_parameters():
        if expected[name] is None:
            assert p.grad is None or p.grad.norm() < 1e-9, name
            continue
        assert p.grad is not None, name
        error = (p.grad - expected[name]).norm() / expected[name].norm().clamp(min=1e-3)
        assert error < tolerance, (name, error.item())
