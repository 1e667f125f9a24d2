"""Reductions with a closed form; the others (amax, prod, other norms, ...) take PyTorch's forward mode through the fallback."""

from __future__ import annotations

from typing import Any

import torch

from ..dual import aten
from .helpers import all_dims, low_dtype, parts, shift, wrap

_aten = torch.ops.aten


@aten(_aten.sum.default, _aten.mean.default)
def total(func: Any, x: Any, *, dtype: torch.dtype | None = None) -> Any:
    value, tangents = parts(x)
    out = func(value, dtype=dtype)
    if tangents is None:
        return out
    if value.dim() == 0:
        return wrap(out, tangents.clone(), low_dtype(x))
    over_dims = torch.sum if func is _aten.sum.default else torch.mean
    return wrap(out, over_dims(tangents, all_dims(value), dtype=_dtype(tangents, dtype)), low_dtype(x))


@aten(_aten.sum.dim_IntList, _aten.mean.dim)
def over_dims(func: Any, x: Any, dim: Any, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    value, tangents = parts(x)
    if value.dim() == 0:
        return NotImplemented
    out = func(value, dim, keepdim, dtype=dtype)
    if tangents is None:
        return out
    dims = [shift(d, value.dim()) for d in dim] if dim else all_dims(value)
    return wrap(out, func(tangents, dims, keepdim, dtype=_dtype(tangents, dtype)), low_dtype(x))


def _dtype(tangents: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype to sum in: wider where asked, never that of a narrower tangent."""
    return None if dtype is None else torch.promote_types(tangents.dtype, dtype)


@aten(_aten.var.correction, _aten.std.correction)
def spread(func: Any, x: Any, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    """``var' = 2 / (n - correction) * sum((x - mean) x')`` and ``std' = var' / (2 std)``."""
    value, tangents = parts(x)
    if tangents is None or value.is_complex() or value.dim() == 0:
        return NotImplemented
    dims = [d % value.dim() for d in dim] if dim else list(range(value.dim()))
    out = func(value, dims, correction=correction, keepdim=keepdim)
    count = 1
    for d in dims:
        count *= value.shape[d]
    freedom = count - (1 if correction is None else correction)
    if freedom <= 0 or tangents.dtype != value.dtype:
        return NotImplemented
    centred = value - value.mean(dims, keepdim=True)
    moved = (tangents * centred).sum([d + 1 for d in dims], keepdim=keepdim) * (2 / freedom)
    if func is _aten.std.correction:
        moved = moved / (2 * out)
        moved = torch.where(out == 0, 0, moved)  # PyTorch's choice at the kink
    return wrap(out, moved)


@aten(_aten.logsumexp.default)
def logsumexp(func: Any, x: Any, dim: Any, keepdim: bool = False) -> Any:
    value, tangents = parts(x)
    if tangents is None or value.dim() == 0 or value.is_complex():
        return NotImplemented
    kept = func(value, dim, True)
    if not bool(torch.isfinite(kept).all()):
        return NotImplemented
    dims = [shift(d, value.dim()) for d in dim] if dim else all_dims(value)
    moved = (tangents * (value - kept).exp()).sum(dims, keepdim=keepdim)
    return wrap(func(value, dim, keepdim), moved, low_dtype(x))


@aten(_aten.linalg_vector_norm.default)
def euclidean_norm(
    func: Any, x: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    """``|x|' = <x, x'> / |x|``, and 0 where x is, as in PyTorch."""
    value, tangents = parts(x)
    if tangents is None or ord != 2 or dtype is not None or value.is_complex() or value.dim() == 0:
        return NotImplemented
    dims = [shift(d, value.dim()) for d in dim] if dim else all_dims(value)
    out = func(value, ord, dim, keepdim)
    moved = (tangents * value).sum(dims, keepdim).div_(out).masked_fill_(out == 0, 0)
    return wrap(out, moved, low_dtype(x))
