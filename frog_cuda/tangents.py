"""The k tangents of one step, piece by piece, and all that ``tangents=`` accepts.

*Base* tangents ``Z`` are what is drawn here; :mod:`frog_cuda.distributions` says how a distribution mixes them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import ops
from ._checks import check_count, check_seed, check_step, flat
from .distributions import (
    Cone,
    Distribution,
    Guided,
    LowRank,
    Normal,
    Orthonormal,
    Rademacher,
    Sphere,
    StandardBasis,
    Supplied,
    VaryingLength,
    random_words,
)
from .guides import Guide, Piece, read_vectors
from .low_rank import Drawn, Factors, Layout
from .sgd import Sgd

__all__ = [
    "Cone",
    "Distribution",
    "Guided",
    "LowRank",
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


#: elements whose tangents are stored at a time for the Gram matrix with guides
_BLOCK = 1 << 16

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
        more = {
            "cone": "; cones need their angle: frog_cuda.tangents.Cone(angle)",
            "guided": "; guided tangents need what guides them: frog_cuda.tangents.Guided(previous)",
        }.get(spec, "")
        raise ValueError(f"tangents is {spec!r}; accepted names are {', '.join(_NAMES)}{more}")
    if isinstance(spec, type) and issubclass(spec, Distribution):
        raise TypeError(f"tangents is the class {spec.__name__}; expected an object: {spec.__name__}(...)")
    if isinstance(spec, (Tensor, Mapping)) or callable(spec):
        return Supplied(spec)
    raise TypeError(
        f"tangents is of type {type(spec).__name__}; accepted are a name ({', '.join(_NAMES)}), an object of "
        "frog_cuda.tangents, a callable, a tensor or a mapping of tensors"
    )


class TangentSet:
    """The k tangents of one step over a vector of n elements, piece by piece. *Base* tangents, see the module's head.

    Arguments:
        distribution, k, seed, step: what is drawn.
        device: where.
        n: length of the whole vector; only :class:`StandardBasis`, :class:`Guided` and :class:`Supplied` callables must know it
            beforehand.
        pieces: the pieces by name; only :class:`Guided`, :class:`LowRank` and :class:`Supplied` need them.
        remembered: for :class:`Guided` with ``previous``, the estimates so far.
        layout: of the pieces, for :class:`LowRank`; made of them where it is not given.
    Attributes:
        drawn: how many of the tangents are drawn; after them come the ``guides``.
        k: of all tangents.
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
        remembered: Sequence[Guide] | None = None,
        layout: Layout | None = None,
    ) -> None:
        self.distribution, self.drawn, self.seed, self.step, self.device = distribution, k, seed, step, device
        self.stored: dict[str, Tensor] | None = None
        if isinstance(distribution, LowRank):
            assert pieces is not None
            self._layout = Layout(pieces, distribution.r) if layout is None else layout
        self._kept: dict[tuple[torch.dtype, int, int], Drawn] = {}  # of low rank: of all tangents, and of the latest chunk
        self.guides: list[Guide] = []
        if n is not None:
            distribution.check(k, n)
        if isinstance(distribution, Guided):
            assert n is not None and pieces is not None
            if distribution.previous and remembered is None:
                raise ValueError(
                    "tangents: Guided(previous=...) needs estimates that ForwardGradient remembers; here only vectors= guide"
                )
            self.guides = [*(remembered or ()), *read_vectors(distribution.vectors, pieces, n, device)]
        self.k = k + len(self.guides)
        if isinstance(distribution, Supplied):
            assert n is not None and pieces is not None
            self.stored = _supplied(distribution.source, k, n, pieces, seed, step, device)
            self._versions = {name: _version(v) for name, v in self.stored.items()}
        elif isinstance(distribution, StandardBasis):
            assert n is not None
            self.state = torch.from_numpy(_coordinates(seed, step, k, n)).to(device)
        else:
            self.state = torch.tensor([seed, step], dtype=torch.int64, device=device)

    def check_unchanged(self, what: str) -> None:
        """Raises RuntimeError where supplied tangents, which are not copied, were modified in place since this was made."""
        for name, v in (self.stored or {}).items():
            if _version(v) != self._versions[name]:
                raise RuntimeError(
                    f"{what}: the tangents supplied for {name} were modified in place after the forward pass; the estimate is "
                    "made of those that were propagated"
                )

    def passes(self, begin: int, count: int, chunk_size: int | None) -> tuple[list[range], list[range]]:
        """Tangents ``begin .. begin + count`` of those that are drawn, and all guides, in chunks of at most ``chunk_size``."""

        def chunks(begin: int, end: int) -> Iterator[range]:
            size = chunk_size or max(1, end - begin)
            return (range(first, min(first + size, end)) for first in range(begin, end, size))

        return list(chunks(begin, begin + count)), list(chunks(self.drawn, self.k))

    def draw(self, piece: Piece, dtype: torch.dtype, first: int = 0, count: int | None = None) -> Tensor:
        """Tangents ``first .. first + count`` of a piece, stored: (count, *shape)."""
        count = self.k - first if count is None else count
        if self.stored is not None:
            return self.stored[piece.name][first : first + count].to(dtype)
        factors = self.factors(piece, dtype, first, count)
        if factors is not None:
            return factors.dense()
        full = self.in_full(piece, dtype, first, count)
        if full is not None:
            return full.clone()
        return self._rows(dtype, first, count, piece.offset, piece.numel).view(count, *piece.shape)

    def _rows(self, dtype: torch.dtype, first: int, count: int, start: int, numel: int) -> Tensor:
        """Elements ``start .. start + numel`` of tangents ``first .. first + count``: (count, numel)."""
        random = max(0, min(count, self.drawn - first))
        guides = self.guides[first + random - self.drawn : first + count - self.drawn] if count > random else []
        rows = [torch.stack([g.scaled(start, numel, dtype) for g in guides])] if guides else []
        if random or not guides:
            base = self.distribution.base
            drawn = ops.sample_tangents(self.state, random, numel, offset=start, first=first, distribution=base, dtype=dtype)
            rows.insert(0, drawn)
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def factors(self, piece: Piece, dtype: torch.dtype, first: int = 0, count: int | None = None) -> Factors | None:
        """The same by their factors, where a piece is drawn so: :class:`LowRank` and a matrix. Those of all are kept for
        the Gram matrix and the estimate."""
        if not isinstance(self.distribution, LowRank):
            return None
        return self._of_low_rank(dtype, first, count).factors(piece)

    def in_full(self, piece: Piece, dtype: torch.dtype, first: int = 0, count: int | None = None) -> Tensor | None:
        """The same of other pieces that are short: (count, *shape), not to be written to."""
        if not isinstance(self.distribution, LowRank):
            return None
        return self._of_low_rank(dtype, first, count).full(piece)

    def _of_low_rank(self, dtype: torch.dtype, first: int = 0, count: int | None = None) -> Drawn:
        assert isinstance(self.distribution, LowRank)
        count = self.k - first if count is None else count
        key = dtype, first, count
        if key not in self._kept:
            for other in [o for o in self._kept if o[2] < self.k and o[1:] != key[1:]]:
                del self._kept[other]  # of an earlier chunk
            self._kept[key] = Drawn(self._layout, self.state, count, first, self.distribution.base, dtype)
        return self._kept[key]

    def forget(self) -> None:
        """Drops what was kept: the state is that of another step now."""
        self._kept.clear()

    def gram(self, piece: Piece) -> Tensor:
        """This piece's share of the Gram matrix: (k, k) float64."""
        if self.stored is not None:
            return ops.gram(flat(self.stored[piece.name]))
        if isinstance(self.distribution, LowRank):  # exact in float32, in which elements are drawn
            gram = self._of_low_rank(torch.float32).gram(piece)
            if gram is not None:
                return gram
        if self.guides:
            return self.joint_gram([piece])
        return ops.tangent_gram(self.state, self.k, piece.numel, offset=piece.offset, distribution=self.distribution.base)

    def joint_gram(self, pieces: Sequence[Piece]) -> Tensor:
        """The pieces' Gram matrices in one, (k, k) float64; random tangents are drawn block by block and put beside guides."""
        dtype = _at_least_float32(*(g.vector.dtype for g in self.guides))
        total = torch.zeros(self.k, self.k, dtype=torch.float64, device=self.device)
        for begin, end in _stretches(pieces):
            for start in range(begin, end, _BLOCK):
                total += ops.gram(self._rows(dtype, 0, self.k, start, min(_BLOCK, end - start)))
        return total

    def combine(self, piece: Piece, coefficients: Tensor, dtype: torch.dtype) -> Tensor:
        """``Z c`` on a piece: (*shape); coefficients (k,) float64. Zeros in a row that is fixed."""
        combined = self._combined(piece, coefficients, dtype)
        if piece.fixed_row is not None:
            combined[piece.fixed_row] = 0
        return combined

    def combine_each(
        self, pieces: Sequence[Piece], coefficients: Tensor, dtypes: Sequence[torch.dtype]
    ) -> Iterator[tuple[Piece, Tensor]]:
        """The same of several pieces, to the bit; those of low rank in one call, where all take part. In low precision one
        after the other, so that there is no second gradient, in float32."""
        found: dict[tuple[int, tuple[int, ...]], Tensor] = {}
        if isinstance(self.distribution, LowRank) and len(pieces) == len(self._layout.pieces):
            if set(dtypes) in ({torch.float32}, {torch.float64}):
                found = self._of_low_rank(dtypes[0]).combine(coefficients)
        for piece, dtype in zip(pieces, dtypes, strict=True):
            combined = found.pop((piece.offset, piece.shape), None)
            if combined is None or piece.fixed_row is not None:
                yield piece, self.combine(piece, coefficients, dtype)
            else:
                yield piece, combined

    def _combined(self, piece: Piece, coefficients: Tensor, dtype: torch.dtype) -> Tensor:
        if self.stored is not None:
            tangents = self.stored[piece.name]
            wide = torch.promote_types(tangents.dtype, dtype)
            return (coefficients.to(wide) @ flat(tangents).to(wide)).view(piece.shape).to(dtype)
        factors = self.factors(piece, _at_least_float32(dtype))
        if factors is not None:
            return factors.combine(coefficients).to(dtype)
        full = self.in_full(piece, _at_least_float32(dtype))
        if full is not None:
            return ops.combine_blocks(full.flatten(), self.k, [piece.numel], coefficients)[0].view(piece.shape).to(dtype)
        combined = ops.tangent_combine(
            self.state,
            coefficients[: self.drawn],
            piece.numel,
            offset=piece.offset,
            distribution=self.distribution.base,
            dtype=_at_least_float32(dtype) if self.guides else dtype,
        )
        for guide, c in zip(self.guides, coefficients[self.drawn :], strict=True):
            guide.add_to(combined, piece, c)
        return combined.view(piece.shape).to(dtype)

    def combine_samples(self, piece: Piece, coefficients: Tensor, dtype: torch.dtype) -> Tensor:
        """``sum_i c_ib z_ib`` for every sample b of a piece of shape (B, *m): (B, *m); coefficients (k, B) float64. Only of
        tangents that are drawn element by element."""
        base, m = self.distribution.base, math.prod(piece.shape[1:])
        how: dict[str, Any] = {"offset": piece.offset, "distribution": base, "dtype": dtype}
        return ops.tangent_combine_samples(self.state, coefficients, m, **how).view(piece.shape)

    def axpy_(self, target: Tensor, piece: Piece, coefficients: Tensor, alpha: float) -> None:
        """``target += alpha * Z c`` in place."""
        factors = self.factors(piece, _at_least_float32(target.dtype)) if piece.fixed_row is None else None
        if factors is not None:
            factors.axpy_(target, coefficients, alpha)
            return
        if self._combined_apart(piece, target.dtype):
            target.add_(self.combine(piece, coefficients, target.dtype), alpha=alpha)
            return
        ops.tangent_axpy_(
            target,
            self.state,
            coefficients,
            alpha=alpha,
            offset=piece.offset,
            distribution=self.distribution.base,
        )

    def _combined_apart(self, piece: Piece, dtype: torch.dtype) -> bool:
        """Whether ``Z c`` is made before it is added to anything: tangents are not drawn again for it, or a row stays 0."""
        if self.stored is not None or self.guides or piece.fixed_row is not None:
            return True
        wide = _at_least_float32(dtype)
        return self.factors(piece, wide) is not None or self.in_full(piece, wide) is not None

    def sgd_(self, target: Tensor, buffer: Tensor | None, fresh: bool, piece: Piece, coefficients: Tensor, sgd: Sgd) -> None:
        """A step of SGD in place along ``Z c``; drawn tangents in one pass over target and buffer."""
        if self._combined_apart(piece, target.dtype):
            sgd.step_(target, self.combine(piece, coefficients, target.dtype), buffer, fresh)
            return
        ops.tangent_sgd_(
            target,
            buffer,
            self.state,
            coefficients,
            lr=sgd.lr,
            momentum=sgd.momentum,
            dampening=sgd.dampening,
            weight_decay=sgd.weight_decay,
            nesterov=sgd.nesterov,
            fresh=fresh,
            offset=piece.offset,
            distribution=self.distribution.base,
        )


def _version(tensor: Tensor) -> int:
    """Counts changes in place, also through views; of tensors made in inference mode nothing does."""
    return 0 if tensor.is_inference() else tensor._version


def _stretches(pieces: Sequence[Piece]) -> Iterator[tuple[int, int]]:
    """Where pieces begin and end in the global vector; those that follow one another are taken together."""
    begin = end = 0
    for piece in pieces:
        if piece.offset != end:
            yield begin, end
            begin = piece.offset
        end = piece.offset + piece.numel
    yield begin, end


def _at_least_float32(*dtypes: torch.dtype) -> torch.dtype:
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


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
        ``(k, n)``, row i is tangent i; of :class:`Guided`, its vectors come after the k random ones.
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


def _coordinates(seed: int, step: int, k: int, n: int) -> np.ndarray:
    """k different integers in [0, n), in random order. Floyd's algorithm (Bentley and Floyd, CACM 1987) with the order of
    insertion shuffled: k words whatever n is."""
    words = random_words(seed, step, 2 * k, 1)
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
        generator = torch.Generator().manual_seed(int(random_words(seed, step, 1, 2)[0] >> np.uint64(1)))
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
