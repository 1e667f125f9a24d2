"""Activity perturbation: tangents over the outputs ("activities") of layers, and layer-local gradients.

A layer's output y gets the tangent ``dy + v``: what comes from earlier layers is carried on, the layer's own tangent v is
added. The estimate of the loss's gradient with respect to y, ``C^T V_y``, then gives the layer's parameters their gradient
locally.
Flügel et al., arXiv 2410.17764, section 4.4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from . import ops
from ._checks import flat, warn
from ._deferred import deferring
from .aggregate import Aggregate, Custom
from .custom_functions import intercepted
from .dual import DualTensor, perturbed, primal_of
from .estimate import Estimate, read_loss, solve
from .functional import RandomNumbers
from .layers import Group
from .local import local_gradient
from .share import ALONE, Share
from .tangents import Distribution, LowRank, Piece, StandardBasis, Supplied, TangentSet
from .weight import Inputs, Step, check_parameters, copied_buffers

Perturb = Callable[["Segment", Tensor], Tensor]


#: elements of an input's tangents
_WORTH_A_COPY = 1 << 20
#: elements of tangents whose Gram matrices are computed at a time
_GRAM_BLOCK = 1 << 17
#: elements up to which the tangents of all layers are drawn in one call. A layer's part of more than one tangent is not
#: contiguous, and operators copy it: for few elements less work than calls and Gram matrices layer by layer.
_DRAWN_AT_ONCE = 1 << 20


class _EverythingSeen(BaseException):
    """Ends a pass early; no error, so that no model catches it."""


@dataclass(eq=False)
class Segment:
    """One perturbed output of one call of a layer."""

    group: Group
    piece: Piece  # shape: of a sample where tangents are shared, of the whole batch where they are not
    batch: int
    input: Tensor | None  # (B, *, in) for layers whose gradient is taken directly
    version: int
    tangents: list[Tensor]  # base tangents of each chunk, (count, *piece.shape); none where they are replayed
    dtype: torch.dtype = torch.float32  # of the tangents
    grams: Tensor | None = None  # (B, k, k) of replayed tangents, where they were wanted as they were drawn
    block: Tensor | None = None  # tangents of all segments, (k, n), where these are a part of it


class ActivityPerturbation:
    """Tangents over the outputs of ``groups``; memory beyond that of the forward pass: k times the perturbed outputs of one
    sample, and the inputs of the layers. Tangents that are not shared are drawn again when they are needed, not kept; only
    supplied ones and those in low precision are kept, k times the perturbed outputs of the batch."""

    def __init__(self, model: nn.Module, groups: list[Group], shared: bool, per_sample: bool) -> None:
        self.model, self.groups, self.shared, self.per_sample = model, groups, shared, per_sample
        own = {id(p) for group in groups for p in group.parameters}
        self.parameters: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if id(p) in own}
        self._names = {id(p): name for name, p in self.parameters.items()}
        check_parameters(model, self.parameters)
        self.segments: list[Segment] = []
        self._pieces: list[Piece] = []
        self._warned = False
        self._draws_numbers = False  # seen where a layer last ran a second time
        self._losses_per_sample = per_sample  # in the step before

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def tangent_set(self, distribution: Distribution, k: int, seed: int, step: int, inputs: Inputs) -> TangentSet:
        if isinstance(distribution, StandardBasis) and not self.shared and self.per_sample:
            raise ValueError(
                "tangents: standard basis tangents drawn per sample would leave most samples unperturbed; use "
                "shared_across_batch=True or per_sample=False"
            )
        if not isinstance(distribution, (StandardBasis, Supplied)):
            return TangentSet(distribution, k, seed, step, self.device)
        self._measure(inputs)
        pieces = [s.piece for s in self.segments]
        if isinstance(distribution, Supplied) and len({p.name for p in pieces}) < len(pieces):
            raise ValueError("tangents: supplied tangents cannot serve a layer that is called more than once in a forward pass")
        return TangentSet(distribution, k, seed, step, self.device, sum(p.numel for p in pieces), pieces)

    def _measure(self, inputs: Inputs) -> None:
        """A plain pass without tangents: which layers are called, and the shapes of their outputs."""
        with torch.no_grad(), RandomNumbers(self.parameters.values()).replayed(), self._hooked(lambda segment, y: y):
            functional_call(self.model, copied_buffers(self.model), *inputs)

    def derivatives(
        self,
        step: Step,
        aggregate: Aggregate | Custom,
        *,
        chunk_size: int | None,
        correct_length: bool,
        share: Share = ALONE,
    ) -> Estimate:
        """One forward pass per chunk of this share's tangents."""
        tangents = step.tangents
        k = tangents.k
        begin, mine = share.span(k)
        end = begin + mine
        size = mine if chunk_size is None else min(chunk_size, mine)
        starts = range(begin, end, size)
        columns: list[Tensor] = []
        kept: list[list[list[Tensor]]] = []
        wants_gram = tangents.distribution.mixed or (isinstance(aggregate, Aggregate) and aggregate.needs_gram)
        wants_gram = wants_gram and size == k and self._losses_per_sample and not self.shared
        loss = value = torch.empty(0)
        self._numbers = RandomNumbers(self.parameters.values())
        for first in starts:
            if first > begin:
                self._numbers.rewind()
            chunk = range(first, min(first + size, end))
            block = self._drawn_ahead(step) if len(chunk) == k else None
            value, moved = self._pass(step, chunk, first == starts[-1], wants_gram, block)
            loss = value.mean()
            kept.append([s.tangents for s in self.segments])
            columns.append(moved)
        for segment, *parts in zip(self.segments, *kept, strict=True):
            if not segment.tangents:
                continue
            others = [(0, begin), (end, k - end)]  # propagated by others, and needed here for the estimate
            before, after = ([tangents.draw(segment.piece, segment.dtype, at, n)] if n else [] for at, n in others)
            segment.tangents = [*before, *(v for part in parts for v in part), *after]
        kept.clear()  # so that what is joined later is freed piece by piece
        parts = before = after = []
        self._warn_of_layers_not_called()
        moved = share.gather(columns[0] if len(columns) == 1 else torch.cat(columns), loss, k)
        return self.finish(tangents, aggregate, loss, value.dim() == 1, moved, correct_length, share)

    def _drawn_ahead(self, step: Step) -> Tensor | None:
        """Shared tangents of all layers in one call, (k, n), where an earlier pass tells that they are few together; that they
        are other layers' now does not matter, as an element depends on its place alone."""
        tangents = step.tangents
        if not (self.shared and self._pieces) or tangents.stored is not None or isinstance(tangents.distribution, LowRank):
            return None
        n = self._pieces[-1].offset + self._pieces[-1].numel
        if tangents.k * n > _DRAWN_AT_ONCE:
            return None
        everything = Piece("", (n,), 0)
        return tangents.draw(everything, step.tangent_dtype or next(iter(self.parameters.values())).dtype)

    def _pass(
        self, step: Step, chunk: range, moves_buffers: bool, wants_gram: bool = False, block: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss and derivatives of one forward pass, as :func:`read_loss` gives them. Fills ``segments``."""
        tangents = step.tangents

        def perturb(segment: Segment, y: Tensor) -> Tensor:
            segment.dtype = step.tangent_dtype or primal_of(y).dtype
            piece = segment.piece
            end = piece.offset + piece.numel
            if block is not None and block.dtype == segment.dtype and end <= block.shape[1]:
                v, segment.block = block[:, piece.offset : end].view(len(chunk), *piece.shape), block
            else:
                v = tangents.draw(piece, segment.dtype, chunk.start, len(chunk))
            # Shared tangents are few. Low precision rounds, and the estimate is to be made of what was propagated.
            if self.shared or tangents.stored is not None or segment.dtype not in (torch.float32, torch.float64):
                segment.tangents.append(v)
            elif wants_gram:
                segment.grams = torch.cat([_grams(v[:, rows]) for rows in _blocks(segment, len(v))])
            return perturbed(y, v)

        with torch.no_grad(), intercepted(), self._hooked(perturb):
            inputs = step.inputs
            output = (
                self.model(*inputs[0], **inputs[1])
                if moves_buffers
                else functional_call(self.model, copied_buffers(self.model), *inputs)
            )
            return read_loss(step.loss_fn(output, step.target))

    def probe(self, step: Step, chunk: range) -> int:
        """A pass that leaves no trace but ``segments``. Returns the bytes of tangents, for each, that a step keeps after its
        pass."""
        self._pass(step, chunk, False)
        return sum(v.nbytes for s in self.segments for v in s.tangents) // len(chunk)

    def _warn_of_layers_not_called(self) -> None:
        """Once: a module may use the weights of an inner one without calling it, as torch.nn.MultiheadAttention does."""
        if self._warned:
            return
        self._warned = True
        called = {id(s.group) for s in self.segments}
        idle = [g.name for g in self.groups if id(g) not in called]
        if idle:
            warn(
                f"activity perturbation: {', '.join(idle)} were not called in the forward pass, and their parameters get no "
                "gradient; where an outer module uses them by itself, name that one in layers="
            )

    def finish(
        self,
        tangents: TangentSet,
        aggregate: Aggregate | Custom,
        loss: Tensor,
        losses_per_sample: bool,
        base_derivatives: Tensor,
        correct_length: bool,
        share: Share = ALONE,
    ) -> Estimate:
        """From base derivatives, (k,) or (k, B), to the estimate."""
        per_sample = self._losses_per_sample = self.per_sample and losses_per_sample
        if losses_per_sample and not per_sample:
            base_derivatives = base_derivatives.double().mean(1).to(base_derivatives.dtype)
        self._scale = 1.0
        if per_sample:
            batch = base_derivatives.shape[1]
            self.check_rows(batch)
            self._scale = 1.0 / (batch * share.shards)
        loss, averaged = share.average(loss, None if per_sample else base_derivatives)
        base_derivatives = base_derivatives if averaged is None else averaged
        n = sum(s.piece.numel for s in self.segments)
        if per_sample and not self.shared:
            n = sum(s.piece.numel // s.batch for s in self.segments)
            if not isinstance(aggregate, Aggregate):
                raise ValueError("aggregate: a custom aggregation needs shared_across_batch=True or per_sample=False")
        elif not per_sample and self.shared:
            n = sum(s.piece.numel * s.batch * share.shards for s in self.segments)

        def gram() -> Tensor:
            batches = {s.batch for s in self.segments}
            if self.shared and (per_sample or len(batches) == 1):
                # Under one derivative for the batch: the same vector once for each row
                return ops.gram(self._side_by_side()) * (1 if per_sample else batches.pop() * share.shards)
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            for s in self.segments:
                if per_sample:
                    total = total + (_sample_grams(tangents, s) if s.grams is None else s.grams)
                elif not s.tangents:
                    total = total + tangents.gram(s.piece)
                else:
                    total = total + ops.gram(flat(_joined(s))) * (s.batch * share.shards if self.shared else 1)
            return total.expand(batch, *total.shape[1:]) if total.dim() == 3 else total

        def stored() -> Tensor:
            rows = []
            for s in self.segments:
                v = flat(_joined(s) if s.tangents else tangents.draw(s.piece, s.dtype))
                rows.append(v.repeat(1, s.batch) if self.shared and not per_sample else v)
            return torch.cat(rows, 1)

        return solve(tangents, aggregate, loss, base_derivatives, gram, stored, n, correct_length)

    def _side_by_side(self) -> Tensor:
        """Base tangents of all segments: (k, n)."""
        block = self.segments[0].block
        if block is not None and all(s.block is block for s in self.segments):
            if sum(s.piece.numel for s in self.segments) == block.shape[1]:
                return block
        return torch.cat([flat(_joined(s)) for s in self.segments], 1)

    def check_rows(self, batch: int) -> None:
        """With a loss for each sample, outputs have a row for each, or a single one that all samples share, as the embedding of
        positions has."""
        for s in self.segments:
            if s.batch not in (1, batch):
                raise ValueError(
                    f"layers: the output of {s.piece.name} has {s.batch} rows, but there are {batch} losses; per-sample "
                    "derivatives need one row per sample, or per_sample=False"
                )

    def gradients(self, tangents: TangentSet, estimate: Estimate, inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
        """Layer-local gradients of the parameters from the estimated gradients of the activities."""
        self._cache: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}
        found: dict[str, Tensor] = {}
        replayed: list[tuple[Segment, Tensor]] = []
        start = 0
        for segment in self.segments:
            width = segment.piece.numel * (segment.batch if self.shared and estimate.directional_derivatives.dim() == 1 else 1)
            if segment.input is None:
                replayed.append((segment, self._activity_gradient(tangents, segment, estimate, start, width)))
            else:
                for p, g in self._direct(tangents, segment, segment.input, estimate, start, width):
                    name = self._names[id(p)]
                    found[name] = found[name] + g if name in found else g
            start += width
        if replayed:
            for name, g in self._recorded(replayed, inputs):
                found[name] = found[name] + g if name in found else g
        yield from found.items()

    def _direct(
        self, tangents: TangentSet, segment: Segment, x: Tensor, estimate: Estimate, start: int, width: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        rule, layer = segment.group.rule, segment.group.output
        assert rule is not None
        if x._version != segment.version:
            raise RuntimeError(
                f"layers: the input of {segment.piece.name} was modified in place after the layer read it; its gradient "
                "cannot be computed"
            )
        if self.shared and estimate.custom is None and tangents.k < segment.batch:
            return local_gradient(layer, rule, x, _joined(segment), *self._weights(segment, estimate, x.dtype))
        return local_gradient(layer, rule, x, self._activity_gradient(tangents, segment, estimate, start, width))

    def _weights(self, segment: Segment, estimate: Estimate, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(k, B): how much of each tangent the mean loss's gradient holds in each row; (k,): in all rows together."""
        key = segment.batch, dtype
        if key not in self._cache:
            c = estimate.base_coefficients
            assert c is not None
            if c.dim() == 1:
                c = c.unsqueeze(1).expand(-1, segment.batch)
            else:
                c = c * self._scale
                if segment.batch == 1:  # one row for all samples: their gradients add up
                    c = c.sum(1, keepdim=True)
            c = c.to(dtype)
            self._cache[key] = c, c.sum(1)
        return self._cache[key]

    def _activity_gradient(self, tangents: TangentSet, segment: Segment, estimate: Estimate, start: int, width: int) -> Tensor:
        """Estimated gradient of the mean loss with respect to a layer's output: (B, *m)."""
        shape = segment.piece.shape if not self.shared else (segment.batch, *segment.piece.shape)
        if estimate.custom is not None:
            part = estimate.custom[..., start : start + width]
            if part.dim() == 2 and segment.batch == 1:
                part = part.sum(0)
            return (part * self._scale).reshape(shape)
        if not segment.tangents:
            c = estimate.base_coefficients
            assert c is not None
            if c.dim() == 1:
                return tangents.combine(segment.piece, c, segment.dtype)
            weights, _ = self._weights(segment, estimate, torch.float64)
            return tangents.combine_samples(segment.piece, weights, segment.dtype)
        v = _joined(segment)
        wide = torch.promote_types(v.dtype, torch.float32)
        weights, _ = self._weights(segment, estimate, wide)
        if self.shared:  # few
            return (weights.T @ flat(v).to(wide)).view(shape)
        # What a mean over many losses leaves to each may be nothing in float16: weights up to 1 there, scaled afterwards
        largest = weights.abs().amax(0).clamp_(min=torch.finfo(wide).tiny)
        gradient = torch.einsum("kb,kbm->bm", (weights / largest).to(v.dtype), flat(v, 2))
        return gradient.to(wide).mul_(largest.unsqueeze(1)).view(shape)

    def _recorded(self, wanted: list[tuple[Segment, Tensor]], inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
        """Layer-local gradients of arbitrary layers: the plain pass again, autograd on, cut at each layer's output."""
        outputs: list[Tensor] = []
        gradients = [g for _, g in wanted]
        order = {id(s.group): None for s, _ in wanted}

        def cut(segment: Segment, y: Tensor) -> Tensor:
            if id(segment.group) in order:
                outputs.append(y)
                if len(outputs) == len(gradients):
                    raise _EverythingSeen
            return y.detach()

        parameters = {id(p): p for s, _ in wanted for p in s.group.parameters}
        segments = self.segments
        if deferring() and self._draws_numbers:
            names = ", ".join(dict.fromkeys(s.group.name for s, _ in wanted))
            raise NotImplementedError(
                f"cuda_graph: {names} have no closed-form gradient and run a second time, but the model draws random numbers "
                "(dropout), which a graph cannot repeat; use cuda_graph=False"
            )
        with torch.enable_grad(), self._numbers.replayed(), self._hooked(cut), suppress(_EverythingSeen):
            functional_call(self.model, copied_buffers(self.model), *inputs)
        self.segments = segments
        if not deferring():
            self._draws_numbers = self._numbers.moved
        pairs = [(y, g.to(y.dtype)) for y, g in zip(outputs, gradients, strict=True) if y.requires_grad]
        if not pairs:
            return
        grads = torch.autograd.grad([y for y, _ in pairs], list(parameters.values()), [g for _, g in pairs], allow_unused=True)
        for p, g in zip(parameters.values(), grads, strict=True):
            if g is not None:
                yield self._names[id(p)], g

    @contextmanager
    def _hooked(self, perturb: Perturb) -> Iterator[None]:
        """Passes each output of a perturbed layer through ``perturb``; fills ``segments`` in the order of the calls."""
        self.segments = []
        self._offset = 0
        handles = [
            g.output.register_forward_hook(lambda m, args, out, g=g: self._visit(g, args, out, perturb)) for g in self.groups
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _visit(self, group: Group, args: tuple[Any, ...], output: Any, perturb: Perturb) -> Any:
        several = isinstance(output, (tuple, list))
        y = output[0] if several else output
        value = primal_of(y)  # asking a DualTensor for its shape goes through __torch_function__
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() == 0:
            what = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"layers: the output of {group.name} is {what}; expected a real floating point tensor (B, *)")
        shape = value.shape
        piece = self._piece(group.name, shape[1:] if self.shared else shape)
        x = primal_of(args[0]) if group.rule is not None and args else None
        if x is not None and x.dim() != value.dim():
            x = None
        version = x._version if x is not None else 0
        # A fused operator leaves a value and its tangents in one block of memory, which the value alone would keep alive
        # until the gradients are formed; of many tangents, a copy of the value is far less.
        if x is not None and isinstance(args[0], DualTensor) and args[0].k * x.numel() >= _WORTH_A_COPY:
            x = x.clone()
            version = x._version
        segment = Segment(group, piece, shape[0], x, version, [])
        self.segments.append(segment)
        y = perturb(segment, y)
        return type(output)((y, *output[1:])) if several else y

    def _piece(self, name: str, shape: tuple[int, ...]) -> Piece:
        """The next piece of the tangent vector. That of the pass before serves again where it is the same."""
        at = len(self.segments)
        known = self._pieces[at] if at < len(self._pieces) else None
        if known is None or known.offset != self._offset or known.shape != shape or known.name != name:
            known = Piece(name, tuple(shape), self._offset)
            self._pieces[at:] = [known]
        self._offset += known.numel
        return known


def _joined(segment: Segment) -> Tensor:
    """Base tangents of all chunks: (k, *piece.shape)."""
    if len(segment.tangents) > 1:
        segment.tangents = [torch.cat(segment.tangents)]
    return segment.tangents[0]


def _blocks(segment: Segment, k: int) -> Iterator[slice]:
    """Samples whose k tangents fill a cache."""
    size = max(1, _GRAM_BLOCK // max(1, k * math.prod(segment.piece.shape[1:])))
    return (slice(b, min(b + size, segment.batch)) for b in range(0, max(1, segment.batch), size))


def _grams(v: Tensor) -> Tensor:
    """Gram matrices, float64 (B, k, k), of the samples of v (k, B, *m): a part of a larger tensor or not, the same bits."""
    rows = flat(v, 2).transpose(0, 1).to(torch.float64, memory_format=torch.contiguous_format).contiguous()
    return rows @ rows.mT


def _sample_grams(tangents: TangentSet, segment: Segment) -> Tensor:
    """Those of a whole segment; block by block as they are made of tangents that were just drawn, for the same bits."""
    shape = segment.piece.shape[1:]

    def of(rows: slice) -> Tensor:
        if segment.tangents:
            return _joined(segment)[:, rows]
        part = Piece(segment.piece.name, (rows.stop - rows.start, *shape), segment.piece.offset + rows.start * math.prod(shape))
        return tangents.draw(part, segment.dtype)

    return torch.cat([_grams(of(rows)) for rows in _blocks(segment, tangents.k)])
