"""In-place operations: compute out of place, then overwrite value and tangents, which views and bases share."""

from __future__ import annotations

from typing import Any

import torch

from ..dual import DualTensor, aten, called_from
from .helpers import full, lift, parts

_aten = torch.ops.aten


def in_place(func: Any, *args: Any, **kwargs: Any) -> Any:
    """``x.op_(...)`` through ``x.op(...)``."""
    target = args[0]
    for t in target if isinstance(target, (list, tuple)) else [target]:
        _check_target(func, t)
    result = _out_of_place(func)(*args, **kwargs)
    if not isinstance(target, (list, tuple)):
        return target._write(*parts(result), func)
    for t, r in zip(target, result, strict=True):
        t._write(*parts(r), func)
    return None


def _check_target(func: Any, target: Any) -> None:
    if type(target) is not DualTensor:
        raise RuntimeError(
            f"{func}{called_from()}: in-place operation on a plain tensor with a DualTensor argument, whose tangents would be "
            "lost; use the out-of-place operation, or make the buffer from a DualTensor: x.new_zeros(...), torch.zeros_like(x)"
        )


def _out_of_place(func: Any) -> Any:
    namespace, name = func._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    wanted = [str(a.type) for a in func._schema.arguments]
    # Overloads are paired by their arguments: pow_.Scalar belongs to pow.Tensor_Scalar
    for overload in packet.overloads() if packet is not None else ():
        candidate = getattr(packet, overload)
        if [str(a.type) for a in candidate._schema.arguments] == wanted and not candidate._schema.is_mutable:
            return candidate
    raise NotImplementedError(
        f"{func}{called_from()}: no rule for DualTensor, and no out-of-place twin of this in-place operation"
    )


@aten(_aten.copy_.default)
def copy_(func: Any, target: Any, source: Any, non_blocking: bool = False) -> Any:
    _check_target(func, target)
    if not isinstance(source, torch.Tensor):  # a number
        return target._write(torch.full_like(target._primal, source), None, func)
    value, tangents = parts(source)
    if tangents is not None:
        tangents = full(lift(tangents, target), target)
        if target._tangents is None:
            tangents = tangents.clone()  # not to be shared with the source
    return target._write(value.expand(target.shape).to(target.device, target.dtype), tangents, func)


@aten(_aten.polygamma_.default)
def polygamma_(func: Any, target: Any, n: int) -> Any:
    """Its twin takes the arguments the other way round."""
    _check_target(func, target)
    return target._write(*parts(_aten.polygamma.default(n, target)), func)


@aten(_aten.fill_diagonal_.default)
def fill_diagonal_(func: Any, target: Any, value: Any, wrap: bool = False) -> Any:
    """``value`` is a number."""
    _check_target(func, target)
    primal, tangents = parts(target)
    out = func(primal.clone(memory_format=torch.contiguous_format), value, wrap)
    if tangents is not None:
        tangents = tangents.masked_fill(func(torch.zeros_like(out, dtype=torch.bool), 1, wrap), 0)
    return target._write(out, tangents, func)


@aten(_aten.fill_.Tensor)
def fill_(func: Any, target: Any, value: Any) -> Any:
    if value.dim() != 0:
        raise RuntimeError(f"{func}: value has shape {tuple(value.shape)}; expected a 0-dim tensor")
    return copy_(func, target, value)


@aten(
    _aten.zero_.default,
    _aten.fill_.Scalar,
    _aten.normal_.default,
    _aten.uniform_.default,
    _aten.random_.default,
    _aten.random_.to,
    getattr(_aten.random_, "from"),
    _aten.bernoulli_.float,
    _aten.bernoulli_.Tensor,
    _aten.exponential_.default,
    _aten.log_normal_.default,
    _aten.geometric_.default,
    _aten.cauchy_.default,
)
def overwrite(func: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
    """The new value does not depend on the old one: its tangents are exactly zero."""
    _check_target(func, target)
    args = tuple(a._primal if type(a) is DualTensor else a for a in args)
    return target._write(func(torch.empty_like(target._primal), *args, **kwargs), None, func)


@aten(_aten.detach_.default)
def detach_(func: Any, target: Any) -> Any:
    return target._write(target._primal.clone(), None, func)


_SWAPS = (_aten.transpose_.default, _aten.swapaxes_.default, _aten.swapdims_.default)


@aten(
    _aten.t_.default,
    *_SWAPS,
    _aten.squeeze_.default,
    _aten.squeeze_.dim,
    _aten.squeeze_.dims,
    _aten.unsqueeze_.default,
)
def reshape_(func: Any, target: Any, *args: Any) -> Any:
    """The view that the out-of-place twin makes, put into the same Python object."""
    if type(target) is not DualTensor:
        return NotImplemented
    moved = _aten.transpose.int(target, *args) if func in _SWAPS else _out_of_place(func)(target, *args)
    with torch._C._DisableTorchDispatch():
        func(target, *args)  # shape and strides of the wrapper, which has no memory
    target._primal, target._tangents = moved._primal, moved._tangents
    target.sampled = None
    return target


@aten(
    _aten.as_strided_.default,
    _aten.resize_.default,
    _aten.resize_as_.default,
    _aten.set_.source_Tensor,
    _aten.set_.default,
)
def refuse(func: Any, *args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError(f"{func}{called_from()}: changing the storage of a DualTensor in place is not supported")
