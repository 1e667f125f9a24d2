"""Linear combinations of tangents of low rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def low_rank_combine(
    factors: Tensor, k: int, r: int, heights: Sequence[int], widths: Sequence[int], coefficients: Tensor
) -> list[Tensor]:
    """``sum_i c_i A_i^T B_i`` of each matrix: ``(heights[b], widths[b])``."""
    lengths = [*heights, *widths]
    parts = factors.double().split([k * r * n for n in lengths])
    sides = [part.view(k, r, n) for part, n in zip(parts, lengths, strict=True)]
    pairs = zip(sides[: len(heights)], sides[len(heights) :], strict=True)
    return [torch.einsum("k,kro,krm->om", coefficients.double(), left, right) for left, right in pairs]
