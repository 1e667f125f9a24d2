"""Layer-local gradients in closed form, for layers that need no second pass.

A layer's parameters get ``sum_b J(f_b, g_b)`` over the rows b of the batch, with ``f`` the layer's input or something computed
from it, ``g`` the gradient of the layer's output, and ``J`` bilinear. With tangents shared across the batch, ``g_b = sum_i C_ib
v_i`` has rank at most k, so the sum equals ``sum_i J(sum_b C_ib f_b, v_i)``: k rows instead of B, and g is never formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _module

from . import ops
from .one_place import one_place

__all__ = ["LocalRule", "local_gradient", "local_rule", "rule_holds"]


@dataclass(frozen=True)
class LocalRule:
    """How a layer with parameters ``weight`` and ``bias`` gets its gradient.

    Attributes:
        features: (layer, x (B, *in)) -> f (B, *): what the gradient of the weight is bilinear in.
        weight: (layer, f (R, *), g (R, *out)) -> gradient of the weight, summed over the R rows.
        bias: (layer, g (R, *out)) -> gradient of the bias for each row, (R, *bias.shape).
        axes: (layer) -> how many axes the input has at least where the first one is that of the batch.
        now: (layer) -> the rule for what the layer has just computed, which a later change of its mode must not touch; None
            where nothing can change.
    """

    features: Callable[[Any, Tensor], Tensor]
    weight: Callable[[Any, Tensor, Tensor], Tensor]
    bias: Callable[[Any, Tensor], Tensor]
    axes: Callable[[Any], int]
    now: Callable[[Any], LocalRule] | None = None


def local_rule(module: nn.Module) -> LocalRule | None:
    """The rule of exactly this type of layer; a subclass may compute something else, so it has none."""
    return _RULES.get(type(module))


def rule_holds(layer: nn.Module) -> bool:
    """Whether a layer whose type has a rule still computes what the rule is of: nobody has replaced its ``forward``, or that
    of its class, and no hook of all modules may have changed what it returned."""
    kind = type(layer)
    return "forward" not in layer.__dict__ and kind.forward is _FORWARDS.get(kind) and not _module._global_forward_hooks


def share_rule(original: type[nn.Module], subclass: type[nn.Module]) -> None:
    """Lets a subclass that computes the same as ``original`` have its rule."""
    if original in _RULES:
        _RULES[subclass], _FORWARDS[subclass] = _RULES[original], subclass.forward


def local_gradient(
    layer: Any, rule: LocalRule, x: Tensor, g: Tensor, weights: Tensor | None = None, totals: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Gradients of ``layer.weight`` and ``layer.bias``, those that require grad.

    Arguments:
        x: the layer's input, (B, *in).
        g: the gradient of the output, (B, *out); where weights are given, the k tangents of the output, (k, *out).
        weights: C, (k, B).  totals: the sums of its rows, (k,).
    Returns:
        pairs (parameter, gradient).
    """
    weight, bias = layer.weight, getattr(layer, "bias", None)
    # In layers of mixed precision, in the wider one
    dtype = x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
    x, g = x.to(dtype), g.to(dtype)
    if weights is not None and weights.dtype != dtype:
        weights, totals = weights.to(dtype), None
    if weight is not None and weight.requires_grad:
        f = rule.features(layer, x)
        if weights is not None:
            f = torch.mm(weights, f) if f.dim() == 2 else (weights @ f.flatten(1)).view(weights.shape[0], *f.shape[1:])
        yield weight, rule.weight(layer, f, g).to(weight.dtype)
    if bias is not None and bias.requires_grad:
        rows = rule.bias(layer, g)
        if weights is None:
            total = rows.sum(0)
        else:
            totals = weights.sum(1) if totals is None else totals
            total = torch.mv(rows.T, totals) if rows.dim() == 2 else (totals @ rows.flatten(1)).view(rows.shape[1:])
        yield bias, total.to(bias.dtype)


def _same(layer: nn.Module, x: Tensor) -> Tensor:
    return x


def _linear_weight(layer: nn.Linear, f: Tensor, g: Tensor) -> Tensor:
    if g.dim() != 2:
        g, f = g.reshape(-1, g.shape[-1]), f.reshape(-1, f.shape[-1])
    return ops.linear_gradient(g, f) if g.is_cpu else g.T @ f


def _sum_to_last(layer: nn.Module, g: Tensor) -> Tensor:
    return g if g.dim() == 2 else g.flatten(1, -2).sum(1)


def _sum_to_channels(layer: nn.Module, g: Tensor) -> Tensor:
    return g if g.dim() == 2 else g.flatten(2).sum(2)


def _padded(layer: Any, x: Tensor) -> Tensor:
    if layer.padding_mode == "zeros":
        return x
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)


