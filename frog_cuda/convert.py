"""Turning the layers of a model into drop-in ones, and seeing how each of its calls is served."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import dual
from .custom_functions import intercepted
from .dual import DualTensor
from .exchange import exchanged, unmoved_buffers
from .nn import DROP_IN
from .rules import fallback
from .weight import inputs_of

__all__ = ["Conversion", "Coverage", "convert", "coverage"]

#: rules in these files end in a compiled operator
_FUSED = {
    f"{__package__}.rules.{stem}"
    for stem in ("attention", "embedding", "linear", "losses", "normalization", "pointwise", "pooling", "softmax")
}


#: coverage wraps the rules, of which there is one table
_one_at_a_time = threading.RLock()


@dataclass
class Conversion:
    """What :func:`convert` did; prints as a table.

    Attributes:
        swapped: module path -> class name of the layers that are drop-in ones now.
        generic: module path -> class name of the other modules with computations of their own, which stay as they are.
    """

    swapped: dict[str, str] = field(default_factory=dict)
    generic: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [(path or "(model)", name, "drop-in") for path, name in self.swapped.items()]
        rows += [(path or "(model)", name, "generic") for path, name in self.generic.items()]
        return _table(("module", "class", "now"), rows)


def convert(model: nn.Module) -> Conversion:
    """Swaps the layers of ``model`` for those of :mod:`frog_cuda.nn`, in place.

    The modules stay the same objects with the same parameters, buffers and hooks; only their class changes, to a subclass of
    what it was. A subclass of a layer is left alone, because it may compute something else.

    Arguments:
        model: any module.
    Returns:
        :class:`Conversion`: what was swapped and what stays generic.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    >>> print(convert(model))
    module  class   now
    0       Linear  drop-in
    1       ReLU    drop-in
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model is of type {type(model).__name__}; expected a torch.nn.Module")
    done = Conversion()
    converted = set(DROP_IN.values())
    for path, module in model.named_modules():
        name = type(module).__name__
        if type(module) in DROP_IN:
            module.__class__ = DROP_IN[type(module)]
            done.swapped[path] = name
        elif type(module) in converted:
            done.swapped[path] = name
        elif not any(True for _ in module.children()) or any(True for _ in module.parameters(recurse=False)):
            done.generic[path] = name
    return done


@dataclass
class Coverage:
    """How each call of a forward pass is served; prints as a table.

    Attributes:
        rows: (module path, call, how) -> number of calls. how: ``"fused"``, a compiled operator for the value and all tangents;
            ``"rule"``, library calls with k as one more batch axis; ``"fallback"``, PyTorch's own forward mode of this one
            operation, vectorised over k; ``"unsupported"``, the pass ended here.
    """

    rows: dict[tuple[str, str, str], int] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [(path or "(model)", call, how, str(n)) for (path, call, how), n in self.rows.items()]
        return _table(("module", "call", "how", "times"), rows)

    def count(self, how: str) -> int:
        """Number of calls served in this way."""
        return sum(n for (_, _, h), n in self.rows.items() if h == how)


def coverage(model: nn.Module, input: Any) -> Coverage:
    """Runs ``model`` once with tangents on the input and on all parameters, and records how each call on them is served.

    Arguments:
        model: any module; its buffers are not moved.
        input: as for a call of :class:`frog_cuda.ForwardGradient`.
    Returns:
        :class:`Coverage`. If an operation is not supported at all, it is the last row.

    >>> print(coverage(nn.Sequential(nn.Linear(3, 4), nn.Mish()), torch.ones(2, 3)))
    module  call       how       times
    0       linear     fused     1
    1       aten.mish  fallback  1
    """
    args, kwargs = inputs_of(input)
    found, path = Coverage(), [""]
    with _one_at_a_time, torch.no_grad(), intercepted(), _paths(model, path), _recorded(found, path):
        own = {id(p): _dual(p) for p in model.parameters()}
        try:
            with unmoved_buffers(model), exchanged(model, own):
                model(*map(_dual, args), **{n: _dual(a) for n, a in kwargs.items()})
        except NotImplementedError as error:
            found.rows[path[-1], re.split(r":| \(called from", str(error))[0], "unsupported"] = 1
    return found


def _dual(x: Any) -> Any:
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
        return x
    return DualTensor(x, torch.ones((1, *x.shape), dtype=x.dtype, device=x.device))


@contextmanager
def _paths(model: nn.Module, path: list[str]) -> Iterator[None]:
    """Keeps the path of the running module at the end of ``path``."""
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda m, a, name=name: path.append(name)))
        handles.append(module.register_forward_hook(lambda m, a, o: path.pop() and None))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _recorded(found: Coverage, path: list[str]) -> Iterator[None]:
    """Wraps every rule for the time of one pass, so that ordinary passes pay nothing for this. Passes of other threads go on
    meanwhile and are not recorded."""
    depth, here = [0], threading.get_ident()

    def note(call: str, how: str) -> None:
        key = path[-1], call, how
        found.rows[key] = found.rows.get(key, 0) + 1

    def wrapped(body: Any, named: Any, how: str) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != here:
                return body(*args, **kwargs)
            depth[0] += 1
            try:
                out = body(*args, **kwargs)
            finally:
                depth[0] -= 1
            if out is not NotImplemented and depth[0] == 0:
                note(named(*args), how)
            return out

        return run

    functions, overloads, plan, last = dict(dual.FUNCTION_RULES), dict(dual.ATEN_RULES), fallback.plan, fallback.fallback
    for function, body in functions.items():
        name = getattr(function, "__name__", str(function))
        if name == "__set__":
            continue
        dual.FUNCTION_RULES[function] = wrapped(body, lambda *a, name=name: name, _how(body))
    for overload, body in overloads.items():
        if body is not fallback._decompose:
            dual.ATEN_RULES[overload] = wrapped(body, lambda func, *a: str(func).rsplit(".", 1)[0], _how(body))
    fallback.fallback = wrapped(last, lambda func, *a: str(func).rsplit(".", 1)[0], "fallback")
    fallback.plan = lambda func: fallback.fallback if (body := plan(func)) is last else body
    try:
        yield
    finally:
        fallback.plan, fallback.fallback = plan, last
        dual.FUNCTION_RULES.update(functions)
        dual.ATEN_RULES.update(overloads)
        for overload in set(dual.ATEN_RULES) - set(overloads):  # planned meanwhile, maybe with a wrapped body
            del dual.ATEN_RULES[overload]


def _how(body: Any) -> str:
    if body is fallback.fallback:
        return "fallback"
    return "fused" if body.__module__ in _FUSED else "rule"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]]
    return "\n".join(lines)
