"""Linear layers: value and k tangents, and the gradient of a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .pointwise import POINTWISE
from .tangents import gram, sample_tangents


def linear_jvp(
    x: Tensor,
    dx: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
    activity: Tensor | None = None,
    state: Tensor | None = None,
    k: int,
    first: int = 0,
    distribution: str = "normal",
    weight_offset: int | None = None,
    bias_offset: int | None = None,
    activation: str = "identity",
    alpha: float = 0.0,
    beta: float = 0.0,
    want_gram: bool = False,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``y = act(x W^T + b)``, ``dy_i = act'(.) (dx_i W^T + x dW_i^T + db_i + v_i)``, Gram of the sampled ``[dW, db]``."""
    out = weight.shape[0]
    x, w = x.double(), weight.double()
    total = torch.zeros(k if want_gram else 0, k if want_gram else 0, dtype=torch.float64)
    how: dict[str, Any] = {"first": first, "distribution": distribution}
    if left is not None:
        assert right is not None
        dweight = left.double().mT @ right.double()
    if weight_offset is not None:
        assert state is not None
        dweight = sample_tangents(state, k, weight.numel(), offset=weight_offset, **how).view(k, *weight.shape)
        if want_gram:
            total = total + gram(dweight.flatten(1))
    if bias_offset is not None:
        assert state is not None
        dbias = sample_tangents(state, k, out, offset=bias_offset, **how)
        if want_gram:
            total = total + gram(dbias)

    z = x @ w.T  # (*, out)
    dz = torch.zeros(k, *z.shape, dtype=torch.float64)
    if bias is not None:
        z = z + bias.double()
    if dx is not None:
        dz = dz + dx.double() @ w.T
    for i in range(k):
        if dweight is not None:
            dz[i] += x @ dweight[i].double().T
        if dbias is not None:
            dz[i] += dbias[i].double()
        if activity is not None:
            dz[i] += activity[i].double()
    y, slope = POINTWISE[activation](z, alpha, beta)
    return y, slope * dz, total


def linear_rows(x: Tensor, weight: Tensor) -> Tensor:
    """``x weight^T``."""
    return x.double() @ weight.double().T


def linear_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """``gradient^T x``."""
    return gradient.double().T @ x.double()
