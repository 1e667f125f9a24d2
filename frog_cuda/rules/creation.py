"""Results without tangents: predicates, integers, buffers, random numbers, values taken out; and dropout with one mask."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import DispatchKey
from torch.utils._pytree import tree_leaves

from .. import stopping
from ..dual import DualTensor, _make, aten, called_from, rule
from .helpers import common_k, low_dtype, number, parts, wrap

_aten = torch.ops.aten


def _overloads(*names: str) -> list[Any]:
    return [getattr(getattr(_aten, n), o) for n in names for o in getattr(_aten, n).overloads() if "out" not in o]


@aten(
    *_overloads("eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf", "isfinite", "isposinf", "isneginf", "signbit", "equal"),
    *_overloads(
        "logical_and", "logical_or", "logical_xor", "logical_not", "argmax", "argmin", "argsort", "allclose", "isclose"
    ),
    *_overloads("nonzero", "count_nonzero", "bucketize", "searchsorted", "multinomial", "any", "all", "is_nonzero", "isin"),
    *_overloads("floor", "ceil", "round", "trunc", "fix", "sign", "floor_divide"),
    *_overloads("rand_like", "randn_like", "randint_like", "bernoulli", "poisson", "histc", "is_same_size"),
    *_overloads("normal"),
    _aten.detach.default,
)
def plain(func: Any, *args: Any, **kwargs: Any) -> Any:
    """The result's derivative is zero or does not exist: computed from the values, a plain tensor."""
    return func(*(primal(a) for a in args), **{n: primal(a) for n, a in kwargs.items()})


def primal(x: Any) -> Any:
    return x._primal if type(x) is DualTensor else x


@aten(
    *_overloads("zeros_like", "ones_like", "full_like", "empty_like"),
    *_overloads("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided"),
)
def buffer(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """A constant with zero tangents that are not stored, so that results with tangents may be written into it."""
    if any(type(a) is DualTensor for a in args):
        return NotImplemented
    out = func(primal(x), *args, **kwargs)
    if type(x) is not DualTensor or not (out.is_floating_point() or out.is_complex()):
        return out
    return _make(out, None, x.k)


@rule(torch.Tensor.tolist)
def tolist(x: DualTensor) -> Any:
    return x._primal.tolist()


@rule(torch.Tensor.numpy, torch.Tensor.__array__)
def numpy(x: DualTensor, *args: Any, **kwargs: Any) -> Any:
    raise RuntimeError(
        f"numpy{called_from()}: a DualTensor's tangents would be lost in a numpy array; use .primal.numpy() if that is meant"
    )


@rule(torch.Tensor.__dlpack__)
def dlpack(x: DualTensor, *args: Any, **kwargs: Any) -> Any:
    raise RuntimeError(
        f"__dlpack__{called_from()}: a DualTensor's tangents would be lost, and it has no memory of its own; hand on .primal "
        "if that is meant"
    )


@rule(torch.Tensor.share_memory_)
def share_memory_(x: DualTensor) -> Any:
    raise RuntimeError(f"share_memory_{called_from()}: a DualTensor has no memory of its own; share .primal and .tangents")


@rule(torch.Tensor.apply_)
def apply_(x: DualTensor, function: Any) -> Any:
    raise _python_function("apply_")


@rule(torch.Tensor.map_)
def map_(x: Any, other: Any, function: Any) -> Any:
    raise _python_function("map_")


@rule(torch.Tensor.map2_)
def map2_(x: Any, first: Any, second: Any, function: Any) -> Any:
    raise _python_function("map2_")


def _python_function(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name}{called_from()}: the derivative of a Python function of numbers is not known; use torch functions"
    )


def _number(read: Any) -> Any:
    def body(x: DualTensor) -> Any:
        """Asked for by ``torch.tensor([x, 2.0])`` below the dispatcher, where a DualTensor has no memory to read from."""
        if torch._C._dispatch_tls_is_dispatch_key_excluded(DispatchKey.Python):
            raise _in_a_list("torch.tensor")
        return read(x._primal)

    return body


def _in_a_list(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name}{called_from()}: a DualTensor in a list of numbers, of which a constant is made: its tangents would be "
        "lost; use torch.stack(), or .item() if that is meant"
    )


for _name in ("item", "__float__", "__complex__", "__int__", "__index__"):
    rule(getattr(torch.Tensor, _name))(_number(getattr(torch.Tensor, _name)))


@aten(*_overloads("item", "_local_scalar_dense"))
def scalar(func: Any, x: Any) -> Any:
    """What reads a number by name does not come here, but a DualTensor where PyTorch's functions take a number does."""
    if stopping.stopped() or _read_within_torch():
        return func(x._primal)
    raise RuntimeError(
        f"a DualTensor{called_from()} as an argument that is a number, such as alpha or eps: its tangents would be lost; pass "
        ".item() if that is meant, or compute with tensor operations"
    )


