"""F.linear through the fused operator: any mix of plain, stored, sampled and pending tangents."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import float8, ops
from ..dual import DualTensor, SampledTangents, _k_mismatch, _make, aten, rule
from ..low_rank import Factors
from .helpers import FUSED_DTYPES, low_dtype, rows_times

# Rules run below autograd on plain tensors, so the guards of the public face have nothing to find here.
_linear_jvp = torch.ops.frog_cuda.linear_jvp.default
_DISTRIBUTIONS = ops.DISTRIBUTIONS
_IDENTITY = ops.POINTWISE["identity"]


@rule(F.linear)
def linear(input: Any, weight: Any, bias: Any = None) -> Any:
    k = 0
    x, dx, activity = input, None, None
    if type(input) is DualTensor:
        k = input.k
        x, dx, activity = input._primal, input._tangents, input._activity
        if input.sampled is not None:
            dx = input.tangents
    sampled: Any  # SampledTangents, or None; a bias, being a vector, has no factors
    b_sampled: Any
    w, dw, sampled, factors = weight, None, None, None
    if type(weight) is DualTensor:
        if weight.k != k:
            if k:
                raise _k_mismatch("linear", k, weight.k)
            k = weight.k
        w, sampled = weight._primal, weight.sampled
        if isinstance(sampled, Factors):
            sampled, factors = None, sampled
        elif sampled is None:
            dw = weight._tangents if weight._activity is None else weight.tangents
    b, db, b_sampled = bias, None, None
    if type(bias) is DualTensor:
        if bias.k != k:
            if k:
                raise _k_mismatch("linear", k, bias.k)
            k = bias.k
        b, b_sampled = bias._primal, bias.sampled
        if b_sampled is None:
            db = bias._tangents if bias._activity is None else bias.tangents
        elif b_sampled.stored is not None:
            if b_sampled.touched is not None:
                b_sampled.touched.add(b_sampled.offset)
            db, b_sampled = b_sampled.stored, None
    if w.layout is not torch.strided and w.dim() == 2:
        out = torch.matmul(input, w.t())
        return out if bias is None else out + bias
    if x.dtype is not w.dtype or x.dtype not in FUSED_DTYPES or w.dim() != 2 or x.dim() == 0:
        return NotImplemented
    if b is not None and b.shape != w.shape[:1]:  # one that PyTorch stretches, or its own error
        return NotImplemented
    if activity is not None:
        # A tangent shared over rows goes through the layer as one row and is added to the product of the others. In low
        # precision that takes another pass over the product, so one over the input is better where it is narrower.
        narrower = activity.dtype is not x.dtype and dx is not None and w.shape[1] < w.shape[0]
        if 2 <= activity.dim() < x.dim() + 1 and not narrower:
            activity = rows_times(activity, w)
            input._on_adding = None  # else the next pass would add it before, and go on with other bits
        else:
            dx, activity = input.tangents, None
    product = None  # of tangents that were multiplied beforehand
    if dx is not None and float8.takes(dx, w):
        product, dx = float8.product(dx, w), None
    left, right = None, None
    if factors is not None:
        factors.touch()
        left, right = factors.left if factors.r == 1 else factors.left * factors.scale, factors.right
    # A single draw serves both parameters where they come from the same set of tangents
    source = sampled if sampled is not None else b_sampled
    if source is None:
        if dx is None and dw is None and db is None and activity is None and factors is None:
            y = F.linear(x, w, b)
            return y if product is None else _make(y, product, k)
        y, dy, _ = _linear_jvp(
            x, dx, w, b, dw, db, activity, None, k, 0, 0, None, None, _IDENTITY, 0.0, 0.0, False, left, right
        )
        if dx is None and product is None:  # the operator gives what no tangent of the input tells in the value's dtype
            low = low_dtype(input, weight, bias)
            dy = dy if low is None else dy.to(low)
        return _make(y, dy if product is None else product.add_(dy), k)
    if b_sampled is not None and b_sampled is not source and not _same_set(source, b_sampled):
        db, b_sampled = bias.tangents, None
    w_offset = None if sampled is None else sampled.offset
    b_offset = None if b_sampled is None else b_sampled.offset
    for drawn in (sampled, b_sampled):
        if drawn is not None and drawn.touched is not None:
            drawn.touched.add(drawn.offset)
    grams = source.grams
    # Each offset is counted once: a parameter used a second time, or a bias already counted, asks for nothing
    uncounted = grams is not None and w_offset not in grams and b_offset not in grams
    want_gram = uncounted and source.whole in (None, k)
    y, dy, gram = _linear_jvp(
        x,
        dx,
        w,
        b,
        dw,
        db,
        activity,
        source.state,
        k,
        source.first,
        _DISTRIBUTIONS[source.distribution],
        w_offset,
        b_offset,
        _IDENTITY,
        0.0,
        0.0,
        want_gram,
        left,
        right,
    )
    if uncounted:
        empty = x.new_empty(0, w.shape[1])
        made = (lambda: gram) if want_gram else partial(_gram_alone, empty, w, b, source, w_offset, b_offset)
        grams[w_offset if b_offset is None else b_offset] = made
        if w_offset is not None and b_offset is not None:
            side = source.whole or k
            grams[w_offset], grams[b_offset] = made, partial(empty.new_zeros, (side, side), dtype=torch.float64)
    if dx is None and source.dtype is not None:
        dy = dy.to(source.dtype)
    return _make(y, dy if product is None else product.add_(dy), k)


def _same_set(a: SampledTangents, b: SampledTangents) -> bool:
    return a.state is b.state and a.first == b.first and a.distribution == b.distribution and a.grams is b.grams


def _gram_alone(
    x: Tensor, w: Tensor, b: Tensor | None, source: SampledTangents, w_offset: int | None, b_offset: int | None
) -> Tensor:
    """What the operator returns for the whole set, to the bit, where it multiplied with a part of the set only. x: (0, in)."""
    code, whole = _DISTRIBUTIONS[source.distribution], source.whole
    w, b = w.detach(), None if b is None else b.detach()  # called after the pass, where plain parameters require grad
    return _linear_jvp(
        x, None, w, b, None, None, None, source.state, whole, 0, code, w_offset, b_offset, _IDENTITY, 0.0, 0.0, True
    )[2]


@aten(torch.ops.aten.linear.default)
def aten_linear(func: Any, input: Any, weight: Any, bias: Any = None) -> Any:
    return linear(input, weight, bias)
