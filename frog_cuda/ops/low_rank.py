"""Linear combinations of tangents of low rank (csrc/cpu/low_rank.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd

from .helpers import _guard, _ops


def low_rank_combine(
    factors: Tensor, k: int, r: int, heights: Sequence[int], widths: Sequence[int], coefficients: Tensor
) -> list[Tensor]:
    """``sum_i c_i A_i^T B_i`` for several matrices in one call, the products never multiplied out one by one.

    Arguments:
        factors: ``(k r (sum(heights) + sum(widths)),)``: of all matrices first the left factors ``A`` ``(k, r, heights[b])``,
            one behind the other, then the right ones ``B`` ``(k, r, widths[b])``. Low precision is summed in float32.
        coefficients: ``(k,)``, any float dtype.
    Returns:
        a tensor ``(heights[b], widths[b])`` for each, in the dtype of the factors.
    Raises:
        RuntimeError: an argument has another shape, or a dtype that is not floating.
    """
    _guard("low_rank_combine", factors, coefficients)
    with _AutoDispatchBelowAutograd():
        return _ops.low_rank_combine(factors, k, r, heights, widths, coefficients)
