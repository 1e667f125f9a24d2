"""The same estimate from the true gradient by backprop: what the paper did, and what the forward passes are checked against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._checks import flat
from ._recording import recording
from .activity import ActivityPerturbation, Segment
from .estimate import Estimate, solve
from .exchange import unmoved_buffers
from .forward_gradient import ForwardGradient
from .functional import RandomNumbers
from .rerun import snapshot
from .rows import check_numbers
from .surroundings import surroundings
from .tangents import TangentSet
from .weight import Inputs, WeightPerturbation, inputs_of

__all__ = ["Simulated", "simulate"]


@dataclass(eq=False)
class Simulated:
    """What :func:`simulate` found.

    Attributes:
        loss: the mean loss, 0-dim.
        gradients: the estimate by parameter name.
        true_gradients: the gradient by backprop, by parameter name.
        estimate: directional derivatives, coefficients, Gram matrix and rank.
    """

    loss: Tensor
    gradients: dict[str, Tensor]
    true_gradients: dict[str, Tensor]
    estimate: Estimate

    @property
    def directional_derivatives(self) -> Tensor:
        return self.estimate.directional_derivatives

    @property
    def coefficients(self) -> Tensor | None:
        return self.estimate.coefficients


def simulate(fg: ForwardGradient, input: Any, target: Any) -> Simulated:
    """What ``fg(input, target)`` is about to estimate, computed from the true gradient with the same tangents.

    Changes nothing: no ``.grad``, no step, no buffer, no random number. Uses backprop and its memory, and for weight
    perturbation stored tangents one parameter at a time.

    Arguments:
        fg, input, target: as for the call.
    Returns:
        :class:`Simulated`.
    """
    inputs, method = inputs_of(input), fg._method
    fg._structure.check()
    with surroundings(fg._structure, method.device):
        with RandomNumbers(method.parameters.values(), fg.model.modules()).replayed():
            tangents = fg.tangent_set(inputs)
        with RandomNumbers(method.parameters.values(), fg.model.modules()).replayed():
            if isinstance(method, WeightPerturbation):
                return _weight(fg, method, tangents, inputs, target)
            return _activity(fg, method, tangents, inputs, target)


def _loss(fg: ForwardGradient, inputs: Inputs, target: Any) -> Tensor:
    (args, kwargs), target = snapshot((inputs, target))
    with unmoved_buffers(fg.model):
        return fg.loss_fn(fg.model(*args, **kwargs), target)


def _weight(fg: ForwardGradient, method: WeightPerturbation, tangents: TangentSet, inputs: Inputs, target: Any) -> Simulated:
    with recording():
        loss = _loss(fg, inputs, target).mean()
        found = torch.autograd.grad(loss, list(method.parameters.values()), allow_unused=True)
    true = {name: g for name, g in zip(method.parameters, found, strict=True) if g is not None}
    with torch.no_grad():
        used = [p for p in method.pieces if tangents.stored is not None or p.name in true]
        derivatives = torch.zeros(tangents.k, dtype=torch.float64, device=method.device)
        for piece in used:
            if piece.name in true:
                v = tangents.draw(piece, torch.float64)
                derivatives += flat(v) @ true[piece.name].double().flatten()
        estimate = solve(
            tangents,
            fg.aggregate,
            loss.detach(),
            derivatives.to(loss.dtype),
            lambda: torch.stack([tangents.gram(p) for p in used]).sum(0),
            lambda: torch.cat([flat(tangents.draw(p, method.parameters[p.name].dtype)) for p in used], 1),
            sum(p.numel for p in used),
            fg.scaling_correction,
        )
        before, method.used = getattr(method, "used", []), used  # of the latest call
        try:
            gradients = dict(method.gradients(tangents, estimate))
        finally:
            method.used = before
        return Simulated(loss.detach(), gradients, true, estimate)


def _activity(
    fg: ForwardGradient, method: ActivityPerturbation, tangents: TangentSet, inputs: Inputs, target: Any
) -> Simulated:
    shifts: list[Tensor] = []

    def shift(segment: Segment, y: Tensor) -> Tensor:
        shifts.append(torch.zeros_like(y, requires_grad=True))
        return y + shifts[-1]

    with recording():
        trace = method.beginning(inputs)
        with method._hooked(trace, shift):
            losses = _loss(fg, inputs, target)
        # Without cross terms between samples, row b of the summed losses' gradient is that of loss b
        per_sample = method.per_sample and losses.dim() == 1
        total = losses.sum() if per_sample else losses.mean()
        common: dict[int, Tensor] = {}
        if per_sample:
            check_numbers(trace.segments, losses.numel())
            # An output whose single row all samples share gets its gradient (B, m) one loss at a time
            wanted = {i: shifts[i] for i, s in enumerate(trace.segments) if s.batch < losses.numel()}
            common = {i: torch.stack(g) for i, g in zip(wanted, _each_loss(losses, list(wanted.values())), strict=True)}
        found = torch.autograd.grad(total, [*shifts, *method.parameters.values()], allow_unused=True)
    activity = [torch.zeros_like(s) if g is None else g for s, g in zip(shifts, found[: len(shifts)], strict=True)]
    scale = 1 / losses.numel() if per_sample else 1.0
    true = {name: g * scale for name, g in zip(method.parameters, found[len(shifts) :], strict=True) if g is not None}
    with torch.no_grad():
        rows: Tensor = torch.zeros((), dtype=losses.dtype)
        for i, (segment, g) in enumerate(zip(trace.segments, activity, strict=True)):
            v = tangents.draw(segment.piece, g.dtype)
            segment.tangents = [v]
            if segment.input is not None:
                segment.input = segment.input.detach()
            if i in common or method.shared:
                each = flat(v) @ flat(common.get(i, g)).T
            else:
                each = torch.einsum("kbm,bm->kb", flat(v, 2), flat(g))
            rows = rows + (each if per_sample else each.sum(1))
        estimate = method.finish(trace, tangents, fg.aggregate, losses.detach().mean(), per_sample, rows, fg.scaling_correction)
        gradients = dict(method.gradients(tangents, estimate, inputs))
    return Simulated(losses.detach().mean(), gradients, true, estimate)


def _each_loss(losses: Tensor, inputs: list[Tensor]) -> list[list[Tensor]]:
    """For each input, its gradient of each loss."""
    columns: list[list[Tensor]] = [[] for _ in inputs]
    for loss in losses if inputs else ():
        found = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
        for column, x, g in zip(columns, inputs, found, strict=True):
            column.append(torch.zeros_like(x) if g is None else g)
    return columns
