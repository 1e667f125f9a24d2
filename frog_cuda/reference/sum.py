"""Sums of tangents."""

from __future__ import annotations

from torch import Tensor


def tangent_sum(
    a: Tensor, va: Tensor | None = None, b: Tensor | None = None, vb: Tensor | None = None, *, alpha: float = 1.0
) -> Tensor:
    """``a_i + va_i + alpha (b_i + vb_i)``."""
    out = a.double().clone()
    for i in range(len(out)):
        for t, factor in ((va, 1.0), (b, alpha), (vb, alpha)):
            if t is not None:
                out[i] += factor * t[i].double()
    return out
