"""Tangents of low rank by their factors: drawn once, never multiplied out where a layer can work with them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from ._checks import flat
from .guides import Piece


def factored(shape: tuple[int, ...], r: int) -> bool:
    """Whether tangents of a parameter of this shape are drawn as factors: a matrix at least, and fewer elements that way."""
    return len(shape) >= 2 and r * (shape[0] + math.prod(shape[1:])) < math.prod(shape)


@dataclass(frozen=True, eq=False)
class Factors:
    """k tangents ``v_i = A_i B_i^T / sqrt(r)`` of a parameter, seen as a matrix (out, m).

    Arguments:
        left: ``A`` (k, r, out).
        right: ``B`` (k, r, m).
        shape: of the parameter, ``(out, *rest)`` with ``m = prod(rest)``.
        offset: position of the parameter in the global tangent vector.
        touched: where given, the offset is added to it when an operation reads the tangents: the parameter takes part.
    """

    left: Tensor
    right: Tensor
    shape: tuple[int, ...]
    offset: int = 0
    touched: set[int] | None = None

    @property
    def k(self) -> int:
        return self.left.shape[0]

    @property
    def r(self) -> int:
        return self.left.shape[1]

    @property
    def scale(self) -> float:
        return self.r**-0.5

    @property
    def dtype(self) -> torch.dtype:
        return self.left.dtype

    def touch(self) -> None:
        if self.touched is not None:
            self.touched.add(self.offset)

    def dense(self, first: int = 0, count: int | None = None) -> Tensor:
        """Tangents ``first .. first + count``, multiplied out: (count, *shape)."""
        chosen = slice(first, None if count is None else first + count)
        return (self.left[chosen].mT @ self.right[chosen]).mul_(self.scale).view(-1, *self.shape)

    def combine(self, coefficients: Tensor) -> Tensor:
        """``sum_i c_i v_i``, coefficients (k,): (*shape), in the dtype of the factors, or float32 where that is lower."""
        left, right = self._scaled(coefficients)
        return (ops.linear_gradient(left, right) if left.is_cpu else left.mT @ right).view(self.shape)

    def axpy_(self, target: Tensor, coefficients: Tensor, alpha: float) -> None:
        """``target += alpha sum_i c_i v_i``."""
        left, right = self._scaled(coefficients)
        if target.is_contiguous() and target.dtype == left.dtype:
            flat(target).addmm_(left.mT, right, alpha=alpha)
        else:
            target.add_((left.mT @ right).view(self.shape), alpha=alpha)

    def _scaled(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Both factors as (k r, .), coefficients and scale in the left one."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        weights = (coefficients * self.scale).to(dtype).view(-1, 1, 1)
        return (self.left.to(dtype) * weights).flatten(0, 1), self.right.to(dtype).flatten(0, 1)


class Layout:
    """Which elements of the global tangent vector the pieces of a model take, where tangents of matrices have rank r.

    Arguments:
        pieces: all of them.
    Attributes:
        matrices: pieces (out, *) with factors.  sides: their lengths, first of all left factors, then of all right ones.
        short: pieces that are drawn in full.
    """

    #: elements of a piece without factors up to which it is drawn beforehand; the tangents of longer ones are never stored
    LONGEST = 1 << 12

    def __init__(self, pieces: Sequence[Piece], r: int) -> None:
        self.r, self.pieces = r, list(pieces)
        self.matrices = [p for p in pieces if factored(p.shape, r)]
        self.short = [p for p in pieces if not factored(p.shape, r) and p.numel <= self.LONGEST]
        heights = [p.shape[0] for p in self.matrices]
        self.sides = [*heights, *(math.prod(p.shape[1:]) for p in self.matrices)]
        self.numels = [r * n for n in self.sides]
        begins = [p.offset for p in self.matrices]
        self.offsets = [*begins, *(at + r * n for at, n in zip(begins, heights, strict=True))]
        self.short_numels, self.short_offsets = [p.numel for p in self.short], [p.offset for p in self.short]
        #: by offset and shape, as an empty piece has the offset of the one behind it
        self.places = {(p.offset, p.shape): i for i, p in enumerate([*self.matrices, *self.short])}


class Drawn:
    """Tangents of all matrices and short pieces, drawn together: a call for each would take longer than drawing.

    Arguments:
        state, k, first, base, dtype: what :func:`frog_cuda.ops.sample_blocks` draws.
    """

    #: elements of the factors' Gram matrices that are there at a time
    PAIRS = 1 << 20

    def __init__(self, layout: Layout, state: Tensor, k: int, first: int, base: str, dtype: torch.dtype) -> None:
        self.layout, self.k = layout, k
        self._sample = functools.partial(ops.sample_blocks, state, k, first=first, distribution=base, dtype=dtype)
        self._factors = self._sample(layout.numels, layout.offsets)
        self._sides = self._factors.split([k * n for n in layout.numels])

    @functools.cached_property
    def _full(self) -> Tensor:
        return self._sample(self.layout.short_numels, self.layout.short_offsets)

    @functools.cached_property
    def _blocks(self) -> tuple[Tensor, ...]:
        return self._full.split([self.k * n for n in self.layout.short_numels])

    def _place(self, piece: Piece) -> int:
        return self.layout.places.get((piece.offset, piece.shape), -1)

    def factors(self, piece: Piece) -> Factors | None:
        """None where it has none."""
        at, count = self._place(piece), len(self.layout.matrices)
        if not 0 <= at < count:
            assert not factored(piece.shape, self.layout.r), f"{piece} is not in the layout"
            return None
        left, right = (side.view(self.k, self.layout.r, -1) for side in (self._sides[at], self._sides[count + at]))
        return Factors(left, right, piece.shape, piece.offset)

    def full(self, piece: Piece) -> Tensor | None:
        """(k, *shape) of a piece that is drawn in full, and short."""
        at = self._place(piece) - len(self.layout.matrices)
        return self._blocks[at].view(self.k, *piece.shape) if at >= 0 else None

    def combine(self, coefficients: Tensor) -> dict[tuple[int, tuple[int, ...]], Tensor]:
        """``sum_i c_i v_i`` of every piece that is here, by its offset and shape; coefficients (k,)."""
        layout, count = self.layout, len(self.layout.matrices)
        heights, widths = layout.sides[:count], layout.sides[count:]
        matrices = ops.low_rank_combine(self._factors, self.k, layout.r, heights, widths, coefficients * layout.r**-0.5)
        vectors = ops.combine_blocks(self._full, self.k, layout.short_numels, coefficients)
        pieces = [*layout.matrices, *layout.short]
        return {(p.offset, p.shape): g.view(p.shape) for p, g in zip(pieces, [*matrices, *vectors], strict=True)}

    def gram(self, piece: Piece) -> Tensor | None:
        """``<v_i, v_j>``, float64 (k, k); None where the tangents are not here."""
        at = self._place(piece)
        return self._grams[at] if at >= 0 else None

    @functools.cached_property
    def _grams(self) -> list[Tensor]:
        """Of factors: sums of products of their Gram matrices, accumulated in float64."""
        k, r, count = self.k, self.layout.r, len(self.layout.matrices)
        found: list[Tensor] = []
        some = max(1, self.PAIRS // (k * r) ** 2)
        for first in range(0, count, some):
            left, right = (self._side_grams(begin + first, min(some, count - first)) for begin in (0, count))
            pairs = left.mul_(right)
            if r > 1:
                pairs = pairs.view(-1, k, r, k, r).sum((2, 4)) / r
            found.extend(pairs.unbind())
        return [*found, *ops.gram_blocks(self._full, k, self.layout.short_numels).unbind()]

    def _side_grams(self, first: int, count: int) -> Tensor:
        """Of factors that lie one behind the other: (count, k r, k r)."""
        rows, sides = self.k * self.layout.r, self.layout.sides
        begin = rows * sum(sides[:first])
        chosen = sides[first : first + count]
        return ops.gram_blocks(self._factors[begin : begin + rows * sum(chosen)], rows, chosen)
