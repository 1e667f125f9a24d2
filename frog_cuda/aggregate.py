"""From k directional derivatives to a gradient estimate.

Every aggregation by name is linear in the tangents: ``g_hat = V c`` with coefficients ``c`` computed from the derivatives
``d = V^T g`` and, for some, the Gram matrix ``G = V^T V``. So one kernel serves all of them. Flügel et al., arXiv 2410.17764,
sections 3.2 (mean, sum) and 3.4 (orthogonal projection P_U).

``d`` is ``(k,)``, or ``(k, B)`` for B samples with a gradient each; ``c`` has the shape of ``d``. ``G`` is ``(k, k)``, or
``(B, k, k)`` where each sample has tangents of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import ops
from ._checks import check_count, is_real
from .tangents import Distribution
from .tangents import resolve as resolve_tangents

__all__ = [
    "Aggregate",
    "Max",
    "MaxNormalized",
    "Mean",
    "MeanOfTopK",
    "MeanTimesDim",
    "Orthogonal",
    "Sum",
    "combine",
    "resolve",
    "scaling_correction",
]


class Aggregate:
    """How coefficients are computed; subclasses are the aggregations."""

    needs_gram: ClassVar[bool] = False

    def coefficients(
        self, gram: Tensor | None, derivatives: Tensor, n: int, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, Tensor | None]:
        """Coefficients shaped like ``derivatives``, and the rank of the tangents where it was found on the way.

        Arguments:
            gram: float64 ``(k, k)`` or ``(B, k, k)``; may be None unless ``needs_gram``.
            derivatives: float64 ``(k,)`` or ``(k, B)``.
            n: number of elements of a tangent.
            dtype: the precision that ``derivatives`` were computed in.
        """
        raise NotImplementedError

    def length(self, distribution: Distribution, k: int, n: int) -> float:
        """Expected ``|g_hat| / |g|``, for the length correction.

        Raises:
            ValueError: no closed form.
        """
        raise ValueError(
            f"scaling_correction: no closed form for {type(self).__name__}; it exists for orthogonal, mean, sum and "
            "mean_times_dim"
        )


@dataclass(frozen=True)
class Mean(Aggregate):
    """``V d / k``, unbiased where E[v v^T] = I (section 3.2)."""

    def coefficients(
        self, gram: Tensor | None, derivatives: Tensor, n: int, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, Tensor | None]:
        return derivatives / derivatives.shape[0], None

    def length(self, distribution: Distribution, k: int, n: int) -> float:
        return math.sqrt(distribution.energy(k, n)) / k


@dataclass(frozen=True)
class Sum(Aggregate):
    """``V d`` (section 3.2)."""

    def coefficients(
        self, gram: Tensor | None, derivatives: Tensor, n: int, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, Tensor | None]:
        return derivatives.clone(), None

    def length(self, distribution: Distribution, k: int, n: int) -> float:
        return math.sqrt(distribution.energy(k, n))


@dataclass(frozen=True)
class MeanTimesDim(Aggregate):
    """``n V d / k``: the mean made unbiased for tangents of unit length, where E[v v^T] = I / n."""

    def coefficients(
        self, gram: Tensor | None, derivatives: Tensor, n: int, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, Tensor | None]:
        return derivatives * (n / derivatives.shape[0]), None

    def length(self, distribution: Distribution, k: int, n: int) -> float:
        return n * math.sqrt(distribution.energy(k, n)) / k


@dataclass(frozen=True)
class Orthogonal(Aggregate):
    """P_U, the projection onto the span U of the tangents: ``V G^-1 d`` (section 3.4).

    Lengths and angles of the tangents play no part; for k >= n and n independent tangents the gradient is exact. Dependent
    tangents are dropped, see :func:`frog_cuda.ops.cholesky_project`.

    Arguments:
        rtol: squared relative distance from the span of the others below which a tangent counts as dependent. None: 1e-13 for
            derivatives computed in float64, 1e-7 for anything less exact, whose rounding errors it would blow up.
    """

    rtol: float | None = None
    needs_gram: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.rtol is not None and not (is_real(self.rtol) and 0 <= self.rtol < 1):
            raise ValueError(f"Orthogonal: rtol is {self.rtol!r}; expected a number in [0, 1), or None")

    def coefficients(
        self, gram: Tensor | None, derivatives: Tensor, n: int, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, Tensor | None]:
        assert gram is not None
        rtol = self.rtol if self.rtol is not None else 1e-13 if dtype == torch.float64 else 1e-7
        if gram.dim() == 3:  # d (k, B) -> (B, k, 1)
            c, rank = ops.cholesky_project(gram, derivatives.T.unsqueeze(2), rtol=rtol)
            return c.squeeze(2).T, rank
        if derivatives.dim() == 1:
            c, rank = ops.cholesky_project(gram, derivatives.unsqueeze(1), rtol=rtol)
            return c.squeeze(1), rank
        return ops.cholesky_project(gram, derivatives, rtol=rtol)

    def length(self, distribution: Distribution, k: int, n: int) -> float:
        distribution.energy(k, n)  # raises where nothing is known about the tangents
        if k >= n:
            return 1.0
        if distribution.uniform_span:  # E|P_U g| / |g| = E[chi_k] / E[chi_n]
            return mean_chi(k) / mean_chi(n)
        return math.sqrt(k / n)  # E[P_U] = k/n I by symmetry, so E|P_U g|^2 = k/n |g|^2


@dataclass(frozen=True)
class Max(Aggregate):
    """``d_j v_j`` for the one tangent with the largest |d_j|."""

    def coefficients(
        self, gram: Tensor | None, derivatives: Tensor, n: int, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, Tensor | None]:
        return _keep(derivatives, derivatives.abs(), 1), None


@dataclass(frozen=True)
class MaxNormalized(Aggregate):
    """``d_j v_j`` for the one tangent closest to the gradient's direction: the largest ``|d_j| / |v_j|``."""

    needs_gram: ClassVar[bool] = True

    def coefficients(
        self, gram: Tensor | None, derivatives: Tensor, n: int, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, Tensor | None]:
        return _keep(derivatives, _cosines(gram, derivatives), 1), None


