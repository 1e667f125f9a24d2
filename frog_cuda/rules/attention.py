"""Attention through the fused operator; PyTorch's own fused backends have no forward mode.

What the operator does not take (dropout, a mask with tangents) is differentiated step by step, which stores the L x S matrices.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dual import DualTensor, _make, aten, called_from, rule
from .helpers import FUSED_DTYPES, common_k, parts

_aten = torch.ops.aten
_attention_jvp = torch.ops.frog_cuda.attention_jvp.default


@rule(F.scaled_dot_product_attention)
def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """``softmax(Q K^T scale + mask) V``; query (*, H, L, D) with any leading axes."""
    k = common_k("scaled_dot_product_attention", query, key, value, attn_mask)
    q, dq = parts(query)
    kk, dk = parts(key)
    v, dv = parts(value)
    if (
        dropout_p != 0.0
        or type(attn_mask) is DualTensor
        or (dq is None and dk is None and dv is None)
        or not _fits(q, kk, v, attn_mask, enable_gqa)
    ):
        _check(q, kk, v, parts(attn_mask)[0], dropout_p)
        return _step_by_step(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    mask = attn_mask
    if q.dim() == 4:
        out, dout = _attention_jvp(q, dq, kk, dk, v, dv, mask, is_causal, factor)
        return _make(out, dout, k)
    shape = (*q.shape[:-1], v.shape[-1])
    q, kk, v = (t.reshape(_four(t.shape)) for t in (q, kk, v))
    dq, dk, dv = (None if t is None else t.reshape(k, *_four(t.shape[1:])) for t in (dq, dk, dv))
    if mask is not None and len(shape) == 3 and mask.dim() == 3:
        mask = mask.unsqueeze(1)
    out, dout = _attention_jvp(q, dq, kk, dk, v, dv, mask, is_causal, factor)
    return _make(out.reshape(shape), dout.reshape(k, *shape), k)


def _four(shape: torch.Size) -> tuple[int, ...]:
    """(*, H, L, D) as (B, H, L, D); (L, D) and (B, L, D) get one head."""
    if len(shape) < 4:
        return (shape[0] if len(shape) == 3 else 1, 1, *shape[-2:])
    return (shape[:-3].numel(), *shape[-3:])


def _fits(q: Tensor, k: Tensor, v: Tensor, mask: Any, enable_gqa: bool) -> bool:
    """Whether the operator takes these shapes and dtypes; PyTorch decides (and words its errors) about all others."""
    if not (q.dtype == k.dtype == v.dtype and q.dtype in FUSED_DTYPES and q.dim() == k.dim() == v.dim() >= 2):
        return False
    of_q, of_k, of_v = q.shape, k.shape, v.shape
    if of_q[:-3] != of_k[:-3] or of_k[:-1] != of_v[:-1] or of_q[-1] != of_k[-1] or of_q[-1] == 0:
        return False
    if len(of_q) >= 3:
        heads, shared = of_q[-3], of_k[-3]
        if heads != shared and (not enable_gqa or len(of_q) < 4 or shared == 0 or heads % shared):
            return False
    if mask is None:
        return True
    full = (*of_q[:-1], of_k[-2])
    if mask.dtype not in (torch.bool, q.dtype) or mask.dim() > len(full) or (q.dim() > 4 and mask.dim() > 3):
        return False
    return all(m in (1, f) for m, f in zip(reversed(mask.shape), reversed(full), strict=False))


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout_p: float) -> None:
    """What the steps below would refuse without naming it, or take without a word."""

    def refuse(error: type[Exception], what: str) -> None:
        raise error(f"scaled_dot_product_attention{called_from()}: {what}")

    if not 0 <= dropout_p <= 1:
        refuse(ValueError, f"dropout_p is {dropout_p}; expected a probability, 0 to 1")
    if q.dim() < 2 or k.dim() < 2 or v.dim() < 2 or k.shape[-1] != q.shape[-1] or v.shape[-2] != k.shape[-2]:
        refuse(
            ValueError,
            f"query, key and value have shapes {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}; expected "
            "(*, L, D), (*, S, D) and (*, S, Dv)",
        )
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        refuse(TypeError, f"attn_mask has dtype {mask.dtype}; accepted are torch.bool and the dtype of the query, {q.dtype}")
    full = (*q.shape[:-1], k.shape[-2])
    if mask.dim() > len(full) or any(m not in (1, f) for m, f in zip(reversed(mask.shape), reversed(full), strict=False)):
        refuse(ValueError, f"attn_mask has shape {tuple(mask.shape)}; expected one that broadcasts to {full}")


def _step_by_step(q: Any, k: Any, v: Any, mask: Any, dropout_p: float, is_causal: bool, scale: Any, gqa: bool) -> Any:
    if mask is not None and mask.dtype == torch.bool:  # the composition below adds what it is given
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    if is_causal and mask is not None:  # of which it takes only one
        allowed = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        mask, is_causal = mask.masked_fill(~allowed, float("-inf")), False
    out, _ = _aten._scaled_dot_product_attention_math.default(
        q, k, v, mask, dropout_p, is_causal, None, scale=scale, enable_gqa=gqa
    )
    return out


@aten(_aten.scaled_dot_product_attention.default)
def aten_attention(func: Any, *args: Any, **kwargs: Any) -> Any:
    return attention(*args, **kwargs)


def _backend(mask_name: str | None) -> Any:
    """A rule for one of PyTorch's fused backends, called by name: the value and statistics are its own, the tangents ours."""

    def body(func: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip([a.name for a in func._schema.arguments[3:]], args, strict=False)) | kwargs
        if given.get("dropout_p", 0.0) > 0.0:
            raise NotImplementedError(
                f"{func}{called_from()}: attention dropout inside a fused backend has no tangents; call "
                "torch.nn.functional.scaled_dot_product_attention, which draws one mask for the value and all tangents"
            )
        mask = None if mask_name is None else given.get(mask_name)
        plain = [parts(t)[0] for t in (query, key, value)]
        statistics = func(*plain, *(parts(a)[0] for a in args), **{n: parts(a)[0] for n, a in kwargs.items()})
        gqa = query.dim() == 4 and query.shape[1] != key.shape[1]
        out = attention(query, key, value, mask, 0.0, given.get("is_causal", False), given.get("scale"), gqa)
        return (out, *statistics[1:])

    return body


for _name, _mask in (
    ("_scaled_dot_product_flash_attention", None),
    ("_scaled_dot_product_flash_attention_for_cpu", "attn_mask"),
    ("_scaled_dot_product_efficient_attention", "attn_bias"),
    ("_scaled_dot_product_cudnn_attention", "attn_bias"),
    ("_scaled_dot_product_fused_attention_overrideable", "attn_bias"),
):
    if hasattr(_aten, _name):
        aten(getattr(_aten, _name).default)(_backend(_mask))
