"""Philox, the distributions, and what is made of sampled tangents."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def philox4x32_10(counters: np.ndarray, k0: int, k1: int) -> np.ndarray:
    """Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011): counters ``(n, 4)`` and a key -> words ``(n, 4)``, all uint32."""
    c = np.asarray(counters).astype(np.uint64).T
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    for round in range(10):
        # the key moves on by the golden ratio and by sqrt(3) - 1, modulo 2^32
        key0 = np.uint64((k0 + round * 0x9E3779B9) & 0xFFFFFFFF)
        key1 = np.uint64((k1 + round * 0xBB67AE85) & 0xFFFFFFFF)
        p0 = np.uint64(0xD2511F53) * c[0]
        p1 = np.uint64(0xCD9E8D57) * c[2]
        c = np.stack([(p1 >> half) ^ c[1] ^ key0, p1 & low, (p0 >> half) ^ c[3] ^ key1, p0 & low])
    return c.T.astype(np.uint32)


def _words(seed: int, step: int, tangent: int, calls: np.ndarray) -> np.ndarray:
    """The four words of each call (uint64) of one tangent: counter = (call low, call high, tangent, step), key = seed."""
    seed &= 0xFFFFFFFFFFFFFFFF  # a negative seed counts as its two's complement
    counters = np.empty((len(calls), 4), np.uint64)
    counters[:, 0] = calls & np.uint64(0xFFFFFFFF)
    counters[:, 1] = calls >> np.uint64(32)
    counters[:, 2] = tangent
    counters[:, 3] = step
    return philox4x32_10(counters, seed & 0xFFFFFFFF, seed >> 32)


def _calls(offset: int, numel: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Place of each element within its group of ``group`` elements, and the first of the eight calls of that group."""
    index = np.uint64(offset) + np.arange(numel, dtype=np.uint64)
    return index % np.uint64(group), index // np.uint64(group) * np.uint64(8)


