"""Vectors that guide an estimate beside random tangents: what the user gives, and the last estimates.

The better a direction is known to hold the gradient, the more one tangent along it tells. Used by
:class:`frog_cuda.tangents.Guided`.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops
from ._checks import is_real


@dataclass(frozen=True)
class Piece:
    """A stretch of the global tangent vector: one parameter, or the output of one layer.

    Attributes:
        fixed_row: a row that has no gradient, as the padding of an embedding has none.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    fixed_row: int | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class Guide:
    """One stored vector over all that is perturbed. As a tangent it is multiplied by ``scale``.

    Nothing writes into ``vector`` (n,), which is zero where there is nothing to tell.
    """

    vector: Tensor
    scale: float

    @staticmethod
    def of(name: str, parts: Mapping[str, Tensor], pieces: list[Piece]) -> Guide | None:
        """Puts parts together. The scale gives it the length that a random tangent has on these pieces, so that tangents of low
        precision hold it; None for a vector of zeros.

        Raises:
            FloatingPointError: it is not finite.
        """
        some = next(iter(parts.values()), None)
        if some is None:
            return None
        dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts.values()))
        nothing = (torch.zeros(p.numel, dtype=dtype, device=some.device) for p in pieces if p.name not in parts)
        rows = [parts[p.name].flatten().to(dtype) if p.name in parts else next(nothing) for p in pieces]
        vector = torch.cat(rows)
        square = float(ops.gram(vector.unsqueeze(0)))  # the same bits whatever the threads
        if not math.isfinite(square):
            bad = next((p.name for p, row in zip(pieces, rows, strict=True) if not row.isfinite().all()), "all pieces together")
            raise FloatingPointError(f"tangents: {name} has NaN, infinite or too large elements at {bad}")
        elements = sum(part.numel() for part in parts.values())
        return Guide(vector, math.sqrt(elements / square)) if square > 0 else None

    def scaled(self, start: int, numel: int, dtype: torch.dtype) -> Tensor:
        """Elements ``start .. start + numel`` of the tangent: (numel,)."""
        wide = torch.promote_types(dtype, torch.float32)
        return (self.vector[start : start + numel].to(wide) * self.scale).to(dtype)

    def add_to(self, combined: Tensor, piece: Piece, coefficient: Tensor) -> None:
        """``combined += coefficient * tangent`` on a piece; combined (numel,), coefficient () float64."""
        part = self.vector[piece.offset : piece.offset + piece.numel]
        combined.addcmul_(part.to(combined.dtype), (coefficient * self.scale).to(combined.dtype))


