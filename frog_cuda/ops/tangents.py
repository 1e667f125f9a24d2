"""Tangents drawn by a counter-based generator, what is made of them without storing them, and Gram matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd
from torch.autograd.graph import increment_version

from .helpers import _code, _guard, _guard_written, _ops

#: name -> code of ``distribution``
DISTRIBUTIONS = {"normal": 0, "rademacher": 1, "standard_basis": 2}


def sample_tangents(
    state: Tensor,
    k: int,
    numel: int,
    *,
    offset: int = 0,
    first: int = 0,
    distribution: str = "normal",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draws tangents ``first .. first+k`` restricted to the elements ``offset .. offset+numel`` of the global tangent vector.

    Element (i, j) is a pure function of (seed, step, first + i, offset + j) (Philox4x32-10, Salmon et al. 2011), whatever the
    chunk, slice, device or number of threads.

    Arguments:
        state: int64 ``(2,)`` holding ``[seed, step]``; for ``"standard_basis"`` the coordinates, int64 ``(>= first + k,)``.
            On a GPU the kernel reads it, without waiting: what the CPU refuses, a step outside ``[0, 2^32)`` or a negative
            coordinate, gives NaN there, in this operator and in all others that draw.
        distribution: ``"normal"``, ``"rademacher"`` or ``"standard_basis"``.
        dtype: floating dtype of the result; values are drawn in float32 and rounded.
    Returns:
        tangents ``(k, numel)``.
    """
    _guard("sample_tangents", state)
    code = _code(DISTRIBUTIONS, "distribution", distribution)
    with _AutoDispatchBelowAutograd():
        return _ops.sample_tangents(state, k, numel, offset, first, code, dtype)


def tangent_gram(state: Tensor, k: int, numel: int, *, offset: int = 0, first: int = 0, distribution: str = "normal") -> Tensor:
    """Gram matrix ``V^T V`` of the tangents that :func:`sample_tangents` would draw, without storing them.

    Arguments:
        state, k, numel, offset, first, distribution: as there.
    Returns:
        float64 ``(k, k)``, accumulated in float64 over blocks in a fixed order.
    """
    _guard("tangent_gram", state)
    code = _code(DISTRIBUTIONS, "distribution", distribution)
    with _AutoDispatchBelowAutograd():
        return _ops.tangent_gram(state, k, numel, offset, first, code)


def gram(tangents: Tensor) -> Tensor:
    """Gram matrix ``V^T V`` of given tangents.

    Arguments:
        tangents: ``(k, n)``.
    Returns:
        float64 ``(k, k)``, accumulated in float64.
    """
    _guard("gram", tangents)
    with _AutoDispatchBelowAutograd():
        return _ops.gram(tangents)


