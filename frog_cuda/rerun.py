"""Gradients of layers without a closed form: the layer runs again on what it was given, with autograd on.

A layer's random numbers and buffers are those of its first run, and its inputs are what they were then, so nothing of the model
outside the layer is needed or touched. A group of several modules is no function that could be called: for it the whole pass is
repeated, see :mod:`frog_cuda.activity`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakIdKeyDictionary

from ._recording import recording
from .dual import DualTensor
from .exchange import buffers_as, saved_buffers
from .functional import RandomNumbers, copy_if_written
from .layers import Group


class Finished(BaseException):
    """Ends a pass early; no error, so that no model catches it."""


def snapshot(tree: Any) -> Any:
    """Values as they are now, whatever writes into the tensors later. What is the same tensor stays so, as the query, key and
    value of self-attention are. Objects are copied, too, such as a cache that layers append to."""
    return _Snapshot().of(tree)


class _Snapshot:
    """No nested function, whose reference to itself would keep what was seen until garbage is collected."""

    def __init__(self) -> None:
        #: by id: what it is of, which stays alive with it, and the copy
        self._seen: dict[int, tuple[Any, Any]] = {}
        self._depth = 0

    def of(self, tree: Any) -> Any:
        return tree_map(self._leaf, tree)

    def _leaf(self, leaf: Any) -> Any:
        known = self._seen.get(id(leaf))
        if known is not None:
            return known[1]
        if isinstance(leaf, Tensor):
            copy: Any = _value(leaf) if isinstance(leaf, DualTensor) else copy_if_written(leaf.detach())
            self._seen[id(leaf)] = leaf, copy
        elif _is_copied(leaf) and len(self._seen) < _MOST_OBJECTS and self._depth < _DEEPEST:
            copy = object.__new__(type(leaf))
            self._seen[id(leaf)] = leaf, copy
            self._depth += 1
            copy.__dict__.update((name, self.of(value)) for name, value in vars(leaf).items())
            self._depth -= 1
        else:
            return leaf
        return copy


#: tensors and objects beyond which no more objects are copied, and how many objects may lie within one another
_MOST_OBJECTS, _DEEPEST = 10_000, 20


def _is_copied(leaf: Any) -> bool:
    """An object of a class written in Python, all of which is in its attributes, and which is no part of a model. A class that
    says itself how it is copied may have its reasons."""
    kind = type(leaf)
    if kind.__new__ is not object.__new__ or not hasattr(leaf, "__dict__") or isinstance(leaf, nn.Module):
        return False
    return not any(hasattr(kind, name) for name in ("__copy__", "__deepcopy__", "__del__"))


#: the primal of a DualTensor, its version, and a copy of it as it was then
_values: Any = WeakIdKeyDictionary()


def _value(dual: DualTensor) -> Tensor:
    """A copy: the value itself lies beside the tangents, which it alone would keep alive. One for all layers that are given
    the same, as they are where each layer's keys and values are put into one cache."""
    primal, version, value = _values.get(dual, (None, 0, None))
    if primal is not dual.primal or version != primal._version:
        primal = dual.primal
        value = primal.clone()
        _values[dual] = primal, primal._version, value
    return value