def _convolution_weight(layer: Any, f: Tensor, g: Tensor) -> Tensor:
    transposed = layer.transposed
    padding = layer.padding
    if layer.padding_mode != "zeros":
        padding = (0,) * len(layer.kernel_size)
    elif isinstance(padding, str):
        # 'same' and 'valid': the library's backward takes symmetric numbers only
        if padding == "same":
            f = F.pad(f, layer._reversed_padding_repeated_twice)
        padding = (0,) * len(layer.kernel_size)
    if not transposed and layer.groups == 1 and f.is_cpu:
        place = one_place(f.shape[2:], layer.weight, layer.stride, padding, layer.dilation)
        if place is not None:
            return place.spread(g.flatten(1).T @ place.rows(f), layer.weight)
    return torch.ops.aten.convolution_backward(
        g.contiguous(),
        f,
        layer.weight,
        None,
        layer.stride,
        padding,
        layer.dilation,
        transposed,
        layer.output_padding,
        layer.groups,
        (False, True, False),
    )[1]


def _transposed_weight(layer: Any, f: Tensor, g: Tensor) -> Tensor:
    # output_size= may have chosen another padding of the output than the layer's own
    spatial = range(len(layer.kernel_size))
    smallest = [
        (f.shape[2 + j] - 1) * layer.stride[j] - 2 * layer.padding[j] + layer.dilation[j] * (layer.kernel_size[j] - 1) + 1
        for j in spatial
    ]
    output_padding = [g.shape[2 + j] - smallest[j] for j in spatial]
    return torch.ops.aten.convolution_backward(
        g.contiguous(),
        f,
        layer.weight,
        None,
        layer.stride,
        layer.padding,
        layer.dilation,
        True,
        output_padding,
        layer.groups,
        (False, True, False),
    )[1]


def _layer_normalised(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, layer.normalized_shape, None, None, layer.eps)


def _rms_normalised(layer: nn.RMSNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x, layer.normalized_shape, None, layer.eps)


def _group_normalised(layer: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.group_norm(x, layer.num_groups, None, None, layer.eps)


def _by_statistics(mean: Tensor | None, variance: Tensor | None, layer: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, mean, variance, None, None, mean is None, 0.0, layer.eps)


def _batch_normalised(layer: Any, x: Tensor) -> Tensor:
    if layer.training or layer.running_mean is None:
        return _by_statistics(None, None, layer, x)
    return _by_statistics(layer.running_mean, layer.running_var, layer, x)


def _batch_norm_now(layer: Any) -> LocalRule:
    if layer.training or layer.running_mean is None:
        return _BY_BATCH
    return replace(_BATCH_NORM, features=partial(_by_statistics, layer.running_mean.clone(), layer.running_var.clone()))


def _over_elements(layer: Any, f: Tensor, g: Tensor) -> Tensor:
    shape = layer.weight.shape
    product = f * g
    return product.reshape(-1, *shape).sum(0)


def _over_elements_bias(layer: Any, g: Tensor) -> Tensor:
    return g.reshape(g.shape[0], -1, *layer.bias.shape).sum(1)


def _over_channels(layer: Any, f: Tensor, g: Tensor) -> Tensor:
    return (f * g).transpose(0, 1).flatten(1).sum(1)


def _two(layer: nn.Module) -> int:
    return 2


def _spatial(layer: Any) -> int:
    return len(layer.kernel_size) + 2


def _normalised_axes(layer: Any) -> int:
    return len(layer.normalized_shape) + 1


_CONVOLUTION = LocalRule(_padded, _convolution_weight, _sum_to_channels, _spatial)
_TRANSPOSED = LocalRule(_same, _transposed_weight, _sum_to_channels, _spatial)
_BATCH_NORM = LocalRule(_batch_normalised, _over_channels, _sum_to_channels, _two, _batch_norm_now)
_BY_BATCH = replace(_BATCH_NORM, features=partial(_by_statistics, None, None))

_RULES: dict[type[nn.Module], LocalRule] = {
    nn.Linear: LocalRule(_same, _linear_weight, _sum_to_last, _two),
    nn.Conv1d: _CONVOLUTION,
    nn.Conv2d: _CONVOLUTION,
    nn.Conv3d: _CONVOLUTION,
    nn.ConvTranspose1d: _TRANSPOSED,
    nn.ConvTranspose2d: _TRANSPOSED,
    nn.ConvTranspose3d: _TRANSPOSED,
    nn.LayerNorm: LocalRule(_layer_normalised, _over_elements, _over_elements_bias, _normalised_axes),
    nn.RMSNorm: LocalRule(_rms_normalised, _over_elements, _over_elements_bias, _normalised_axes),
    nn.GroupNorm: LocalRule(_group_normalised, _over_channels, _sum_to_channels, _two),
    nn.BatchNorm1d: _BATCH_NORM,
    nn.BatchNorm2d: _BATCH_NORM,
    nn.BatchNorm3d: _BATCH_NORM,
}

#: ``forward`` of these types as it was when the package was imported
_FORWARDS: dict[type[nn.Module], Any] = {kind: kind.forward for kind in _RULES}
