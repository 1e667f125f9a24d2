"""Matrix products: bilinear, with k as one more batch axis of the tangents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dual import aten
from .helpers import full, lift, low_dtype, parts, wrap

_aten = torch.ops.aten


def product(a: Tensor, ta: Tensor | None, b: Tensor, tb: Tensor | None) -> Tensor | None:
    """Tangents of ``matmul(a, b)``, None where neither factor has any."""
    left, right = a.dim() == 1, b.dim() == 1
    if left:
        a, ta = a.unsqueeze(0), None if ta is None else ta.unsqueeze(1)
    if right:
        b, tb = b.unsqueeze(1), None if tb is None else tb.unsqueeze(2)
    ndim = max(a.dim(), b.dim())
    total = None
    if a.layout != torch.strided and tb is not None:  # sparse: a dense matrix with k times the columns
        assert ta is None
        columns = torch.matmul(a.to(tb.dtype), tb.movedim(0, 1).flatten(1))  # (n, k * p)
        total = columns.unflatten(1, (tb.shape[0], -1)).movedim(1, 0).contiguous()
        return total.squeeze(-1) if right else total
    if ta is not None:
        total = torch.matmul(_batch(ta, ndim), b.to(ta.dtype))
    if tb is not None:
        other = torch.matmul(a.to(tb.dtype), _batch(tb, ndim))
        total = other if total is None else total + other
    if total is None:
        return None
    if right:
        total = total.squeeze(-1)
    return total.squeeze(-1 if right else -2) if left else total


def _batch(tangents: Tensor, ndim: int) -> Tensor:
    missing = ndim + 1 - tangents.dim()
    return tangents[(slice(None),) + (None,) * missing] if missing else tangents


@aten(_aten.matmul.default, _aten.mm.default, _aten.bmm.default, _aten.mv.default, _aten.dot.default)
def matmul(func: Any, a: Any, b: Any) -> Any:
    pa, ta = parts(a)
    pb, tb = parts(b)
    out = func(pa, pb)
    moved = product(pa, ta, pb, tb)
    return out if moved is None else wrap(out, moved, low_dtype(a, b))


@aten(_aten.addmm.default, _aten.baddbmm.default, _aten.addmv.default, _aten._sparse_addmm.default)
def addmm(func: Any, c: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    pc, tc = parts(c)
    pa, ta = parts(a)
    pb, tb = parts(b)
    out = func(pc, pa, pb, beta=beta, alpha=alpha)
    moved = product(pa, ta, pb, tb)
    if moved is not None and alpha != 1:
        moved = moved * alpha
    if tc is not None:
        own = full(lift(tc, out), out) * beta
        moved = own if moved is None else moved + own
    return out if moved is None else wrap(out, moved, low_dtype(c, a, b))
