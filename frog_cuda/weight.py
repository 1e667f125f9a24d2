"""Weight perturbation: one tangent vector over all parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import flat
from .aggregate import Aggregate, Custom
from .custom_functions import intercepted
from .dual import DualTensor, SampledTangents
from .estimate import Estimate, read_loss, solve
from .exchange import exchanged, unmoved_buffers
from .functional import RandomNumbers
from .guides import Guide
from .layers import parameters_of
from .low_rank import Layout
from .rerun import snapshot
from .sgd import Momentum, Sgd
from .share import ALONE, Share
from .stopping import stopping_at_no_grad
from .tangents import Distribution, LowRank, Piece, TangentSet

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Step:
    """What the forward passes of one step work on."""

    tangents: TangentSet
    loss_fn: Any
    inputs: Inputs
    target: Any
    tangent_dtype: torch.dtype | None  # None: that of the primal


class WeightPerturbation:
    """Tangents over all trainable parameters, drawn inside the layers' kernels and replayed for the estimate.

    Memory beyond one primal pass with k tangents of its activations: nothing that grows with the parameters, except where a
    layer has no fused rule (its own tangents, while it runs), for supplied tangents and for vectors that guide; of low-rank
    tangents the factors, and what is drawn in full where it is short, are kept until the next step.
    """

    def __init__(self, model: nn.Module, wanted: Any) -> None:
        self.model, self._keeping = model, keeping_modules(model)
        self.parameters = _trainable(model, wanted)
        padding = padding_rows(model)
        self.momentum = Momentum(self.parameters)
        self.pieces: list[Piece] = []
        offset = 0
        for name, p in self.parameters.items():
            self.pieces.append(Piece(name, tuple(p.shape), offset, padding.get(name)))
            offset += p.numel()
        self.total = offset
        self._layout: Layout | None = None

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def tangent_set(
        self, distribution: Distribution, k: int, seed: int, step: int, remembered: Sequence[Guide] | None = None
    ) -> TangentSet:
        layout = None
        if isinstance(distribution, LowRank):
            if self._layout is None or self._layout.r != distribution.r:
                self._layout = Layout(self.pieces, distribution.r)
            layout = self._layout
        return TangentSet(distribution, k, seed, step, self.device, self.total, self.pieces, remembered, layout)

    def derivatives(
        self,
        step: Step,
        aggregate: Aggregate | Custom,
        *,
        chunk_size: int | None,
        correct_length: bool,
        share: Share = ALONE,
    ) -> Estimate:
        """One forward pass per chunk of this share's tangents, and of all guides. Fills ``used``: the pieces that took part."""
        tangents = step.tangents
        tangents.forget()
        drawn, guided = tangents.passes(*share.span(tangents.drawn), chunk_size)
        passes = [*drawn, *guided]
        wants_gram = tangents.distribution.mixed or (isinstance(aggregate, Aggregate) and aggregate.needs_gram)
        grams: dict[int, Callable[[], Tensor]] | None = {} if wants_gram and not guided else None
        touched: set[int] = set()
        columns: list[Tensor] = []
        loss = torch.empty(0)
        numbers = RandomNumbers(self.parameters.values(), self.model.modules()) if len(passes) > 1 else None
        for chunk in passes:
            if numbers is not None:
                numbers.rewind()
            # Running statistics move once a step, with the last chunk
            moves = chunk is passes[-1]
            value, moved = self._pass(step, chunk, grams, touched, moves)
            loss = value.mean()
            columns.append(moved.reshape(len(chunk), -1).double().mean(1).to(moved.dtype))
        used = [p for p in self.pieces if tangents.stored is not None or p.offset in touched]

        gathered = share.gather(torch.cat(columns[: len(drawn)]), loss, tangents.drawn)
        loss, derivatives = share.average(loss, torch.cat([gathered, *columns[len(drawn) :]]))
        assert derivatives is not None

        def gram_of(piece: Piece) -> Tensor:
            return grams[piece.offset]() if grams and piece.offset in grams else tangents.gram(piece)

        def gram() -> Tensor:
            if guided:
                return tangents.joint_gram(used)
            if tangents.stored is not None:  # of any magnitude, and held by every process
                return torch.stack([tangents.gram(p) for p in used]).sum(0)
            # Where the step does not need it, one process alone may ask for it
            return (share if wants_gram else ALONE).gram(used, gram_of)

        def stored() -> Tensor:
            return torch.cat([flat(tangents.draw(p, self.parameters[p.name].dtype)) for p in used], 1)

        n = sum(p.numel for p in used)
        estimate = solve(tangents, aggregate, loss, derivatives, gram, stored, n, correct_length)
        self.used = used
        return estimate

    @torch.no_grad()
    def _pass(
        self,
        step: Step,
        chunk: range,
        grams: dict[int, Callable[[], Tensor]] | None,
        touched: set[int],
        moves_buffers: bool,
    ) -> tuple[Tensor, Tensor]:
        """Loss and derivatives of one forward pass, as :func:`read_loss` gives them."""
        own: dict[int, Tensor] = {id(self.parameters[p.name]): self._dual(step, p, chunk, grams, touched) for p in self.pieces}
        inputs, target = step.inputs, step.target
        if not moves_buffers:  # the last pass does; the others leave inputs and target as they were, too
            inputs, target = snapshot((inputs, target))
        buffers = nullcontext() if moves_buffers else unmoved_buffers(self.model)
        # The loss inside, too: it may read parameters, for a penalty
        with buffers, exchanged(self.model, own), stopping_at_no_grad(), intercepted():
            passed = read_loss(step.loss_fn(self.model(*inputs[0], **inputs[1]), target))
        forget_duals(self._keeping)
        return passed

    def probe(self, step: Step, chunk: range) -> tuple[int, None]:
        """A pass without consequences. Returns the bytes of tangents, for each, that a step keeps after its pass, and all it
        keeps."""
        self._pass(step, chunk, {}, set(), False)
        return 0, None

    def _dual(
        self,
        step: Step,
        piece: Piece,
        chunk: range,
        grams: dict[int, Callable[[], Tensor]] | None,
        touched: set[int],
    ) -> DualTensor:
        tangents, dtype = step.tangents, step.tangent_dtype
        p, first, count = self.parameters[piece.name], chunk.start, len(chunk)
        if tangents.stored is not None or first >= tangents.drawn:
            dual = DualTensor(p, tangents.draw(piece, dtype or p.dtype, first, count))
        elif (factors := tangents.factors(piece, dtype or p.dtype, first, count)) is not None:
            dual = DualTensor.sampled_from(p, replace(factors, touched=touched))
        else:
            base, stored = tangents.distribution.base, tangents.in_full(piece, dtype or p.dtype, first, count)
            sampled = SampledTangents(
                tangents.state,
                count,
                first,
                piece.offset,
                base,
                grams if stored is None else None,  # else they have theirs
                touched,
                dtype,
                whole=tangents.k,
                stored=stored,
            )
            dual = DualTensor.sampled_from(p, sampled)
        dual.stops_padding = True
        return dual

    def gradients(
        self, tangents: TangentSet, estimate: Estimate, only: Collection[Piece] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """The estimate, parameter by parameter; those that did not take part are left out, or all that are not ``only``."""
        wanted = self.used if only is None else [piece for piece in self.used if piece in only]
        if estimate.computed is not None:
            yield from ((piece.name, estimate.computed[piece.name].clone()) for piece in wanted)
        elif estimate.base_coefficients is not None:
            dtypes = [self.parameters[piece.name].dtype for piece in wanted]
            each = tangents.combine_each(wanted, estimate.base_coefficients, dtypes)
            yield from ((piece.name, g) for piece, g in each)
        else:
            assert estimate.custom is not None
            parts = estimate.custom.split([piece.numel for piece in self.used])
            for piece, part in zip(self.used, parts, strict=True):
                if only is None or piece in only:
                    own = part.view(piece.shape).to(self.parameters[piece.name].dtype, copy=True)  # the caller's own
                    if piece.fixed_row is not None:
                        own[piece.fixed_row] = 0
                    yield piece.name, own

    def update_(self, tangents: TangentSet, estimate: Estimate, sgd: Sgd, only: Collection[Piece] | None = None) -> None:
        """A step of SGD in place, of all parameters that took part or only some of them."""
        if estimate.base_coefficients is None or estimate.computed is not None:
            for name, g in self.gradients(tangents, estimate, only):
                buffer, fresh = self.momentum.buffer(name, sgd)
                sgd.step_(self.parameters[name].detach(), g, buffer, fresh)
                self.momentum.keep(name, buffer)
            return
        for piece in self.used if only is None else only:
            p = self.parameters[piece.name]
            if sgd.plain:
                tangents.axpy_(p.detach(), piece, estimate.base_coefficients, -sgd.lr)
            else:
                buffer, fresh = self.momentum.buffer(piece.name, sgd)
                tangents.sgd_(p.detach(), buffer, fresh, piece, estimate.base_coefficients, sgd)
                self.momentum.keep(piece.name, buffer)
            torch.autograd.graph.increment_version(p)


def inputs_of(input: Any) -> Inputs:
    """Positional and keyword arguments of a model, from what a call was given. A named tuple, such as a PackedSequence, is one
    argument."""
    if isinstance(input, tuple) and not hasattr(input, "_fields"):
        return input, {}
    if isinstance(input, Mapping):
        return (), dict(input)
    return (input,), {}


def keeping_modules(model: nn.Module) -> list[nn.Module]:
    """Modules that may keep what they compute in attributes: not PyTorch's own, unless a hook runs before them."""
    return [m for m in model.modules() if m._forward_pre_hooks or not type(m).__module__.startswith("torch.nn.modules.")]


def forget_duals(modules: Iterable[nn.Module]) -> None:
    """Puts values in place of DualTensors that modules keep in attributes or buffers, also in lists, tuples and dicts: a later
    pass has other tangents, and none may be left where a model is saved."""
    for module in modules:
        for own in (module.__dict__, module._buffers):
            for name, value in own.items():
                if type(value) is DualTensor:
                    own[name] = value.primal
                elif type(value) in _CONTAINERS and value and name not in _OF_EVERY_MODULE:
                    own[name] = _without_duals(value)


_CONTAINERS = (list, tuple, dict)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_LONG = 1000  # a list of data rather than of what a pass has computed; looking through it would take longer than the pass


def _without_duals(container: Any, depth: int = 3) -> Any:
    """The container, with values in their place; a tuple anew."""
    if len(container) > _LONG or depth == 0:  # one may hold itself
        return container
    entries = container.items() if type(container) is dict else enumerate(container)
    found = {
        at: entry.primal if type(entry) is DualTensor else _without_duals(entry, depth - 1)
        for at, entry in entries
        if type(entry) is DualTensor or (type(entry) in _CONTAINERS and entry)
    }
    changed = {at: entry for at, entry in found.items() if entry is not container[at]}
    if type(container) is tuple:
        return tuple(changed.get(at, entry) for at, entry in enumerate(container)) if changed else container
    for at, entry in changed.items():
        container[at] = entry
    return container


def padding_rows(model: nn.Module) -> dict[str, int]:
    """By name of the parameter: rows of embeddings that have no gradient, because nothing but lookups of padding reads them."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    found = {}
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.padding_idx is not None:
            tied = names.get(id(module.weight), [])
            if len(tied) == 1:
                found[tied[0]] = module.padding_idx
    return found


def _trainable(model: nn.Module, wanted: Any) -> dict[str, Tensor]:
    """Parameters by name that require grad, tied ones once, restricted to the modules that ``layers=`` means."""
    chosen: set[int] | None = None
    if wanted is not None:
        chosen = {id(p) for group in wanted for _, member in group for p in parameters_of(member)}
    found: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            continue  # check_parameters names it
        if chosen is not None and id(p) not in chosen:
            continue
        if not p.is_floating_point() and (p.requires_grad or chosen is not None):
            raise TypeError(
                f"model: parameter {name} has dtype {p.dtype}; only real floating point parameters can be perturbed"
            )
        if p.requires_grad and p.numel() > 0:  # an empty one has no tangents, and the place of the one behind it
            found[name] = p
    check_parameters(model, found)
    return found


def check_parameters(model: nn.Module, found: dict[str, Tensor]) -> None:
    """Raises where there is nothing to perturb or the parameters are not on one device."""
    for name, p in model.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"model: parameter {name} is not initialized; run the model once, so that lazy modules know their sizes"
            )
    if not found:
        names = [name for name, _ in model.named_parameters()]
        why = "it has no parameters" if not names else f"none of {', '.join(names[:5])} that layers= selects requires grad"
        raise ValueError(f"model: nothing to perturb: {why}")
    devices = {p.device for p in found.values()}
    if len(devices) > 1:
        raise ValueError(
            f"model: its parameters are on several devices ({', '.join(sorted(map(str, devices)))}); one is needed"
        )
