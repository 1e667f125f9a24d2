"""What a pass with perturbed activities leaves behind for the gradients of the layers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from ._checks import flat
from ._deferred import require
from .dual import DualTensor
from .functional import RandomNumbers
from .layers import Group
from .local import LocalRule
from .rerun import Call, differs, same
from .tangents import Piece, TangentSet

#: elements up to which the tangents of all layers are drawn in one call. A layer's part of more than one tangent is not
#: contiguous, and operators copy it: for few elements less work than calls and Gram matrices layer by layer.
AT_ONCE = 1 << 20

#: elements of tangents whose Gram matrices are computed at a time
_GRAM_BLOCK = 1 << 17


@dataclass(eq=False)
class Segment:
    """One perturbed tensor of what one call of a layer returns."""

    group: Group
    rule: LocalRule | None  # by which the gradient is taken directly
    piece: Piece  # shape: of a sample where tangents are shared, of the whole batch where they are not
    batch: int
    input: Tensor | None  # (B, *, in), where there is a rule
    version: int
    tangents: list[Tensor]  # base tangents of each chunk, (count, *piece.shape); none where they are replayed
    dtype: torch.dtype = torch.float32  # of the tangents
    grams: Tensor | None = None  # (B, k, k) of replayed tangents, where they were wanted as they were drawn
    block: Tensor | None = None  # tangents of all segments, (k, n), where these are a part of it
    call: Call | None = None  # of a layer that runs again for its gradient
    mark: Tensor | None = None  # of its values, where they are to be computed again


@dataclass(eq=False)
class Trace:
    """The passes of one step: their segments in the order of the calls, and what another pass would start from."""

    segments: list[Segment] = field(default_factory=list)
    offset: int = 0  # of the next segment in the tangent vector
    pieces: list[Piece] = field(default_factory=list)  # of the passes before, which serve again where they are the same
    scale: float = 1.0  # of a sample's gradient in that of the mean loss
    numbers: RandomNumbers | None = None
    buffers: dict[str, Tensor] | None = None
    inputs: Any = None
    marked: bool = False  # values that are to be computed again are known by their marks
    lasting: bool = False  # a captured graph reads it again

    def release(self) -> None:
        """Gives the memory back, before the next passes take theirs."""
        if not self.lasting:
            self.segments, self.numbers, self.buffers, self.inputs = [], None, None, None


def batch_axis(layer: nn.Module, value: Tensor, at: int) -> int:
    """Which axis of tensor number ``at`` that ``layer`` returns belongs to the samples."""
    if value.dim() == 3:
        if isinstance(layer, nn.RNNBase):  # the output, then final states (layers, B, hidden)
            return 1 if at > 0 or not layer.batch_first else 0
        if isinstance(layer, nn.MultiheadAttention) and at == 0:
            return 0 if layer.batch_first else 1
    return 0


def alike(segments: list[Segment], gradients: list[Tensor], outputs: list[Tensor], marks: list[Tensor]) -> list[Tensor]:
    """0-dim bool for each of these segments: whether what a second run returned has the values of the first.

    Raises:
        RuntimeError: other shapes, or with tangents, which layers find in what they keep of the first run.
    """
    for segment, g, y in zip(segments, gradients, outputs, strict=False):
        if type(y) is DualTensor or y.shape != g.shape:
            raise RuntimeError(differs(segment.group))
    if len(segments) != len(outputs):
        raise RuntimeError(differs(segments[0].group))
    assert all(s.mark is not None for s in segments)
    own = zip(segments, marks, outputs, strict=True)
    return [same(s.mark, m, s.group.output, y.dtype) for s, m, y in own if s.mark is not None]


def require_alike(segments: list[Segment], held: list[Tensor]) -> None:
    """
    Raises:
        RuntimeError: names the first of the segments for which :func:`alike` did not hold.
    """
    passed = torch.stack(held)
    require(passed.all(), lambda: RuntimeError(differs(segments[passed.tolist().index(False)].group)))


def joined(segment: Segment) -> Tensor:
    """Base tangents of all chunks: (k, *piece.shape)."""
    if len(segment.tangents) > 1:
        segment.tangents = [torch.cat(segment.tangents)]
    return segment.tangents[0]


def shared_gram(segments: list[Segment], k: int) -> Tensor:
    """Gram matrix, float64 (k, k), of tangents that all samples share. Neither chunks nor drawing ahead show in the bits."""
    n = sum(s.piece.numel for s in segments)
    if k * n > AT_ONCE:  # putting them side by side would take longer than the calls
        return torch.stack([ops.gram(flat(joined(s))) for s in segments]).sum(0)
    block = segments[0].block
    if block is not None and block.shape[1] == n and all(s.block is block for s in segments):
        return ops.gram(block)
    return ops.gram(torch.cat([flat(joined(s)) for s in segments], 1))


def blocks(segment: Segment, k: int) -> Iterator[slice]:
    """Samples whose k tangents fill a cache."""
    size = max(1, _GRAM_BLOCK // max(1, k * math.prod(segment.piece.shape[1:])))
    return (slice(b, min(b + size, segment.batch)) for b in range(0, max(1, segment.batch), size))


def grams(v: Tensor) -> Tensor:
    """Gram matrices, float64 (B, k, k), of the samples of v (k, B, *m): a part of a larger tensor or not, the same bits."""
    rows = flat(v, 2).transpose(0, 1).to(torch.float64, memory_format=torch.contiguous_format).contiguous()
    return rows @ rows.mT


def sample_grams(tangents: TangentSet, segment: Segment) -> Tensor:
    """Those of a whole segment; block by block as they are made of tangents that were just drawn, for the same bits."""
    shape = segment.piece.shape[1:]

    def of(rows: slice) -> Tensor:
        if segment.tangents:
            return joined(segment)[:, rows]
        part = Piece(segment.piece.name, (rows.stop - rows.start, *shape), segment.piece.offset + rows.start * math.prod(shape))
        return tangents.draw(part, segment.dtype)

    return torch.cat([grams(of(rows)) for rows in blocks(segment, tangents.k)])
