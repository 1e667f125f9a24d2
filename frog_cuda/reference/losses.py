"""Losses, one for each sample or element."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .softmax import log_softmax_jvp


def cross_entropy_jvp(
    logits: Tensor,
    dlogits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "none",
) -> tuple[Tensor, Tensor]:
    """``-(1 - s) w_t log p_t - (s / C) sum_c w_c log p_c`` with ``p = softmax(logits)``, which is linear in ``log p``."""
    classes = logits.shape[1]
    w = torch.ones(classes, dtype=torch.float64) if weight is None else weight.double()
    ignored = target == ignore_index
    t = torch.where(ignored, 0, target)
    log_p, dlog_p = log_softmax_jvp(logits, dlogits, 1)  # (B, C), (k, B, C)

    def loss(v: Tensor) -> Tensor:
        total = -(1 - label_smoothing) * w[t] * v.gather(1, t[:, None])[:, 0]
        if label_smoothing > 0:  # else a logit of -inf would give 0 * inf
            total = total - label_smoothing / classes * (w * v).sum(1)
        each = torch.where(ignored, 0.0, total)
        if reduction == "none":
            return each
        return each.sum() / w[t][~ignored].sum() if reduction == "mean" else each.sum()

    return loss(log_p), torch.stack([loss(v) for v in dlog_p])


def mse_jvp(input: Tensor, dinput: Tensor | None, target: Tensor, dtarget: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``(a - b)^2``, ``2 (a - b) (da_i - db_i)``."""
    difference = input.double() - target.double()
    assert dinput is not None or dtarget is not None, "one of dinput and dtarget must be given"
    change = 0 if dinput is None else dinput.double()
    if dtarget is not None:
        change = change - dtarget.double()
    return difference**2, 2 * difference * change


def bce_jvp(
    input: Tensor,
    dinput: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    with_logits: bool = True,
) -> tuple[Tensor, Tensor]:
    """``-w (q t log p + (1 - t) log(1 - p))`` with p the input or its sigmoid, w ``weight`` and q ``pos_weight``.

    Where p itself is given, logarithms are at least -100 and ``p (1 - p)`` in the derivative at least 1e-12, as in PyTorch.
    """
    x, t = input.double(), target.double()
    w = 1.0 if weight is None else weight.double()
    if with_logits:
        q = 1.0 if pos_weight is None else pos_weight.double()
        mixed = 1 + (q - 1) * t
        # log p = -softplus(-x) and log(1 - p) = -x - softplus(-x)
        loss = (1 - t) * x + mixed * torch.nn.functional.softplus(-x, threshold=700)
        slope = (1 - t) - mixed * torch.sigmoid(-x)
    else:
        if pos_weight is not None:
            raise ValueError("bce_jvp: pos_weight is given; it needs with_logits=True")
        loss = -(t * x.log().clamp(min=-100) + (1 - t) * torch.log1p(-x).clamp(min=-100))
        # PyTorch's 1e-12 is a float32 at every precision
        slope = (x - t) / (x * (1 - x)).clamp(min=float(np.float32(1e-12)))
    return w * loss, w * slope * dinput.double()
