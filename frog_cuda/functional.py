"""Forward-mode derivatives of any function of tensors, k directions at a time."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

from ._deferred import deferring
from .custom_functions import intercepted
from .dual import DualTensor
from .stopping import not_stopping
from .surroundings import as_written

__all__ = ["jvp"]


def jvp(fn: Callable[..., Any], primals: Any, tangents: Any, *, chunk_size: int | None = None) -> tuple[Any, Any]:
    """``fn(*primals)`` and its derivatives along k tangents, in one forward pass.

    What ``torch.func.vmap`` of ``torch.func.jvp`` computes, for functions made of any PyTorch operations, including those that
    vmap cannot handle (control flow on values, in-place operations, dropout with one mask for all tangents).

    Arguments:
        fn: takes ``*primals``; returns a pytree of tensors.
        primals: tuple or list of pytrees of tensors (other leaves are passed on).
        tangents: like ``primals``, each tensor ``(k, *shape)`` of its primal, same dtype and device, the same k throughout.
            None in place of a tensor or of a whole subtree: not perturbed.
        chunk_size: at most so many tangents at a time, to bound the memory; ``fn`` then runs ``ceil(k / chunk_size)`` times,
            each time with the same random numbers.
    Returns:
        ``(out, out_tangents)``: the value and, for each tensor, its tangents ``(k, *shape)``; zeros where an output does not
        depend on what is perturbed, as in ``torch.func.jvp``. Nothing is recorded for backward.
    Raises:
        TypeError: structures differ, a tangent of a tensor that is not floating point, a DualTensor, as inside another
            ``jvp``, ``fn`` returns something else than tensors.
        ValueError: shape, dtype, device or k do not fit; no tangents at all; chunk_size < 1.
        NotImplementedError: PyTorch has no forward-mode rule for an operation in ``fn``; the error names it and the
            module that called it.
    """
    if not isinstance(primals, (tuple, list)) or not isinstance(tangents, (tuple, list)):
        raise TypeError(
            f"jvp: primals and tangents are of types {type(primals).__name__} and {type(tangents).__name__}; expected tuples"
        )
    counts = isinstance(chunk_size, (int, np.integer)) and not isinstance(chunk_size, bool)
    if chunk_size is not None and (not counts or chunk_size < 1):
        raise ValueError(f"jvp: chunk_size is {chunk_size!r}; expected an integer >= 1, or None")
    if _functorch.peek_interpreter_stack() is not None:
        raise RuntimeError("jvp: called inside a torch.func transform (grad, jvp or vmap), which it does not compose with")
    flat, spec = tree_flatten(tuple(primals))
    directions: list[Tensor | None] = []
    _match(tuple(primals), tuple(tangents), "primals", directions)
    for name, leaves in (("primal", flat), ("tangent", directions)):
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, DualTensor):
                raise TypeError(f"jvp: {name} {i} is a DualTensor, whose own tangents would be lost; jvp does not nest")
    k = _checked_k(flat, directions)
    size = k if chunk_size is None else min(int(chunk_size), k)
    starts = list(range(0, k, size))
    values: list[Tensor] = []
    columns: list[list[Tensor]] = []
    numbers = RandomNumbers(flat) if len(starts) > 1 else None
    with torch.no_grad(), not_stopping(), intercepted(), as_written():
        for start in starts:
            if numbers is not None:
                numbers.rewind()
            # If fn writes into its arguments, the caller's see it once, after the last chunk; tangents never do.
            last = start == starts[-1]
            leaves = [_leaf(p, v, slice(start, start + size), last) for p, v in zip(flat, directions, strict=True)]
            outs, out_spec = tree_flatten(fn(*tree_unflatten(leaves, spec)))
            values, chunk = _split(outs, len(range(start, min(start + size, k))))
            columns.append(chunk)
    out_tangents = [c[0] if len(c) == 1 else torch.cat(c) for c in zip(*columns, strict=True)]
    return tree_unflatten(values, out_spec), tree_unflatten(out_tangents, out_spec)


def _match(primal: Any, tangent: Any, where: str, found: list[Tensor | None]) -> None:
    """Appends the tangent of each leaf of ``primal``, None where there is none."""
    leaves, spec = tree_flatten(primal)
    if tangent is None:
        found += [None] * len(leaves)
    elif spec.is_leaf():
        if not isinstance(tangent, Tensor):
            raise TypeError(f"jvp: the tangent of {where} is of type {type(tangent).__name__}; expected a tensor or None")
        found.append(tangent)
    else:
        if isinstance(primal, dict) and isinstance(tangent, dict) and set(tangent) <= set(primal):
            for key in spec.context if isinstance(spec.context, list) else list(primal):
                _match(primal[key], tangent.get(key), f"{where}[{key!r}]", found)
            return
        if not isinstance(primal, (tuple, list)) or not isinstance(tangent, (tuple, list)) or len(primal) != len(tangent):
            raise TypeError(
                f"jvp: tangents do not have the structure of {where}: got {_describe(tangent)}, expected {_describe(primal)}"
            )
        for i, (p, t) in enumerate(zip(primal, tangent, strict=True)):
            _match(p, t, f"{where}[{i}]", found)


def _describe(tree: Any) -> str:
    if isinstance(tree, dict):
        return f"a dict with keys {list(tree)}"
    return f"a {type(tree).__name__}" + (f" of length {len(tree)}" if isinstance(tree, (tuple, list)) else "")


def _checked_k(flat: list[Any], directions: list[Tensor | None]) -> int:
    k = 0
    for i, (p, v) in enumerate(zip(flat, directions, strict=True)):
        if v is None:
            continue
        if not isinstance(p, Tensor) or not (p.is_floating_point() or p.is_complex()):
            what = p.dtype if isinstance(p, Tensor) else type(p).__name__
            raise TypeError(f"jvp: primal {i} ({what}) has a tangent, but only floating point and complex tensors can have one")
        for name, t in (("primal", p), ("tangent", v)):
            if forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None:  # type: ignore[attr-defined]
                raise RuntimeError(
                    f"jvp: {name} {i} is a torch.autograd.forward_ad dual tensor, whose own tangent would be lost"
                )
        if v.dim() < 1 or v.shape[1:] != p.shape:
            raise ValueError(f"jvp: tangent {i} has shape {tuple(v.shape)}; expected (k, *{tuple(p.shape)})")
        if v.dtype != p.dtype or v.device != p.device:
            raise ValueError(f"jvp: tangent {i} is {v.dtype} on {v.device}, but its primal is {p.dtype} on {p.device}")
        if v.shape[0] < 1:
            raise ValueError(f"jvp: tangent {i} has k = {v.shape[0]}; at least 1 tangent is needed")
        if k and v.shape[0] != k:
            raise ValueError(f"jvp: tangents disagree in number: tangent {i} has k = {v.shape[0]}, another has k = {k}")
        k = v.shape[0]
    if k == 0:
        raise ValueError("jvp: no primal has a tangent; at least one tensor must be perturbed")
    return k


def _leaf(primal: Any, tangent: Tensor | None, chunk: slice, last: bool) -> Any:
    if not isinstance(primal, Tensor):
        return primal
    value = primal.detach() if last else copy_if_written(primal.detach())
    if tangent is None:
        return value
    return DualTensor(value, copy_if_written(tangent.detach()[chunk]))


def copy_if_written(tensor: Tensor) -> Tensor:
    """The same values, copied once somebody writes into either."""
    try:
        return torch._lazy_clone(tensor)
    except RuntimeError:  # memory that PyTorch did not allocate itself, such as numpy's, can only be copied at once
        return tensor.clone()


def _split(outs: list[Any], k: int) -> tuple[list[Tensor], list[Tensor]]:
    values, tangents = [], []
    for out in outs:
        if not isinstance(out, Tensor):
            raise TypeError(f"jvp: fn returned a {type(out).__name__}; expected tensors only")
        if isinstance(out, DualTensor):
            values.append(out.primal)
            tangents.append(out.tangents)
        else:
            values.append(out)
            tangents.append(torch.zeros((k, *out.shape), dtype=out.dtype, device=out.device))
    return values, tangents


def _same(a: Any, b: Any) -> bool:
    """Of states of generators: tensors, or tuples with numpy's arrays."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return all(np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y for x, y in zip(a, b, strict=True))


