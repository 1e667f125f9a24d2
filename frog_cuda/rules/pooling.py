"""Max pooling through the fused operator; places that the caller does not ask for are never stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dual import _make, aten, rule
from .helpers import FUSED_DTYPES, low_dtype, parts, wrap
from .spatial import picked

_aten = torch.ops.aten
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_max_pool_jvp = torch.ops.frog_cuda.max_pool_jvp.default


def _pooling(spatial: int, want_indices: bool) -> Any:
    def body(
        func: Any,
        x: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,  # never set where this arrives: PyTorch calls another function then
    ) -> Any:
        value, tangents = parts(x)
        options = (kernel_size, kernel_size if stride is None or stride in ([], ()) else stride, padding, dilation)
        if tangents is None:
            return func(value, *options, ceil_mode)
        if _fused(value, spatial):
            lists = (_each(option, spatial) for option in options)
            y, dy, indices = _max_pool_jvp(value, tangents, *lists, ceil_mode, want_indices)
            out = _make(y, dy, dy.shape[0])
            return (out, indices) if want_indices else out
        if not want_indices:
            return NotImplemented  # comes again with indices
        y, indices = func(value, *options, ceil_mode)
        return wrap(y, picked(tangents, indices, spatial), low_dtype(x)), indices

    return body


def _fused(x: Tensor, spatial: int) -> bool:
    """Not for an empty batch, what PyTorch alone takes or refuses, and channels that come last on the CPU: PyTorch compares
    those side by side, in a tenth of the time that the operator takes to copy them and compare (benchmarks/bench_pooling.py).
    """
    if x.dtype not in FUSED_DTYPES or x.dim() not in (spatial + 1, spatial + 2) or x.numel() == 0:
        return False
    last = _CHANNELS_LAST.get(x.dim())
    return not x.is_cpu or x.is_contiguous() or last is None or not x.is_contiguous(memory_format=last)


def _each(given: int | Sequence[int], spatial: int) -> list[int]:
    """An integer for each spatial axis."""
    values = [given] if isinstance(given, int) else list(given)
    return values * spatial if len(values) == 1 else values


def _without_indices(spatial: int, function: Any) -> Any:
    body = _pooling(spatial, False)

    def call(input: Tensor, *args: Any, **kwargs: Any) -> Any:
        return body(function, input, *args, **kwargs)

    return call


for _spatial in (1, 2, 3):
    _function = getattr(torch, f"max_pool{_spatial}d")
    rule(_function, getattr(F, f"max_pool{_spatial}d"))(_without_indices(_spatial, _function))
for _spatial, _overload in ((2, _aten.max_pool2d_with_indices.default), (3, _aten.max_pool3d_with_indices.default)):
    aten(_overload)(_pooling(_spatial, True))
