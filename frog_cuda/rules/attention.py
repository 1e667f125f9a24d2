"""Attention: PyTorch's fused backends have no forward mode, so the products and the softmax are differentiated one by one."""

from __future__ import annotations

from typing import Any

import torch

from ..dual import aten

_aten = torch.ops.aten


@aten(_aten.scaled_dot_product_attention.default)
def attention(
    func: Any,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """``softmax(Q K^T scale + mask) V``; stores the attention matrix and its tangents, (k, ..., L, S)."""
    out, _ = _aten._scaled_dot_product_attention_math.default(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )
    return out
