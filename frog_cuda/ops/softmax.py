"""Softmax and its logarithm."""

from __future__ import annotations

from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd

from .helpers import _guard, _ops


def softmax_jvp(x: Tensor, dx: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """``y = softmax(x, dim)`` and ``dy_i = y * (dx_i - sum(y * dx_i))``.

    Arguments:
        x: any shape.  dx: ``(k, *x.shape)``.
        dim: an axis of ``x``, negative ones from the end.
    Returns:
        y like ``x``; dy ``(k, *x.shape)`` in the tangents' dtype.
    """
    _guard("softmax_jvp", x, dx)
    with _AutoDispatchBelowAutograd():
        return _ops.softmax_jvp(x, dx, dim)


def log_softmax_jvp(x: Tensor, dx: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """``y = log_softmax(x, dim)`` and ``dy_i = dx_i - sum(exp(y) * dx_i)``; arguments and results as of :func:`softmax_jvp`."""
    _guard("log_softmax_jvp", x, dx)
    with _AutoDispatchBelowAutograd():
        return _ops.log_softmax_jvp(x, dx, dim)
