"""``torch.autograd.Function`` with DualTensors: the class's own ``jvp``, as in PyTorch's forward mode.

PyTorch calls ``forward`` with DualTensors as if they were any tensors, so that the derivative would be that of the code in
``forward``, not the one that the class defines: wrong for a straight-through estimator or a gradient reversal. ``apply`` is
often kept under another name, and not written in Python since torch 2.14, so it cannot be caught. But it looks ``forward`` up
in its class at every call, and what it finds there is another function for the time of a pass, or for good where a DualTensor
is made by hand.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, FunctionMeta
from torch.utils._pytree import tree_leaves

from . import _data, stopping
from .dual import DualTensor, _make, called_from, primal_of, resolve
from .rules.helpers import common_k, low_dtype, parts, share_memory, wrap

_lock = threading.Lock()
_passes = 0


def _getattribute(cls: Any, name: str) -> Any:
    value = type.__getattribute__(cls, name)
    # PyTorch's own, such as a checkpoint, are made of operations that have rules
    if name != "forward" or cls.__module__.partition(".")[0] == "torch":
        return value

    @functools.wraps(value)
    def forward(*given: Any, **named: Any) -> Any:
        return _forward(cls, value, given, named)

    return forward


def _forward(cls: Any, original: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    first = 0 if _separate(cls) else 1  # of the arguments, after ctx
    args = given[first:]
    if not any(type(a) is DualTensor for a in tree_leaves((args, named))):
        return original(*given, **named)
    if stopping.stopped():
        return original(*given[:first], *map(primal_of, args), **{name: primal_of(a) for name, a in named.items()})
    return _forward_mode(cls, original, args, named)


def _separate(cls: Any) -> bool:
    return cls.setup_context is not Function.setup_context


@contextmanager
def intercepted() -> Iterator[None]:
    """Inside, ``apply`` of custom functions heeds DualTensors, in every thread; for other arguments it stays as it is."""
    _count(1)
    try:
        yield
    finally:
        _count(-1)


def stay() -> None:
    """Outside of passes, for a DualTensor made by hand: nobody tells when it is no longer used."""
    if _passes == 0:
        _count(1)


def _count(change: int) -> None:
    global _passes
    with _lock:
        _passes += change
        if _passes == change == 1:
            FunctionMeta.__getattribute__ = _getattribute  # type: ignore[method-assign, assignment]
            _data.check()
        elif _passes == 0:
            del FunctionMeta.__getattribute__
            _data.stop_checking()


class _Context(FunctionCtx):
    """What ``forward`` and ``setup_context`` fill and ``jvp`` reads."""

    materialize_grads = True
    non_differentiable: tuple[Any, ...] = ()
    dirty_tensors: tuple[Any, ...] = ()
    to_save: tuple[Any, ...] = ()
    saved_for_forward: Any = None

    def __init__(self, name: str, needs_input_grad: tuple[bool, ...]) -> None:
        self._name, self.needs_input_grad = name, needs_input_grad

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        if self.saved_for_forward is None and self.to_save:
            raise RuntimeError(f"{self._name}: jvp reads ctx.saved_tensors, which needs ctx.save_for_forward() in forward")
        return self.saved_for_forward or ()

    def name(self) -> str:
        return self._name


def _forward_mode(cls: Any, forward: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    name = cls.__name__
    if any(type(a) is DualTensor for a in tree_leaves(([a for a in args if type(a) is not DualTensor], named))):
        raise NotImplementedError(
            f"{name}.apply{called_from()}: a DualTensor inside a list or dict, or as a keyword argument; PyTorch "
            "differentiates custom functions in their positional arguments only"
        )
    k = common_k(f"{name}.apply", *args)
    given = [parts(a)[1] for a in args]
    moves = any(t is not None for t in given)
    if moves and cls.jvp is Function.jvp:
        raise NotImplementedError(
            f"{name}.apply{called_from()}: this torch.autograd.Function defines no jvp staticmethod, which forward mode needs; "
            "see 'Extending PyTorch', forward mode AD, in the documentation of PyTorch"
        )
    values = tuple(map(primal_of, args))
    ctx = _Context(name, tuple(isinstance(v, Tensor) and v.requires_grad for v in values))
    with torch.no_grad():
        if _separate(cls):
            out = forward(*values, **named)
            cls.setup_context(ctx, values, out)
        else:
            out = forward(ctx, *values, **named)
    outs = out if isinstance(out, tuple) else (out,)
    if any(type(o) is DualTensor for o in tree_leaves(outs)):
        raise NotImplementedError(
            f"{name}.apply{called_from()}: forward used a DualTensor that is not among its arguments, whose tangents PyTorch "
            "would lose; make it an argument"
        )
    columns = _tangents(cls, ctx, args, given, values, outs, k) if moves else [None] * len(outs)
    results = [_result(name, ctx, args, values, o, t, k) for o, t in zip(outs, columns, strict=True)]
    return tuple(results) if isinstance(out, tuple) else results[0]


def _tangents(
    cls: Any,
    ctx: Any,
    args: tuple[Any, ...],
    given: list[Tensor | None],
    values: tuple[Any, ...],
    outs: tuple[Any, ...],
    k: int,
) -> list[Tensor | None]:
    """Of each output, (k, *shape), or None where ``jvp`` returned None each time."""

    def tangent(value: Any, tangents: Tensor | None, i: int) -> Tensor | None:
        if tangents is not None:
            # jvp changes the tangent of what forward changed
            row = tangents[i].to(value.dtype)
            return row.clone() if any(value is d for d in ctx.dirty_tensors) else row
        differentiable = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
        return torch.zeros_like(value) if differentiable and ctx.materialize_grads else None

    rows = []
    filled = dict(ctx.__dict__)
    for i in range(k):
        ctx.__dict__.clear()
        ctx.__dict__.update(filled)  # as forward left it: jvp may free what it has used
        with torch.no_grad():
            row = cls.jvp(ctx, *(tangent(v, t, i) for v, t in zip(values, given, strict=True)))
        row = tuple(row) if isinstance(row, (tuple, list)) else (row,)
        if len(row) != len(outs):
            raise RuntimeError(f"{cls.__name__}: jvp returned {len(row)} tangents; forward returned {len(outs)} outputs")
        rows.append(row)
    ctx.__dict__.clear()
    ctx.__dict__.update(filled)
    return [_column(cls.__name__, ctx, out, column) for out, column in zip(outs, zip(*rows, strict=True), strict=True)]


def _column(name: str, ctx: Any, out: Any, column: tuple[Any, ...]) -> Tensor | None:
    if all(t is None for t in column):
        return None
    if not isinstance(out, Tensor) or any(out is o for o in ctx.non_differentiable):
        raise RuntimeError(f"{name}: jvp returned a tangent of an output that is not differentiable; expected None")
    for t in column:
        if t is not None and t.shape != out.shape:
            raise RuntimeError(
                f"{name}: jvp returned a tangent of shape {tuple(t.shape)} for an output of shape {tuple(out.shape)}"
            )
    return torch.stack([torch.zeros_like(out) if t is None else t for t in column])


def _result(name: str, ctx: Any, args: tuple[Any, ...], values: tuple[Any, ...], out: Any, tangents: Any, k: int) -> Any:
    if not isinstance(out, Tensor) or not (out.is_floating_point() or out.is_complex()):
        return out
    if any(out is o for o in ctx.non_differentiable):
        return out
    changed = [a for a, v in zip(args, values, strict=True) if v is out and any(out is d for d in ctx.dirty_tensors)]
    if changed:
        if type(changed[0]) is DualTensor:
            return changed[0]._write(out, tangents, name)
        if tangents is None:
            return out
        raise RuntimeError(
            f"{name}.apply{called_from()}: in-place operation on a plain tensor with a DualTensor argument, whose tangents "
            "would be lost"
        )
    value = resolve(out.detach())
    result: Any = _make(value, None, k) if tangents is None else wrap(value, resolve(tangents), low_dtype(*args))
    if any(type(a) is DualTensor and share_memory(out, a._primal) for a in args):
        result._copied_from(out, f"a view made by {name}")
    return result
