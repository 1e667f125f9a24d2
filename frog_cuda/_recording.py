"""Whether drop-in layers let autograd record: only where this package differentiates by it, layer by layer or to compare."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Here(threading.local):
    on = False


_here = _Here()


def is_recording() -> bool:
    """Whether this thread is inside :func:`recording`."""
    return _here.on


@contextmanager
def recording() -> Iterator[None]:
    """Inside, autograd is on, and drop-in layers leave it so."""
    before, _here.on = _here.on, True
    try:
        with torch.enable_grad():
            yield
    finally:
        _here.on = before
