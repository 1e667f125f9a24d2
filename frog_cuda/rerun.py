"""Gradients of layers without a closed form: the layer runs again on what it was given, with autograd on.

A layer's random numbers and buffers are those of its first run, and its inputs are what they were then, so nothing of the model
outside the layer is needed or touched. A group of several modules is no function that could be called: for it the whole pass is
repeated, see :mod:`frog_cuda.activity`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .dual import DualTensor
from .exchange import buffers_as, saved_buffers
from .functional import RandomNumbers, copy_if_written
from .layers import Group


class Finished(BaseException):
    """Ends a pass early; no error, so that no model catches it."""


def snapshot(tree: Any) -> Any:
    """Values as they are now, whatever writes into the tensors later. What is the same tensor stays so, as the query, key and
    value of self-attention are."""
    seen: dict[int, Any] = {}

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in seen:
            # A DualTensor's value lies beside its tangents, which it alone would keep alive
            value = leaf.primal.clone() if isinstance(leaf, DualTensor) else copy_if_written(leaf.detach())
            seen[id(leaf)] = value
        return seen[id(leaf)]

    return tree_map(of, tree)


class Call:
    """One call of a layer, to be made again.

    Attributes:
        group: the layer.
        draws_numbers: whether the layer drew random numbers.
    """

    draws_numbers = False

    def __init__(self, group: Group, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.group, layer = group, group.output
        self._args, self._kwargs = snapshot((args, kwargs))
        self._parameters = list(layer.parameters())
        self._versions = [p._version for p in self._parameters]
        self._numbers = RandomNumbers(self._parameters, layer.modules())
        self._buffers = saved_buffers(layer)

    def ended(self) -> None:
        """The layer has run."""
        self.draws_numbers = self._numbers.drawn()

    def again(self, name: str) -> None:
        """Runs the layer; a hook takes its output.

        Raises:
            RuntimeError: its parameters have changed in the meantime.
        """
        if [p._version for p in self._parameters] != self._versions:
            raise RuntimeError(
                f"layers: the parameters of {name} were changed after the forward pass, but the layer has no closed-form "
                "gradient and runs again for it; take gradients before the parameters move"
            )
        with torch.enable_grad(), self._numbers.replayed() if self.draws_numbers else nullcontext():
            with suppress(Finished), buffers_as(self.group.output, self._buffers):
                self.group.output(*self._args, **self._kwargs)


def local_gradients(
    outputs: Sequence[Tensor], gradients: Sequence[Tensor], parameters: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of parameters that get ``gradients`` through recorded ``outputs``; None for those that took no part."""
    pairs = [(y, g.to(y.dtype)) for y, g in zip(outputs, gradients, strict=True) if y.requires_grad]
    if not pairs:
        return [None] * len(parameters)
    found = torch.autograd.grad([y for y, _ in pairs], list(parameters), [g for _, g in pairs], allow_unused=True)
    return list(found)
