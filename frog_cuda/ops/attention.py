"""Scaled dot-product attention."""

from __future__ import annotations

from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd

from .helpers import _guard, _ops


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
    """``out = softmax(scale Q K^T + mask) V`` and its k tangents, in one pass over the keys for each block of queries.

    The softmax is computed once for all tangents, and the L x S matrices are never in memory (online softmax as in Dao et al.,
    "FlashAttention", 2022). Extra memory: that of key and value and their tangents.

    Arguments:
        query: ``(B, H, L, D)``.  key: ``(B, Hkv, S, D)``.  value: ``(B, Hkv, S, Dv)``; Hkv divides H (grouped-query heads).
        dquery, dkey, dvalue: ``(k, *)`` in front of the primal's shape, or None where not perturbed; at least one is given.
        mask: broadcasts to ``(B, H, L, S)``: boolean (True: takes part) or floating (added to the scores).
        is_causal: query i attends to keys 0 .. i, together with the mask if there is one.
        scale: None means ``1 / sqrt(D)``.
    Returns:
        out ``(B, H, L, Dv)``; dout ``(k, B, H, L, Dv)`` in the tangents' dtype. A query that may attend to no key gives zeros.
    """
    _guard("attention_jvp", query, dquery, key, dkey, value, dvalue, mask)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    with _AutoDispatchBelowAutograd():
        return _ops.attention_jvp(query, dquery, key, dkey, value, dvalue, mask, is_causal, factor)