def sample_blocks(
    state: Tensor,
    k: int,
    numels: Sequence[int],
    offsets: Sequence[int],
    *,
    first: int = 0,
    distribution: str = "normal",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Several draws of :func:`sample_tangents` in one call, for what has many small pieces.

    Arguments:
        numels, offsets: of each block; block b has the elements ``offsets[b] .. offsets[b] + numels[b]`` of the tangents.
        state, first, distribution, dtype: as there.
    Returns:
        ``(k * sum(numels),)``: the blocks ``(k, numels[b])`` one behind the other, each contiguous.
    """
    _guard("sample_blocks", state)
    code = _code(DISTRIBUTIONS, "distribution", distribution)
    with _AutoDispatchBelowAutograd():
        return _ops.sample_blocks(state, k, numels, offsets, first, code, dtype)


def gram_blocks(blocks: Tensor, k: int, numels: Sequence[int]) -> Tensor:
    """Gram matrices of the blocks ``(k, numels[b])`` that lie one behind the other in ``(k * sum(numels),)``, as
    :func:`sample_blocks` draws them.

    Returns:
        float64 ``(len(numels), k, k)``, each to the bit what :func:`gram` gives.
    """
    _guard("gram_blocks", blocks)
    with _AutoDispatchBelowAutograd():
        return _ops.gram_blocks(blocks, k, numels)


def combine_blocks(blocks: Tensor, k: int, numels: Sequence[int], coefficients: Tensor) -> list[Tensor]:
    """``V c`` of each of the blocks ``(k, numels[b])`` that lie one behind the other in ``(k * sum(numels),)``.

    Arguments:
        coefficients: ``(k,)``, any float dtype. Low precision is summed in float32.
    Returns:
        a tensor ``(numels[b],)`` for each, in the dtype of the blocks.
    """
    _guard("combine_blocks", blocks, coefficients)
    with _AutoDispatchBelowAutograd():
        return _ops.combine_blocks(blocks, k, numels, coefficients)


def tangent_combine(
    state: Tensor,
    coefficients: Tensor,
    numel: int,
    *,
    offset: int = 0,
    first: int = 0,
    distribution: str = "normal",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``V c``: the linear combination of replayed tangents, which are never stored.

    Arguments:
        coefficients: ``(k,)``, any float dtype.
        state, numel, offset, first, distribution: as in :func:`sample_tangents`.
        dtype: floating dtype of the result; summed in float32, or in float64 for that.
    Returns:
        ``(numel,)``.
    """
    _guard("tangent_combine", state, coefficients)
    code = _code(DISTRIBUTIONS, "distribution", distribution)
    with _AutoDispatchBelowAutograd():
        return _ops.tangent_combine(state, coefficients, numel, offset, first, code, dtype)


def tangent_combine_samples(
    state: Tensor,
    coefficients: Tensor,
    numel: int,
    *,
    offset: int = 0,
    first: int = 0,
    distribution: str = "normal",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Linear combinations of replayed tangents, each sample's with coefficients of its own; the tangents are never stored.

    Arguments:
        coefficients: ``(k, B)``, any float dtype.
        numel: elements of a sample; sample b has elements ``offset + b numel .. offset + (b + 1) numel`` of the tangents.
    Returns:
        ``(B, numel)``: row b is the sum over i of ``coefficients[i, b]`` times tangent ``first + i`` on that sample.
    """
    _guard("tangent_combine_samples", state, coefficients)
    code = _code(DISTRIBUTIONS, "distribution", distribution)
    with _AutoDispatchBelowAutograd():
        return _ops.tangent_combine_samples(state, coefficients, numel, offset, first, code, dtype)


def tangent_axpy_(
    self: Tensor,
    state: Tensor,
    coefficients: Tensor,
    *,
    alpha: float = 1.0,
    offset: int = 0,
    first: int = 0,
    distribution: str = "normal",
) -> Tensor:
    """``self += alpha * V c`` in place with replayed tangents, which are never stored.

    Arguments:
        self: any shape, viewed as a flat vector of ``self.numel()`` elements.
        coefficients: ``(k,)``, any float dtype.
        state, offset, first, distribution: as in :func:`sample_tangents`.
    Returns:
        ``self``.
    """
    _guard("tangent_axpy_", self, state, coefficients)
    _guard_written("tangent_axpy_", self=self)
    code = _code(DISTRIBUTIONS, "distribution", distribution)
    with _AutoDispatchBelowAutograd():
        _ops.tangent_axpy_(self, state, coefficients, alpha, offset, first, code)
    if not self.is_inference():
        increment_version(self)  # so that a backward pass that still needs the old values says so
    return self


def tangent_sgd_(
    self: Tensor,
    buffer: Tensor | None,
    state: Tensor,
    coefficients: Tensor,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    fresh: bool = False,
    offset: int = 0,
    first: int = 0,
    distribution: str = "normal",
) -> Tensor:
    """A step of :class:`torch.optim.SGD` in place with the gradient ``V c``, replayed as parameter and buffer are written.

    ``g = V c + weight_decay * self``; ``buffer = momentum * buffer + (1 - dampening) * g``, or ``g`` where ``fresh``; then
    ``self -= lr * d`` with d the buffer, ``g + momentum * buffer`` where ``nesterov``, or ``g`` without momentum. Low precision
    is computed in float32 and rounded once for each result.

    Arguments:
        self: any shape, viewed as a flat vector.  buffer: like ``self``, or None exactly where ``momentum`` is 0.
        coefficients: ``(k,)``, any float dtype.
        lr, dampening: finite.  momentum, weight_decay: finite, >= 0.  nesterov: needs momentum > 0 and dampening 0.
        fresh: the buffer holds nothing yet; what is in it is not read.
        state, offset, first, distribution: as in :func:`sample_tangents`.
    Returns:
        ``self``.
    """
    _guard("tangent_sgd_", self, buffer, state, coefficients)
    _guard_written("tangent_sgd_", self=self, buffer=buffer)
    code = _code(DISTRIBUTIONS, "distribution", distribution)
    with _AutoDispatchBelowAutograd():
        _ops.tangent_sgd_(
            self, buffer, state, coefficients, lr, momentum, dampening, weight_decay, nesterov, fresh, offset, first, code
        )
    for t in (self, buffer):
        if t is not None and not t.is_inference():
            increment_version(t)
    return self