class RandomNumbers:
    """Remembers where the random number generators stand: PyTorch's of the CPU and of the tensors' GPUs, those that modules
    keep in attributes, Python's and numpy's.

    Attributes:
        moved: whether numbers were drawn when they were last replayed.
    """

    moved = False

    def __init__(self, leaves: Iterable[Any], modules: Iterable[nn.Module] = ()) -> None:
        self._generators: list[torch.Generator] = []
        self._states: tuple[list[Tensor], list[Any]] | None = None
        if deferring():  # inside a CUDA graph no state can be read; whoever captures has seen that no numbers are drawn
            return
        devices = {leaf.device.index for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_cuda}
        own = [value for module in modules for value in vars(module).values() if isinstance(value, torch.Generator)]
        self._generators = [torch.default_generator, *(torch.cuda.default_generators[d] for d in devices), *own]
        self._states = self._read()

    def _read(self) -> tuple[list[Tensor], list[Any]]:
        return [g.get_state() for g in self._generators], [random.getstate(), np.random.get_state()]  # noqa: NPY002

    def _set(self, states: tuple[list[Tensor], list[Any]]) -> None:
        for generator, state in zip(self._generators, states[0], strict=True):
            generator.set_state(state)
        random.setstate(states[1][0])
        np.random.set_state(states[1][1])  # noqa: NPY002

    def drawn(self) -> bool:
        """Whether any of them has moved since; never where no state can be read."""
        if self._states is None:
            return False
        generators, others = self._read()
        pairs = [*zip(self._states[0], generators, strict=True), *zip(self._states[1], others, strict=True)]
        return not all(_same(a, b) for a, b in pairs)

    def rewind(self) -> None:
        """Puts them back, so that the next pass draws what the first one drew."""
        assert self._states is not None
        self._set(self._states)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, the numbers drawn since; afterwards, the generators stand where they stood before."""
        if self._states is None:
            yield
            return
        later = self._read()
        self.rewind()
        try:
            yield
        finally:
            self.moved = self.drawn()
            self._set(later)
