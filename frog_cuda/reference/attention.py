"""Scaled dot-product attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention_jvp(
    query: Tensor,
    dquery: Tensor | None,
    key: Tensor,
    dkey: Tensor | None,
    value: Tensor,
    dvalue: Tensor | None,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``P V`` with ``P = softmax(S)``, ``S = scale Q K^T + mask``, and ``dP = P (dS - sum(P dS))``, all of them stored."""
    q, k, v = query.double(), key.double(), value.double()
    groups = q.shape[1] // k.shape[1]  # query heads that share a key head

    def shared(t: Tensor) -> Tensor:
        return t.double().repeat_interleave(groups, dim=-3)

    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q @ shared(k).mT * factor
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    nothing = (scores == -math.inf).all(-1, keepdim=True)  # a query that may attend to no key gives zeros
    p = torch.where(nothing, 0.0, torch.softmax(scores, -1))
    out = p @ shared(v)
    tangents = []
    for i in range(next(t for t in (dquery, dkey, dvalue) if t is not None).shape[0]):
        ds = torch.zeros_like(scores)
        if dquery is not None:
            ds = ds + dquery[i].double() @ shared(k).mT * factor
        if dkey is not None:
            ds = ds + q @ shared(dkey[i]).mT * factor
        moved = (p * (ds - (p * ds).sum(-1, keepdim=True))) @ shared(v)
        tangents.append(moved if dvalue is None else moved + p @ shared(dvalue[i]))
    return out, torch.stack(tangents)
