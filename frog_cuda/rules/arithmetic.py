"""Elementwise arithmetic: a table of derivatives for functions of one argument, the product rule for two."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dual import DualTensor, _make, aten, rule
from .helpers import FUSED_DTYPES, common_k, full, lift, low_dtype, own, parts, wrap

_aten = torch.ops.aten
_tangent_sum = torch.ops.frog_cuda.tangent_sum.default

#: aten name -> f'(x, y) with y = f(x), valid for real x
DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "abs": lambda x, y: x.sgn(),
    "acos": lambda x, y: -(1 - x * x).rsqrt(),
    "acosh": lambda x, y: (x * x - 1).rsqrt(),
    "asin": lambda x, y: (1 - x * x).rsqrt(),
    "asinh": lambda x, y: (x * x + 1).rsqrt(),
    "atan": lambda x, y: (x * x + 1).reciprocal(),
    "atanh": lambda x, y: (1 - x * x).reciprocal(),
    "cos": lambda x, y: -x.sin(),
    "cosh": lambda x, y: x.sinh(),
    "erf": lambda x, y: (2 / math.sqrt(math.pi)) * (-x * x).exp(),
    "erfc": lambda x, y: (-2 / math.sqrt(math.pi)) * (-x * x).exp(),
    "exp": lambda x, y: y,
    "exp2": lambda x, y: y * math.log(2),
    "expm1": lambda x, y: y + 1,
    "log": lambda x, y: x.reciprocal(),
    "log10": lambda x, y: (x * math.log(10)).reciprocal(),
    "log1p": lambda x, y: (x + 1).reciprocal(),
    "log2": lambda x, y: (x * math.log(2)).reciprocal(),
    "reciprocal": lambda x, y: -y * y,
    "rsqrt": lambda x, y: -0.5 * y * y * y,
    "sin": lambda x, y: x.cos(),
    "sinh": lambda x, y: x.cosh(),
    "sqrt": lambda x, y: 0.5 / y,
    "tan": lambda x, y: 1 + y * y,
}


def _unary(derivative: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    def body(func: Any, x: Any) -> Any:
        value, tangents = parts(x)
        if value.is_complex():
            return NotImplemented
        out = func(value)
        return out if tangents is None else wrap(out, tangents * derivative(value, out), low_dtype(x))

    return body


for _name, _derivative in DERIVATIVES.items():
    aten(getattr(_aten, _name).default)(_unary(_derivative))


@aten(_aten.neg.default, _aten.conj_physical.default)
def neg(func: Any, x: Any) -> Any:
    value, tangents = parts(x)
    return func(value) if tangents is None else wrap(func(value), func(tangents), low_dtype(x))


def _scaled(tangents: Tensor, factor: Any) -> Tensor:
    return tangents if isinstance(factor, (int, float)) and factor == 1 else tangents * factor


def _sum(out: Tensor, low: torch.dtype | None, ta: Tensor | None, tb: Tensor | None, sign: Any) -> Tensor:
    """Dual of ``out`` with tangents ``ta + sign * tb``; a single one is copied, never shared with its source."""
    if tb is None:
        assert ta is not None
        total = own(ta, out)
    elif ta is None:
        total = own(tb, out) if _is_one(sign) else _scaled(full(lift(tb, out), out), sign)
    else:
        total = full(torch.add(lift(ta, out), lift(tb, out), alpha=sign), out)
    return wrap(out, total, low)


def _is_one(factor: Any) -> bool:
    return isinstance(factor, (int, float)) and factor == 1


def _fused_sum(a: Any, b: Any, alpha: Any) -> Any:
    """Tangents of the sum of two alike, such as a residual connection, in one pass with activity tangents still to be added."""
    pa, pb = a._primal, b._primal
    if pa.shape != pb.shape or pa.dtype != pb.dtype or pa.dtype not in FUSED_DTYPES or not pa.is_cpu or not pb.is_cpu:
        return None
    ta, tb = a._tangents, b._tangents
    if ta is None or tb is None or ta.dtype != tb.dtype or ta.dtype not in FUSED_DTYPES or not isinstance(alpha, (int, float)):
        return None
    return _tangent_sum(ta, a._activity, tb, b._activity, float(alpha))


@aten(_aten.add.Tensor, _aten.add.Scalar)
def add(func: Any, a: Any, b: Any, alpha: Any = 1) -> Any:
    if type(a) is DualTensor and type(b) is DualTensor:
        common_k(func, a, b)
        moved = _fused_sum(a, b, alpha)
        if moved is not None:
            return _make(func(a._primal, b._primal, alpha=alpha), moved, a.k)
    pa, ta = parts(a)
    pb, tb = parts(b)
    out = func(pa, pb, alpha=alpha)
    return out if ta is None and tb is None else _sum(out, low_dtype(a, b), ta, tb, alpha)


@rule(torch.add, torch.Tensor.add)
def plain_add(*operands: Any, **others: Any) -> Any:
    """``a + b`` of two DualTensors, as in every residual network, without the way through PyTorch's dispatcher."""
    if others or len(operands) != 2 or type(operands[0]) is not DualTensor or type(operands[1]) is not DualTensor:
        return NotImplemented
    a, b = operands
    moved = _fused_sum(a, b, 1) if a.k == b.k else None
    return NotImplemented if moved is None else _make(torch.add(a._primal, b._primal), moved, a.k)


