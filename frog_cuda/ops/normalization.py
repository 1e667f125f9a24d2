"""Layer, RMS, group, instance and batch normalisation."""

from __future__ import annotations

from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd

from .helpers import _guard, _ops


def normalization_jvp(
    x: Tensor,
    dx: Tensor | None,
    weight: Tensor | None = None,
    dweight: Tensor | None = None,
    bias: Tensor | None = None,
    dbias: Tensor | None = None,
    *,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    outer: int = 1,
    groups: int,
    weight_groups: int = 1,
    centred: bool = True,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Layer, RMS, group, instance and batch normalisation: k tangents through ``y = w (x - mean) / sqrt(var + eps) + b``.

    ``x`` is read as ``(outer, groups, inner)`` and each group is normalised over outer and inner; its statistics are computed
    once for all tangents. Layer and RMS norm: a group for each row. Group norm: ``groups = B * G``. Batch norm: ``outer = B``,
    ``groups = C``.

    Arguments:
        x: any shape.  dx: ``(k, *x.shape)`` or None.
        weight, bias: any shape with ``weight_groups * m`` elements, where m divides inner: group g uses part
            ``g % weight_groups``, each of its m factors for a run of ``inner / m`` elements.
        dweight, dbias: ``(k, *weight.shape)`` or None.
        mean, var: ``(groups,)``: given statistics, constants that do not depend on ``x`` (batch norm in evaluation).
        centred: False leaves the mean alone (RMS norm).
    Returns:
        y like ``x``; dy ``(k, *x.shape)`` in the tangents' dtype; mean and biased variance ``(groups,)``, float32 or float64.
    """
    _guard("normalization_jvp", x, dx, weight, dweight, bias, dbias, mean, var)
    with _AutoDispatchBelowAutograd():
        return _ops.normalization_jvp(
            x, dx, weight, dweight, bias, dbias, mean, var, outer, groups, weight_groups, centred, eps
        )
