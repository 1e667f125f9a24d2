"""Other tensors in place of a model's own, for the time of a pass.

As ``torch.func.functional_call``, which however leaves the other tensors behind where a module has two names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def exchanged(model: nn.Module, tensors: Mapping[int, Tensor]) -> Iterator[None]:
    """Inside, the modules of ``model`` find ``tensors[id(t)]`` in place of a parameter or buffer ``t``, where there is one."""
    places: list[tuple[dict[str, Any], str, Tensor | None]] = [
        (owner, name, t)
        for module in model.modules()
        for owner in (module._parameters, module._buffers)
        for name, t in owner.items()
        if id(t) in tensors
    ]
    try:
        for owner, name, t in places:
            owner[name] = tensors[id(t)]
        yield
    finally:
        for owner, name, t in places:
            owner[name] = t


@contextmanager
def unmoved_buffers(model: nn.Module) -> Iterator[None]:
    """For a pass that must not move running statistics: inside, buffers are copies; afterwards they are what they were, and
    those that the pass has registered are gone."""
    before = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    copies = {id(b): b.clone() for b in model.buffers()}
    try:
        for owner, own in before:
            owner.update((name, b if b is None else copies[id(b)]) for name, b in own.items())
        yield
    finally:
        for owner, own in before:
            owner.clear()
            owner.update(own)


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers, for :func:`buffers_as`."""
    return {name: b.clone() for name, b in model.named_buffers()}


@contextmanager
def buffers_as(model: nn.Module, saved: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, buffers are what they were when they were saved; afterwards, what they are now."""
    with unmoved_buffers(model):
        with exchanged(model, {id(b): saved[name].clone() for name, b in model.named_buffers() if name in saved}):
            yield
