"""Convolution of any kind: bilinear, so k folds into the batch for tangents of the input.

Supplied tangents of the weight take one library call each. Sampled ones are the compiled operator's, in any groups and
transposed: all k share the unfolded input, of which as little is ever there as of the tangents.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..dual import DualTensor, SampledTangents, _make, aten, draw, primal_of, rule
from ..low_rank import Factors
from ..one_place import OnePlace, one_place
from .helpers import FUSED_DTYPES, common_k, low_dtype, parts, rows_times, wrap

_aten = torch.ops.aten
_convolution_jvp = torch.ops.frog_cuda.convolution_jvp.default
_sampled_convolution_ = torch.ops.frog_cuda.sampled_convolution_.default
_linear_jvp = torch.ops.frog_cuda.linear_jvp.default
_narrow_convolution = torch.ops.frog_cuda.narrow_convolution.default
_IDENTITY = ops.POINTWISE["identity"]

#: for narrow_convolution to pay: with fewer, adding the products up takes longer than making them
_FEWEST_CHANNELS = 8

#: of a group, for the GPU's operator to multiply the sampled tangents of a weight
_FEWEST_FILTERS = 8


@rule(F.conv1d, F.conv2d, F.conv3d)
def layer(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Any:
    """Most calls; what PyTorch makes of the others comes to the rule below."""
    axes = primal_of(weight).dim() - 2
    stride, padding, dilation = _numbers(stride, axes), _numbers(padding, axes), _numbers(dilation, axes)
    if type(input) is DualTensor and type(weight) is not DualTensor and type(bias) is not DualTensor:
        done = _plain(input, weight, bias, axes, stride, padding, dilation, groups)
        if done is not None:
            return done
    w = primal_of(weight)
    if isinstance(padding, str) or primal_of(input).dim() != w.dim() or w.dtype not in FUSED_DTYPES or not w.is_cpu:
        return NotImplemented
    return convolution(_aten.convolution.default, input, weight, bias, stride, padding, dilation, False, (0,) * axes, groups)


def _numbers(value: Any, axes: int) -> Any:
    """One for each axis."""
    if type(value) is int:
        return (value,) * axes
    return value * axes if type(value) is tuple and len(value) == 1 else value


def _plain(
    input: DualTensor, w: Tensor, bias: Any, axes: int, stride: Any, padding: Any, dilation: Any, groups: int
) -> DualTensor | None:
    """What a convolution in the middle of a network comes to, on a short way; None for all else, errors included."""
    x, dx = input._primal, input._tangents
    if dx is None or input._activity is not None or dx.dtype is not w.dtype or x.dtype is not w.dtype:
        return None
    if not type(stride) is type(padding) is type(dilation) is tuple or x.dtype not in FUSED_DTYPES or not x.is_cpu:
        return None
    if (
        axes < 1
        or not len(stride) == len(padding) == len(dilation) == axes
        or x.size(-1) + 2 * padding[-1] - dilation[-1] * (w.size(-1) - 1) <= stride[-1]
    ):
        return None  # the result may have one place
    try:
        y, dy = _convolution_jvp(x, dx, w, bias, stride, padding, dilation, False, (0,) * axes, groups)
    except RuntimeError:
        return None  # raised again, or in PyTorch's own words, by the rule
    return _make(y, dy, input.k)


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
    k = common_k(func, input, weight, bias)
    factors = weight.sampled if type(weight) is DualTensor else None
    if isinstance(factors, Factors) and not transposed and groups == 1 and input.dim() == weight.dim():
        options: tuple[Any, ...] = (stride, padding, dilation, transposed, output_padding, groups)
        return _low_rank(func, input, weight._primal, factors, bias, options)
    x, dx = parts(input)
    b, db = parts(bias)
    sampled = weight.sampled if type(weight) is DualTensor else None
    w, dw = (weight._primal, None) if sampled is not None else parts(weight)
    if x.dim() != w.dim():
        return NotImplemented
    options = (stride, padding, dilation, transposed, output_padding, groups)
    low = low_dtype(input, weight, bias)
    place = None if transposed or groups != 1 else _one_place(x, w, b, low, stride, padding, dilation)
    moved = None
    if place is not None:
        out, moved = _as_product(place, k, x, dx, w, dw, b, db)
        dw = db = None
    elif dx is not None and dx.dtype == x.dtype == w.dtype and x.dtype in FUSED_DTYPES and x.is_cpu and x.dim() > 2:
        try:
            out, moved = _convolution_jvp(x, dx, w, b, *options)  # (B, O, *s), (k, B, O, *s)
        except RuntimeError:
            func(x, w, b, *options)  # PyTorch's own error
            raise
    else:
        out = func(x, w, b, *options)
    if dx is not None and moved is None:
        moved = func(dx.flatten(0, 1), w.to(dx.dtype), None, *options).unflatten(0, (k, x.shape[0]))
    if isinstance(sampled, SampledTangents) and _fits(x, w, sampled, moved, groups, out.shape[1] // groups):
        add = moved is not None
        if moved is None:
            moved = torch.empty((k, *out.shape), dtype=sampled.dtype or w.dtype, device=out.device)
        _add_sampled(moved, x, w, sampled, options, add)
    elif sampled is not None or dw is not None:
        for i in range(k):
            v = draw(w, sampled, i, 1)[0] if sampled is not None else dw[i]  # type: ignore[index]
            product = func(x.to(v.dtype), v, None, *options)
            if moved is None:
                moved = product.new_zeros((k, *product.shape))
            moved[i] += product
    if db is not None and out.shape[1] == b.shape[0]:  # without input channels PyTorch makes none
        shared = db.reshape(k, 1, -1, *(1,) * (w.dim() - 2))
        moved = shared.expand(k, *out.shape).clone() if moved is None else moved + shared
    if moved is None:
        return out
    return wrap(out, moved.contiguous(), low)


def _one_place(
    x: Tensor, w: Tensor, b: Tensor | None, low: torch.dtype | None, stride: Any, padding: Any, dilation: Any
) -> OnePlace | None:
    if not x.is_cpu or x.dtype not in FUSED_DTYPES or any(t is not None and t.dtype != x.dtype for t in (w, b)):
        return None
    if x.shape[1] != w.shape[1] or x.shape[1] == 0 or (b is not None and b.shape != w.shape[:1]):
        return None  # PyTorch's own error, or result: of no channels it makes none
    place = one_place(x.shape[2:], w, stride, padding, dilation)
    # The library's convolutions in bfloat16 lose more than gathering the matrix costs, however few rows there are
    slow = low is not None or x.dtype in (torch.bfloat16, torch.float16)
    return place if place is None or slow or place.is_cheap(w) else None


def _as_product(
    place: OnePlace, k: int, x: Tensor, dx: Tensor | None, w: Tensor, dw: Tensor | None, b: Tensor | None, db: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    rows, matrix = place.rows(x), place.matrix(w)  # (B, m C), (O, m C)
    moved = None
    if dx is None and dw is None and db is None:
        out = F.linear(rows, matrix, b)
    else:
        dx, dw = None if dx is None else place.rows(dx), None if dw is None else place.matrix(dw)
        out, moved, _ = _linear_jvp(
            rows, dx, matrix, b, dw, db, None, None, k, 0, 0, None, None, _IDENTITY, 0.0, 0.0, False
        )  # (B, O), (k, B, O)
    shape = (*out.shape, *(1,) * (w.dim() - 2))
    return out.view(shape), None if moved is None else moved.view(k, *shape)


def _fits(x: Tensor, w: Tensor, sampled: SampledTangents, moved: Tensor | None, groups: int, filters: int) -> bool:
    """Whether the compiled operator takes these tangents of a weight. On a GPU its tiles have 32 outputs at least, most of
    which groups of few filters would leave idle; those are the library's, one tangent at a time."""
    if groups > 1 and filters < _FEWEST_FILTERS and not x.is_cpu:
        return False
    dtype = sampled.dtype or w.dtype
    return dtype in FUSED_DTYPES and x.dim() > 2 and (moved is None or moved.dtype == dtype)


