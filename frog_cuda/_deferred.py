"""Conditions on values that a device computes: checked at once, or, while a CUDA graph is captured, left for after its replay.

Reading a value waits for the device, which a captured graph cannot do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor


class Condition(NamedTuple):
    """``passed``: 0-dim bool on the device; ``error`` makes what is raised where it is False."""

    passed: Tensor
    error: Callable[[], Exception]


class _Here(threading.local):
    """Of each thread its own: one captures a graph while another goes on as usual."""

    collected: list[Condition] | None = None


_here = _Here()


def deferring() -> bool:
    """Whether conditions are being collected, so that no value may be read."""
    return _here.collected is not None


@contextmanager
def deferred() -> Iterator[list[Condition]]:
    """Inside, conditions are collected in the list that is yielded; nothing is raised."""
    before, _here.collected = _here.collected, []
    try:
        yield _here.collected
    finally:
        _here.collected = before


def require(passed: Tensor, error: Callable[[], Exception]) -> None:
    """Raises ``error()`` unless ``passed``, now or, where that is deferred, by whoever collects."""
    if _here.collected is not None:
        _here.collected.append(Condition(passed, error))
    elif not bool(passed):
        raise error()
