"""The pairs of element types, of primal and tangents, that CUDA kernels exist for, and what holds for their results."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from helpers import assert_as_good_as_torch, assert_close32, assert_close64
from torch import Tensor

from .client import Out, Skewed

#: as in exported.h
NAMES = {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "fp16"}
LOW = [torch.bfloat16, torch.float16]
PAIRS = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    *((torch.float32, low) for low in LOW),
    *((low, torch.float32) for low in LOW),
    *((low, low) for low in LOW),
]


def name_of(primal: torch.dtype, tangents: torch.dtype) -> str:
    return f"{NAMES[primal]}_{NAMES[tangents]}"


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def given(tensors: Sequence[Tensor | None], skew: bool) -> list[Tensor | Skewed | None]:
    """Arguments of a kernel, at addresses that are multiples of 16 or, with ``skew``, are not."""
    return [Skewed(t) if skew and t is not None else t for t in tensors]


def result(shape: Sequence[int], dtype: torch.dtype, skew: bool) -> Out:
    return Out(tuple(shape), dtype, dtype.itemsize if skew else 0)


def check(results: Sequence[Tensor], exact: Sequence[Tensor], shift: float = 0.0) -> None:
    """Each result has the bound of its type; low precision is the exact value, rounded, to twice that.

    ``shift`` is added to both where a result may be exactly zero, which has no relative error.
    """
    for got, wanted in zip(results, exact, strict=True):
        if got.dtype == torch.float64:
            assert_close64(got + shift, wanted + shift)
        elif got.dtype == torch.float32:
            assert_close32(got + shift, wanted + shift)
        else:
            assert_as_good_as_torch(got, wanted.to(got.dtype), wanted)
