"""What every operator's face does before the call: guards against silent loss of tangents, names instead of codes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import DispatchKey, _functorch
from torch.autograd import forward_ad

_ops = torch.ops.frog_cuda


def _guard(name: str, *tensors: Tensor | None) -> None:
    """Raises where PyTorch would silently drop a tangent or a gradient."""
    # Another thread may be in forward mode; below autograd no tensor shows a tangent, and asking for it is an error
    if forward_ad._current_level >= 0 and not torch._C._dispatch_tls_is_dispatch_key_excluded(
        DispatchKey.AutogradFunctionality
    ):
        for t in tensors:
            if t is not None and forward_ad.unpack_dual(t).tangent is not None:
                raise RuntimeError(
                    f"frog_cuda.ops.{name}: got a forward-mode dual tensor (torch.autograd.forward_ad or torch.func.jvp), "
                    "whose tangent would be lost; pass primal and tangents as separate arguments, or use frog_cuda.jvp"
                )
    if _functorch.peek_interpreter_stack() is not None:
        for t in tensors:
            if t is not None and _functorch.is_functorch_wrapped_tensor(t):
                raise RuntimeError(
                    f"frog_cuda.ops.{name}: got a tensor wrapped by torch.func (jvp, grad or vmap), whose tangent would be "
                    "lost; call the operator outside torch.func, or use frog_cuda.jvp"
                )
    if torch.is_grad_enabled():
        _refuse_grad(name, tensors)


def _guard_written(name: str, **written: Tensor | None) -> None:
    """Raises where PyTorch would let the operator write into a copy: that of a view which negates."""
    for argument, t in written.items():
        if t is not None and t.is_neg():
            raise RuntimeError(
                f"frog_cuda.ops.{name}: {argument} is a view that negates, such as .imag of a conjugate; pass "
                f"{argument}.resolve_neg()"
            )


def _refuse_grad(name: str, tensors) -> None:
    for t in tensors:
        if isinstance(t, Tensor) and t.requires_grad:
            raise RuntimeError(
                f"frog_cuda.ops.{name}: got a tensor that requires grad, but no gradient is recorded through it; call it "
                "under torch.no_grad() or pass tensor.detach()"
            )


def _code(table: dict[str, int], what: str, name: str) -> int:
    try:
        return table[name]
    except KeyError:
        raise ValueError(f"{what} is {name!r}; accepted are {', '.join(table)}") from None
