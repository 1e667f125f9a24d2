"""The orthogonal projection onto the span of tangents."""

from __future__ import annotations

from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd

from .helpers import _guard, _ops


def cholesky_project(gram: Tensor, derivatives: Tensor, *, rtol: float = 1e-7) -> tuple[Tensor, Tensor]:
    """Coefficients ``c = G^+ d`` of the orthogonal projection P_U (Flügel et al., section 3.4) by pivoted Cholesky.

    Dependent tangents are dropped: tangents are scaled to unit length, and once none is farther than ``sqrt(rtol)`` from the
    span of those taken before, the rest get coefficient 0; the projection onto the span stays exact.

    Arguments:
        gram: symmetric positive semi-definite, ``(k, k)`` or batched ``(b, k, k)``.
        derivatives: ``(k, r)`` or ``(b, k, r)``: r right-hand sides.
    Returns:
        coefficients, float64, shaped like ``derivatives``; rank, int64, ``()`` or ``(b,)``.
    """
    _guard("cholesky_project", gram, derivatives)
    with _AutoDispatchBelowAutograd():
        return _ops.cholesky_project(gram, derivatives, rtol)
