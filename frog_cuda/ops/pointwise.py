"""Pointwise functions, alone or as the activation of a layer."""

from __future__ import annotations

from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd

from .helpers import _code, _guard, _ops

#: name -> code of the pointwise ``function`` / fused ``activation``; ``alpha`` and ``beta`` are the parameters in brackets
POINTWISE = {
    "identity": 0,
    "relu": 1,
    "gelu": 2,
    "gelu_tanh": 3,
    "silu": 4,
    "tanh": 5,
    "sigmoid": 6,
    "softplus": 7,  # (alpha=beta of torch, beta=threshold of torch)
    "elu": 8,  # (alpha)
    "leaky_relu": 9,  # (alpha=negative_slope)
    "hardtanh": 10,  # (alpha=min_val, beta=max_val)
}


def pointwise_jvp(
    x: Tensor, dx: Tensor | None, function: str, *, activity: Tensor | None = None, alpha: float = 0.0, beta: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``y = f(x)`` and ``dy_i = f'(x) * (dx_i + v_i)``, reading ``x`` once for all k tangents.

    Arguments:
        x: any shape.  dx: ``(k, *x.shape)`` or None.
        activity: tangent added to ``dx``, ``(k, *s)`` with ``s`` a suffix of ``x.shape``. One of dx and activity must be given.
        function, alpha, beta: see :data:`POINTWISE`. Derivatives at kinks are PyTorch's.
    Returns:
        y like ``x``; dy ``(k, *x.shape)`` in the tangents' dtype.
    """
    _guard("pointwise_jvp", x, dx, activity)
    code = _code(POINTWISE, "function", function)
    with _AutoDispatchBelowAutograd():
        return _ops.pointwise_jvp(x, dx, activity, code, alpha, beta)
