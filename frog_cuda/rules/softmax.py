"""softmax and log_softmax through the fused operators."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..dual import DualTensor, _make, aten, rule
from .helpers import FUSED_DTYPES, parts

_aten = torch.ops.aten
_SOFTMAX = torch.ops.frog_cuda.softmax_jvp.default
_LOG_SOFTMAX = torch.ops.frog_cuda.log_softmax_jvp.default


def _apply(op: Any, x: Any, dim: int, dtype: torch.dtype | None) -> Any:
    if dtype is not None and type(x) is DualTensor and x.dtype != dtype:
        x = x.to(dtype)
    value, tangents = parts(x)
    if tangents is None or value.dtype not in FUSED_DTYPES or value.dim() == 0 or not -value.dim() <= dim < value.dim():
        return NotImplemented
    y, dy = op(value, tangents, dim)
    return _make(y, dy, x.k)


@rule(F.softmax)
def f_softmax(input: Any, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Any:
    if dim is None:
        dim = F._get_softmax_dim("softmax", input.dim(), _stacklevel)  # type: ignore[attr-defined]
    return _apply(_SOFTMAX, input, dim, dtype)


@rule(F.log_softmax)
def f_log_softmax(input: Any, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Any:
    if dim is None:
        dim = F._get_softmax_dim("log_softmax", input.dim(), _stacklevel)  # type: ignore[attr-defined]
    return _apply(_LOG_SOFTMAX, input, dim, dtype)


@aten(_aten.softmax.int)
def softmax(func: Any, x: Any, dim: int, dtype: torch.dtype | None = None) -> Any:
    return _apply(_SOFTMAX, x, dim, dtype)


@aten(_aten.log_softmax.int)
def log_softmax(func: Any, x: Any, dim: int, dtype: torch.dtype | None = None) -> Any:
    return _apply(_LOG_SOFTMAX, x, dim, dtype)


@aten(_aten._softmax.default)
def inner_softmax(func: Any, x: Any, dim: int, half_to_float: bool) -> Any:
    return NotImplemented if half_to_float else _apply(_SOFTMAX, x, dim, None)


@aten(_aten._log_softmax.default)
def inner_log_softmax(func: Any, x: Any, dim: int, half_to_float: bool) -> Any:
    return NotImplemented if half_to_float else _apply(_LOG_SOFTMAX, x, dim, None)
