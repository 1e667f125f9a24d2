"""Attention with k tangents of query, key and value: the operator, and the same formula written in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import frog_cuda as frog

HEADS, DEPTH = 8, 64
OURS, UNFUSED = "attention_jvp", "unfused formula"

Result = tuple[Tensor, Tensor]


def unfused(q: Tensor, dq: Tensor, k: Tensor, dk: Tensor, v: Tensor, dv: Tensor) -> Result:
    """Stores the scores (B, H, T, T), their softmax and k tangents of both."""
    scale = q.shape[-1] ** -0.5
    p = torch.softmax(scale * (q @ k.mT), -1)
    ds = scale * (dq @ k.mT + q @ dk.mT)
    dp = p * (ds - (p * ds).sum(-1, keepdim=True))
    return p @ v, dp @ v + p @ dv


def inputs(length: int, k: int, heads: int = HEADS, depth: int = DEPTH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = [(1, heads, length, depth), (k, 1, heads, length, depth)] * 3
    return [torch.randn(shape, generator=generator) for shape in shapes]


def prepare(name: str, length: int, k: int) -> Callable[[], Result]:
    """The call to be timed or measured."""
    given = inputs(length, k)
    function = frog.ops.attention_jvp if name == OURS else unfused

    def call() -> Result:
        with torch.no_grad():
            return function(*given)

    return call
