"""Shape, dtype and strides of every operator's results, for meta tensors, ``FakeTensorMode`` and ``torch.compile``.

Results are contiguous, but for those of attention on the CPU: there, heads can be joined without a copy. Values and shapes are
checked by the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _fake(body: Callable[..., Any]) -> Callable[..., Any]:
    """Registers ``body`` for the operator of its name.

    A meta tensor among real ones also ends up here and would turn into an uninitialised real result, hence the check.
    """

    def checked(*args: Any) -> Any:
        devices = {str(t.device) for t in args if isinstance(t, Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"{body.__name__}: arguments are on {' and '.join(sorted(devices))}; all must be on one device")
        return body(*args)

    torch.library.register_fake(f"frog_cuda::{body.__name__}", checked)
    return body


@_fake
def sample_tangents(
    state: Tensor, k: int, numel: int, offset: int, first: int, distribution: int, dtype: torch.dtype
) -> Tensor:
    return state.new_empty((k, numel), dtype=dtype)


@_fake
def tangent_gram(state: Tensor, k: int, numel: int, offset: int, first: int, distribution: int) -> Tensor:
    return state.new_empty((k, k), dtype=torch.float64)


@_fake
def gram(tangents: Tensor) -> Tensor:
    k = tangents.shape[0]
    return tangents.new_empty((k, k), dtype=torch.float64)


@_fake
def sample_blocks(
    state: Tensor, k: int, numels: list[int], offsets: list[int], first: int, distribution: int, dtype: torch.dtype
) -> Tensor:
    return state.new_empty((k * sum(numels),), dtype=dtype)


@_fake
def gram_blocks(blocks: Tensor, k: int, numels: list[int]) -> Tensor:
    return blocks.new_empty((len(numels), k, k), dtype=torch.float64)


@_fake
def combine_blocks(blocks: Tensor, k: int, numels: list[int], coefficients: Tensor) -> list[Tensor]:
    return [blocks.new_empty((n,)) for n in numels]


@_fake
def low_rank_combine(
    factors: Tensor, k: int, r: int, heights: list[int], widths: list[int], coefficients: Tensor
) -> list[Tensor]:
    if len(heights) != len(widths):
        raise RuntimeError(
            f"low_rank_combine: widths has {len(widths)} elements, expected {len(heights)}, one for each of heights"
        )
    return [factors.new_empty(shape) for shape in zip(heights, widths, strict=True)]


@_fake
def tangent_combine(
    state: Tensor, coefficients: Tensor, numel: int, offset: int, first: int, distribution: int, dtype: torch.dtype
) -> Tensor:
    return state.new_empty((numel,), dtype=dtype)


@_fake
def tangent_combine_samples(
    state: Tensor, coefficients: Tensor, numel: int, offset: int, first: int, distribution: int, dtype: torch.dtype
) -> Tensor:
    return state.new_empty((coefficients.shape[1], numel), dtype=dtype)


@_fake
def tangent_axpy_(
    self: Tensor, state: Tensor, coefficients: Tensor, alpha: float, offset: int, first: int, distribution: int
) -> None:
    return None


@_fake
def tangent_sgd_(
    self: Tensor,
    buffer: Tensor | None,
    state: Tensor,
    coefficients: Tensor,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    fresh: bool,
    offset: int,
    first: int,
    distribution: int,
) -> None:
    return None


@_fake
def cholesky_project(gram: Tensor, derivatives: Tensor, rtol: float) -> tuple[Tensor, Tensor]:
    coefficients = derivatives.new_empty(derivatives.shape, dtype=torch.float64)
    return coefficients, gram.new_empty(gram.shape[:-2], dtype=torch.int64)


@_fake
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
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    side = k if want_gram else 0
    return y, _like(y, k, x if dx is None else dx), x.new_empty((side, side), dtype=torch.float64)


@_fake
def linear_rows(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@_fake
def linear_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    return gradient.new_empty((gradient.shape[1], x.shape[1]))


@_fake
def pointwise_jvp(
    x: Tensor, dx: Tensor | None, activity: Tensor | None, function: int, alpha: float, beta: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _tangents(x, dx, activity)


@_fake
def tangent_sum(a: Tensor, va: Tensor | None, b: Tensor | None, vb: Tensor | None, alpha: float) -> Tensor:
    return a.new_empty(a.shape)


@_fake
def convolution_jvp(
    x: Tensor,
    dx: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    shape = torch.ops.aten.convolution(x, weight, None, stride, padding, dilation, transposed, output_padding, groups).shape
    return x.new_empty(shape), dx.new_empty((dx.shape[0], *shape))


@_fake
def narrow_convolution(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
    none = [0] * len(stride)
    return x.new_empty(torch.ops.aten.convolution(x, weight, None, stride, padding, dilation, False, none, 1).shape)


@_fake
def sampled_convolution_(
    self: Tensor,
    x: Tensor,
    state: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    offset: int,
    first: int,
    distribution: int,
    add: bool,
) -> None:
    return None


@_fake
def embedding_jvp(
    indices: Tensor,
    weight: Tensor,
    dweight: Tensor | None,
    state: Tensor | None,
    k: int,
    first: int,
    distribution: int,
    weight_offset: int | None,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    y = weight.new_empty((*indices.shape, weight.shape[1]))
    return y, y.new_empty((k, *y.shape), dtype=dtype if dweight is None else dweight.dtype)


@_fake
def softmax_jvp(x: Tensor, dx: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _tangents(x, dx)


@_fake
def log_softmax_jvp(x: Tensor, dx: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _tangents(x, dx)


@_fake
def cross_entropy_jvp(
    logits: Tensor,
    dlogits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty(() if reduction else logits.shape[:1])
    return loss, _tangents(loss, dlogits)


@_fake
def mse_jvp(input: Tensor, dinput: Tensor | None, target: Tensor, dtarget: Tensor | None) -> tuple[Tensor, Tensor]:
    return input.new_empty(input.shape), _tangents(input, dinput, dtarget)


@_fake
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


@_fake
def max_pool_jvp(
    x: Tensor,
    dx: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    want_indices: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    lead = x.dim() - len(kernel)
    shape = list(x.shape[:lead])
    for size, window, step, pad, apart in zip(x.shape[lead:], kernel, stride, padding, dilation, strict=True):
        room = size + 2 * pad - apart * (window - 1) - 1
        count = (room + (step - 1 if ceil_mode else 0)) // step + 1
        if ceil_mode and (count - 1) * step >= size + pad:
            count -= 1
        shape.append(count)
    y = x.new_empty(shape)
    return y, _tangents(y, dx), x.new_empty(shape if want_indices else (0,), dtype=torch.int64)


@_fake
def attention_jvp(
    query: Tensor,
    dquery: Tensor | None,
    key: Tensor,
    dkey: Tensor | None,
    value: Tensor,
    dvalue: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    given = next(t for t in (dquery, dkey, dvalue) if t is not None)
    batch, heads, length, _ = query.shape
    if query.is_cuda:
        shape = (batch, heads, length, value.shape[3])
        return query.new_empty(shape), given.new_empty((given.shape[0], *shape))
    shape = (batch, length, heads, value.shape[3])  # in memory: heads can be joined again without a copy
    return query.new_empty(shape).transpose(1, 2), given.new_empty((given.shape[0], *shape)).transpose(2, 3)


@_fake
def normalization_jvp(
    x: Tensor,
    dx: Tensor | None,
    weight: Tensor | None,
    dweight: Tensor | None,
    bias: Tensor | None,
    dbias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    outer: int,
    groups: int,
    weight_groups: int,
    centred: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = next(t for t in (dx, dweight, dbias) if t is not None)
    statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
    y, dy = x.new_empty(x.shape), given.new_empty((given.shape[0], *x.shape))
    return y, dy, x.new_empty((groups,), dtype=statistics), x.new_empty((groups,), dtype=statistics)
