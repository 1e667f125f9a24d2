"""Activation functions through the fused operator, which reads the value once for all k tangents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .. import ops
from ..dual import DualTensor, _make, aten, rule
from .helpers import FUSED_DTYPES, number

_aten = torch.ops.aten
# Rules run below autograd on plain tensors, so the guards of the public face have nothing to find here.
_pointwise_jvp = torch.ops.frog_cuda.pointwise_jvp.default
_CODES = ops.POINTWISE


def apply(x: Any, code: int, alpha: float = 0.0, beta: float = 0.0, inplace: bool = False) -> Any:
    """Value and tangents of one activation; declines what the operator does not take."""
    if type(x) is not DualTensor or x._primal.dtype not in FUSED_DTYPES:
        return NotImplemented
    tangents = x._tangents
    if tangents is None and x._activity is None:
        if x.sampled is None:
            return NotImplemented  # zero tangents, not stored
        tangents = x.tangents
    y, dy = _pointwise_jvp(x._primal, tangents, x._activity, code, alpha, beta)
    return x._write(y, dy, "inplace=True") if inplace else _make(y, dy, x.k)


def _register(
    name: str,
    functions: list[Callable[..., Any]],
    in_place: list[Callable[..., Any]],
    overload: Any,
    inplace_argument: bool = False,
) -> None:
    """An activation without parameters under all its Python and aten names."""
    code = _CODES[name]

    def call(x: Any) -> Any:
        return apply(x, code)

    def layer(input: Any, inplace: bool = False) -> Any:
        return apply(input, code, inplace=inplace)

    rule(*functions)(layer if inplace_argument else call)
    rule(*in_place)(lambda x: apply(x, code, inplace=True))
    aten(overload)(lambda func, x: apply(x, code))


def _register_with(
    name: str,
    parameters: dict[str, float],
    functions: list[Callable[..., Any]],
    in_place: list[Callable[..., Any]],
    overload: Any,
    inplace_argument: bool = False,
) -> None:
    """An activation with one or two parameters, given as {name: default} in the order of the layer's signature."""
    code, names, defaults = _CODES[name], list(parameters), list(parameters.values())

    def values(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, float]:
        given = [*args, *defaults[len(args) :]]
        pair = [number(n, kwargs.get(n, v)) for n, v in zip(names, given, strict=True)]
        return pair[0], pair[1] if len(pair) > 1 else 0.0

    def call(x: Any, *args: Any, **kwargs: Any) -> Any:
        alpha, beta = values(args, kwargs)
        return apply(x, code, alpha, beta)

    def layer(input: Any, *args: Any, inplace: bool = False, **kwargs: Any) -> Any:
        if len(args) > len(defaults):
            args, inplace = args[:-1], args[-1]
        alpha, beta = values(args, kwargs)
        return apply(input, code, alpha, beta, inplace)

    def call_(x: Any, *args: Any, **kwargs: Any) -> Any:
        alpha, beta = values(args, kwargs)
        return apply(x, code, alpha, beta, True)

    rule(*functions)(layer if inplace_argument else call)
    rule(*in_place)(call_)
    aten(overload)(lambda func, x, *args, **kwargs: call(x, *args, **kwargs))


def _both(name: str) -> list[Any]:
    return [getattr(torch, name), getattr(torch.Tensor, name)]


_register("tanh", _both("tanh"), [torch.Tensor.tanh_, torch.tanh_], _aten.tanh.default)
_register("sigmoid", _both("sigmoid"), [torch.Tensor.sigmoid_, torch.sigmoid_], _aten.sigmoid.default)
_register("relu", _both("relu"), [torch.Tensor.relu_, torch.relu_], _aten.relu.default)
_register("relu", [F.relu], [], _aten.relu.default, inplace_argument=True)
_register("silu", [F.silu], [], _aten.silu.default, inplace_argument=True)
_register_with("softplus", {"beta": 1.0, "threshold": 20.0}, [F.softplus], [], _aten.softplus.default)
_register_with("elu", {"alpha": 1.0}, [F.elu], [F.elu_], _aten.elu.default, True)
_register_with("leaky_relu", {"negative_slope": 0.01}, [F.leaky_relu], [F.leaky_relu_], _aten.leaky_relu.default, True)
_register_with("hardtanh", {"min_val": -1.0, "max_val": 1.0}, [F.hardtanh], [F.hardtanh_], _aten.hardtanh.default, True)


@aten(_aten.elu.default)
def elu(func: Any, x: Any, alpha: Any = 1, scale: Any = 1, input_scale: Any = 1) -> Any:
    # selu and celu come here with their own scales
    return apply(x, _CODES["elu"], number("alpha", alpha)) if scale == 1 and input_scale == 1 else NotImplemented


@rule(F.gelu)
def gelu(input: Any, approximate: str = "none") -> Any:
    if approximate not in ("none", "tanh"):
        return NotImplemented  # PyTorch's own error
    return apply(input, _CODES["gelu" if approximate == "none" else "gelu_tanh"])


@aten(_aten.gelu.default)
def aten_gelu(func: Any, x: Any, *, approximate: str = "none") -> Any:
    return gelu(x, approximate)


@rule(F.relu6)
def relu6(input: Any, inplace: bool = False) -> Any:
    return apply(input, _CODES["hardtanh"], 0.0, 6.0, inplace)


@aten(_aten.relu6.default)
def aten_relu6(func: Any, x: Any) -> Any:
    return relu6(x)
