"""Softmax and its logarithm."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_jvp(x: Tensor, dx: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """``y = softmax(x)``, ``dy_i = y (dx_i - sum(y dx_i))``."""
    dim = dim % max(x.dim(), 1)
    y, dx = torch.softmax(x.double(), dim), dx.double()
    mean = torch.stack([_sum(y * v, dim) for v in dx])
    return y, y * (dx - mean)


def log_softmax_jvp(x: Tensor, dx: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """``y = log softmax(x)``, ``dy_i = dx_i - sum(exp(y) dx_i)``."""
    dim = dim % max(x.dim(), 1)
    y, dx = torch.log_softmax(x.double(), dim), dx.double()
    return y, dx - torch.stack([_sum(y.exp() * v, dim) for v in dx])


def _sum(x: Tensor, dim: int) -> Tensor:
    return x.sum(dim, keepdim=True) if x.dim() else x
