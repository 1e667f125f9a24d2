"""What weight and activity perturbation share: from base derivatives to coefficients, and the checks of a loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ._deferred import deferring, require
from .aggregate import Aggregate, Custom, Orthogonal, scaling_correction
from .dual import DualTensor, primal_of
from .tangents import TangentSet

__all__ = ["Estimate"]


@dataclass(eq=False)
class Estimate:
    """One forward gradient: everything about it but the gradient itself, which is replayed when it is asked for.

    Attributes:
        loss: the mean loss, 0-dim.
        directional_derivatives: ``d = V^T g``, float64 ``(k,)``, or ``(k, B)`` for per-sample losses under activity
            perturbation.
        coefficients: ``c`` in the estimate ``V c``, shaped like ``d``; None for a custom aggregation.
        n: number of perturbed elements (per sample, where derivatives are per sample).
    """

    loss: Tensor
    directional_derivatives: Tensor
    coefficients: Tensor | None
    n: int
    #: coefficients of the base tangents, float64, shaped like d
    base_coefficients: Tensor | None = field(repr=False)
    #: what a custom aggregation returned: (n,) or (B, n)
    custom: Tensor | None = field(repr=False)
    _gram: Callable[[], Tensor] = field(repr=False)
    _rank: Tensor | None = field(repr=False)
    #: what the derivatives were computed in
    _dtype: torch.dtype = field(repr=False)
    #: what the passes left behind for the gradients of layers, under activity perturbation
    trace: Any = field(default=None, repr=False)
    #: the estimate itself by parameter name, where it is remembered; nothing may write into it
    computed: dict[str, Tensor] | None = field(default=None, repr=False)

    @property
    def gram(self) -> Tensor:
        """``G = V^T V``, float64 ``(k, k)``, or ``(B, k, k)`` where each sample has its own tangents. Replayed on first use
        where the aggregation did not need it; activities' only until the next call, RuntimeError afterwards."""
        return self._gram()

    @property
    def rank(self) -> Tensor:
        """Number of independent tangents, int64 ``()``, or ``(B,)`` where each sample has its own tangents."""
        if self._rank is None:
            _, self._rank = Orthogonal().coefficients(self.gram, self.directional_derivatives, self.n, self._dtype)
            assert self._rank is not None
        return self._rank


def solve(
    tangents: TangentSet,
    aggregate: Aggregate | Custom,
    loss: Tensor,
    base_derivatives: Tensor,
    base_gram: Callable[[], Tensor],
    stored: Callable[[], Tensor],
    n: int,
    correct_length: bool,
) -> Estimate:
    """Mixes base derivatives into directional derivatives and turns those into coefficients.

    Arguments:
        base_derivatives: ``Z^T g``, (k,) or (k, B), in the dtype they were computed in.
        base_gram: makes ``Z^T Z``, float64 (k, k) or (B, k, k); called at most once.
        stored: makes the base tangents (k, n), for custom aggregations.
    """
    distribution, k = tangents.distribution, tangents.k
    distribution.check(k, n)
    check_finite("directional derivatives", base_derivatives)
    dtype, d = base_derivatives.dtype, base_derivatives.double()
    base_gram = _once(base_gram)
    mixing = distribution.mixing(base_gram(), tangents.seed, tangents.step) if distribution.mixed else None
    if mixing is not None:
        check_finite("the mixing of the tangents (dependent draws)", mixing)
        d = _apply(mixing.mT, d)

    def gram() -> Tensor:
        tangents.check_unchanged("gram")  # on first use, which may be later
        own = base_gram()
        return own if mixing is None else mixing.mT @ own @ mixing

    gram = _once(gram)
    if not isinstance(aggregate, Aggregate):
        if correct_length:
            raise ValueError("scaling_correction: no closed form for a custom aggregation")
        v = stored()
        v = v if mixing is None else (mixing.mT @ v.double()).to(v.dtype)
        custom = aggregate(v, d.to(v.dtype))
        expected = (n,) if d.dim() == 1 else (d.shape[1], n)
        if not isinstance(custom, Tensor) or custom.shape != expected:
            got = tuple(custom.shape) if isinstance(custom, Tensor) else type(custom).__name__
            raise ValueError(f"aggregate: the callable returned {got}; expected a gradient of shape {expected}")
        check_finite("the gradient from the custom aggregation", custom)
        return Estimate(loss, d, None, n, None, custom, gram, None, dtype)
    c, rank = aggregate.coefficients(gram() if aggregate.needs_gram else None, d, n, dtype)
    if correct_length:
        c = c * scaling_correction(aggregate, distribution, k, n)
    check_finite("coefficients", c)
    return Estimate(loss, d, c, n, c if mixing is None else _apply(mixing, c), None, gram, rank, dtype)


def _apply(matrix: Tensor, columns: Tensor) -> Tensor:
    """matrix (k, k) or (B, k, k), one per column; columns (k,) or (k, B)."""
    if matrix.dim() == 3:
        return (matrix @ columns.T.unsqueeze(2)).squeeze(2).T
    return matrix @ columns


def _once(make: Callable[[], Tensor]) -> Callable[[], Tensor]:
    made: list[Tensor] = []

    def get() -> Tensor:
        if not made:
            made.append(make())
        return made[0]

    return get


def read_loss(loss: Any, name: str = "loss_fn") -> tuple[Tensor, Tensor]:
    """Value and tangents of what the function ``name`` returned: (), (k,); or (B,), (k, B).

    Raises:
        TypeError: no floating point tensor.
        ValueError: neither a scalar nor one loss per sample; or it does not depend on what is perturbed.
        FloatingPointError: NaN or infinite.
    """
    check_loss(loss, name)
    if not isinstance(loss, DualTensor):
        raise ValueError(f"{name}: the result does not depend on anything that is perturbed")
    return loss.primal, loss.tangents


def check_loss(loss: Any, name: str) -> None:
    """The checks of :func:`read_loss` that need no tangents."""
    loss = primal_of(loss)
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        what = loss.dtype if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"{name} returned {what}; expected a real floating point tensor")
    if loss.dim() > 1 or loss.numel() == 0:
        raise ValueError(f"{name} returned shape {tuple(loss.shape)}; expected a scalar () or one loss per sample (B,), B >= 1")
    check_finite("the loss", loss.detach())


def check_finite(what: str, values: Tensor) -> None:
    if deferring():
        require(values.isfinite().all(), lambda: FloatingPointError(f"{what}: not all of {values.numel()} values are finite"))
    elif not math.isfinite(values.sum().item()) and not bool(values.isfinite().all()):
        bad = values[~values.isfinite()]
        raise FloatingPointError(f"{what}: {bad.numel()} of {values.numel()} values are not finite (first: {bad[0].item()})")
