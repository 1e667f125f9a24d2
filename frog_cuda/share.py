"""Which part of a step a process does itself, and how parts are put together.

Sums of Gram matrices are exact and therefore independent of their order: however the parameters are dealt out among processes,
the total has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .tangents import Piece

__all__ = ["ALONE", "Share", "from_limbs", "limbs"]

_LIMB = 2.0**30


class Share:
    """The share of a process that is alone: all tangents, all rows, all parameters.

    :mod:`frog_cuda.distributed` overrides it with one that exchanges.

    Attributes:
        shards: over how many processes the rows of a batch are spread.
    """

    shards = 1

    def span(self, k: int) -> tuple[int, int]:
        """Which of k tangents to propagate: the first one, and how many; at least one."""
        return 0, k

    def gather(self, derivatives: Tensor, loss: Tensor, k: int) -> Tensor:
        """Base derivatives of all k tangents, (k,) or (k, B), from those of this share's span."""
        return derivatives

    def average(self, loss: Tensor, derivatives: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Loss and derivatives (k,) of the whole batch, from those of this share's rows."""
        return loss, derivatives

    def gram(self, pieces: Sequence[Piece], gram_of: Callable[[Piece], Tensor]) -> Tensor:
        """The sum of the pieces' Gram matrices, float64 (k, k)."""
        return from_limbs(limbs([gram_of(p) for p in pieces]))


ALONE = Share()


def limbs(grams: Sequence[Tensor]) -> Tensor:
    """The sum of matrices as whole numbers, which floating point adds up exactly in any order: (3, k, k) float64.

    The limbs are multiples of 1, 2^-30 and 2^-60, so each matrix is rounded to 2^-60, for tangents whose elements are drawn
    around 1. Sums are exact below 2^53, which the Gram matrix of 10^15 normal elements does not reach.
    """
    stacked = torch.stack(tuple(grams))
    whole = stacked.floor()
    rest = (stacked - whole) * _LIMB
    middle = rest.floor()
    low = ((rest - middle) * _LIMB).round()
    return torch.stack((whole.sum(0), middle.sum(0), low.sum(0)))


def from_limbs(sums: Tensor) -> Tensor:
    """What :func:`limbs` of symmetric matrices, or a sum of several, stands for: (k, k) float64; reads the lower triangle."""
    whole, middle, low = sums.tril()
    lower = whole + (middle + low / _LIMB) / _LIMB
    return lower + lower.tril(-1).mT