def _read_within_torch() -> bool:
    """Whether torch.func or torch.compile runs, inside which ``.item()``, too, goes on without asking for a rule."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(("torch._functorch", "torch._dynamo")):
            return True
        frame = frame.f_back
    return False


@rule(torch.Tensor.new_tensor, torch.Tensor.new)
def new_tensor(x: Any, *data: Any, **kwargs: Any) -> Any:
    given = [d for d in (*data, kwargs.get("data")) if isinstance(d, (list, tuple))]
    if given and any(type(d) is DualTensor for d in tree_leaves(given)):
        raise _in_a_list("new_tensor")
    return NotImplemented


@rule(torch.Tensor.requires_grad.__get__)  # type: ignore[attr-defined]
def requires_grad(x: DualTensor) -> bool:
    """torch.autograd.functional leaves out results that do not require grad: their derivatives would be zeros."""
    if sys._getframe(2).f_globals.get("__name__") == "torch.autograd.functional":
        raise RuntimeError(
            f"torch.autograd.functional{called_from()}: nothing is recorded for backward through a DualTensor; use "
            "torch.func.jacrev (twice for a Hessian), grad or vjp, where each DualTensor is one of the arguments"
        )
    return False


@rule(torch.Tensor.requires_grad_)
def requires_grad_(x: DualTensor, requires_grad: bool = True) -> DualTensor:
    """In a pass of an estimator it changes nothing, as in training, where what depends on parameters requires grad anyway."""
    if requires_grad and not stopping.in_pass():
        raise RuntimeError("requires_grad_: nothing is recorded for backward through a DualTensor")
    return x


@rule(torch.Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
def set_requires_grad(x: DualTensor, requires_grad: bool) -> None:
    requires_grad_(x, requires_grad)


@rule(torch.Tensor.data.__set__)  # type: ignore[attr-defined]
def set_data(x: DualTensor, data: Tensor) -> None:
    raise RuntimeError(f"data{called_from()}: a DualTensor's value cannot be replaced; use copy_()")


@rule(torch.Tensor.backward)
def backward(x: DualTensor, *args: Any, **kwargs: Any) -> None:
    raise RuntimeError("backward: nothing is recorded for backward through a DualTensor; its tangents are the derivatives")


@rule(torch.autograd.grad)
def grad(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError(
        f"torch.autograd.grad{called_from()}: nothing is recorded for backward through a DualTensor; torch.func.grad "
        "and torch.func.vjp can be used inside, where each DualTensor is one of their arguments"
    )


@rule(F.dropout)
def f_dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if not 0.0 <= p <= 1.0:
        return NotImplemented  # PyTorch's own error
    return _dropped(input, p, training, inplace)


@rule(torch.dropout)
def t_dropout(input: Any, p: float, train: bool) -> Any:
    return _dropped(input, p, train, False)


@aten(_aten.dropout.default)
def a_dropout(func: Any, input: Any, p: float, train: bool) -> Any:
    return _dropped(input, p, train, False)


def _dropped(x: Any, p: float, train: bool, inplace: bool) -> Any:
    value, tangents = parts(x)
    p = number("p", p)
    if not train or p == 0 or tangents is None:
        return x if not train or p == 0 else NotImplemented
    # The same draws as torch.dropout makes for x, on any device
    scaled_mask = torch.dropout(torch.ones_like(value), p, True)
    out = value * scaled_mask
    moved = tangents * scaled_mask
    if inplace:
        return x._write(out, moved, "dropout")
    return wrap(out, moved, low_dtype(x))


@aten(_aten.native_dropout.default)
def native_dropout(func: Any, input: Any, p: float, train: bool | None) -> Any:
    value, tangents = parts(input)
    out, mask = func(value, p, train)
    if tangents is None:
        return out, mask
    scale = 1.0 if train is False or p == 1 else 1.0 / (1.0 - p)
    return wrap(out, tangents * mask * scale, low_dtype(input)), mask


@aten(_aten.where.self)
def where(func: Any, condition: Tensor, a: Any, b: Any) -> Any:
    from .helpers import full, lift

    common_k(func, a, b)
    pa, ta = parts(a)
    pb, tb = parts(b)
    out = func(condition, pa, pb)
    if ta is None and tb is None:
        return out
    zero = out.new_zeros(())
    ta = zero if ta is None else lift(ta, out)
    tb = zero if tb is None else lift(tb, out)
    return wrap(out, full(torch.where(condition, ta, tb), out), low_dtype(a, b))