@aten(_aten.sub.Tensor, _aten.sub.Scalar)
def sub(func: Any, a: Any, b: Any, alpha: Any = 1) -> Any:
    pa, ta = parts(a)
    pb, tb = parts(b)
    out = func(pa, pb, alpha=alpha)
    return out if ta is None and tb is None else _sum(out, low_dtype(a, b), ta, tb, -alpha)


@aten(_aten.rsub.Tensor, _aten.rsub.Scalar)
def rsub(func: Any, a: Any, b: Any, alpha: Any = 1) -> Any:
    pa, ta = parts(a)
    pb, tb = parts(b)
    out = func(pa, pb, alpha=alpha)
    if ta is None and tb is None:
        return out
    return _sum(out, low_dtype(a, b), tb, ta if ta is None else _scaled(ta, alpha), -1)


@aten(_aten.mul.Tensor, _aten.mul.Scalar)
def mul(func: Any, a: Any, b: Any) -> Any:
    pa, ta = parts(a)
    pb, tb = parts(b)
    out = func(pa, pb)
    if ta is None and tb is None:
        return out
    total = None if ta is None else lift(ta, out) * pb
    if tb is not None:
        other = lift(tb, out) * pa
        total = other if total is None else total + other
    assert total is not None
    return wrap(out, full(total, out), low_dtype(a, b))


@aten(_aten.addcmul.default)
def addcmul(func: Any, x: Any, a: Any, b: Any, *, value: Any = 1) -> Any:
    px, tx = parts(x)
    pa, ta = parts(a)
    pb, tb = parts(b)
    out = func(px, pa, pb, value=value)
    if tx is None and ta is None and tb is None:
        return out
    total = None if ta is None else lift(ta, out) * pb
    if tb is not None:
        other = lift(tb, out) * pa
        total = other if total is None else total + other
    return _sum(out, low_dtype(x, a, b), tx, total, value)


@aten(_aten.div.Tensor, _aten.div.Scalar, _aten.div.Tensor_mode, _aten.div.Scalar_mode)
def div(func: Any, a: Any, b: Any, rounding_mode: str | None = None) -> Any:
    pa, ta = parts(a)
    pb, tb = parts(b)
    if rounding_mode is not None:
        return func(pa, pb, rounding_mode=rounding_mode)  # a step function
    out = torch.div(pa, pb)
    if ta is None and tb is None:
        return out
    total = None if ta is None else lift(ta, out) / pb
    if tb is not None:
        other = lift(tb, out) * (-out / pb)
        total = other if total is None else total + other
    assert total is not None
    return wrap(out, full(total, out), low_dtype(a, b))


@aten(_aten.pow.Tensor_Scalar)
def power(func: Any, x: Any, exponent: Any) -> Any:
    value, tangents = parts(x)
    if value.is_complex() or isinstance(exponent, complex):
        return NotImplemented
    out = func(value, exponent)
    if tangents is None:
        return out
    if exponent == 0:
        return wrap(out, torch.zeros_like(tangents), low_dtype(x))
    slope = value if exponent == 2 else value.pow(exponent - 1)
    return wrap(out, tangents * (slope * exponent), low_dtype(x))


@aten(_aten.maximum.default, _aten.minimum.default)
def extremum(func: Any, a: Any, b: Any) -> Any:
    """Ties give half of each tangent, as PyTorch does."""
    pa, ta = parts(a)
    pb, tb = parts(b)
    out = func(pa, pb)
    if ta is None and tb is None:
        return out
    first = pa > pb if func is _aten.maximum.default else pa < pb
    share = torch.where(pa == pb, 0.5, first.to(out.dtype)).to(out.dtype)
    total = None if ta is None else lift(ta, out) * share
    if tb is not None:
        other = lift(tb, out) * (1 - share)
        total = other if total is None else total + other
    assert total is not None
    return wrap(out, full(total, out), low_dtype(a, b))


@aten(_aten.clamp.default, _aten.clamp_min.default, _aten.clamp_max.default)
def clamp(func: Any, x: Any, *bounds: Any, **kwargs: Any) -> Any:
    value, tangents = parts(x)
    out = func(value, *bounds, **kwargs)
    if tangents is None:
        return out
    low, high = _bounds(func, *bounds, **kwargs)
    inside = torch.ones_like(value, dtype=torch.bool)
    if low is not None:
        inside = inside & (value >= low)
    if high is not None:
        inside = inside & (value <= high)
    return wrap(out, torch.where(inside, tangents, 0), low_dtype(x))


def _of_each(clamped: Any) -> Any:
    """Of a list, each clamped: PyTorch's forward mode of these gives the scalar's value as the tangent where it is taken."""

    def body(func: Any, tensors: Any, scalars: Any) -> Any:
        several = scalars if isinstance(scalars, (list, tuple)) else [scalars] * len(tensors)
        return [clamped(x, s) for x, s in zip(tensors, several, strict=True)]

    return body


for _name, _clamped in (("_foreach_maximum", _aten.clamp_min.default), ("_foreach_minimum", _aten.clamp_max.default)):
    aten(getattr(_aten, _name).Scalar, getattr(_aten, _name).ScalarList)(_of_each(_clamped))


def _bounds(func: Any, *bounds: Any, **kwargs: Any) -> tuple[Any, Any]:
    low, high = (*bounds, None, None)[:2]
    low, high = kwargs.get("min", low), kwargs.get("max", high)
    if func is _aten.clamp_max.default:
        return None, high if high is not None else low
    return low, high
