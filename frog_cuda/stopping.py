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
from types import FrameType
from typing import Any

import torch
from torch.utils._pytree import tree_map

from . import dual

#: which turn recording off because they do without, not because something is constant
_CALLERS_THAT_DIFFERENTIATE = ("torch.utils.checkpoint", __package__ + ".")

#: which set the mode to what they found, that of the pass
_CALLERS_THAT_RESTORE = ("torch._dynamo", "torch._functorch")


class _Local(threading.local):
    #: whether values alone are wanted now, in this thread's pass; None outside passes
    stopped: bool | None = None


_local = _Local()
_lock = threading.Lock()
_passes = 0

#: attribute of a context manager that was entered in a pass: what it found, as ``prev`` is to PyTorch
_FOUND = "_frog_cuda_found"


def in_pass() -> bool:
    """Whether this thread is inside a pass of an estimator."""
    return _local.stopped is not None


def stopped() -> bool:
    """Whether this thread is inside a pass, and there inside ``no_grad``."""
    return bool(_local.stopped)


def on_values(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func`` of the values of DualTensors; one that was written in place is returned as it is."""
    out = func(*tree_map(dual.primal_of, args), **tree_map(dual.primal_of, kwargs))
    if args and type(args[0]) is dual.DualTensor and out is args[0]._primal:
        return args[0]
    return out


@contextmanager
def not_stopping() -> Iterator[None]:
    """For what differentiates by itself within a pass."""
    before, _local.stopped = _local.stopped, None
    try:
        yield
    finally:
        _local.stopped = before


@contextmanager
def stopping_at_no_grad() -> Iterator[None]:
    """For a pass: inside, ``no_grad`` stops derivatives."""
    global _passes
    before, _local.stopped = _local.stopped, False
    with _lock:
        _passes += 1
        if _passes == 1:
            for owner, name, noting, _ in _METHODS:
                setattr(owner, name, noting)
    try:
        yield
    finally:
        _local.stopped = before
        with _lock:
            _passes -= 1
            if _passes == 0:
                for owner, name, _, original in _METHODS:
                    setattr(owner, name, original)


def _module(caller: FrameType) -> str:
    return str(caller.f_globals.get("__name__", ""))


def _stop(manager: Any, args: tuple[Any, ...], caller: FrameType) -> None:
    setattr(manager, _FOUND, _local.stopped)
    if getattr(manager, "mode", True) and not _module(caller).startswith(_CALLERS_THAT_DIFFERENTIATE):
        _local.stopped = True


def _go_on(manager: Any, args: tuple[Any, ...], caller: FrameType) -> None:
    setattr(manager, _FOUND, _local.stopped)
    _local.stopped = False


def _switch(manager: Any, args: tuple[Any, ...], caller: FrameType) -> None:
    """``set_grad_enabled`` acts when it is made, entered or not."""
    # By it, no_grad and enable_grad switch the mode itself, and what compiles puts back the mode that it found
    by = _module(caller)
    if by.startswith(_CALLERS_THAT_RESTORE) or (by == torch.no_grad.__module__ and caller.f_code.co_name != "clone"):
        return
    setattr(manager, _FOUND, _local.stopped)
    _local.stopped = not args[0]


def _switch_again(manager: Any, args: tuple[Any, ...], caller: FrameType) -> None:
    if not _module(caller).startswith(_CALLERS_THAT_RESTORE):
        if _FOUND not in vars(manager):  # made before the pass
            setattr(manager, _FOUND, _local.stopped)
        _local.stopped = not manager.mode


def _leave(manager: Any, args: tuple[Any, ...], caller: FrameType) -> None:
    """Also where ``set_grad_enabled`` turns out to decorate a function."""
    if _FOUND in vars(manager):
        _local.stopped = vars(manager).pop(_FOUND)


def _noting(owner: type, name: str, note: Callable[[Any, tuple[Any, ...], FrameType], None]) -> tuple[Any, str, Any, Any]:
    """A method of a context manager of PyTorch that notes when it is entered or left, and the method as it was."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _local.stopped is not None:
            note(self, (*args, *kwargs.values()), sys._getframe(1))
        return original(self, *args, **kwargs)

    return owner, name, noting, original


_is_grad_enabled = torch.is_grad_enabled


def _would_record() -> bool:
    """What ``torch.is_grad_enabled`` tells a model in a pass: whether there is a derivative. It may set that mode anew."""
    if _local.stopped is None or sys._getframe(1).f_globals.get("__name__", "").startswith(("torch.", __package__ + ".")):
        return _is_grad_enabled()
    return not stopped()


_MANAGERS = (torch.no_grad, torch.enable_grad, torch.set_grad_enabled, torch.inference_mode)
_METHODS: list[tuple[Any, str, Any, Any]] = [
    _noting(torch.no_grad, "__enter__", _stop),
    _noting(torch.inference_mode, "__enter__", _stop),
    _noting(torch.enable_grad, "__enter__", _go_on),
    _noting(torch.set_grad_enabled, "__init__", _switch),
    _noting(torch.set_grad_enabled, "__enter__", _switch_again),
    _noting(torch.set_grad_enabled, "__call__", _leave),
    *(_noting(owner, "__exit__", _leave) for owner in _MANAGERS),
    (torch, "is_grad_enabled", _would_record, _is_grad_enabled),
]
