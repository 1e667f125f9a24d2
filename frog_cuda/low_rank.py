"""Tangents of low rank by their factors: drawn once, never multiplied out where a layer can work with them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from ._checks import flat


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

    @staticmethod
    def split(drawn: Tensor, shape: tuple[int, ...], r: int) -> Factors:
        """From elements (k, r (out + m)) in a row."""
        out = shape[0]
        left, right = drawn[:, : r * out], drawn[:, r * out :]
        return Factors(left.contiguous().view(-1, r, out), right.contiguous().view(len(drawn), r, -1), shape)

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

    def gram(self) -> Tensor:
        """``<v_i, v_j>``, float64 (k, k): sums of products of the factors' Gram matrices, accumulated in float64."""
        from . import ops

        pairs = ops.gram(self.left.flatten(0, 1)) * ops.gram(self.right.flatten(0, 1))
        if self.r == 1:
            return pairs
        return pairs.view(self.k, self.r, self.k, self.r).sum((1, 3)) / self.r

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