def _normal(seed: int, step: int, tangent: int, offset: int, numel: int) -> np.ndarray:
    """Box-Muller: a word of Philox gives two elements.

    Groups of 64 elements take eight calls. Word w of call c holds element 32 (w // 2) + 16 (c % 2) + 4 (c // 2) + 2 (w % 2) and
    the next one.
    """
    e, first = _calls(offset, numel, 64)
    e = e.astype(np.int64)
    call = first + (2 * (e // 4 % 4) + e // 16 % 2).astype(np.uint64)
    word = _one_of_four(_words(seed, step, tangent, call), 2 * (e // 32) + e // 2 % 2)
    # Radius: midpoints of 2^23 equal cells of (0, 1), from bits 8..31. Angle: odd multiples of 2^-15 in (-1, 1) quarter turns,
    # from bits 1..15. Bit 0: the sign of the cosine.
    u = ((word >> 8) | 1) / 2.0**24
    x = ((word & 0xFFFF) | 1) / 2.0**15 - 1
    radius = np.sqrt(-2 * np.log(u))
    cosine = radius * np.cos(x * math.pi / 2) * np.where(word & 1, -1.0, 1.0)
    sine = radius * np.sin(x * math.pi / 2)
    return np.where(e % 2 == 0, cosine, sine)


def _rademacher(seed: int, step: int, tangent: int, offset: int, numel: int) -> np.ndarray:
    """A bit gives one element; a set bit is -1.

    Eight calls give a group of 1024. Element e is bit e % 32 of word 2 (e // 512) + (e // 32) % 2 of call (e // 64) % 8.
    """
    e, first = _calls(offset, numel, 1024)
    e = e.astype(np.int64)
    call = first + (e // 64 % 8).astype(np.uint64)
    word = _one_of_four(_words(seed, step, tangent, call), 2 * (e // 512) + e // 32 % 2)
    return np.where((word >> (e % 32)) & 1, -1.0, 1.0)


def _one_of_four(words: np.ndarray, which: np.ndarray) -> np.ndarray:
    return np.take_along_axis(words.astype(np.int64), which[:, None], axis=1)[:, 0]


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
    """Tangents ``first .. first+k``, elements ``offset .. offset+numel``: float64 ``(k, numel)``."""
    if distribution == "standard_basis":
        v = torch.zeros(k, numel, dtype=torch.float64)
        for i, coordinate in enumerate(state.tolist()[first : first + k]):
            if offset <= coordinate < offset + numel:
                v[i, coordinate - offset] = 1
        return v
    draw = {"normal": _normal, "rademacher": _rademacher}[distribution]
    seed, step = state.tolist()
    v = torch.empty(k, numel, dtype=torch.float64)
    for i in range(k):
        v[i] = torch.from_numpy(draw(seed, step, first + i, offset, numel))
    return v


def tangent_gram(state: Tensor, k: int, numel: int, *, offset: int = 0, first: int = 0, distribution: str = "normal") -> Tensor:
    """``V^T V`` of sampled tangents: ``(k, k)``."""
    return gram(sample_tangents(state, k, numel, offset=offset, first=first, distribution=distribution))


def gram(tangents: Tensor) -> Tensor:
    """``V^T V`` of the tangents in the rows of ``(k, n)``: ``(k, k)``."""
    v = tangents.double()
    return v @ v.T


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
    """Blocks ``(k, numels[b])`` of sampled tangents, one behind the other: float64 ``(k * sum(numels),)``."""
    drawn = [torch.empty(0, dtype=torch.float64)]
    for numel, offset in zip(numels, offsets, strict=True):
        block = sample_tangents(state, k, numel, offset=offset, first=first, distribution=distribution)
        drawn.append(block.flatten())
    return torch.cat(drawn)


def gram_blocks(blocks: Tensor, k: int, numels: Sequence[int]) -> Tensor:
    """``V^T V`` of each block ``(k, numels[b])``: ``(len(numels), k, k)``."""
    parts = zip(blocks.split([k * n for n in numels]), numels, strict=True)
    return torch.stack([torch.empty(k, k, dtype=torch.float64), *(gram(part.view(k, n)) for part, n in parts)])[1:]


def combine_blocks(blocks: Tensor, k: int, numels: Sequence[int], coefficients: Tensor) -> list[Tensor]:
    """``V c`` of each block ``(k, numels[b])``: ``(numels[b],)``."""
    parts = zip(blocks.double().split([k * n for n in numels]), numels, strict=True)
    return [coefficients.double() @ part.view(k, n) for part, n in parts]


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
    """``V c``: ``(numel,)``."""
    k = coefficients.numel()
    v = sample_tangents(state, k, numel, offset=offset, first=first, distribution=distribution)
    return coefficients.double() @ v


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
    """``sum_i c_ib v_ib`` for every sample b: ``(B, numel)``."""
    k, batch = coefficients.shape
    v = sample_tangents(state, k, batch * numel, offset=offset, first=first, distribution=distribution)
    return torch.einsum("kb,kbm->bm", coefficients.double(), v.view(k, batch, numel))


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
    """``self += alpha V c``; ``self`` keeps its dtype and is rounded to it once."""
    step = tangent_combine(state, coefficients, self.numel(), offset=offset, first=first, distribution=distribution)
    return self.copy_(self.double() + alpha * step.view(self.shape))


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
    """A step of SGD along ``V c``; ``self`` and ``buffer`` keep their dtype and are rounded to it once."""
    g = tangent_combine(state, coefficients, self.numel(), offset=offset, first=first, distribution=distribution)
    g = g.view(self.shape) + weight_decay * self.double()
    if buffer is not None:
        moved = g if fresh else momentum * buffer.double() + (1 - dampening) * g
        buffer.copy_(moved)
        g = g + momentum * moved if nesterov else moved
    return self.copy_(self.double() - lr * g)
