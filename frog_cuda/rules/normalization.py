"""Normalisation layers through the fused operator, which computes the statistics once for all k tangents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dual import DualTensor, _make, primal_of, rule
from .helpers import FUSED_DTYPES, common_k, parts

_normalization_jvp = torch.ops.frog_cuda.normalization_jvp.default


def _apply(
    x: Any,
    weight: Any,
    bias: Any,
    outer: int,
    groups: int,
    weight_groups: int,
    eps: float,
    centred: bool = True,
    mean: Tensor | None = None,
    var: Tensor | None = None,
) -> Any:
    """(dual of the result, mean, var), or NotImplemented for what the operator does not take."""
    k = common_k("normalization", x, weight, bias)
    px, dx = parts(x)
    pw, dw = parts(weight)
    pb, db = parts(bias)
    if px.dtype not in FUSED_DTYPES or px.numel() == 0 or any(t is not None and t.dtype != px.dtype for t in (pw, pb)):
        return NotImplemented
    if (dx is None and dw is None and db is None) or eps < 0:
        return NotImplemented
    y, dy, m, v = _normalization_jvp(px, dx, pw, dw, pb, db, mean, var, outer, groups, weight_groups, centred, eps)
    return _make(y, dy, k), m, v


def _over_last(x: Any, normalized_shape: Sequence[int], weight: Any, bias: Any, eps: float, centred: bool) -> Any:
    shape, whole = tuple(normalized_shape), primal_of(x).shape  # asking a DualTensor for its shape takes longer
    if not shape or whole[-len(shape) :] != shape or any(t is not None and primal_of(t).shape != shape for t in (weight, bias)):
        return NotImplemented  # PyTorch's own error
    done = _apply(x, weight, bias, 1, whole[: -len(shape)].numel(), 1, eps, centred)
    return done if done is NotImplemented else done[0]


@rule(F.layer_norm)
def layer_norm(input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    return _over_last(input, normalized_shape, weight, bias, eps, True)


@rule(F.rms_norm)
def rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    if eps is None:
        dtype = primal_of(input).dtype
        eps = torch.finfo(torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype).eps
    return _over_last(input, normalized_shape, weight, None, eps, False)


@rule(F.group_norm)
def group_norm(input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    shape = primal_of(input).shape
    if len(shape) < 2 or num_groups < 1 or shape[1] % num_groups or not _per_channel(shape, weight, bias):
        return NotImplemented
    done = _apply(input, weight, bias, 1, shape[0] * num_groups, num_groups, eps)
    return done if done is NotImplemented else done[0]


@rule(F.instance_norm)
def instance_norm(
    input: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    shape = primal_of(input).shape
    if running_mean is not None or not use_input_stats or len(shape) < 3 or not _per_channel(shape, weight, bias):
        return NotImplemented
    if shape[2:].numel() <= 1:
        return NotImplemented  # PyTorch's own error
    done = _apply(input, weight, bias, 1, shape[0] * shape[1], shape[1], eps)
    return done if done is NotImplemented else done[0]


@rule(F.batch_norm)
def batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """In training, running statistics are updated here, once."""
    value = primal_of(input)
    shape = value.shape
    if len(shape) < 2 or not _per_channel(shape, weight, bias) or (running_mean is None) != (running_var is None):
        return NotImplemented
    if any(type(t) is DualTensor for t in (running_mean, running_var)) or (not training and running_mean is None):
        return NotImplemented
    count = shape[0] * shape[2:].numel()
    if training and count <= 1:
        return NotImplemented
    given = (None, None) if training else (running_mean.to(value.dtype), running_var.to(value.dtype))
    done = _apply(input, weight, bias, shape[0], shape[1], shape[1], eps, True, *given)
    if done is NotImplemented:
        return done
    out, mean, var = done
    if training and running_mean is not None:
        running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
        running_var.mul_(1 - momentum).add_(var, alpha=momentum * count / (count - 1))
    return out


def _per_channel(shape: torch.Size, *factors: Any) -> bool:
    return all(t is None or primal_of(t).shape == shape[1:2] for t in factors)
