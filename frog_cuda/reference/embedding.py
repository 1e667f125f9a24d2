"""Rows of a table and of its tangents."""

from __future__ import annotations

import torch
from torch import Tensor

from .tangents import sample_tangents


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
    """``weight[indices]`` and the same rows of every tangent, all of which are drawn here."""
    if dweight is None:
        assert state is not None and weight_offset is not None
        drawn = sample_tangents(state, k, weight.numel(), offset=weight_offset, first=first, distribution=distribution)
        dweight = drawn.view(k, *weight.shape)
    return weight.double()[indices.long()], dweight.double()[:, indices.long()]
