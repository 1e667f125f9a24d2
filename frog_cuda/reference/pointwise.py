"""Pointwise functions with their derivatives, alone or as the activation of a layer."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def _identity(x: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
    return x, torch.ones_like(x)


def _relu(x: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
    return x.relu(), torch.where(x <= 0, 0.0, 1.0).to(x)


def _gelu(x: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
    cdf = torch.special.erfc(-x / math.sqrt(2)) / 2
    pdf = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return x * cdf, cdf + x * pdf


def _gelu_tanh(x: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
    c = math.sqrt(2 / math.pi)
    t = torch.tanh(c * (x + 0.044715 * x**3))
    return x * (1 + t) / 2, (1 + t) / 2 + x * (1 - t * t) / 2 * c * (1 + 3 * 0.044715 * x * x)


def _silu(x: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(x)
    return x * s, s * (1 + x * (1 - s))


def _tanh(x: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
    y = torch.tanh(x)
    return y, 1 - y * y


def _sigmoid(x: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
    y = torch.sigmoid(x)
    return y, y * (1 - y)


def _softplus(x: Tensor, beta: float, threshold: float) -> tuple[Tensor, Tensor]:
    linear = x * beta > threshold
    soft = torch.log1p(torch.exp(torch.where(linear, 0.0, x * beta))) / beta
    return torch.where(linear, x, soft), torch.where(linear, 1.0, torch.sigmoid(x * beta))


def _elu(x: Tensor, alpha: float, b: float) -> tuple[Tensor, Tensor]:
    low = x <= 0
    negative = torch.where(low, x, 0.0)
    return torch.where(low, alpha * torch.expm1(negative), x), torch.where(low, alpha * torch.exp(negative), 1.0)


def _leaky_relu(x: Tensor, slope: float, b: float) -> tuple[Tensor, Tensor]:
    return torch.where(x > 0, x, slope * x), torch.where(x > 0, torch.ones_like(x), slope)


def _hardtanh(x: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    return x.clamp(low, high), ((x > low) & (x < high)).to(x)


#: name -> (x, alpha, beta) -> (f(x), f'(x)). At a kink f' is what PyTorch's own derivative gives; of NaN it is not specified.
POINTWISE: dict[str, Callable[[Tensor, float, float], tuple[Tensor, Tensor]]] = {
    "identity": _identity,
    "relu": _relu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "softplus": _softplus,
    "elu": _elu,
    "leaky_relu": _leaky_relu,
    "hardtanh": _hardtanh,
}


def pointwise_jvp(
    x: Tensor, dx: Tensor | None, function: str, *, activity: Tensor | None = None, alpha: float = 0.0, beta: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``y = f(x)``, ``dy_i = f'(x) (dx_i + v_i)``."""
    given = dx if dx is not None else activity
    assert given is not None, "one of dx and activity must be given"
    y, slope = POINTWISE[function](x.double(), alpha, beta)
    dy = torch.zeros(given.shape[0], *x.shape, dtype=torch.float64)
    for i in range(len(dy)):
        if dx is not None:
            dy[i] += dx[i].double()
        if activity is not None:
            dy[i] += activity[i].double()
    return y, slope * dy
