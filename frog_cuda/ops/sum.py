"""Sums of tangents."""

from __future__ import annotations

from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd

from .helpers import _guard, _ops


def tangent_sum(
    a: Tensor, va: Tensor | None = None, b: Tensor | None = None, vb: Tensor | None = None, *, alpha: float = 1.0
) -> Tensor:
    """``a + va + alpha * (b + vb)``: tangents of a sum, with activity tangents still to be added on either side.

    Arguments:
        a: ``(k, *s)``.  b: the same shape, or None.
        va, vb: ``(k, *t)`` with ``t`` a suffix of ``s``, or None.
    Returns:
        ``(k, *s)`` in the dtype of ``a``.
    """
    _guard("tangent_sum", a, va, b, vb)
    with _AutoDispatchBelowAutograd():
        return _ops.tangent_sum(a, va, b, vb, alpha)
