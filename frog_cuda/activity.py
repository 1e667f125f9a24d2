"""Activity perturbation: tangents over the outputs ("activities") of layers, and layer-local gradients.

A layer's output y gets the tangent ``dy + v``: what comes from earlier layers is carried on, the layer's own tangent v is
added. The estimate of the loss's gradient with respect to y, ``C^T V_y``, then gives the layer's parameters their gradient
locally.
Flügel et al., arXiv 2410.17764, section 4.4.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from ._checks import flat, warn
from ._deferred import deferring
from ._recording import recording
from .aggregate import Aggregate, Custom
from .custom_functions import intercepted
from .dual import perturbed, perturbed_, primal_of
from .estimate import Estimate, read_loss, solve
from .exchange import buffers_as, saved_buffers, unmoved_buffers
from .functional import RandomNumbers
from .hooks import Perturb, hooked, returns_what_is_new
from .layers import Group
from .local import local_gradient
from .rerun import Call, Finished, local_gradients, mark, snapshot
from .rows import check_apart, check_numbers, doubtful, using_batch_statistics
from .segments import AT_ONCE, Segment, Trace, alike, blocks, grams, joined, require_alike, sample_grams, shared_gram
from .share import ALONE, Share
from .tangents import Distribution, LowRank, Piece, StandardBasis, Supplied, TangentSet
from .weight import Inputs, Step, check_parameters, forget_duals, keeping_modules


class ActivityPerturbation:
    """Tangents over the outputs of ``groups``; memory beyond that of the forward pass: k times the perturbed outputs of one
    sample, and the inputs of the layers. Tangents that are not shared are drawn again when they are needed, not kept; only
    supplied ones and those in low precision are kept, k times the perturbed outputs of the batch."""

    def __init__(self, model: nn.Module, groups: list[Group], shared: bool, per_sample: bool) -> None:
        self.model, self._keeping = model, keeping_modules(model)
        self.groups, self.shared, self.per_sample = groups, shared, per_sample
        own = {id(p) for group in groups for p in group.parameters}
        self.parameters: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if id(p) in own}
        check_parameters(model, self.parameters)
        self._pieces: list[Piece] = []
        #: names and offsets of activities whose tangents were added by themselves in an earlier pass: nothing takes them along
        self._added: set[tuple[str, int]] = set()
        #: names of activities whose first axis is known to be that of the samples
        self._samples_first: set[str] = set()
        self._warned = False
        self._draws_numbers = False  # seen where a layer last ran a second time
        self._repeats_passes = any(group.rule is None and not group.runs_again for group in groups)
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
        pieces = [s.piece for s in self._measured(inputs)]
        if isinstance(distribution, Supplied) and len({p.name for p in pieces}) < len(pieces):
            raise ValueError("tangents: supplied tangents cannot serve a layer that is called more than once in a forward pass")
        return TangentSet(distribution, k, seed, step, self.device, sum(p.numel for p in pieces), pieces)

    def _measured(self, inputs: Inputs) -> list[Segment]:
        """A plain pass without tangents: which layers are called, and the shapes of their outputs."""
        trace, numbers = Trace(), RandomNumbers(self.parameters.values(), self.model.modules())
        with torch.no_grad(), numbers.replayed(), self._hooked(trace, lambda segment, y: y):
            args, kwargs = snapshot(inputs)
            with unmoved_buffers(self.model):
                self.model(*args, **kwargs)
        return trace.segments

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
        trace = self.beginning(step.inputs, len(starts))
        for first in starts:
            if first > begin:
                assert trace.numbers is not None
                trace.numbers.rewind()
            chunk = range(first, min(first + size, end))
            block = self._drawn_ahead(step) if len(chunk) == k else None
            value, moved = self._pass(trace, step, chunk, first == starts[-1], wants_gram, block)
            loss = value.mean()
            kept.append([s.tangents for s in trace.segments])
            columns.append(moved)
        for segment, *parts in zip(trace.segments, *kept, strict=True):
            if not segment.tangents:
                continue
            others = [(0, begin), (end, k - end)]  # propagated by others, and needed here for the estimate
            before, after = ([tangents.draw(segment.piece, segment.dtype, at, n)] if n else [] for at, n in others)
            segment.tangents = [*before, *(v for part in parts for v in part), *after]
        kept.clear()  # so that what is joined later is freed piece by piece
        parts = before = after = []
        self._warn_at_first(trace)
        if self.per_sample and value.dim() == 1:
            self._check_samples(trace, step, len(value))
        moved = share.gather(columns[0] if len(columns) == 1 else torch.cat(columns), loss, k)
        return self.finish(trace, tangents, aggregate, loss, value.dim() == 1, moved, correct_length, share)

    def beginning(self, inputs: Inputs, passes: int = 1) -> Trace:
        """An empty trace, with what is needed where the pass is repeated."""
        trace = Trace(pieces=self._pieces)
        if passes > 1 or self._repeats_passes:
            trace.numbers = RandomNumbers(self.parameters.values(), self.model.modules())
        if self._repeats_passes:
            trace.buffers, trace.inputs = saved_buffers(self.model), snapshot(inputs)
        return trace

    def _drawn_ahead(self, step: Step) -> Tensor | None:
        """Shared tangents of all layers in one call, (k, n), where an earlier pass tells that they are few together; that they
        are other layers' now does not matter, as an element depends on its place alone."""
        tangents = step.tangents
        if not (self.shared and self._pieces) or tangents.stored is not None or isinstance(tangents.distribution, LowRank):
            return None
        n = self._pieces[-1].offset + self._pieces[-1].numel
        if tangents.k * n > AT_ONCE:
            return None
        everything = Piece("", (n,), 0)
        return tangents.draw(everything, step.tangent_dtype or next(iter(self.parameters.values())).dtype)

    def _pass(
        self, trace: Trace, step: Step, chunk: range, moves_buffers: bool, wants_gram: bool = False, block: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss and derivatives of one forward pass, as :func:`read_loss` gives them. Fills ``trace``."""
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
                segment.grams = torch.cat([grams(v[:, rows]) for rows in blocks(segment, len(v))])
            place = piece.name, piece.offset
            if place in self._added and returns_what_is_new(segment):
                return perturbed_(y, v)
            return perturbed(y, v, partial(self._added.add, place))

        return self._run(trace, step, perturb, moves_buffers)

    def _run(self, trace: Trace, step: Step, perturb: Perturb, moves_buffers: bool) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), intercepted(), self._hooked(trace, perturb):
            if moves_buffers:  # the last pass; the others leave buffers, inputs and target as they were
                output, target = self.model(*step.inputs[0], **step.inputs[1]), step.target
            else:
                (args, kwargs), target = snapshot((step.inputs, step.target))
                with unmoved_buffers(self.model):
                    output = self.model(*args, **kwargs)
            passed = read_loss(step.loss_fn(output, target))
        forget_duals(self._keeping)
        return passed

    def probe(self, step: Step, chunk: range) -> tuple[int, Trace]:
        """A pass without consequences. Returns the bytes of tangents, for each, that a step keeps after its pass, and all it
        keeps."""
        trace = self.beginning(step.inputs, 2)
        self._pass(trace, step, chunk, False)
        return sum(v.nbytes for s in trace.segments for v in s.tangents) // len(chunk), trace

    def _check_samples(self, trace: Trace, step: Step, batch: int) -> None:
        """Once for each layer whose output gives rise to doubt, by a pass without consequences."""
        check_numbers(trace.segments, batch)
        asked = [s for s in doubtful(trace.segments, batch, self.shared) if s.piece.name not in self._samples_first]
        if not asked or deferring() or using_batch_statistics(self.model):
            return

        def derivatives(perturb: Perturb) -> Tensor:
            with RandomNumbers(self.parameters.values(), self.model.modules()).replayed():
                return self._run(Trace(), step, perturb, False)[1]

        check_apart(asked, derivatives)
        self._samples_first.update(s.piece.name for s in asked)

    def _warn_at_first(self, trace: Trace) -> None:
        """Of layers that cannot learn. A module may use the weights of an inner one without calling it, as
        torch.nn.MultiheadAttention does."""
        if self._warned:
            return
        self._warned = True
        if self.shared and trace.segments[0].batch > 1:
            first = trace.segments[0].group.output  # of the layers behind the inputs nothing is taken out
            names = [name or "the model" for name, m in using_batch_statistics(self.model).items() if m is not first]
            if names:
                warn(
                    f"activity perturbation: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''} normalise over the "
                    "batch, which takes out what all samples share, tangents too; layers before them hardly learn. Use "
                    "shared_across_batch=False, or eval() for these"
                )
        called = {id(s.group) for s in trace.segments}
        idle = [g.name for g in self.groups if id(g) not in called]
        if idle:
            warn(
                f"activity perturbation: {', '.join(idle)} were not called in the forward pass, and their parameters get no "
                "gradient; where an outer module uses them by itself, name that one in layers="
            )

    def finish(
        self,
        trace: Trace,
        tangents: TangentSet,
        aggregate: Aggregate | Custom,
        loss: Tensor,
        losses_per_sample: bool,
        base_derivatives: Tensor,
        correct_length: bool,
        share: Share = ALONE,
    ) -> Estimate:
        """From base derivatives, (k,) or (k, B), to the estimate."""
        segments = trace.segments
        per_sample = self._losses_per_sample = self.per_sample and losses_per_sample
        if losses_per_sample and not per_sample:
            base_derivatives = base_derivatives.double().mean(1).to(base_derivatives.dtype)
        trace.scale = 1.0
        if per_sample:
            batch = base_derivatives.shape[1]
            trace.scale = 1.0 / (batch * share.shards)
        loss, averaged = share.average(loss, None if per_sample else base_derivatives)
        base_derivatives = base_derivatives if averaged is None else averaged
        n = sum(s.piece.numel for s in segments)
        if per_sample and not self.shared:
            n = sum(s.piece.numel // s.batch for s in segments)
            if not isinstance(aggregate, Aggregate):
                raise ValueError("aggregate: a custom aggregation needs shared_across_batch=True or per_sample=False")
        elif not per_sample and self.shared:
            tangents.distribution.check(tangents.k, n)  # the rows are all the same
            n = sum(s.piece.numel * s.batch * share.shards for s in segments)

        def gram() -> Tensor:
            segments = trace.segments
            if not segments:
                raise RuntimeError("gram: a later call took the place of these activities; read it before")
            batches = {s.batch for s in segments}
            if self.shared and (per_sample or len(batches) == 1):
                # Under one derivative for the batch: the same vector once for each row
                shared = shared_gram(segments, tangents.k)
                return shared * (1 if per_sample else batches.pop() * share.shards)
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            for s in segments:
                if per_sample:
                    total = total + (sample_grams(tangents, s) if s.grams is None else s.grams)
                elif not s.tangents:
                    total = total + tangents.gram(s.piece)
                else:
                    total = total + ops.gram(flat(joined(s))) * (s.batch * share.shards if self.shared else 1)
            return total.expand(batch, *total.shape[1:]) if total.dim() == 3 else total

        def stored() -> Tensor:
            rows = []
            for s in segments:
                v = flat(joined(s) if s.tangents else tangents.draw(s.piece, s.dtype))
                rows.append(v.repeat(1, s.batch) if self.shared and not per_sample else v)
            return torch.cat(rows, 1)

        estimate = solve(tangents, aggregate, loss, base_derivatives, gram, stored, n, correct_length)
        estimate.trace = trace
        return estimate

    def gradients(self, tangents: TangentSet, estimate: Estimate, inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
        """Layer-local gradients of the parameters from the estimated gradients of the activities."""
        trace = estimate.trace
        assert trace is not None
        self._cache: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}
        names = {id(p): name for name, p in self.parameters.items()}
        found: dict[str, Tensor] = {}
        again: list[tuple[int, Tensor]] = []
        start = 0

        def add(p: Tensor, g: Tensor) -> None:
            name = names[id(p)]
            found[name] = found[name] + g if name in found else g

        for i, segment in enumerate(trace.segments):
            width = segment.piece.numel * (segment.batch if self.shared and estimate.directional_derivatives.dim() == 1 else 1)
            if segment.input is None:
                again.append((i, self._activity_gradient(tangents, segment, estimate, start, width)))
            else:
                for p, g in self._direct(tangents, segment, segment.input, estimate, start, width):
                    add(p, g)
            start += width
        for p, g in self._recorded(trace, again) if again else ():
            add(p, g)
        yield from found.items()

    def _direct(
        self, tangents: TangentSet, segment: Segment, x: Tensor, estimate: Estimate, start: int, width: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        rule, layer = segment.rule, segment.group.output
        assert rule is not None
        if x._version != segment.version:
            raise RuntimeError(
                f"layers: the input of {segment.piece.name} was modified in place after the layer read it; its gradient "
                "cannot be computed"
            )
        batched = x.dim() >= rule.axes(layer)
        if batched and self.shared and estimate.custom is None and tangents.k < segment.batch:
            return local_gradient(layer, rule, x, joined(segment), *self._weights(segment, estimate, x.dtype))
        g = self._activity_gradient(tangents, segment, estimate, start, width)
        # A layer that was given no batch: its rows, if there are any, are not those of the rules
        return local_gradient(layer, rule, *(x, g) if batched else (x.unsqueeze(0), g.unsqueeze(0)))

    def _weights(self, segment: Segment, estimate: Estimate, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(k, B): how much of each tangent the mean loss's gradient holds in each row; (k,): in all rows together."""
        key = segment.batch, dtype
        if key not in self._cache:
            c = estimate.base_coefficients
            assert c is not None
            if c.dim() == 1:
                c = c.unsqueeze(1).expand(-1, segment.batch)
            else:
                c = c * estimate.trace.scale
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
            return (part * estimate.trace.scale).reshape(shape)
        if not segment.tangents:
            c = estimate.base_coefficients
            assert c is not None
            if c.dim() == 1:
                return tangents.combine(segment.piece, c, segment.dtype)
            weights, _ = self._weights(segment, estimate, torch.float64)
            return tangents.combine_samples(segment.piece, weights, segment.dtype)
        v = joined(segment)
        wide = torch.promote_types(v.dtype, torch.float32)
        weights, _ = self._weights(segment, estimate, wide)
        if self.shared:  # few
            return (weights.T @ flat(v).to(wide)).view(shape)
        # What a mean over many losses leaves to each may be nothing in float16: weights up to 1 there, scaled afterwards
        largest = weights.abs().amax(0).clamp_(min=torch.finfo(wide).tiny)
        gradient = torch.einsum("kb,kbm->bm", (weights / largest).to(v.dtype), flat(v, 2))
        return gradient.to(wide).mul_(largest.unsqueeze(1)).view(shape)

    def _recorded(self, trace: Trace, wanted: list[tuple[int, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Local gradients of the layers of some segments, by number, that have no closed form."""
        segments = trace.segments
        if deferring() and self._draws_numbers:
            names = ", ".join(dict.fromkeys(segments[i].group.name for i, _ in wanted))
            raise NotImplementedError(
                f"cuda_graph: {names} have no closed-form gradient and run a second time, but draw random numbers (dropout), "
                "which a graph cannot repeat; use cuda_graph=False"
            )
        gradients = dict(wanted)
        calls: dict[Call, list[int]] = {}
        others: list[int] = []
        for i in gradients:
            call = segments[i].call
            (others if call is None else calls.setdefault(call, [])).append(i)
        draws, checked, runs = [], [], []

        def local(
            numbers: list[int], again: tuple[list[Tensor], list[Tensor]], parameters: list[Tensor]
        ) -> Iterator[tuple[Tensor, Tensor]]:
            own, received, outputs = [segments[i] for i in numbers], [gradients[i] for i in numbers], again[0]
            runs.extend(alike(own, received, *again))
            checked.extend(own)
            found = local_gradients(outputs, received, parameters)
            yield from ((p, g) for p, g in zip(parameters, found, strict=True) if g is not None)

        for call, numbers in calls.items():
            yield from local(numbers, self._again(call), call.group.parameters)
            draws.append(call.draws_numbers)
        if others:
            parameters = list({id(p): p for i in others for p in segments[i].group.parameters}.values())
            yield from local(others, self._pass_again(trace, others), parameters)
            draws.append(trace.numbers is not None and trace.numbers.moved)
        require_alike(checked, runs)
        if not deferring():
            self._draws_numbers = any(draws)

    def _again(self, call: Call) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs of one layer, recorded, and their marks. Calls of itself within are a part of it."""
        outputs: list[Tensor] = []
        marks: list[Tensor] = []
        layer, depth = call.group.output, 0

        def keep(segment: Segment, y: Tensor) -> Tensor:
            outputs.append(y)
            marks.append(mark(y))
            return y

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal depth
            depth += 1
            # What it was given had been through the hooks of all modules
            return call.given() if depth == 1 and nn.modules.module._global_forward_pre_hooks else None

        def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            nonlocal depth
            depth -= 1
            if depth == 0 and sys.exc_info()[0] is None:  # else the layer has raised
                raise Finished

        # The hooks of the last line come before the second one here
        handles = [
            layer.register_forward_pre_hook(begin, prepend=True, with_kwargs=True),
            layer.register_forward_hook(end, prepend=True, always_call=True),
        ]
        try:
            with self._hooked(Trace(), keep, [call.group]):
                call.again()
        finally:
            for handle in handles:
                handle.remove()
        return outputs, marks

    def _pass_again(self, trace: Trace, wanted: list[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs of some segments in the plain pass again, recorded, each cut off from what follows, and their marks."""
        outputs: list[Tensor] = []
        marks: list[Tensor] = []
        again = Trace()

        def cut(segment: Segment, y: Tensor) -> Tensor:
            if len(again.segments) - 1 in wanted:
                outputs.append(y)
                marks.append(mark(y))  # now, as the model may write into it
                if len(outputs) == len(wanted):
                    raise Finished
            return y.detach()

        assert trace.numbers is not None and trace.buffers is not None
        with recording(), trace.numbers.replayed(), suppress(Finished), self._hooked(again, cut, self.groups):
            args, kwargs = snapshot(trace.inputs)
            with buffers_as(self.model, trace.buffers):
                self.model(*args, **kwargs)
        return outputs, marks

    def _hooked(self, trace: Trace, perturb: Perturb, groups: list[Group] | None = None) -> AbstractContextManager[None]:
        """Layers hooked for a pass. ``groups``: of these, for one after which no layer runs again."""
        return hooked(self.groups if groups is None else groups, trace, perturb, self.shared, groups is None)
