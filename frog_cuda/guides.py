"""Vectors that guide an estimate beside random tangents: what the user gives, and the last estimates.

The better a direction is known to hold the gradient, the more one tangent along it tells. Used by
:class:`frog_cuda.tangents.Guided`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops


@dataclass(frozen=True)
class Piece:
    """A stretch of the global tangent vector: one parameter, or the output of one layer."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class Guide:
    """One stored vector, piece by piece; zero where it has no part. As a tangent it is multiplied by ``scale``.

    Nothing writes into ``parts``, each contiguous and shaped like its piece.
    """

    parts: dict[str, Tensor]
    scale: float

    @staticmethod
    def of(name: str, parts: dict[str, Tensor]) -> Guide | None:
        """Scaled to the length that a random tangent has on these pieces, so that tangents of low precision hold it; None for a
        vector of zeros.

        Raises:
            FloatingPointError: it is not finite.
        """
        squares = 0.0
        for piece, part in parts.items():
            square = float(ops.gram(part.view(1, -1))) if part.numel() else 0.0  # the same bits whatever the threads
            if not math.isfinite(square):
                raise FloatingPointError(f"tangents: {name} has NaN, infinite or too large elements at {piece}")
            squares += square
        return Guide(parts, math.sqrt(sum(part.numel() for part in parts.values()) / squares)) if squares > 0 else None

    def scaled(self, piece: Piece, start: int, numel: int, dtype: torch.dtype) -> Tensor:
        """Elements ``start .. start + numel`` of a piece, as a tangent: (numel,)."""
        part = self.parts.get(piece.name)
        if part is None:
            device = next(iter(self.parts.values())).device
            return torch.zeros(numel, dtype=dtype, device=device)
        wide = torch.promote_types(dtype, torch.float32)
        return (part.view(-1)[start : start + numel].to(wide) * self.scale).to(dtype)

    def add_to(self, combined: Tensor, piece: Piece, coefficient: Tensor) -> None:
        """``combined += coefficient * tangent``; combined (n,), coefficient () float64."""
        part = self.parts.get(piece.name)
        if part is not None:
            combined.addcmul_(part.view(-1).to(combined.dtype), (coefficient * self.scale).to(combined.dtype))


class Memory:
    """The last estimates of a :class:`~frog_cuda.ForwardGradient`, the newest first.

    Arguments:
        previous: how many.
    """

    def __init__(self, previous: int) -> None:
        self.guides: deque[Guide] = deque(maxlen=previous)

    def take(self, estimate: dict[str, Tensor]) -> None:
        """Remembers an estimate, which nothing may write into any more; one of zeros tells nothing and is left out.

        Raises:
            FloatingPointError: it is not finite; nothing is changed then.
        """
        guide = Guide.of("the gradient estimate", estimate)
        if guide is not None:
            self.guides.appendleft(guide)

    def state(self) -> list[dict[str, Tensor]]:
        """For :meth:`load`."""
        return [dict(guide.parts) for guide in self.guides]

    def load(self, state: Any, parameters: Mapping[str, Tensor]) -> None:
        """Goes on where :meth:`state` was taken; nothing is changed where it raises.

        Raises:
            TypeError, ValueError: of another form, too many estimates, or for other parameters.
        """
        if not isinstance(state, Sequence) or not all(isinstance(parts, Mapping) for parts in state):
            raise TypeError("load_state_dict: state['previous'] is no list of mappings of tensors")
        most = self.guides.maxlen
        if len(state) > (most or 0):
            raise ValueError(f"load_state_dict: state holds {len(state)} previous estimates; expected at most {most}")
        found: deque[Guide] = deque(maxlen=most)
        for i, parts in enumerate(state):
            own: dict[str, Tensor] = {}
            for name, part in parts.items():
                where = f"load_state_dict: state['previous'][{i}][{name!r}]"
                p = parameters.get(name)
                if p is None:
                    raise ValueError(f"{where} is of no parameter that is perturbed")
                if not isinstance(part, Tensor):
                    raise TypeError(f"{where} is of type {type(part).__name__}; expected a tensor")
                if part.shape != p.shape or part.dtype != p.dtype:
                    raise ValueError(
                        f"{where} is {tuple(part.shape)} {part.dtype}; expected {tuple(p.shape)} {p.dtype}, as the parameter is"
                    )
                own[name] = part.detach().to(p.device).clone(memory_format=torch.contiguous_format)
            guide = Guide.of(f"state['previous'][{i}]", own)
            if guide is not None:
                found.append(guide)
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
    found = []
    for i in range(count):
        own = {name: part[i].clone(memory_format=torch.contiguous_format) for name, part in parts.items()}
        guide = Guide.of(f"vectors[{i}]", own)
        if guide is not None:
            found.append(guide)
    return found


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