class Call:
    """One call of a layer, to be made again.

    Arguments:
        versions: those of the layer's parameters where its last call in this pass ended; for all calls the same list.
    Attributes:
        group: the layer.
        draws_numbers: whether the layer drew random numbers.
    """

    draws_numbers = False

    def __init__(self, group: Group, args: tuple[Any, ...], kwargs: dict[str, Any], versions: list[int]) -> None:
        self.group, layer = group, group.output
        self._given = snapshot((args, kwargs))
        self._parameters = list(layer.parameters())
        # A layer may write into its own parameters, as embeddings with max_norm do, but nobody else between its calls
        self._versions, self._moved = versions, bool(versions) and versions != self._present()
        self._numbers = RandomNumbers(self._parameters, layer.modules())
        self._buffers = saved_buffers(layer)

    def _present(self) -> list[int]:
        return [p._version for p in self._parameters]

    def given(self) -> Any:
        """Arguments and keyword arguments of the call."""
        return snapshot(self._given)  # which the layer may write into

    def ended(self) -> None:
        """The layer has run."""
        if not self._moved:
            self._versions[:] = self._present()
        self.draws_numbers = self._numbers.drawn()

    def again(self) -> None:
        """Runs the layer; a hook takes its output.

        Raises:
            RuntimeError: its parameters have changed in the meantime, or it raises now although it did not at first.
        """
        name = self.group.name or "the model"
        if self._moved or self._present() != self._versions:
            raise RuntimeError(
                f"layers: the parameters of {name} were changed after the forward pass, but the layer has no closed-form "
                "gradient and runs again for it; take gradients before the parameters move"
            )
        args, kwargs = self.given()
        with recording(), self._numbers.replayed() if self.draws_numbers else nullcontext():
            try:
                with buffers_as(self.group.output, self._buffers):
                    self.group.output(*args, **kwargs)
            except Finished:
                pass
            except Exception as error:
                raise RuntimeError(f"{differs(self.group)} It raised {type(error).__name__}: {error}") from error
        self._versions[:] = self._present()


def differs(group: Group) -> str:
    """What an error says of a layer whose second run is not as the first."""
    return (
        f"layers: {group.name or 'the model'} has no closed-form gradient and runs a second time for it, but did not do the "
        "same as in the forward pass. A layer must not keep state between calls other than buffers and random numbers: no "
        "counter, and no cache of keys and values (use_cache=False)."
    )


def mark(y: Tensor) -> Tensor:
    """float64 (17,): random projections of the values of ``y`` (B, *), which move about as far as these do, and their norm."""
    y = y.detach()
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    rows = y.flatten(0, -2) if y.dim() > 1 else y.unsqueeze(1)
    left, right = (_weights(n, y) for n in rows.shape)
    projections = left.T @ (rows @ right)  # (4, 4)
    return torch.cat((projections.flatten() / 4, torch.linalg.vector_norm(rows).unsqueeze(0))).double()


def _weights(n: int, like: Tensor) -> Tensor:
    """(n, 4), as if random, of mean square 1: fractional parts that no regular pattern is orthogonal to."""
    j = torch.arange(1, n + 1, dtype=torch.float64, device=like.device).square_()
    # Not copied from the host, which a captured graph cannot do
    rates = torch.arange(2, 6, dtype=torch.float64, device=like.device).add_(0.618034).sqrt_()
    return torch.outer(j, rates).frac_().sub_(0.5).mul_(12**0.5).to(like)


def same(first: Tensor, second: Tensor, layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """0-dim bool: whether these marks can be those of the same values of ``dtype`` but for rounding. The kernels of the two
    runs are not the same, and rounding, in the least precision of the layer, adds up over what it consists of."""
    dtypes = {dtype, *(p.dtype for p in layer.parameters() if p.is_floating_point())}
    tolerance = min(8 * max(torch.finfo(d).eps for d in dtypes) ** 0.5, 0.1)
    far = torch.linalg.vector_norm(first - second) > tolerance * torch.maximum(first[-1], second[-1])
    return ~far  # nor is what is not finite


def local_gradients(
    outputs: Sequence[Tensor], gradients: Sequence[Tensor], parameters: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of parameters that get ``gradients`` through recorded ``outputs``; None for those that took no part."""
    pairs = [(y, g.to(y.dtype)) for y, g in zip(outputs, gradients, strict=True) if y.requires_grad]
    if not pairs:
        return [None] * len(parameters)
    found = torch.autograd.grad([y for y, _ in pairs], list(parameters), [g for _, g in pairs], allow_unused=True)
    return list(found)
