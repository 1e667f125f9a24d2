"""``torch.no_grad()`` in a model or a loss: what is computed there is a constant for the gradient estimate, as for backprop.

The passes themselves run without recording, so the grad mode alone does not tell. While a thread runs a pass, the context
managers that a model may enter take note of it here, and operations on DualTensors then work on values.
:func:`frog_cuda.jvp` is not concerned: like ``torch.func.jvp`` it differentiates what is computed under ``no_grad``, too.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_map

from . import dual

#: which turn recording off only to do it later again
_CALLERS_THAT_DIFFERENTIATE = ("torch.utils.checkpoint",)


class _Local(threading.local):
    #: of this thread's pass: whether values alone are wanted, for each context manager that was entered; None outside passes
    entered: list[bool] | None = None


_local = _Local()
_lock = threading.Lock()
_passes = 0
_originals: list[tuple[type, str, Callable[..., Any]]] = []


def stopped() -> bool:
    """Whether this thread is inside a pass, and there inside ``no_grad``."""
    entered = _local.entered
    return bool(entered) and entered[-1]  # type: ignore[index]


def on_values(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func`` of the values of DualTensors; one that was written in place is returned as it is."""
    out = func(*tree_map(dual.primal_of, args), **tree_map(dual.primal_of, kwargs))
    if args and type(args[0]) is dual.DualTensor and out is args[0]._primal:
        return args[0]
    return out


@contextmanager
def stopping_at_no_grad() -> Iterator[None]:
    """For a pass: inside, ``no_grad`` stops derivatives."""
    global _passes
    before, _local.entered = _local.entered, []
    with _lock:
        _passes += 1
        if _passes == 1:
            _watch()
    try:
        yield
    finally:
        _local.entered = before
        with _lock:
            _passes -= 1
            if _passes == 0:
                while _originals:
                    owner, name, original = _originals.pop()
                    setattr(owner, name, original)


def _watch() -> None:
    """Lets the context managers of PyTorch tell that they are entered and left."""

    def replace(owner: type, name: str, note: Callable[[list[bool], tuple[Any, ...]], None]) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
            if _local.entered is not None:
                note(_local.entered, (*args, *kwargs.values()))
            return original(self, *args, **kwargs)

        _originals.append((owner, name, original))
        setattr(owner, name, noting)

    def stop(entered: list[bool], args: tuple[Any, ...]) -> None:
        caller = sys._getframe(2).f_globals.get("__name__", "")
        entered.append(not caller.startswith(_CALLERS_THAT_DIFFERENTIATE))

    def go_on(entered: list[bool], args: tuple[Any, ...]) -> None:
        entered.append(False)

    def switch(entered: list[bool], args: tuple[Any, ...]) -> None:
        if sys._getframe(2).f_globals.get("__name__") != torch.no_grad.__module__:  # which switches by this one
            entered.append(not args[0])

    def leave(entered: list[bool], args: tuple[Any, ...]) -> None:
        if entered:
            entered.pop()

    replace(torch.no_grad, "__enter__", stop)
    replace(torch.enable_grad, "__enter__", go_on)
    replace(torch.set_grad_enabled, "__init__", switch)
    for owner in (torch.no_grad, torch.enable_grad, torch.set_grad_enabled):
        replace(owner, "__exit__", leave)