class Memory:
    """The last estimates of a :class:`~frog_cuda.ForwardGradient`, the newest first.

    Arguments:
        previous: how many.
        pieces: what is perturbed.
    """

    def __init__(self, previous: int, pieces: list[Piece]) -> None:
        self.pieces = pieces
        self.guides: deque[Guide] = deque(maxlen=previous)

    def take(self, estimate: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Remembers a copy of an estimate; one of zeros tells nothing and is left out. Returns it: nothing may write into it.

        Raises:
            FloatingPointError: it is not finite; nothing is changed then.
        """
        guide = Guide.of("the gradient estimate", estimate, self.pieces)
        if guide is None:
            return dict(estimate)
        self.guides.appendleft(guide)
        return {name: part.to(estimate[name].dtype) for name, part in self._parts(guide).items() if name in estimate}

    def _parts(self, guide: Guide) -> dict[str, Tensor]:
        return {p.name: guide.vector[p.offset : p.offset + p.numel].view(p.shape) for p in self.pieces}

    def state(self) -> list[dict[str, Any]]:
        """For :meth:`load`."""
        return [{"scale": guide.scale, "parts": self._parts(guide)} for guide in self.guides]

    def load(self, state: Any, device: torch.device) -> None:
        """Goes on where :meth:`state` was taken; nothing is changed where it raises.

        Raises:
            TypeError, ValueError: of another form, too many estimates, or for other parameters.
        """
        if not isinstance(state, Sequence) or not all(isinstance(s, Mapping) and set(s) == {"scale", "parts"} for s in state):
            raise TypeError("load_state_dict: state['previous'] is no list of mappings of 'scale' and 'parts'")
        most = self.guides.maxlen
        if len(state) > (most or 0):
            raise ValueError(f"load_state_dict: state holds {len(state)} previous estimates; expected at most {most}")
        found: deque[Guide] = deque(maxlen=most)
        for i, kept in enumerate(state):
            where, parts, scale = f"state['previous'][{i}]", kept["parts"], kept["scale"]
            if not is_real(scale) or not 0 < scale < math.inf:
                raise ValueError(f"load_state_dict: {where}['scale'] is {scale!r}; expected a number > 0")
            names = [p.name for p in self.pieces]
            if not isinstance(parts, Mapping) or sorted(parts) != sorted(names):
                raise ValueError(f"load_state_dict: {where} is not of the parameters that are perturbed: {', '.join(names)}")
            for p in self.pieces:
                part = parts[p.name]
                if not isinstance(part, Tensor) or part.shape != p.shape or not part.is_floating_point():
                    what = f"{tuple(part.shape)} {part.dtype}" if isinstance(part, Tensor) else type(part).__name__
                    raise ValueError(f"load_state_dict: {where}[{p.name!r}] is {what}; expected a floating tensor {p.shape}")
            guide = Guide.of(where, {name: part.detach().to(device) for name, part in parts.items()}, self.pieces)
            if guide is not None:
                found.append(Guide(guide.vector, float(scale)))
        self.guides = found


def read_vectors(source: Any, pieces: list[Piece], n: int, device: torch.device) -> list[Guide]:
    """The vectors that ``vectors=`` of :class:`~frog_cuda.tangents.Guided` stands for now, copied.

    Raises:
        TypeError, ValueError: they do not fit what is perturbed.
        FloatingPointError: one is not finite.
    """
    if callable(source) and not isinstance(source, (Tensor, Mapping)):
        source = source()
    if source is None:
        return []
    if isinstance(source, Mapping):
        parts = _of_mapping(source, pieces, device)
    elif isinstance(source, Tensor):
        parts = _of_tensor(source, pieces, n, device)
    else:
        raise TypeError(
            f"tangents: vectors is a callable that returned a {type(source).__name__}; expected a tensor, a mapping or None"
        )
    count = max((len(part) for part in parts.values()), default=0)
    guides = (Guide.of(f"vectors[{i}]", {name: part[i] for name, part in parts.items()}, pieces) for i in range(count))
    return [guide for guide in guides if guide is not None]


def _of_mapping(source: Mapping[str, Any], pieces: list[Piece], device: torch.device) -> dict[str, Tensor]:
    shapes = {p.name: p.shape for p in pieces}
    unknown = sorted(set(source) - set(shapes))
    if unknown:
        raise ValueError(f"tangents: vectors has {', '.join(unknown)}, not perturbed; accepted are {', '.join(shapes)}")
    parts: dict[str, Tensor] = {}
    for name, given in source.items():
        where, shape = f"vectors[{name!r}]", shapes[name]
        _check(given, where, device)
        if given.shape == shape:
            given = given.unsqueeze(0)
        elif given.shape[1:] != shape or given.dim() != len(shape) + 1:
            raise ValueError(f"tangents: {where} has shape {tuple(given.shape)}; expected {shape} or (m, *{shape})")
        parts[name] = given.detach()
    counts = {name: len(part) for name, part in parts.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"tangents: vectors disagree in number: {', '.join(f'{n}: {m}' for n, m in counts.items())}")
    return parts


def _of_tensor(given: Tensor, pieces: list[Piece], n: int, device: torch.device) -> dict[str, Tensor]:
    _check(given, "vectors", device)
    given = given.detach()
    shapes = [(n,)] if len(pieces) > 1 else list(dict.fromkeys([pieces[0].shape, (n,)]))
    for shape in shapes:
        if given.shape == shape or (given.dim() == len(shape) + 1 and given.shape[1:] == shape):
            rows = given.reshape(-1, n)
            return {p.name: rows[:, p.offset : p.offset + p.numel].reshape(-1, *p.shape) for p in pieces}
    accepted = " or ".join(f"{shape} or (m, *{shape})" for shape in shapes)
    raise ValueError(f"tangents: vectors has shape {tuple(given.shape)}; expected {accepted}")


def _check(given: Any, where: str, device: torch.device) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"tangents: {where} is of type {type(given).__name__}; expected a tensor")
    if not given.is_floating_point():
        raise TypeError(f"tangents: {where} has dtype {given.dtype}; expected a floating point dtype")
    if given.device != device:
        raise ValueError(f"tangents: {where} is on {given.device}, but what is perturbed is on {device}")
