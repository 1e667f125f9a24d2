"""Distributions of tangents, and the k tangents of one step.

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

from . import ops
from ._checks import check_count, check_seed, check_step, flat, is_real
from ._deferred import require

__all__ = [
    "Cone",
    "Distribution",
    "Normal",
    "Orthonormal",
    "Rademacher",
    "Sphere",
    "StandardBasis",
    "Supplied",
    "VaryingLength",
    "resolve",
    "sample",
]


class Distribution:
    """How k tangents of n elements are made; subclasses say what they need."""

    #: what the kernels draw: a name in :data:`frog_cuda.ops.DISTRIBUTIONS`
    base: ClassVar[str] = "normal"
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

    base: ClassVar[str] = "rademacher"
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

    base: ClassVar[str] = "standard_basis"
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
    """Tangents that the user makes. They are stored: k times the size of what is perturbed.

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


_NAMES: dict[str, Callable[[], Distribution]] = {
    "normal": Normal,
    "rademacher": Rademacher,
    "sphere": Sphere,
    "orthonormal": Orthonormal,
    "standard_basis": StandardBasis,
    "varying_length": VaryingLength,
}


def resolve(spec: Any) -> Distribution:
    """The distribution that ``tangents=`` means: a name, a :class:`Distribution`, a callable, a tensor or a mapping.

    Raises:
        ValueError: unknown name.
        TypeError: anything else.
    """
    if isinstance(spec, Distribution):
        return spec
    if isinstance(spec, str):
        if spec in _NAMES:
            return _NAMES[spec]()
        more = "; cones need their angle: frog_cuda.tangents.Cone(angle)" if spec == "cone" else ""
        raise ValueError(f"tangents is {spec!r}; accepted names are {', '.join(_NAMES)}{more}")
    if isinstance(spec, type) and issubclass(spec, Distribution):
        raise TypeError(f"tangents is the class {spec.__name__}; expected an object: {spec.__name__}(...)")
    if isinstance(spec, (Tensor, Mapping)) or callable(spec):
        return Supplied(spec)
    raise TypeError(
        f"tangents is of type {type(spec).__name__}; accepted are a name ({', '.join(_NAMES)}), an object of "
        "frog_cuda.tangents, a callable, a tensor or a mapping of tensors"
    )


@dataclass(frozen=True)
class Piece:
    """A stretch of the global tangent vector: one parameter, or the output of one layer."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class TangentSet:
    """The k tangents of one step over a vector of n elements, piece by piece. *Base* tangents, see the module's head.

    Arguments:
        distribution, k, seed, step: what is drawn.
        device: where.
        n: length of the whole vector; only :class:`StandardBasis` and :class:`Supplied` callables must know it beforehand.
        pieces: the pieces by name; only :class:`Supplied` needs them.
    """

    def __init__(
        self,
        distribution: Distribution,
        k: int,
        seed: int,
        step: int,
        device: torch.device,
        n: int | None = None,
        pieces: list[Piece] | None = None,
    ) -> None:
        self.distribution, self.k, self.seed, self.step, self.device = distribution, k, seed, step, device
        self.stored: dict[str, Tensor] | None = None
        if n is not None:
            distribution.check(k, n)
        if isinstance(distribution, Supplied):
            assert n is not None and pieces is not None
            self.stored = _supplied(distribution.source, k, n, pieces, seed, step, device)
        elif isinstance(distribution, StandardBasis):
            assert n is not None
            self.state = torch.from_numpy(_coordinates(seed, step, k, n)).to(device)
        else:
            self.state = torch.tensor([seed, step], dtype=torch.int64, device=device)

    def draw(self, piece: Piece, dtype: torch.dtype, first: int = 0, count: int | None = None) -> Tensor:
        """Tangents ``first .. first + count`` of a piece, stored: (count, *shape)."""
        count = self.k - first if count is None else count
        if self.stored is not None:
            return self.stored[piece.name][first : first + count].to(dtype)
        drawn = ops.sample_tangents(
            self.state,
            count,
            piece.numel,
            offset=piece.offset,
            first=first,
            distribution=self.distribution.base,
            dtype=dtype,
        )
        return drawn.view(count, *piece.shape)

    def gram(self, piece: Piece) -> Tensor:
        """This piece's share of the Gram matrix: (k, k) float64."""
        if self.stored is not None:
            return ops.gram(flat(self.stored[piece.name]))
        return ops.tangent_gram(self.state, self.k, piece.numel, offset=piece.offset, distribution=self.distribution.base)

    def combine(self, piece: Piece, coefficients: Tensor, dtype: torch.dtype) -> Tensor:
        """``Z c`` on a piece: (*shape); coefficients (k,) float64."""
        if self.stored is not None:
            tangents = self.stored[piece.name]
            wide = torch.promote_types(tangents.dtype, dtype)
            return (coefficients.to(wide) @ flat(tangents).to(wide)).view(piece.shape).to(dtype)
        combined = ops.tangent_combine(
            self.state,
            coefficients,
            piece.numel,
            offset=piece.offset,
            distribution=self.distribution.base,
            dtype=dtype,
        )
        return combined.view(piece.shape)

    def axpy_(self, target: Tensor, piece: Piece, coefficients: Tensor, alpha: float) -> None:
        """``target += alpha * Z c`` in place."""
        if self.stored is not None:
            target.add_(self.combine(piece, coefficients, target.dtype), alpha=alpha)
        else:
            ops.tangent_axpy_(
                target,
                self.state,
                coefficients,
                alpha=alpha,
                offset=piece.offset,
                distribution=self.distribution.base,
            )


