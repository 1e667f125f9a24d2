"""Rows of a table and of its tangents."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd

from .helpers import _code, _guard, _ops
from .tangents import DISTRIBUTIONS


def embedding_jvp(
    indices: Tensor,
    weight: Tensor,
    dweight: Tensor | None = None,
    *,
    state: Tensor | None = None,
    k: int,
    first: int = 0,
    distribution: str = "normal",
    weight_offset: int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``y = weight[indices]`` and its k tangents ``dy_i = dweight_i[indices]``, supplied or sampled.

    Arguments:
        indices: any shape, int64 or int32, each in ``0 .. rows - 1``. What the CPU refuses, an index that is no row, gives NaN
            on a GPU, which is not waited for.
        weight: ``(rows, dim)``.  dweight: ``(k, rows, dim)``, or None where tangents are sampled.
        state, weight_offset, first, distribution: sampled tangents of weight, as in :func:`sample_tangents`; of them only the
            rows looked up are drawn, so nothing of the size of k tables is stored.
        dtype: of sampled tangents; None means the weight's. Drawn in float32 and rounded.
    Returns:
        y ``(*indices.shape, dim)``; dy ``(k, *indices.shape, dim)`` in the tangents' dtype.
    """
    _guard("embedding_jvp", weight, dweight)
    code = _code(DISTRIBUTIONS, "distribution", distribution)
    with _AutoDispatchBelowAutograd():
        return _ops.embedding_jvp(indices, weight, dweight, state, k, first, code, weight_offset, dtype)
