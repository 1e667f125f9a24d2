"""What no rule knows: decompositions, and PyTorch's own forward mode for one operation at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..dual import DualTensor, called_from, resolve
from .helpers import common_k, low_dtype, parts, share_memory, wrap

#: PyTorch's forward mode counts its levels for the whole process: one thread at a time
_levels = threading.RLock()

# A rule runs with the autograd keys switched off, and so would everything inside torch.func.jvp. These are the dispatch keys of
# an ordinary call at top level.
with torch.inference_mode(False):
    _INCLUDE = torch._C._dispatch_tls_local_include_set()
    _EXCLUDE = torch._C._dispatch_tls_local_exclude_set()


def plan(func: Any) -> Callable[..., Any]:
    """How to serve an overload that has no rule of its own; asked once per overload."""
    from . import in_place

    schema = func._schema
    if any(a.is_out for a in schema.arguments):
        return _refuse_out
    random = torch.Tag.nondeterministic_seeded in func.tags
    first = schema.arguments[0] if schema.arguments else None
    if schema.name.endswith("_") and first is not None and first.alias_info is not None and first.alias_info.is_write:
        # A composite such as aten.dropout_ is served by its out-of-place twin, too
        return in_place.in_place
    # The compiled kernel is asked for by name: func.has_kernel_for_dispatch_key also counts decompositions written in Python
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd") and not random:
        return _decompose
    return fallback


def _decompose(func: Any, *args: Any, **kwargs: Any) -> Any:
    return func._op_dk(DispatchKey.CompositeImplicitAutograd, *args, **kwargs)


def _refuse_out(func: Any, *args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError(f"{func}{called_from()}: out= is not supported with a DualTensor; use the result instead")


def fallback(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Value and tangents of one operation through ``torch.func.jvp``, vectorised over k where PyTorch can.

    Raises:
        NotImplementedError: PyTorch has no forward-mode rule for the operation; names it and the module that called it.
    """
    flat, spec = tree_flatten((args, kwargs))
    flat = [resolve(a) for a in flat]
    k = common_k(func, *flat)
    # Zero tangents of a base are stored before it is viewed, so that what is written into either reaches both
    if any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
        for a in flat:
            if type(a) is DualTensor and a.sampled is None:
                a._tangents = a.tangents
    split = [parts(a) for a in flat]
    low = low_dtype(*flat)
    slots = [i for i, (_, t) in enumerate(split) if t is not None]
    values = [p for p, _ in split]
    spare = _mutated_copies(func, values, spec)  # before the call below writes into them
    random = torch.Tag.nondeterministic_seeded in func.tags
    rewind = _Rewind(values) if random else None
    a, kw = tree_unflatten(values, spec)
    # Bad arguments raise PyTorch's own error here; the value is exactly the plain operation's, and running statistics
    # are updated once
    out = func(*a, **kw)
    outs, out_spec = tree_flatten(out)
    if slots and any(isinstance(o, Tensor) and o.is_quantized for o in outs):
        raise NotImplementedError(
            f"{func}{called_from()}: the result is quantized and cannot carry tangents; use the primal if that is meant, or "
            "a rounding that lets tangents pass"
        )
    wanted = [j for j, o in enumerate(outs) if isinstance(o, Tensor) and (o.is_floating_point() or o.is_complex())]
    for a, (p, _) in zip(flat, split, strict=True):
        for j in [j for j in wanted if type(a) is DualTensor and outs[j] is p]:
            outs[j] = a  # as it is, such as by a dropout of feature maps that does not drop
            wanted.remove(j)
    if not slots or not wanted:
        return tree_unflatten(outs, out_spec)
    primals = tuple(_apart(func, split[i][0]) for i in slots)
    tangents = tuple(_tangent_like(t, p) for p, t in (split[i] for i in slots))
    connected: set[int] = set()

    def one(*inner: Tensor) -> tuple[Tensor, ...]:
        again = list(values)
        for i, copy in spare.items():
            again[i] = copy.clone()
        for i, p in zip(slots, inner, strict=True):
            again[i] = p
        a, kw = tree_unflatten(again, spec)
        results = tree_flatten(func(*a, **kw))[0]
        results = [results[j] for j in wanted]
        connected.update(j for j, r in zip(wanted, results, strict=True) if forward_ad.unpack_dual(r).tangent is not None)
        return tuple(results)

    with _levels, _top_level():
        d_outs = _push(func, one, primals, tangents, k, rewind)
    if not connected:
        # PyTorch hands back zeros for an operator whose derivative nobody has registered, such as a Bessel function
        raise NotImplementedError(
            f"{func}{called_from()}: no forward-mode derivative is registered; PyTorch would take its tangents as zero"
        )
    given = [(p, t) for p, t in split if t is not None]
    for j, d in zip(wanted, d_outs, strict=True):
        if j in connected:
            d = d.contiguous()  # in the layout of other tangents, k outermost
            views = any(share_memory(outs[j], p) for p, _ in given)
            shared = any(share_memory(d, t) for _, t in given)
            if shared and not views:
                d = d.clone()  # frac and the likes of squeeze_copy hand a tangent on as it is
            outs[j] = wrap(outs[j], d, low)
            if views and not shared:
                outs[j]._copied_from(outs[j]._primal, f"a view made by {func}, whose tangents are a copy")
            elif views:
                seen = outs[j]._primal
                why = [a._readonly for a in flat if type(a) is DualTensor and share_memory(seen, a._primal)]
                for reason in [w for w in why if w is not None][:1]:  # its tangents share the memory of a copy
                    outs[j]._copied_from(seen, reason)
    return tree_unflatten(outs, out_spec)