@dataclass(frozen=True)
class MeanOfTopK(Aggregate):
    """Mean of ``d_j v_j`` over the tangents closest to the gradient's direction.

    Arguments:
        top: how many; None takes half of the k tangents, rounded up.
    """

    top: int | None = None
    needs_gram: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.top is not None and (isinstance(self.top, bool) or not isinstance(self.top, int) or self.top < 1):
            raise ValueError(f"MeanOfTopK: top is {self.top!r}; expected an integer >= 1, or None")

    def coefficients(
        self, gram: Tensor | None, derivatives: Tensor, n: int, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, Tensor | None]:
        k = derivatives.shape[0]
        top = (k + 1) // 2 if self.top is None else min(self.top, k)
        return _keep(derivatives, _cosines(gram, derivatives), top) / top, None


def _cosines(gram: Tensor | None, derivatives: Tensor) -> Tensor:
    """|d_j| / |v_j|, proportional to the cosine between v_j and the gradient; a tangent of length 0 counts as the worst."""
    assert gram is not None
    lengths = gram.diagonal(dim1=-2, dim2=-1).sqrt()  # (k,) or (B, k)
    lengths = lengths.T if lengths.dim() == 2 else lengths.view(-1, *(1,) * (derivatives.dim() - 1))
    return torch.where(lengths > 0, derivatives.abs() / lengths, -1.0)


def _keep(derivatives: Tensor, score: Tensor, count: int) -> Tensor:
    best = score.topk(count, dim=0).indices
    return torch.zeros_like(derivatives).scatter(0, best, derivatives.gather(0, best))


_NAMES: dict[str, Callable[[], Aggregate]] = {
    "orthogonal": Orthogonal,
    "mean": Mean,
    "sum": Sum,
    "mean_times_dim": MeanTimesDim,
    "max": Max,
    "max_normalized": MaxNormalized,
    "mean_of_top_k": MeanOfTopK,
}

Custom = Callable[[Tensor, Tensor], Tensor]


def resolve(spec: Any) -> Aggregate | Custom:
    """What ``aggregate=`` means: a name, an :class:`Aggregate`, or a callable ``(tangents, derivatives) -> gradient``.

    A callable gets the tangents stored, ``(k, n)``, and derivatives ``(k,)`` or ``(k, B)``; it returns ``(n,)`` or ``(B, n)``.

    Raises:
        ValueError: unknown name.  TypeError: anything else.
    """
    if isinstance(spec, Aggregate):
        return spec
    if isinstance(spec, str):
        if spec in _NAMES:
            return _NAMES[spec]()
        raise ValueError(f"aggregate is {spec!r}; accepted names are {', '.join(_NAMES)}")
    if isinstance(spec, type) and issubclass(spec, Aggregate):
        raise TypeError(f"aggregate is the class {spec.__name__}; expected an object: {spec.__name__}()")
    if callable(spec):
        return spec
    raise TypeError(
        f"aggregate is of type {type(spec).__name__}; accepted are a name ({', '.join(_NAMES)}), an object of "
        "frog_cuda.aggregate or a callable (tangents, derivatives) -> gradient"
    )


