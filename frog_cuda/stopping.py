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

#: which turn recording off because they do without, not because something is constant
_CALLERS_THAT_DIFFERENTIATE = ("torch.utils.checkpoint", __package__ + ".")


class _Local(threading.local):
    #: of this thread's pass: whether values alone are wanted, for each context manager that was entered; None outside passes
    entered: list[bool] | None = None


_local = _Local()
_lock = threading.Lock()
_passes = 0


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
def not_stopping() -> Iterator[None]:
    """For what differentiates by itself within a pass."""
    before, _local.entered = _local.entered, None
    try:
        yield
    finally:
        _local.entered = before


@contextmanager
def stopping_at_no_grad() -> Iterator[None]:
    """For a pass: inside, ``no_grad`` stops derivatives."""
    global _passes
    before, _local.entered = _local.entered, []
    with _lock:
        _passes += 1
        if _passes == 1:
            for owner, name, noting, _ in _METHODS:
                setattr(owner, name, noting)
    try:
        yield
    finally:
        _local.entered = before
        with _lock:
            _passes -= 1
            if _passes == 0:
                for owner, name, _, original in _METHODS:
                    setattr(owner, name, original)


def _stops(entered: list[bool], stops: bool) -> None:
    """Notes what a context manager means that was just entered, two calls up: for some, what was meant before."""
    caller = sys._getframe(3).f_globals.get("__name__", "")
    entered.append(entered[-1:] == [True] if caller.startswith(_CALLERS_THAT_DIFFERENTIATE) else stops)


def _stop(entered: list[bool], manager: Any, args: tuple[Any, ...]) -> None:
    _stops(entered, True)


def _stop_where_on(entered: list[bool], manager: Any, args: tuple[Any, ...]) -> None:
    _stops(entered, manager.mode or entered[-1:] == [True])


def _go_on(entered: list[bool], manager: Any, args: tuple[Any, ...]) -> None:
    entered.append(False)


def _switch(entered: list[bool], manager: Any, args: tuple[Any, ...]) -> None:
    if sys._getframe(2).f_globals.get("__name__") != torch.no_grad.__module__:  # which switches by this one
        entered.append(not args[0])


def _leave(entered: list[bool], manager: Any, args: tuple[Any, ...]) -> None:
    if entered:
        entered.pop()


def _noting(owner: type, name: str, note: Callable[[list[bool], Any, tuple[Any, ...]], None]) -> tuple[Any, str, Any, Any]:
    """A method of a context manager of PyTorch that notes when it is entered or left, and the method as it was."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _local.entered is not None:
            note(_local.entered, self, (*args, *kwargs.values()))
        return original(self, *args, **kwargs)

    return owner, name, noting, original


_is_grad_enabled = torch.is_grad_enabled


def _would_record() -> bool:
    """What ``torch.is_grad_enabled`` tells a model in a pass: whether there is a derivative. It may set that mode anew."""
    if _local.entered is None or sys._getframe(1).f_globals.get("__name__", "").startswith(("torch.", __package__ + ".")):
        return _is_grad_enabled()
    return not stopped()


_MANAGERS = (torch.no_grad, torch.enable_grad, torch.set_grad_enabled, torch.inference_mode)
_METHODS: list[tuple[Any, str, Any, Any]] = [
    _noting(torch.no_grad, "__enter__", _stop),
    _noting(torch.inference_mode, "__enter__", _stop_where_on),
    _noting(torch.enable_grad, "__enter__", _go_on),
    _noting(torch.set_grad_enabled, "__init__", _switch),
    *(_noting(owner, "__exit__", _leave) for owner in _MANAGERS),
    (torch, "is_grad_enabled", _would_record, _is_grad_enabled),
]
