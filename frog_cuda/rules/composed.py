"""Operations that PyTorch cannot differentiate forward, composed of others."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dual import aten, existing, primal_of, rule, tangents_of
from .helpers import common_k, lift, low_dtype, parts, wrap

_aten = torch.ops.aten


@aten(_aten._cdist_forward.default, _aten._euclidean_dist.default)
def cdist(func: Any, a: Any, b: Any, p: float = 2.0, *mode: Any) -> Any:
    """Stores the k * P * R * M differences of the tangents."""
    options = () if func is _aten._euclidean_dist.default else (p, *mode)
    distance = func(primal_of(a), primal_of(b), *options)
    differences = a.unsqueeze(-2) - b.unsqueeze(-3)  # (*, P, R, M)
    moved = tangents_of(torch.linalg.vector_norm(differences, p, -1))
    return wrap(distance, moved, low_dtype(a, b))


@aten(_aten._pdist_forward.default)
def pdist(func: Any, x: Any, p: float = 2.0) -> Any:
    first, second = torch.triu_indices(x.shape[0], x.shape[0], 1, device=x.device)
    moved = tangents_of(torch.linalg.vector_norm(x[first] - x[second], p, -1))
    return wrap(func(primal_of(x), p), moved, low_dtype(x))


@aten(_aten.pad_sequence.default)
def pad_sequence(
    func: Any, sequences: Any, batch_first: bool = False, padding_value: float = 0.0, padding_side: str = "right"
) -> Any:
    """PyTorch writes them into a tensor of its own."""
    func([primal_of(s) for s in sequences], batch_first, padding_value, padding_side)  # PyTorch's own errors
    longest = max(s.shape[0] for s in sequences)
    padded = []
    for s in sequences:
        room = [0, longest - s.shape[0]]
        rows = [0, 0] * (s.dim() - 1) + (room if padding_side == "right" else room[::-1])
        padded.append(F.pad(s, rows, value=padding_value))
    return torch.stack(padded, 0 if batch_first else 1)


@aten(*existing(_aten, "cholesky.default"))  # gone in torch 2.14
def cholesky(func: Any, x: Any, upper: bool = False) -> Any:
    return torch.linalg.cholesky(x, upper=upper)


@aten(_aten._weight_norm.default)
def weight_norm(func: Any, v: Any, g: Any, dim: int = 0) -> Any:
    return v * (g / _aten.norm_except_dim.default(v, 2, dim))


@aten(_aten.heaviside.default)
def heaviside(func: Any, x: Any, values: Any) -> Any:
    return torch.where(primal_of(x) == 0, values, func(primal_of(x), primal_of(values)))


@aten(_aten.native_dropout_backward.default)
def native_dropout_backward(func: Any, grad_output: Any, mask: Tensor, scale: float) -> Any:
    return grad_output * (mask * scale)


@rule(*existing(F, "linear_cross_entropy"))
def linear_cross_entropy(*args: Any, options: Any = None, **kwargs: Any) -> Any:
    """``options`` trade time for the memory of the logits; their operator has no forward mode, so the logits are stored."""
    return NotImplemented if options is None else F.linear_cross_entropy(*args, **kwargs)


@aten(_aten.index_reduce.default)
def index_reduce(func: Any, x: Any, dim: int, index: Tensor, source: Any, reduce: str, *, include_self: bool = True) -> Any:
    common_k(func, x, source)
    func(*(primal_of(t) for t in (x, dim, index, source)), reduce, include_self=include_self)  # PyTorch's own errors
    if x.dim() == 0:
        x, source = x.reshape(1), source.reshape(1)
        return index_reduce(func, x, 0, index.reshape(1), source, reduce, include_self=include_self).reshape(())
    dim = dim % x.dim()
    shape = [1] * x.dim()
    shape[dim] = -1
    return torch.scatter_reduce(x, dim, index.view(shape).expand(source.shape), source, reduce, include_self=include_self)


@aten(_aten.index_fill.int_Tensor)
def index_fill(func: Any, x: Any, dim: int, index: Tensor, value: Any) -> Any:
    """PyTorch's vmap writes the tangents of the value into one expanded tensor, so that the last one is everyone's."""
    common_k(func, x, value)
    px, dx = parts(x)
    pv, dv = parts(value)
    out = func(px, dim, index, pv)
    if dx is None and dv is None:
        return out
    filled = torch.zeros_like(px, dtype=torch.bool).index_fill(dim, index, True)
    zero = out.new_zeros(())
    moved = torch.where(filled, zero if dv is None else lift(dv, out), zero if dx is None else dx)
    return wrap(out, moved, low_dtype(x, value))


@aten(_aten.scatter_reduce.two)
def scatter_reduce(func: Any, x: Any, dim: int, index: Tensor, src: Any, reduce: str, *, include_self: bool = True) -> Any:
    """PyTorch answers products with zero tangents; the other reductions are left to it."""
    if reduce != "prod":
        return NotImplemented
    k = common_k(func, x, src)
    px, dx = parts(x)
    ps, ds = parts(src)
    out = func(px, dim, index, ps, reduce, include_self=include_self)
    if px.dim() == 0:
        one = scatter_reduce(func, x.reshape(1), 0, index.reshape(1), src.reshape(1), reduce, include_self=include_self)
        return one.reshape(())
    dim = dim % px.dim()
    used = ps[tuple(slice(n) for n in index.shape)]  # only as much of src as index covers
    dx = px.new_zeros((k, *px.shape)) if dx is None else dx.to(px.dtype)
    ds = ps.new_zeros((k, *ps.shape)) if ds is None else ds.to(ps.dtype)
    ds = ds[(slice(None), *(slice(n) for n in index.shape))]
    hit = torch.zeros_like(px, dtype=torch.bool).scatter(dim, index, True)
    own = torch.ones_like(hit) if include_self else ~hit  # whether the old element is a factor
    # With no factor zero, d(prod) = prod * sum(dx / x); with a single one, the product of the others times its tangent.
    zeros = (own & (px == 0)).to(torch.int64).scatter_add(dim, index, (used == 0).to(torch.int64))
    rest = torch.where(own & (px != 0), px, 1).scatter_reduce(dim, index, torch.where(used == 0, 1, used), "prod")
    wide = index.expand(k, *index.shape)
    ratio = torch.where(own & (px != 0), dx / px, 0).scatter_add(dim + 1, wide, torch.where(used == 0, 0, ds / used))
    single = torch.where(own & (px == 0), dx, 0).scatter_add(dim + 1, wide, torch.where(used == 0, ds, 0))
    moved = rest * torch.where(zeros == 0, ratio, torch.where(zeros == 1, single, 0))
    return wrap(out, moved, low_dtype(x, src))
