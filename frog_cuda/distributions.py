"""Distributions of tangents.

Every distribution but :class:`Supplied` is written as ``V = Z M``: k *base* tangents ``Z`` (n, k), which the kernels draw as a
pure function of (seed, step, tangent, element) and can replay at any time, and a small *mixing* matrix ``M`` (k, k) computed in
float64 from the Gram matrix ``Z^T Z``. Directional derivatives along ``V`` are ``M^T`` times those along ``Z``, and a linear
combination ``V c`` is ``Z (M c)``; so unit, orthonormal or cone tangents, too, are never stored.

Flügel et al., arXiv 2410.17764, section 3 (normal tangents), 4.1 (normalised ones) and 4.3 (cones).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ._checks import check_count, is_real
from ._deferred import require


class Distribution:
    """How k tangents of n elements are made; subclasses say what they need."""

    #: what the kernels draw: a name in :data:`frog_cuda.ops.DISTRIBUTIONS`
    base: str = "normal"
    #: whether the span of the tangents is uniformly distributed among all subspaces, as that of normal tangents is
    uniform_span: ClassVar[bool] = True
    #: whether :meth:`mixing` wants the Gram matrix of the base tangents
    mixed: ClassVar[bool] = False

    def check(self, k: int, n: int) -> None:
        """Raises ValueError where k tangents of n elements cannot be made."""

    def mixing(self, gram: Tensor, seed: int, step: int) -> Tensor | None:
        """``M`` (*, k, k) float64 with ``V = Z M``, from ``gram = Z^T Z`` (*, k, k) float64; None where ``V = Z``."""
        return None

    def second_moment(self, n: int) -> float:
        """s in ``E[v v^T] = s I``, averaged over the k tangents."""
        return 1.0

    def energy(self, k: int, n: int) -> float:
        """``E |V V^T g|^2 / |g|^2``, which the length correction of mean and sum needs."""
        raise NotImplementedError


@dataclass(frozen=True)
class Normal(Distribution):
    """Independent standard normal elements: E[v v^T] = I."""

    def energy(self, k: int, n: int) -> float:
        return k * (n + k + 1.0)


@dataclass(frozen=True)
class Rademacher(Distribution):
    """Independent elements +1 or -1 with equal probability: E[v v^T] = I and |v|^2 = n exactly."""

    base = "rademacher"
    uniform_span: ClassVar[bool] = False

    def energy(self, k: int, n: int) -> float:
        return k * (n + k - 1.0)


def _squares(gram: Tensor) -> Tensor:
    """|z_i|^2 (*, k)."""
    return gram.diagonal(dim1=-2, dim2=-1)


_diag = torch.diag_embed


class _Unit(Distribution):
    """Tangents of length 1."""

    mixed: ClassVar[bool] = True

    def second_moment(self, n: int) -> float:
        return 1.0 / n


@dataclass(frozen=True)
class Sphere(_Unit):
    """Independent, uniform on the unit sphere: normalised normal tangents."""

    def mixing(self, gram: Tensor, seed: int, step: int) -> Tensor:
        return _diag(_squares(gram).rsqrt())

    def energy(self, k: int, n: int) -> float:
        return k / n + k * (k - 1) / n**2


@dataclass(frozen=True)
class Orthonormal(_Unit):
    """k orthonormal tangents spanning a uniformly distributed subspace; k <= n. ``M = L^-T`` with ``Z^T Z = L L^T``.

    Orthonormal to about 1e-16 times the squared condition number of Z: nothing to think about unless k is close to n.
    """

    def check(self, k: int, n: int) -> None:
        if k > n:
            raise ValueError(f"tangents: k is {k}, but only {n} orthonormal tangents fit into {n} dimensions")

    def mixing(self, gram: Tensor, seed: int, step: int) -> Tensor:
        factor, failed = torch.linalg.cholesky_ex(gram)
        what = "tangents: the normal draws are linearly dependent and have no orthonormal basis"
        require(~failed.any(), lambda: FloatingPointError(what))
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        return torch.linalg.solve_triangular(factor, eye, upper=False).mT.contiguous()

    def energy(self, k: int, n: int) -> float:
        return k / n


@dataclass(frozen=True)
class Cone(_Unit):
    """Unit tangents at a fixed angle to the first one, which is uniform on the sphere (section 4.3).

    Tangent i > 0 is ``cos(angle) v_0 + sin(angle) u_i`` with ``u_i`` independent and uniform among the unit vectors orthogonal
    to ``v_0``.

    Arguments:
        angle: in degrees, 0 < angle <= 90.
    """

    angle: float

    def __post_init__(self) -> None:
        if not is_real(self.angle) or not 0 < self.angle <= 90:
            raise ValueError(f"Cone: angle is {self.angle!r}; expected degrees in (0, 90]")

    def check(self, k: int, n: int) -> None:
        if k > 1 and n < 2:
            raise ValueError(f"tangents: a cone needs at least 2 dimensions, got {n}")

    def mixing(self, gram: Tensor, seed: int, step: int) -> Tensor:
        cos, sin = math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))
        length = gram[..., 0, :1].sqrt()
        along = gram[..., 0, :] / length  # <z_i, v_0>
        across = (_squares(gram) - along**2).clamp_min(0).sqrt()  # |z_i - <z_i, v_0> v_0|
        across[..., 0] = 1  # not used
        mixing = _diag(sin / across)
        mixing[..., 0, :] = (cos - sin * along / across) / length
        mixing[..., 0, 0] = 1 / length[..., 0]
        return mixing

    def energy(self, k: int, n: int) -> float:
        cos2 = math.cos(math.radians(self.angle)) ** 2
        others = cos2**2 + (1 - cos2) ** 2 / max(n - 1, 1)
        return (k + 2 * (k - 1) * cos2 + (k - 1) * (k - 2) * others) / n


@dataclass(frozen=True)
class StandardBasis(Distribution):
    """k different coordinate axes, drawn without replacement; k <= n."""

    base = "standard_basis"
    uniform_span: ClassVar[bool] = False

    def check(self, k: int, n: int) -> None:
        if k > n:
            raise ValueError(f"tangents: k is {k}, but there are only {n} coordinate axes")

    def second_moment(self, n: int) -> float:
        return 1.0 / n

    def energy(self, k: int, n: int) -> float:
        return k / n


@dataclass(frozen=True)
class VaryingLength(Distribution):
    """Directions uniform on the sphere, lengths uniform in [low, high]: what P_U must not notice (section 3.4)."""

    low: float = 0.5
    high: float = 2.0
    mixed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (is_real(self.low) and is_real(self.high) and 0 < self.low <= self.high < math.inf):
            raise ValueError(f"VaryingLength: low and high are {self.low!r} and {self.high!r}; expected 0 < low <= high")

    def mixing(self, gram: Tensor, seed: int, step: int) -> Tensor:
        uniform = torch.from_numpy(_uniform(seed, step, gram.shape[-1])).to(gram.device)
        return _diag((self.low + (self.high - self.low) * uniform) * _squares(gram).rsqrt())

    def _moment(self, power: int) -> float:
        if self.low == self.high:
            return self.low**power
        return (self.high ** (power + 1) - self.low ** (power + 1)) / ((power + 1) * (self.high - self.low))

    def second_moment(self, n: int) -> float:
        return self._moment(2) / n

    def energy(self, k: int, n: int) -> float:
        return k * self._moment(4) / n + k * (k - 1) * (self._moment(2) / n) ** 2


@dataclass(frozen=True, eq=False)
class Supplied(Distribution):
    """Tangents that the user makes. They are stored, k times the size of what is perturbed, but not copied: an estimate raises
    RuntimeError where they were modified in place after the forward pass.

    Arguments:
        source: a tensor ``(k, *shape)`` for one perturbed tensor, or ``(k, n)`` for all of them, flattened and concatenated; a
            mapping ``{name: (k, *shape)}``; or a callable ``(k, n, generator) -> (k, n)``, called once a step with a
            :class:`torch.Generator` on the CPU that is seeded from (seed, step).
    """

    source: Tensor | Mapping[str, Tensor] | Callable[[int, int, torch.Generator], Tensor] = field(repr=False)
    uniform_span: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (isinstance(self.source, (Tensor, Mapping)) or callable(self.source)):
            raise TypeError(
                f"Supplied: source is of type {type(self.source).__name__}; accepted are a tensor, a mapping of tensors and a "
                "callable (k, n, generator) -> tensor"
            )

    def second_moment(self, n: int) -> float:
        raise ValueError("Supplied: the second moment of supplied tangents is not known")

    def energy(self, k: int, n: int) -> float:
        raise ValueError("Supplied: no closed-form length correction for supplied tangents")


@dataclass(frozen=True)
class LowRank(Distribution):
    """Weight tangents of low rank: for a matrix (out, in) or the weight of a convolution, seen as (out, in * kernel), the sum
    of r outer products over sqrt(r), ``v = A B^T / sqrt(r)`` with independent elements in A (out, r) and B (in, r).

    E[v v^T] = I, as for full rank, so the mean stays unbiased; but a tangent's pass through the layer costs
    r (in + out) operations a row instead of in * out. Vectors, and matrices too small to gain, are drawn in full. The factors
    are stored, k r (in + out) elements a layer. Only for weight perturbation.

    Arguments:
        r: rank, >= 1.
        base: distribution of the elements of A and B, and of what is drawn in full: ``"normal"`` or ``"rademacher"``.
    """

    r: int = 1
    base: str = "normal"
    uniform_span: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_count("r", self.r)
        if self.base not in ("normal", "rademacher"):
            raise ValueError(f"LowRank: base is {self.base!r}; accepted are 'normal' and 'rademacher'")

    def energy(self, k: int, n: int) -> float:
        raise ValueError("LowRank: no closed-form length correction, because it depends on the gradient's own rank")


@dataclass(frozen=True, eq=False)
class Guided(Distribution):
    """k random tangents, and beside them directions that are likely to hold much of the gradient: the last estimates, momentum,
    or any other vectors. P_U, the projection onto the span of all of them, is exact whatever their angles.

    In a step, k plus as many tangents are propagated as there are vectors: none of ``previous`` in the first step. Each counts
    as one of ``directional_derivatives``, after the random ones: first the last estimates, the newest one leading, then
    ``vectors``. They are scaled to the length of a random tangent. A vector of zeros is left out; one that depends on the
    others is dropped by the projection.

    Random tangents are drawn inside the kernels and stored ones are not, so that weight perturbation runs them in separate
    passes: one more primal pass in each step. The memory is that of ``previous`` + 1 estimates and of a copy of ``vectors``,
    each as large as the parameters, and during their pass once more that of the vectors. ``chunk_size`` changes roundings of
    theirs.

    For weight perturbation and :func:`frog_cuda.forward_gradient`, with ``aggregate="orthogonal"`` or a callable: chosen
    directions would bias a mean.

    Arguments:
        previous: how many of the last estimates; :class:`frog_cuda.ForwardGradient` remembers them, a function has no memory.
        vectors: read at every step, so that a buffer that changes in place counts with its present values. A mapping
            ``{name: tensor}`` with a parameter's shape, or ``(m, *shape)`` for m vectors; parameters without a name in it have
            zeros there. Or a tensor ``(n,)`` or ``(m, n)``; for a single perturbed tensor ``(*shape)`` or ``(m, *shape)``, too.
            Or a callable without arguments that returns one of these, or None where there are no vectors yet.
        base: distribution of the random tangents: ``"normal"`` or ``"rademacher"``.
    Raises:
        TypeError, ValueError: an argument is not accepted, or neither ``previous`` nor ``vectors`` is given.

    >>> import frog_cuda as frog
    >>> x = torch.linspace(-1, 1, 50, dtype=torch.float64)
    >>> guess = Guided(vectors=2 * x)  # the very gradient
    >>> _, estimate = frog.forward_gradient(lambda x: (x**2).sum(), x, k=1, tangents=guess)
    >>> torch.allclose(estimate, 2 * x)
    True
    """

    previous: int = 0
    vectors: Tensor | Mapping[str, Tensor] | Callable[[], Any] | None = field(default=None, kw_only=True, repr=False)
    base: str = field(default="normal", kw_only=True)
    uniform_span: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.previous != 0 or isinstance(self.previous, bool):
            check_count("previous", self.previous)
        if self.vectors is None:
            if not self.previous:
                raise ValueError("Guided: previous is 0 and vectors is None; expected one of them at least")
        elif not (isinstance(self.vectors, (Tensor, Mapping)) or callable(self.vectors)):
            raise TypeError(
                f"Guided: vectors is of type {type(self.vectors).__name__}; accepted are a tensor, a mapping of tensors and a "
                "callable that returns one"
            )
        if self.base not in ("normal", "rademacher"):
            raise ValueError(f"Guided: base is {self.base!r}; accepted are 'normal' and 'rademacher'")

    def second_moment(self, n: int) -> float:
        raise ValueError("Guided: the second moment of chosen vectors is not known")

    def energy(self, k: int, n: int) -> float:
        raise ValueError("Guided: no closed-form length correction, because it depends on the chosen vectors")


def random_words(seed: int, step: int, count: int, stream: int) -> np.ndarray:
    """``count`` 64-bit random words that depend on (seed, step) alone. Streams differ from one another and, by their key, from
    the elements of tangents."""
    from . import _host  # type: ignore[attr-defined]

    counters = np.zeros((count, 4), dtype=np.uint32)
    counters[:, 0] = np.arange(count)
    counters[:, 1] = stream
    counters[:, 3] = step
    key = (seed ^ 0x6A09E667F3BCC908) & (2**64 - 1)  # the fraction of sqrt(2)
    words = _host.philox(counters, key & 0xFFFFFFFF, key >> 32).astype(np.uint64)
    return words[:, 0] | (words[:, 1] << np.uint64(32))


def _uniform(seed: int, step: int, count: int) -> np.ndarray:
    return (random_words(seed, step, count, 0) >> np.uint64(11)).astype(np.float64) * 2.0**-53
