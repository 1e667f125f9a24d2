"""Shape, dtype and strides of every operator's results, for meta tensors, ``FakeTensorMode`` and ``torch.compile``.

Every result of every operator is contiguous. Values and shapes are checked by the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import register_fake


@register_fake("frog_cuda::sample_tangents")
def sample_tangents(
    state: Tensor, k: int, numel: int, offset: int, first: int, distribution: int, dtype: torch.dtype
) -> Tensor:
    return state.new_empty((k, numel), dtype=dtype)


@register_fake("frog_cuda::tangent_gram")
def tangent_gram(state: Tensor, k: int, numel: int, offset: int, first: int, distribution: int) -> Tensor:
    return state.new_empty((k, k), dtype=torch.float64)


@register_fake("frog_cuda::gram")
def gram(tangents: Tensor) -> Tensor:
    k = tangents.shape[0]
    return tangents.new_empty((k, k), dtype=torch.float64)


@register_fake("frog_cuda::tangent_combine")
def tangent_combine(
    state: Tensor, coefficients: Tensor, numel: int, offset: int, first: int, distribution: int, dtype: torch.dtype
) -> Tensor:
    return state.new_empty((numel,), dtype=dtype)


@register_fake("frog_cuda::tangent_axpy_")
def tangent_axpy_(
    self: Tensor, state: Tensor, coefficients: Tensor, alpha: float, offset: int, first: int, distribution: int
) -> None:
    return None


@register_fake("frog_cuda::cholesky_project")
def cholesky_project(gram: Tensor, derivatives: Tensor, rtol: float) -> tuple[Tensor, Tensor]:
    coefficients = derivatives.new_empty(derivatives.shape, dtype=torch.float64)
    return coefficients, gram.new_empty(gram.shape[:-2], dtype=torch.int64)


@register_fake("frog_cuda::linear_jvp")
def linear_jvp(
    x: Tensor,
    dx: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    activity: Tensor | None,
    state: Tensor | None,
    k: int,
    first: int,
    distribution: int,
    weight_offset: int | None,
    bias_offset: int | None,
    activation: int,
    alpha: float,
    beta: float,
    want_gram: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    side = k if want_gram else 0
    return y, _like(y, k, x if dx is None else dx), x.new_empty((side, side), dtype=torch.float64)


@register_fake("frog_cuda::pointwise_jvp")
def pointwise_jvp(
    x: Tensor, dx: Tensor | None, activity: Tensor | None, function: int, alpha: float, beta: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _tangents(x, dx, activity)


@register_fake("frog_cuda::softmax_jvp")
def softmax_jvp(x: Tensor, dx: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _tangents(x, dx)


@register_fake("frog_cuda::log_softmax_jvp")
def log_softmax_jvp(x: Tensor, dx: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _tangents(x, dx)


@register_fake("frog_cuda::cross_entropy_jvp")
def cross_entropy_jvp(
    logits: Tensor, dlogits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty(logits.shape[:1])
    return loss, _tangents(loss, dlogits)


@register_fake("frog_cuda::mse_jvp")
def mse_jvp(input: Tensor, dinput: Tensor | None, target: Tensor, dtarget: Tensor | None) -> tuple[Tensor, Tensor]:
    return input.new_empty(input.shape), _tangents(input, dinput, dtarget)


@register_fake("frog_cuda::bce_jvp")
def bce_jvp(
    input: Tensor, dinput: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, with_logits: bool
) -> tuple[Tensor, Tensor]:
    return input.new_empty(input.shape), _tangents(input, dinput)


def _tangents(y: Tensor, *tangents: Tensor | None) -> Tensor:
    """Tangents of ``y`` with k and dtype of the first that is given."""
    given = next(t for t in tangents if t is not None)
    return _like(y, given.shape[0], given)


def _like(y: Tensor, k: int, dtype_of: Tensor) -> Tensor:
    return y.new_empty((k, *y.shape), dtype=dtype_of.dtype)
