"""Layers whose outputs are perturbed as a pass comes through them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .dual import DualTensor, primal_of
from .layers import Group
from .local import LocalRule, rule_holds
from .rerun import Call, mark
from .segments import Segment, Trace, batch_axis
from .stopping import stopped, stopping_at_no_grad
from .tangents import Piece

Perturb = Callable[[Segment, Tensor], Tensor]

#: elements of an input's tangents
_WORTH_A_COPY = 1 << 20


@contextmanager
def hooked(groups: list[Group], trace: Trace, perturb: Perturb, shared: bool, again: bool) -> Iterator[None]:
    """Passes each output of a layer through ``perturb``; fills ``trace`` in the order of the calls. What runs under ``no_grad``
    is no layer.

    Arguments:
        shared: whether all samples have the same tangents.
        again: whether layers without a closed form are to run again for their gradients.
    """
    trace.segments, trace.offset, trace.marked = [], 0, again
    calls: list[tuple[Group, Call | None]] = []  # that are under way, of layers without a closed form
    handles = []

    def hook(group: Group) -> None:
        # Others may have changed the layer since the last pass
        rule = group.rule if group.rule is not None and rule_holds(group.output) else None
        runs_again = group.runs_again or rule is not group.rule
        versions: list[int] = []

        # The first hook of all: what the layer itself returns is perturbed, whatever others make of it
        if runs_again:

            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                calls.append((group, Call(group, args, kwargs, versions) if again else None))

            handles.append(group.output.register_forward_pre_hook(before, prepend=True, with_kwargs=True))

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            call = None
            if runs_again:
                _, call = calls.pop()
                if output is None and sys.exc_info()[0] is not None:  # the layer has raised; the model may catch that
                    return None
                if call is not None:
                    call.ended()
            if stopped() or any(other is group for other, _ in calls):  # a constant, or a layer that calls itself
                return None
            given = args[0] if args else kwargs.get("input")
            of_this = rule if rule is None or rule.now is None else rule.now(module)
            return _visit(trace, group, of_this, call, given, output, perturb, shared)

        how: dict[str, bool] = {"prepend": True, "with_kwargs": True, "always_call": runs_again}
        handles.append(group.output.register_forward_hook(after, **how))

    try:
        for group in groups:
            hook(group)
        with stopping_at_no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def returns_what_is_new(segment: Segment) -> bool:
    """Whether nobody but the hook has what the layer returned. Layers with a closed form, PyTorch's own, compute it in new
    memory and do not keep it."""
    return segment.rule is not None


def _visit(
    trace: Trace,
    group: Group,
    rule: LocalRule | None,
    call: Call | None,
    x: Any,
    output: Any,
    perturb: Perturb,
    shared: bool,
) -> Any:
    several = not isinstance(output, Tensor)
    leaves, spec = tree_flatten(output) if several else ([output], None)
    seen = 0
    for i, leaf in enumerate(leaves):
        value = primal_of(leaf)  # asking a DualTensor for its shape goes through __torch_function__
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0:
            axis = batch_axis(group.output, value, seen)
            y = leaf.movedim(axis, 0) if axis else leaf
            name = f"{group.name}[{seen}]" if seen else group.name
            y = _perturbed(trace, group, rule, call, name, x, y, perturb, shared)
            leaves[i] = y.movedim(0, axis) if axis else y
            seen += 1
    if not seen:
        value = primal_of(output)
        what = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"layers: the output of {group.name} is {what}; expected a real floating point tensor (B, *)")
    return tree_unflatten(leaves, spec) if spec is not None else leaves[0]


def _perturbed(
    trace: Trace,
    group: Group,
    rule: LocalRule | None,
    call: Call | None,
    name: str,
    given: Any,
    y: Tensor,
    perturb: Perturb,
    shared: bool,
) -> Tensor:
    value = primal_of(y)
    shape = value.shape
    piece = _piece(trace, name, shape[1:] if shared else shape)
    x = primal_of(given) if rule is not None else None
    version = 0
    if x is not None:
        # A fused operator leaves a value and its tangents in one block of memory, which the value alone would keep alive
        # until the gradients are formed; of many tangents, a copy of the value is far less.
        if x.is_inference() or (isinstance(given, DualTensor) and given.k * x.numel() >= _WORTH_A_COPY):
            x = x.clone()
        version = x._version
    segment = Segment(group, rule, piece, shape[0], x, version, [], call=call)
    if rule is None and trace.marked:
        segment.mark = mark(value)
    trace.segments.append(segment)
    return perturb(segment, y)


def _piece(trace: Trace, name: str, shape: tuple[int, ...]) -> Piece:
    """The next piece of the tangent vector. That of the pass before serves again where it is the same."""
    at = len(trace.segments)
    known = trace.pieces[at] if at < len(trace.pieces) else None
    if known is None or known.offset != trace.offset or known.shape != shape or known.name != name:
        known = Piece(name, tuple(shape), trace.offset)
        trace.pieces[at:] = [known]
    trace.offset += known.numel
    return known