def sample(
    spec: Any,
    k: int,
    n: int,
    *,
    seed: int = 0,
    step: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """k tangents of n elements, stored: what :class:`frog_cuda.ForwardGradient` replays piece by piece.

    Arguments:
        spec: anything that ``tangents=`` accepts, see :func:`resolve`.
        seed, step: the tangents are a pure function of both.
    Returns:
        ``(k, n)``, row i is tangent i.
    Raises:
        TypeError: k, n, seed or step is no integer, dtype is no floating point dtype, or ``spec`` is nothing that is accepted.
        ValueError: k < 1, n < 1, seed or step out of range, unknown name, supplied tangents that do not fit, or k tangents of
            this kind do not exist in n dimensions.

    >>> v = sample("orthonormal", 3, 10, dtype=torch.float64)
    >>> torch.allclose(v @ v.T, torch.eye(3, dtype=torch.float64))
    True
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype!r}; expected a floating point torch.dtype")
    k, seed, step = check_count("k", k), check_seed(seed), check_step(step)
    piece = Piece("x", (check_count("n", n),), 0)
    drawn = TangentSet(resolve(spec), k, seed, step, torch.device(device), n, [piece])
    base = drawn.draw(piece, dtype)
    mixing = drawn.distribution.mixing(drawn.gram(piece), seed, step) if drawn.distribution.mixed else None
    return base if mixing is None else (mixing.T @ base.double()).to(dtype)


def _words(seed: int, step: int, count: int, stream: int) -> np.ndarray:
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
    return (_words(seed, step, count, 0) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _coordinates(seed: int, step: int, k: int, n: int) -> np.ndarray:
    """k different integers in [0, n), in random order. Floyd's algorithm (Bentley and Floyd, CACM 1987) with the order of
    insertion shuffled: k words whatever n is."""
    words = _words(seed, step, 2 * k, 1)
    chosen: dict[int, None] = {}
    for word, top in zip(words[:k].tolist(), range(n - k, n), strict=True):
        pick = word * (top + 1) >> 64
        chosen[top if pick in chosen else pick] = None
    picked = np.fromiter(chosen, dtype=np.int64, count=k)
    return picked[np.argsort(words[k:], kind="stable")]


def _supplied(
    source: Any, k: int, n: int, pieces: list[Piece], seed: int, step: int, device: torch.device
) -> dict[str, Tensor]:
    """The supplied tangents by piece, each (k, *shape), checked."""
    if isinstance(source, Mapping):
        names = {p.name for p in pieces}
        if set(source) != names:
            missing, unknown = sorted(names - set(source)), sorted(set(source) - names)
            raise ValueError(f"tangents: supplied names do not fit; missing {missing}, not perturbed {unknown}")
        return {p.name: _fitting(source[p.name], f"tangents[{p.name!r}]", k, p.shape, device) for p in pieces}
    if callable(source) and not isinstance(source, Tensor):
        generator = torch.Generator().manual_seed(int(_words(seed, step, 1, 2)[0] >> np.uint64(1)))
        source = source(k, n, generator)
        if not isinstance(source, Tensor):
            raise TypeError(f"tangents: the callable returned a {type(source).__name__}; expected a tensor ({k}, {n})")
        source = _fitting(source.to(device), "tangents (from the callable)", k, (n,), device)
    elif len(pieces) == 1 and source.dim() != 2:
        return {pieces[0].name: _fitting(source, "tangents", k, pieces[0].shape, device)}
    else:
        source = _fitting(source, "tangents", k, (n,), device)
    return {p.name: source[:, p.offset : p.offset + p.numel].reshape(k, *p.shape) for p in pieces}


def _fitting(tensor: Any, name: str, k: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is of type {type(tensor).__name__}; expected a tensor")
    if tensor.shape != (k, *shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected (k, *shape) = {(k, *shape)}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected a floating point dtype")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, but what is perturbed is on {device}")
    return tensor.detach()
