"""Python's part of a fused layer call: the layer on a DualTensor beside the compiled operators that it comes to.

Tensors are so small that both take microseconds; the difference is what finding the rule, checking and wrapping cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Compare
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import frog_cuda as frog

K = 4


def dual(*shape: int) -> frog.DualTensor:
    return frog.DualTensor(torch.randn(shape), torch.randn(K, *shape))


ROWS, IMAGES, HEADS = (4, 8), (2, 4, 5, 5), (1, 2, 4, 8)
WEIGHT, BIAS, KERNEL = torch.randn(8, 8), torch.randn(8), torch.randn(4, 4, 3, 3)
LAYERS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "linear": (F.linear, (dual(*ROWS), WEIGHT, BIAS)),
    "conv2d": (F.conv2d, (dual(*IMAGES), KERNEL, torch.randn(4))),
    "relu": (F.relu, (dual(*ROWS),)),
    "layer_norm": (F.layer_norm, (dual(*ROWS), (8,), BIAS, BIAS)),
    "softmax": (F.softmax, (dual(*ROWS), -1)),
    "scaled_dot_product_attention": (F.scaled_dot_product_attention, (dual(*HEADS), dual(*HEADS), dual(*HEADS))),
    "cross_entropy": (F.cross_entropy, (dual(*ROWS), torch.randint(0, 8, (4,)))),
    "sum of two": (torch.add, (dual(*ROWS), dual(*ROWS))),
}


class Calls(TorchDispatchMode):
    """Records the calls of this package's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "frog_cuda":
            self.seen.append((func, args))
        elif any(isinstance(arg, frog.DualTensor) for arg in args):
            with self:  # what the rule calls is seen too
                return frog.DualTensor.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", LAYERS)
def test_overhead(name: str, compare: Compare) -> None:
    layer, args = LAYERS[name]
    with Calls() as calls, torch.no_grad():
        result = layer(*args)
    assert calls.seen, f"{name} called no operator of this package"

    def operators() -> Tensor:
        for func, inner in calls.seen:
            out = func(*inner)
        return out

    with torch.no_grad():
        compare(lambda: layer(*args), operators, table="overhead", op=name, calls=len(calls.seen))
    assert isinstance(result, frog.DualTensor) and result.k == K
