"""Tangents in 8 bits: carried in bfloat16, and rounded to float8 e4m3 where they meet the weight of a linear layer.

Tangents and weight are each scaled so that their largest entry is e4m3's largest number, 448, and multiplied by PyTorch's
``scaled_mm`` with sums in float32. GPUs of compute capability 8.9 and later have instructions for such numbers; CPUs only
imitate them. Everything else multiplies in bfloat16: layers whose sizes are no multiples of 16, which scaled_mm asks
for; a layer's input with the tangents of its weight; tangents that all samples share; products other than ``F.linear``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
ACCEPTED = (torch.float64, torch.float32, torch.bfloat16, torch.float16, FLOAT8)
#: sizes that scaled_mm takes are multiples of it
_MULTIPLE = 16

_active: ContextVar[bool] = ContextVar("float8 products", default=False)


def carried(dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype in which tangents lie in memory for ``tangent_dtype=dtype``."""
    return torch.bfloat16 if dtype is FLOAT8 else dtype


@contextmanager
def products(dtype: torch.dtype | None, device: torch.device) -> Iterator[None]:
    """Inside, linear layers multiply tangents in 8 bits where ``dtype`` is float8.

    Raises:
        RuntimeError: ``device`` is a GPU without such numbers.
    """
    if dtype is FLOAT8 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise RuntimeError(
            f"tangent_dtype is {dtype}, but {torch.cuda.get_device_name(device)} has compute capability "
            f"{'.'.join(map(str, torch.cuda.get_device_capability(device)))}; 8.9 at least is needed"
        )
    before = _active.set(dtype is FLOAT8)
    try:
        yield
    finally:
        _active.reset(before)


def takes(dx: Tensor, w: Tensor) -> bool:
    """Whether tangents ``(k, *, in)`` are multiplied with a weight ``(out, in)`` in 8 bits."""
    return (
        _active.get()
        and dx.dtype is torch.bfloat16
        and dx.numel() > 0
        and w.numel() > 0
        and w.shape[0] % _MULTIPLE == 0
        and w.shape[1] % _MULTIPLE == 0
    )


def product(dx: Tensor, w: Tensor) -> Tensor:
    """``dx w^T``, (k, *, out) in bfloat16."""
    a, a_scale = _rounded(dx.reshape(-1, dx.shape[-1]))
    b, b_scale = _rounded(w)
    one = F.ScalingType.TensorWise
    out = F.scaled_mm(a, b.t(), a_scale, one, b_scale, one, output_dtype=torch.bfloat16)
    return out.view(*dx.shape[:-1], w.shape[0])


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """(row-major float8 tensor, scale), whose product is x but for rounding. The scale stays on the device: nothing waits."""
    largest = x.abs().amax().float()
    scale = largest.clamp_(min=torch.finfo(torch.float32).tiny * 448) / torch.finfo(FLOAT8).max
    # in float32: neither a small scale nor a quotient may be rounded to 16 bits first
    return (x.float() / scale).to(FLOAT8, memory_format=torch.contiguous_format), scale
