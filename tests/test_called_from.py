"""Errors of operations that cannot carry tangents name the operation and the module that called it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from against_func import draw, dual
from torch import Tensor, nn
from torch.func import functional_call

import frog_cuda as frog


class Calls(nn.Module):
    def __init__(self, operation: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.operation = nn.Linear(3, 3), operation

    def forward(self, x: Tensor) -> Any:
        return self.operation(self.linear(x))


def no_forward_mode(x: Tensor) -> Tensor:
    return torch.ops.aten.soft_margin_loss_backward(torch.ones_like(x), x, torch.ones_like(x), 1)


def into_a_plain_buffer(x: Tensor) -> Tensor:
    out = torch.zeros(x.shape, dtype=x.dtype)
    out[:, :2] = x[:, 1:]
    return out


CASES = [
    (no_forward_mode, NotImplementedError, r"aten\.soft_margin_loss_backward\.default"),
    (lambda x: torch.exp(x, out=torch.empty_like(x)), NotImplementedError, r"aten\.exp\.out"),
    (into_a_plain_buffer, RuntimeError, r"aten\.copy_\.default"),
    (lambda x: x.numpy(), RuntimeError, "numpy"),
]


def model(operation: Callable[[Tensor], Any]) -> nn.Sequential:
    blocks = nn.ModuleDict({"attention": Calls(operation)})
    blocks.forward = lambda x: blocks["attention"](x)  # type: ignore[method-assign]
    return nn.Sequential(nn.Tanh(), nn.Sequential(nn.Linear(3, 3), blocks)).double()


@pytest.mark.parametrize("operation, error, op", CASES)
@pytest.mark.parametrize("how", ["jvp", "weight", "activity", "by hand"])
def test_the_operation_and_the_module_are_named(operation, error, op, how):
    net, x = model(operation), draw(2, 3)
    where = re.escape(" (called from 1.1.attention, a Calls of Sequential)")
    with pytest.raises(error, match=op + where):
        if how == "jvp":
            frog.jvp(net, (x,), (draw(3, 2, 3),))
        elif how == "by hand":
            with torch.no_grad():
                functional_call(net, {"1.0.weight": dual(net[1][0].weight.detach())}, (x,))
        else:
            frog.ForwardGradient(net, lambda y, t: y.sum(), k=2, perturb=how)(x, None)
    assert all(p.grad is None for p in net.parameters())


def test_outside_modules_and_in_a_single_one():
    with pytest.raises(NotImplementedError, match=r"soft_margin_loss_backward\.default: no rule"):
        no_forward_mode(dual(draw(2, 3)))
    with pytest.raises(NotImplementedError, match=r"default \(called from a Calls\): no rule"), torch.no_grad():
        Calls(no_forward_mode).double()(dual(draw(2, 3)))


def test_a_module_that_the_outer_one_does_not_hold():
    stranger = Calls(no_forward_mode).double()
    with pytest.raises(NotImplementedError, match=r"called from a module, a Calls of Calls\)"), torch.no_grad():
        Calls(lambda y: stranger(y)).double()(dual(draw(2, 3)))
