"""Rows of a table through the fused operator: of sampled tangents only the rows looked up are drawn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..dual import DualTensor, SampledTangents, _make, aten
from ..low_rank import Factors
from .helpers import FUSED_DTYPES, low_dtype, parts, wrap

_aten = torch.ops.aten
_embedding_jvp = torch.ops.frog_cuda.embedding_jvp.default


@aten(_aten.embedding.default)
def embedding(func: Any, weight: Any, indices: Tensor, padding_idx: int = -1, *args: Any, **kwargs: Any) -> Any:
    """As in PyTorch's forward mode, ``padding_idx`` is a row like any other, unless ``weight`` wants it as in backprop."""
    out = _looked_up(func, weight, indices, padding_idx, *args, **kwargs)
    if padding_idx >= 0 and type(weight) is DualTensor and weight.stops_padding:
        out.tangents.masked_fill_((indices == padding_idx).unsqueeze(-1), 0)
    return out


def _looked_up(func: Any, weight: Any, indices: Tensor, *args: Any, **kwargs: Any) -> Any:
    sampled = weight.sampled if type(weight) is DualTensor else None
    if isinstance(sampled, Factors):
        return _low_rank(func(weight._primal, indices, *args, **kwargs), sampled, indices)
    w, dw = (weight._primal, None) if sampled is not None else parts(weight)
    if w.dtype not in FUSED_DTYPES or w.dim() != 2 or (dw is None and sampled is None):
        value, tangents = parts(weight)
        out = func(value, indices, *args, **kwargs)
        return out if tangents is None else wrap(out, tangents[:, indices], low_dtype(weight))
    try:
        if sampled is not None:
            y, dy = _sampled(w, indices, sampled)
        else:
            y, dy = _embedding_jvp(indices, w, dw, None, weight.k, 0, 0, None, None)
    except RuntimeError:
        func(w, indices, *args, **kwargs)  # an index that is no row: PyTorch's own error
        raise
    return _make(y, dy, weight.k)


def _sampled(w: Tensor, indices: Tensor, s: SampledTangents) -> tuple[Tensor, Tensor]:
    if s.touched is not None:
        s.touched.add(s.offset)
    return _embedding_jvp(indices, w, None, s.state, s.k, s.first, ops.DISTRIBUTIONS[s.distribution], s.offset, s.dtype)


def _low_rank(out: Tensor, factors: Factors, indices: Tensor) -> Tensor:
    """Row j of ``A_i B_i^T`` is a combination of the r rows of ``B_i^T``, with the weights that ``A_i`` has for j."""
    factors.touch()
    left = factors.left[:, :, indices.reshape(-1)].mT  # (k, places, r)
    moved = torch.bmm(left, factors.right).mul_(factors.scale)
    return wrap(out, moved.view(factors.k, *out.shape), factors.dtype)
