"""Loss functions through the fused per-sample operators; the other losses decompose or take the fallback."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass
from torch.nn import _reduction

from ..dual import DualTensor, _make, aten, rule
from ..ops.losses import REDUCTIONS
from .helpers import FUSED_DTYPES, common_k, low_dtype, parts, wrap

_aten = torch.ops.aten
_cross_entropy_jvp = torch.ops.frog_cuda.cross_entropy_jvp.default
_mse_jvp = torch.ops.frog_cuda.mse_jvp.default
_bce_jvp = torch.ops.frog_cuda.bce_jvp.default


def _reduction_name(size_average: Any, reduce: Any, reduction: str) -> str:
    if size_average is not None or reduce is not None:
        return _reduction.legacy_get_string(size_average, reduce)
    return reduction


def _reduced(loss: Tensor, dloss: Tensor, k: int, reduction: str) -> DualTensor:
    """loss (*), dloss (k, *) -> the asked reduction."""
    if reduction == "none":
        return _make(loss, dloss, k)
    if loss.dtype.itemsize < 4 or dloss.dtype.itemsize < 4:
        wide = _reduced(_wide(loss), _wide(dloss), k, reduction)
        return _make(wide._primal.to(loss.dtype), wide.tangents.to(dloss.dtype), k)
    value, tangents = loss.sum(), (dloss if dloss.dim() == 2 else dloss.reshape(k, -1)).sum(1)
    if reduction == "mean":
        value, tangents = value.div_(loss.numel()), tangents.div_(loss.numel())
    return _make(value, tangents, k)


def _wide(losses: Tensor) -> Tensor:
    """In float32 at least: the sum of 10^5 losses is no float16, their mean is."""
    return losses.float() if losses.dtype.itemsize < 4 else losses


def _one_class_each(logits: torch.Size, target: torch.Size) -> bool:
    """(N, C) and (N,); (C,) and (); or (N, C, d1, ..) and (N, d1, ..)."""
    if len(logits) < 2:
        return len(logits) == 1 and len(target) == 0
    return bool(target) and logits[0] == target[0] and logits[2:] == target[1:]


@rule(F.cross_entropy)
def cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """Class indices for ``(C,)``, ``(N, C)`` and ``(N, C, d1, ..)`` inputs; probabilities are left to the decomposition."""
    reduction = _reduction_name(size_average, reduce, reduction)
    logits, tangents = parts(input)
    if (
        tangents is None
        or type(target) is DualTensor
        or type(weight) is DualTensor
        or target.dtype != torch.int64
        or logits.dtype not in FUSED_DTYPES
        or not _one_class_each(logits.shape, target.shape)
        or reduction not in REDUCTIONS
    ):
        return NotImplemented
    k, shape, flat = input.k, target.shape, target
    if logits.dim() != 2:
        flat = target.reshape(-1)
        if logits.dim() == 1:
            logits, tangents = logits.unsqueeze(0), tangents.unsqueeze(1)
        else:
            classes = logits.shape[1]
            logits = logits.movedim(1, -1).reshape(-1, classes)
            tangents = tangents.movedim(2, -1).reshape(k, -1, classes)
    how = REDUCTIONS[reduction]
    loss, dloss = _cross_entropy_jvp(logits, tangents, flat, weight, ignore_index, label_smoothing, how)
    if how == 0 and len(shape) != 1:
        loss, dloss = loss.view(shape), dloss.view(k, *shape)
    return _make(loss, dloss, k)


@rule(F.mse_loss)
def mse_loss(
    input: Any,
    target: Any,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    weight: Any = None,
) -> Any:
    reduction = _reduction_name(size_average, reduce, reduction)
    k = common_k("mse_loss", input, target)
    x, dx = parts(input)
    y, dy = parts(target)
    if (
        weight is not None
        or (dx is None and dy is None)
        or x.shape != y.shape  # PyTorch warns about broadcasting
        or x.dtype != y.dtype
        or x.dtype not in FUSED_DTYPES
        or reduction not in REDUCTIONS
    ):
        return NotImplemented
    loss, dloss = _mse_jvp(x, dx, y, dy)
    return _reduced(loss, dloss, k, reduction)


@rule(F.l1_loss)
def l1_loss(
    input: Any,
    target: Any,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    weight: Any = None,
) -> Any:
    """PyTorch forgets the weight when it asks for a rule; it is read where it was given, in the call of the loss."""
    frame: Any = sys._getframe(1)
    while weight is None and frame is not None:
        if frame.f_code is F.l1_loss.__code__:
            weight = frame.f_locals["weight"]
            break
        frame = frame.f_back
    if weight is None:
        return NotImplemented
    with DisableTorchFunctionSubclass():
        return F.l1_loss(input, target, size_average, reduce, reduction, weight)  # type: ignore[call-arg]


def _bce(input: Any, target: Any, weight: Any, pos_weight: Any, reduction: str, with_logits: bool) -> Any:
    value, tangents = parts(input)
    if (
        tangents is None
        or any(type(t) is DualTensor for t in (target, weight, pos_weight))
        or any(t is not None and t.dtype != value.dtype for t in (target, weight, pos_weight))
        or target.shape != value.shape
        or value.dtype not in FUSED_DTYPES
        or reduction not in REDUCTIONS
    ):
        return NotImplemented
    loss, dloss = _bce_jvp(value, tangents, target, weight, pos_weight, with_logits)
    return _reduced(loss, dloss, input.k, reduction)


@rule(F.binary_cross_entropy)
def binary_cross_entropy(
    input: Any, target: Any, weight: Any = None, size_average: Any = None, reduce: Any = None, reduction: str = "mean"
) -> Any:
    value = input._primal if type(input) is DualTensor else input
    if bool(((value < 0) | (value > 1)).any()):
        return NotImplemented  # PyTorch's own error
    return _bce(input, target, weight, None, _reduction_name(size_average, reduce, reduction), False)


@rule(F.binary_cross_entropy_with_logits)
def binary_cross_entropy_with_logits(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    pos_weight: Any = None,
) -> Any:
    return _bce(input, target, weight, pos_weight, _reduction_name(size_average, reduce, reduction), True)


@aten(_aten.nll_loss_forward.default, _aten.nll_loss2d_forward.default)
def nll_loss(func: Any, x: Any, target: Tensor, weight: Any, reduction: int, ignore_index: int) -> Any:
    """With tangents of the class weights, which PyTorch takes as zero without a word; the rest is left to it."""
    if type(weight) is not DualTensor:
        return NotImplemented
    common_k(func, x, weight)
    _, total = func(parts(x)[0], target, weight._primal, reduction, ignore_index)  # and PyTorch's own errors
    axis = 0 if x.dim() == 1 else 1
    kept = target != ignore_index
    index = torch.where(kept, target, 0)
    factor = weight[index] * kept
    loss = -x.gather(axis, index.unsqueeze(axis)).squeeze(axis) * factor
    if reduction == _reduction.get_enum("none"):
        return loss, total
    return (loss.sum() if reduction == _reduction.get_enum("sum") else loss.sum() / factor.sum()), total


# A loss of one sample depends on that sample only, so a single backward pass of ones gives the slopes of all samples.


def _along(slope: Tensor, tangents: Tensor, loss: Tensor) -> Tensor:
    """slope (*, C), tangents (k, *, C) -> (k, *loss.shape), for losses one by one and for their sum or mean."""
    moved = slope * tangents
    moved = moved.reshape(len(moved), -1).sum(1) if loss.dim() == 0 else moved.sum(-1)
    return moved.reshape(len(moved), *loss.shape)  # a single sample without a batch axis may have a loss of shape (1,)


@aten(_aten.multi_margin_loss.default)
def multi_margin_loss(
    func: Any, x: Any, target: Tensor, p: Any = 1, margin: Any = 1, weight: Any = None, reduction: int = 1
) -> Any:
    value, tangents = parts(x)
    if type(weight) is DualTensor or tangents is None:
        return NotImplemented
    options = (target, p, margin, weight, reduction)
    loss = func(value, *options)
    slope = _aten.multi_margin_loss_backward.default(torch.ones_like(loss), value, *options)
    return wrap(loss, _along(slope, tangents, loss), low_dtype(x))


@aten(_aten.multilabel_margin_loss_forward.default)
def multilabel_margin_loss(func: Any, x: Any, target: Tensor, reduction: int) -> Any:
    value, tangents = parts(x)
    loss, is_target = func(value, target, reduction)
    if tangents is None:
        return loss, is_target
    slope = _aten.multilabel_margin_loss_backward.default(torch.ones_like(loss), value, target, reduction, is_target)
    return wrap(loss, _along(slope, tangents, loss), low_dtype(x)), is_target


@aten(_aten._ctc_loss.default, _aten._ctc_loss.Tensor)
def ctc_loss(
    func: Any, x: Any, targets: Tensor, lengths: Any, target_lengths: Any, blank: int = 0, zero_infinity: bool = False
) -> Any:
    """PyTorch's backward pass returns ``exp(x)`` too much, right only together with log_softmax; here it is taken off."""
    value, tangents = parts(x)  # (T, N, C)
    loss, alpha = func(value, targets, lengths, target_lengths, blank, zero_infinity)
    if tangents is None:
        return loss, alpha
    backward = _aten._ctc_loss_backward.default if func is _aten._ctc_loss.default else _aten._ctc_loss_backward.Tensor
    slope = backward(torch.ones_like(loss), value, targets, lengths, target_lengths, loss, alpha, blank, zero_infinity)
    steps = torch.arange(value.shape[0], device=value.device)
    running = steps[:, None] < torch.as_tensor(lengths, device=value.device)  # (T, N)
    slope = torch.where(running[..., None], slope - value.exp(), 0)
    if zero_infinity:
        slope = torch.where(loss.isinf()[:, None], 0, slope)
    return wrap(loss, (slope * tangents).sum((1, 3)), low_dtype(x)), alpha
