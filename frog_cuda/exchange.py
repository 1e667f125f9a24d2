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


def copied_buffers(model: nn.Module) -> dict[int, Tensor]:
    """Stand-ins for the buffers, in a pass that must not move running statistics."""
    return {id(b): b.clone() for b in model.buffers()}
