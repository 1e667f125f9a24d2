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
from .hooks import returns_what_is_new
from .rerun import snapshot
from .rows import check_numbers
from .surroundings import surroundings
from .tangents import Piece, TangentSet
from .weight import Inputs, Step, WeightPerturbation, inputs_of

__all__ = ["Simulated", "simulate"]


_INDEPENDENT = "loss_fn: the result does not depend on anything that is perturbed"


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
    Raises:
        ValueError: the loss does not depend on what is perturbed.
        RuntimeError: the model writes in place into a layer's output that it also reads otherwise.
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
        found = _gradients(loss, list(method.parameters.values()))
    true = {name: g for name, g in zip(method.parameters, found, strict=True) if g is not None}
    if not true:
        raise ValueError(_INDEPENDENT)
    with torch.no_grad():
        used = _used(fg, method, tangents, inputs, target, true)
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


def _used(
    fg: ForwardGradient,
    method: WeightPerturbation,
    tangents: TangentSet,
    inputs: Inputs,
    target: Any,
    true: dict[str, Tensor],
) -> list[Piece]:
    """Parameters that take part: of those without a gradient, such as a head's that the loss does not read, a pass tells."""
    if tangents.stored is not None or all(p.name in true for p in method.pieces):
        return method.pieces
    touched: set[int] = set()
    step = Step(tangents, fg.loss_fn, inputs, target, None)
    with RandomNumbers(method.parameters.values(), fg.model.modules()).replayed():
        method._pass(step, range(1), None, touched, False)
    tangents.forget()
    return [p for p in method.pieces if p.offset in touched]


def _gradients(loss: Tensor, of: list[Tensor]) -> list[Tensor | None]:
    """By backprop, dense; None for what the loss does not depend on."""
    if not loss.requires_grad:
        return [None] * len(of)
    found = torch.autograd.grad(loss, of, allow_unused=True)
    return [g.to_dense() if g is not None and g.is_sparse else g for g in found]


def _activity(
    fg: ForwardGradient, method: ActivityPerturbation, tangents: TangentSet, inputs: Inputs, target: Any
) -> Simulated:
    shifts: list[Tensor] = []
    shifted: list[tuple[Tensor, int]] = []

    def shift(segment: Segment, y: Tensor) -> Tensor:
        shifts.append(torch.zeros_like(y, requires_grad=True))
        moved = y + shifts[-1]
        if not returns_what_is_new(segment):
            shifted.extend((t, t._version) for t in (y, moved))
        return moved

    numbers = RandomNumbers(method.parameters.values(), fg.model.modules())
    with recording():
        trace = method.beginning(inputs)
        with method._hooked(trace, shift):
            losses = _loss(fg, inputs, target)
        if any(t._version != version for t, version in shifted):
            with torch.no_grad(), numbers.replayed():
                _check_losses(losses.detach(), _loss(fg, inputs, target))
        shifted.clear()
        # Without cross terms between samples, row b of the summed losses' gradient is that of loss b
        per_sample = method.per_sample and losses.dim() == 1
        total = losses.sum() if per_sample else losses.mean()
        common: dict[int, Tensor] = {}
        if per_sample:
            check_numbers(trace.segments, losses.numel())
            # An output whose single row all samples share gets its gradient (B, m) one loss at a time
            wanted = {i: shifts[i] for i, s in enumerate(trace.segments) if s.batch < losses.numel()}
            common = {i: torch.stack(g) for i, g in zip(wanted, _each_loss(losses, list(wanted.values())), strict=True)}
        found = _gradients(total, [*shifts, *method.parameters.values()])
    if all(g is None for g in found[: len(shifts)]):
        raise ValueError(_INDEPENDENT)
    activity = [torch.zeros_like(s) if g is None else g for s, g in zip(shifts, found[: len(shifts)], strict=True)]
    scale = 1 / losses.numel() if per_sample else 1.0
    true = {name: g * scale for name, g in zip(method.parameters, found[len(shifts) :], strict=True) if g is not None}
    with torch.no_grad():
        rows: Tensor = torch.zeros((), dtype=losses.dtype, device=losses.device)
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


def _check_losses(found: Tensor, plain: Tensor) -> None:
    """
    Raises:
        RuntimeError: the losses of the pass with copies of layers' outputs are not those of a plain one.
    """
    apart = torch.linalg.vector_norm(found - plain)
    if apart > 8 * torch.finfo(plain.dtype).eps ** 0.5 * torch.linalg.vector_norm(plain):
        raise RuntimeError(
            "simulate: the output of a layer is written in place after the layer has returned it, and is read elsewhere, too, "
            "as the input that a layer changes in place may be; backprop through a copy of it finds another loss "
            f"({found.mean().item():.6g}) than the model has ({plain.mean().item():.6g}). Write out of place there"
        )


def _each_loss(losses: Tensor, inputs: list[Tensor]) -> list[list[Tensor]]:
    """For each input, its gradient of each loss."""
    columns: list[list[Tensor]] = [[] for _ in inputs]
    for loss in losses if inputs else ():
        found = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
        for column, x, g in zip(columns, inputs, found, strict=True):
            column.append(torch.zeros_like(x) if g is None else g)
    return columns