def _push(
    func: Any,
    one: Callable[..., Any],
    primals: tuple[Tensor, ...],
    tangents: tuple[Tensor, ...],
    k: int,
    rewind: _Rewind | None,
) -> tuple[Tensor, ...]:
    """Tangents of the outputs, each (k, *shape)."""

    def jvp(*t: Tensor) -> tuple[Tensor, ...]:
        return torch.func.jvp(one, primals, t)[1]

    # as_strided must see each tangent with the memory layout of the primal, which a batched tangent does not have
    if rewind is None and "as_strided" not in func._schema.name:
        try:
            with _no_slow_vmap():
                return torch.func.vmap(jvp)(*tangents)
        except (RuntimeError, ValueError, NotImplementedError, IndexError):
            pass  # not vectorisable; if there is no derivative at all, the loop says so
    try:
        rows = []
        for i in range(k):
            with rewind or nullcontext():
                rows.append(jvp(*(t[i] for t in tangents)))
    except (RuntimeError, NotImplementedError) as error:
        raise NotImplementedError(
            f"{func}{called_from()}: no rule for DualTensor, and PyTorch's forward mode fails: {error}"
        ) from error
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


def _apart(func: Any, primal: Tensor) -> Tensor:
    """PyTorch lays a tangent out like its primal: one made by expand or unfold must first get elements of its own."""
    if "as_strided" in func._schema.name or torch._debug_has_internal_overlap(primal) == 0:
        return primal
    return primal.clone(memory_format=torch.contiguous_format)


def _tangent_like(tangents: Tensor | None, primal: Tensor) -> Tensor:
    assert tangents is not None
    if tangents.dtype != primal.dtype:
        tangents = tangents.to(primal.dtype)
    if tangents.is_inference():
        tangents = tangents.clone()
    return tangents


def _mutated_copies(func: Any, values: list[Any], spec: Any) -> dict[int, Tensor]:
    """Copies of the arguments that the operation writes into, such as running statistics, by position in ``values``."""
    arguments = func._schema.arguments
    args, kwargs = tree_unflatten(list(range(len(values))), spec)
    copies = {}
    for i, argument in enumerate(arguments):
        # native_batch_norm and its relatives update these although their schemas do not say so
        declared = argument.alias_info is not None and argument.alias_info.is_write
        if not declared and argument.name not in ("running_mean", "running_var"):
            continue
        at = args[i] if i < len(args) else kwargs.get(argument.name)
        if isinstance(at, int) and isinstance(values[at], Tensor):
            copies[at] = values[at].clone()
    return copies


@contextmanager
def _top_level() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad(), torch._C._ForceDispatchKeyGuard(_INCLUDE, _EXCLUDE):
        yield


@contextmanager
def _no_slow_vmap() -> Iterator[None]:
    """vmap's own loop for operations without a batching rule warns on every call; ours does not and is no slower."""
    functorch: Any = torch._C._functorch
    before = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_enabled(before)


class _Rewind:
    """Replays the random numbers of one operation: inside the context the generators stand where they stood at creation."""

    def __init__(self, values: list[Any]) -> None:
        self.generators = [v for v in values if isinstance(v, torch.Generator)]
        if not self.generators:
            self.generators = [torch.default_generator]
            devices = {v.device for v in values if isinstance(v, Tensor) and v.is_cuda}
            self.generators += [torch.cuda.default_generators[d.index] for d in devices]
        self.states = [g.get_state() for g in self.generators]

    def __enter__(self) -> None:
        self.later = [g.get_state() for g in self.generators]
        for generator, state in zip(self.generators, self.states, strict=True):
            generator.set_state(state)

    def __exit__(self, *_: object) -> None:
        for generator, state in zip(self.generators, self.later, strict=True):
            generator.set_state(state)
