"""Convolution: bilinear, so k folds into the batch for tangents of the input and into the output channels for the weight's."""

from __future__ import annotations

from typing import Any

import torch

from ..dual import aten
from .helpers import low_dtype, parts, wrap

_aten = torch.ops.aten


@aten(_aten.convolution.default)
def convolution(
    func: Any,
    input: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Any:
    """Transposed and grouped convolutions are left to the fallback where their weight has tangents."""
    x, dx = parts(input)
    w, dw = parts(weight)
    b, db = parts(bias)
    spatial = w.dim() - 2
    if x.dim() != w.dim() or (dw is not None and (transposed or groups != 1)):
        return NotImplemented
    options = (stride, padding, dilation, transposed, output_padding, groups)
    out = func(x, w, b, *options)  # (B, O, *s)
    moved = None
    if dx is not None:
        k = dx.shape[0]
        moved = func(dx.flatten(0, 1), w.to(dx.dtype), None, *options).unflatten(0, (k, x.shape[0]))
    if dw is not None:
        k = dw.shape[0]
        own = func(x.to(dw.dtype), dw.flatten(0, 1), None, *options)  # (B, k * O, *s)
        own = own.unflatten(1, (k, w.shape[0])).movedim(1, 0)
        moved = own if moved is None else moved + own
    if db is not None:
        shared = db.reshape(db.shape[0], 1, -1, *(1,) * spatial)
        moved = shared.expand(db.shape[0], *out.shape).clone() if moved is None else moved + shared
    if moved is None:
        return out
    return wrap(out, moved.contiguous(), low_dtype(input, weight, bias))