def _add_sampled(moved: Tensor, x: Tensor, w: Tensor, sampled: SampledTangents, options: tuple[Any, ...], add: bool) -> None:
    """Products with all k sampled tangents of the weight, into ``moved`` (k, B, O, *)."""
    if sampled.touched is not None:
        sampled.touched.add(sampled.offset)
    kernel = list(w.shape[2:])
    stride, padding, dilation, transposed, output_padding, groups = options
    stride, padding, dilation, output_padding = (
        list(p) * (len(kernel) if len(p) == 1 else 1) for p in (stride, padding, dilation, output_padding)
    )
    where = (kernel, stride, padding, dilation, transposed, output_padding, groups)
    code = ops.DISTRIBUTIONS[sampled.distribution]
    _sampled_convolution_(moved, x.to(moved.dtype), sampled.state, *where, sampled.offset, sampled.first, code, add)


def _low_rank(func: Any, input: Any, weight: Any, factors: Factors, bias: Any, options: tuple[Any, ...]) -> Any:
    """The right factors are k r filters of one convolution; the left ones spread each result over the output channels."""
    k, r = factors.k, factors.r
    plain = type(input) is not DualTensor and type(bias) is not DualTensor
    out: Any = None
    if plain:
        out = func(input, weight, bias, *options)
    elif type(input) is DualTensor and type(bias) is not DualTensor:
        stride, padding, dilation, *_, groups = options
        out = _plain(input, weight, bias, weight.dim() - 2, stride, padding, dilation, groups)
    if out is None:
        out = convolution(func, input, weight, bias, *options)
    plain = type(out) is not DualTensor  # an input whose tangents are zero, too
    factors.touch()
    x = primal_of(input).to(factors.dtype)
    right = factors.right.view(k * r, *factors.shape[1:])
    place = one_place(x.shape[2:], right, *options[:3]) if x.is_cpu else None
    if place is not None:
        inner = rows_times(place.rows(x), place.matrix(right)).view(x.shape[0], k * r, *(1,) * (x.dim() - 2))
    elif x.is_cpu and x.shape[1] >= _FEWEST_CHANNELS:
        sizes = (v * (x.dim() - 2) if len(v) == 1 else v for v in options[:3])
        inner = _narrow_convolution(x, right, *sizes)  # (B, k r, *s)
    elif k * r == 1 and x.is_cpu:  # libraries take another path for a single filter, whose bits would tell
        inner = func(x, right.expand(2, *right.shape[1:]), None, *options)[:, :1]
    else:
        inner = func(x, right, None, *options)
    inner = inner.view(inner.shape[0], k, r, *inner.shape[2:]).transpose(0, 1)  # (k, B, r, *s)
    spread = factors.left.view(k, r, 1, -1, *(1,) * (inner.dim() - 3))
    first = 0
    if plain:
        moved = torch.empty((k, *out.shape), dtype=factors.dtype, device=out.device)  # contiguous, as inner is not
        torch.mul(inner[:, :, :1], spread[:, 0].mul(factors.scale), out=moved)
        out, first = wrap(out, moved, factors.dtype), 1
    moved = out.tangents
    inner, spread = inner.to(moved.dtype), spread.to(moved.dtype)
    for j in range(first, r):
        moved.addcmul_(inner if r == 1 else inner[:, :, j : j + 1], spread[:, j], value=factors.scale)
    return out