def combine(spec: Any, tangents: Tensor, derivatives: Tensor) -> Tensor:
    """The gradient estimate from stored tangents.

    Arguments:
        spec: anything that ``aggregate=`` accepts.
        tangents: ``(k, n)``.
        derivatives: ``(k,)``, or ``(k, B)`` for B gradients that share the tangents.
    Returns:
        ``(n,)``, or ``(B, n)``, in the tangents' dtype.
    Raises:
        TypeError: not a tensor, or not of a floating point dtype.
        ValueError: shapes that do not fit; a name of ``spec`` that is not known.

    >>> g = torch.tensor([3.0, -1.0, 2.0])
    >>> v = torch.randn(3, 3)
    >>> torch.allclose(combine("orthogonal", v, v @ g), g, atol=1e-4)
    True
    """
    how = resolve(spec)
    for name, value in (("tangents", tangents), ("derivatives", derivatives)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            what = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"combine: {name} is {what}; expected a floating point tensor")
    if tangents.dim() != 2 or derivatives.dim() not in (1, 2) or not len(derivatives) == len(tangents) >= 1:
        raise ValueError(
            f"combine: tangents and derivatives have shapes {tuple(tangents.shape)} and {tuple(derivatives.shape)}; expected "
            "(k, n), and (k,) or (k, B), with k >= 1"
        )
    if not isinstance(how, Aggregate):
        return how(tangents, derivatives)
    gram = ops.gram(tangents) if how.needs_gram else None
    c, _ = how.coefficients(gram, derivatives.double(), tangents.shape[1], derivatives.dtype)
    return (c if c.dim() == 1 else c.T).to(tangents.dtype) @ tangents


def scaling_correction(spec: Any, distribution: Any, k: int, n: int) -> float:
    """The factor that gives the estimate the length of the gradient: on average, or as its root mean square.

    For P_U it is ``1 / E[|g_hat| / |g|]``, exactly ``E[chi_n] / E[chi_k]``, wherever the span is uniformly distributed. For
    Rademacher and standard basis tangents, mean and sum it is one over the root of ``E[|g_hat|^2] / |g|^2``, also exact; as
    lengths scatter, their average is then below that of the gradient (0.80 of it for the mean of one normal tangent). Derived
    for every distribution from its moments, see :meth:`frog_cuda.tangents.Distribution.energy`. For P_U the k tangents are
    taken to be independent; Rademacher tangents of few elements are not always (two are equal or opposite with probability
    ``2^(1 - n)``).

    Arguments:
        spec: anything that ``aggregate=`` accepts.
        distribution: anything that ``tangents=`` accepts.
        k, n: number of tangents, and of their elements.
    Raises:
        TypeError, ValueError: an argument is not accepted.
        ValueError: no closed form (max and its relatives, supplied tangents, custom aggregations).

    >>> round(scaling_correction("mean", "normal", 4, 9995), 3)
    0.02
    """
    how, distribution = resolve(spec), resolve_tangents(distribution)
    k, n = check_count("k", k), check_count("n", n)
    distribution.check(k, n)
    if not isinstance(how, Aggregate):
        raise ValueError("scaling_correction: no closed form for a custom aggregation")
    return 1.0 / how.length(distribution, k, n)


def mean_chi(k: int) -> float:
    """Expected length of a standard normal vector of k elements, ``sqrt(2) Gamma((k + 1) / 2) / Gamma(k / 2)``."""
    if k >= 100:  # Stirling series; the difference of two log-gammas would lose digits: at k = 1e12, all but three
        return math.sqrt(k) * (1 - (1 / 4 - (1 / 32 + (5 / 128 - (21 / 2048 + 399 / 8192 / k) / k) / k) / k) / k)
    return math.sqrt(2) * math.exp(math.lgamma((k + 1) / 2) - math.lgamma(k / 2))
