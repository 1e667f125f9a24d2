"""Losses, one for each sample or element."""

from __future__ import annotations

from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd

from .helpers import _code, _guard, _ops

#: names of reductions and their codes, those of at::Reduction
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def cross_entropy_jvp(
    logits: Tensor,
    dlogits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "none",
) -> tuple[Tensor, Tensor]:
    """Cross entropy of ``logits`` (B, C) with class indices ``target`` int64 (B,), as
    :func:`torch.nn.functional.cross_entropy`.

    Arguments:
        reduction: ``"none"``, ``"mean"`` or ``"sum"``; sums are float64. The mean divides by the sum of the weights of the
            targets that are not ignored.
    Returns:
        loss ``(B,)``; dloss ``(k, B)``; ignored samples have both exactly 0. Reduced: ``()``; ``(k,)``. What the CPU refuses,
        a target that is no class, gives NaN on a GPU, which is not waited for.
    """
    _guard("cross_entropy_jvp", logits, dlogits, weight)
    code = _code(REDUCTIONS, "reduction", reduction)
    with _AutoDispatchBelowAutograd():
        return _ops.cross_entropy_jvp(logits, dlogits, target, weight, ignore_index, label_smoothing, code)


def mse_jvp(input: Tensor, dinput: Tensor | None, target: Tensor, dtarget: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Elementwise squared error and its k tangents ``2 (input - target) (dinput_i - dtarget_i)``.

    Arguments:
        input, target: of one shape.
        dinput, dtarget: ``(k, *input.shape)`` or None where not perturbed; at least one is given.
    Returns:
        loss like ``input``; dloss ``(k, *input.shape)``.
    """
    _guard("mse_jvp", input, dinput, target, dtarget)
    with _AutoDispatchBelowAutograd():
        return _ops.mse_jvp(input, dinput, target, dtarget)


def bce_jvp(
    input: Tensor,
    dinput: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    with_logits: bool = True,
) -> tuple[Tensor, Tensor]:
    """Elementwise binary cross entropy, ``reduction="none"``, and its k tangents.

    Without logits, logarithms are clamped at -100 as in :func:`torch.nn.functional.binary_cross_entropy`. What the CPU refuses,
    an input outside [0, 1], gives NaN on a GPU, which is not waited for.

    Arguments:
        input: any shape, logits or with ``with_logits=False`` probabilities.  dinput: ``(k, *input.shape)``.
        target: like ``input``.  weight, pos_weight: broadcast against ``input``, or None; pos_weight goes with logits.
    Returns:
        loss like ``input``; dloss ``(k, *input.shape)``.
    """
    _guard("bce_jvp", input, dinput, target, weight, pos_weight)
    with _AutoDispatchBelowAutograd():
        return _ops.bce_jvp(input, dinput, target, weight, pos_weight, with_logits)
