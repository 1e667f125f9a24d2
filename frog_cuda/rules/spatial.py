"""Pooling, interpolation, padding and sampling over spatial axes: the tangents ride along as k times the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dual import aten
from .helpers import low_dtype, parts, wrap

_aten = torch.ops.aten

#: operations that are linear in their first argument, and the number of axes of a batch for each
LINEAR: dict[str, int] = {
    "avg_pool1d": 3,
    "avg_pool2d": 4,
    "avg_pool3d": 5,
    # whole, because their decomposition changes strides in place where channels come last
    "adaptive_avg_pool2d": 4,
    "adaptive_avg_pool3d": 5,
    "_adaptive_avg_pool2d": 4,
    "_adaptive_avg_pool3d": 5,
    "reflection_pad1d": 3,
    "reflection_pad2d": 4,
    "reflection_pad3d": 5,
    "replication_pad1d": 3,
    "replication_pad2d": 4,
    "replication_pad3d": 5,
    "upsample_nearest1d": 3,
    "upsample_nearest2d": 4,
    "upsample_nearest3d": 5,
    "_upsample_nearest_exact1d": 3,
    "_upsample_nearest_exact2d": 4,
    "_upsample_nearest_exact3d": 5,
    "upsample_linear1d": 3,
    "upsample_bilinear2d": 4,
    "_upsample_bilinear2d_aa": 4,
    "upsample_bicubic2d": 4,
    "_upsample_bicubic2d_aa": 4,
    "upsample_trilinear3d": 5,
    "im2col": 4,
    "col2im": 3,
}
#: max pooling that returns (values, indices into the flattened spatial axes), and the number of spatial axes
MAXIMUM: dict[str, int] = {
    "adaptive_max_pool2d": 2,
    "adaptive_max_pool3d": 3,
}


def _linear(ndim: int) -> Any:
    def body(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        value, tangents = parts(x)
        if tangents is None or value.dim() not in (ndim, ndim - 1):
            return NotImplemented
        out = func(value, *args, **kwargs)
        if value.dim() == ndim - 1:  # without a batch axis, k takes its place
            return wrap(out, func(tangents, *args, **kwargs), low_dtype(x))
        moved = func(tangents.flatten(0, 1), *args, **kwargs)
        return wrap(out, moved.unflatten(0, tangents.shape[:2]), low_dtype(x))

    return body


def _maximum(spatial: int) -> Any:
    def body(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        value, tangents = parts(x)
        out, indices = func(value, *args, **kwargs)
        if tangents is None:
            return out, indices
        return wrap(out, picked(tangents, indices, spatial), low_dtype(x)), indices

    return body


def picked(tangents: Tensor, indices: Tensor, spatial: int) -> Tensor:
    """The tangents (k, *, s) of the chosen elements: indices (*, t) count through the flattened spatial axes s."""
    flat = indices.flatten(-spatial).expand(tangents.shape[0], *indices.shape[:-spatial], -1)
    return tangents.flatten(-spatial).gather(-1, flat).view(tangents.shape[0], *indices.shape)


for _name, _ndim in LINEAR.items():
    aten(getattr(_aten, _name).default)(_linear(_ndim))
for _name, _spatial in MAXIMUM.items():
    aten(getattr(_aten, _name).default)(_maximum(_spatial))


@aten(_aten.grid_sampler_2d.default, _aten.grid_sampler_3d.default)
def grid_sampler(func: Any, x: Any, grid: Any, *options: Any) -> Any:
    """Linear in the input; an output moves with its own position only, so one backward pass gives its slope there."""
    px, dx = parts(x)  # (N, C, *s)
    pg, dg = parts(grid)  # (N, *t, d)
    out = func(px, pg, *options)  # (N, C, *t)
    moved = None
    if dx is not None:  # as more channels
        own = func(dx.movedim(0, 1).flatten(1, 2).to(px.dtype), pg, *options)
        moved = own.unflatten(1, (dx.shape[0], px.shape[1])).movedim(1, 0)
    if dg is not None:
        alone = px.flatten(0, 1).unsqueeze(1)  # each channel on its own
        where = pg.repeat_interleave(px.shape[1], 0)
        backward = _aten.grid_sampler_2d_backward if pg.dim() == 4 else _aten.grid_sampler_3d_backward
        ones = torch.ones_like(out).flatten(0, 1).unsqueeze(1)
        slope = backward.default(ones, alone, where, *options, [False, True])[1].unflatten(0, px.shape[:2])
        own = (slope * dg.unsqueeze(2)).sum(-1)  # (k, N, 1, *t, d) -> (k, N, C, *t)
        moved = own if moved is None else moved + own
    return wrap(out, moved, low_dtype(x, grid))


@aten(_aten.cudnn_grid_sampler.default)
def cudnn_grid_sampler(func: Any, x: Any, grid: Any) -> Any:
    return _aten.grid_sampler_2d.default(x, grid, 0, 0, True)  # bilinear, zeros outside, aligned corners
