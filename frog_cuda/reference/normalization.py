"""Layer, RMS, group, instance and batch normalisation."""

from __future__ import annotations

import torch
from torch import Tensor


def normalization_jvp(
    x: Tensor,
    dx: Tensor | None,
    weight: Tensor | None = None,
    dweight: Tensor | None = None,
    bias: Tensor | None = None,
    dbias: Tensor | None = None,
    *,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    outer: int = 1,
    groups: int,
    weight_groups: int = 1,
    centred: bool = True,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``y = w h + b`` with ``h = (x - mean) r``, ``r = 1 / sqrt(var + eps)``; ``dh = r (dx - mean(dx) - h mean(dx h))``."""
    inner = x.numel() // max(1, outer * groups)
    rows = x.double().reshape(outer, groups, inner)
    dims = (-3, -1)
    given = mean is not None and var is not None
    m = mean.double().view(1, -1, 1) if mean is not None else rows.mean(dims, keepdim=True) * centred
    v = var.double().view(1, -1, 1) if var is not None else ((rows - m) ** 2).mean(dims, keepdim=True)
    r = (v + eps).rsqrt()
    h = (rows - m) * r

    def spread(w: Tensor) -> Tensor:
        """(*, weight_groups * weight_inner) -> (*, 1, groups, inner), constant over runs."""
        w = w.double().unflatten(-1, (weight_groups, -1))
        w = w.repeat_interleave(inner // max(1, w.shape[-1]), dim=-1)
        return w.repeat(*(1,) * (w.dim() - 2), groups // weight_groups, 1).unsqueeze(-3)

    y = h if weight is None else h * spread(weight.flatten())
    y = y if bias is None else y + spread(bias.flatten())
    k = next(t for t in (dx, dweight, dbias) if t is not None).shape[0]
    dy = torch.zeros((k, *rows.shape), dtype=torch.float64)
    if dx is not None:
        moved = dx.double().reshape(k, *rows.shape)
        if not given:
            moved = moved - moved.mean(dims, keepdim=True) * centred - h * (moved * h).mean(dims, keepdim=True)
        dy = dy + r * moved * (1 if weight is None else spread(weight.flatten()))
    if dweight is not None:
        dy = dy + spread(dweight.flatten(1)) * h
    if dbias is not None:
        dy = dy + spread(dbias.flatten(1))
    return y.view(x.shape), dy.view(k, *x.shape), m.flatten().expand(groups).clone(), v.flatten()
