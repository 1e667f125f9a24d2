"""Linear layers: value and k tangents, single products, and the gradient of a weight."""

from __future__ import annotations

from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd

from .helpers import _code, _guard, _ops
from .pointwise import POINTWISE
from .tangents import DISTRIBUTIONS


def linear_jvp(
    x: Tensor,
    dx: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
    activity: Tensor | None = None,
    state: Tensor | None = None,
    k: int,
    first: int = 0,
    distribution: str = "normal",
    weight_offset: int | None = None,
    bias_offset: int | None = None,
    activation: str = "identity",
    alpha: float = 0.0,
    beta: float = 0.0,
    want_gram: bool = False,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``y = act(x W^T + b)`` and its k tangents ``dy_i = act'(.) * (dx_i W^T + x dW_i^T + db_i + v_i)``.

    Arguments:
        x: ``(*, in)``.  dx: ``(k, *, in)`` or None where nothing upstream is perturbed.
        weight: ``(out, in)``.  bias: ``(out,)`` or None.
        dweight, dbias: supplied tangents ``(k, out, in)``, ``(k, out)``.
        left, right: in place of ``dweight``, factors ``(k, r, out)`` and ``(k, r, in)`` of ``dW_i = left_i^T right_i``, never
            multiplied out.
        activity: an activity tangent added before the activation, ``(k, *s, out)`` with ``s`` a suffix of ``*`` (empty: shared
            by every row).
        state, weight_offset, bias_offset, first, distribution: sampled tangents of weight and bias, as in
            :func:`sample_tangents`; they are drawn block by block in cache and never stored. An offset of None means: that
            parameter is not sampled.
        activation, alpha, beta: see :data:`POINTWISE`.
        want_gram: also return the Gram matrix of the sampled weight and bias tangents.
    Returns:
        y ``(*, out)``; dy ``(k, *, out)`` in ``dx``'s dtype where given, else ``x``'s; gram float64 ``(k, k)``, or ``(0, 0)``.
    """
    _guard("linear_jvp", x, dx, weight, bias, dweight, dbias, activity, left, right)
    act = _code(POINTWISE, "activation", activation)
    code = _code(DISTRIBUTIONS, "distribution", distribution)
    with _AutoDispatchBelowAutograd():
        return _ops.linear_jvp(
            x,
            dx,
            weight,
            bias,
            dweight,
            dbias,
            activity,
            state,
            k,
            first,
            code,
            weight_offset,
            bias_offset,
            act,
            alpha,
            beta,
            want_gram,
            left,
            right,
        )


def linear_rows(x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T``, where a row's result does not depend on how many rows there are.

    A library's order of sums may depend on that, and then tells in the last bits how many tangents go through a layer
    together. The promise is kept on CPUs with AVX2 or AVX-512; elsewhere this is the library's product.

    Arguments:
        x: ``(*, in)``.  weight: ``(out, in)``, the same dtype. Low precision is summed in float32 and rounded once.
    Returns:
        ``(*, out)``.
    """
    _guard("linear_rows", x, weight)
    with _AutoDispatchBelowAutograd():
        return _ops.linear_rows(x, weight)


def linear_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """Gradient of a linear layer's weight from that of its output: ``gradient^T x``, summed over the rows.

    Arguments:
        gradient: ``(rows, out)``.  x: ``(rows, in)``, the same dtype.
    Returns:
        ``(out, in)``.
    """
    _guard("linear_gradient", gradient, x)
    with _AutoDispatchBelowAutograd():
        return _ops.linear_gradient(gradient, x)
