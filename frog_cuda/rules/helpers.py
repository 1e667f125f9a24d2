"""What the rules share: tangents in the shape, dtype and device of a result."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dual import DualTensor, _k_mismatch, _make, called_from

_linear_rows = torch.ops.frog_cuda.linear_rows.default

#: dtypes the compiled operators take
FUSED_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


def parts(x: Any) -> tuple[Any, Tensor | None]:
    """(primal, tangents), where tangents that are known to be zero are None."""
    if type(x) is not DualTensor:
        return x, None
    if x._tangents is None and x._activity is None and x.sampled is None:
        return x._primal, None
    return x._primal, x.tangents


def common_k(where: object, *tensors: Any) -> int:
    """The k of all DualTensors among ``tensors``, 0 if there is none."""
    k = 0
    for t in tensors:
        if type(t) is DualTensor and t.k != k:
            if k:
                raise _k_mismatch(where, k, t.k)
            k = t.k
    return k


def low_dtype(*tensors: Any) -> torch.dtype | None:
    """The dtype of tangents that differ from their primal's on purpose; None where all are the primal's."""
    low = None
    for t in tensors:
        if type(t) is DualTensor:
            source = t._tangents if t._tangents is not None else t._activity if t._activity is not None else t.sampled
            own = None if source is None else source.dtype
            if own is not None and own != t._primal.dtype:
                low = own if low is None else torch.promote_types(low, own)
    return low


def wrap(primal: Tensor, tangents: Tensor | None, low: torch.dtype | None = None, k: int = 0) -> Tensor:
    """A DualTensor, or the plain primal where there are no tangents or the result is not differentiable."""
    if tangents is None or not (primal.is_floating_point() or primal.is_complex()):
        return primal
    dtype = low if low is not None and primal.is_floating_point() else primal.dtype
    if tangents.dtype != dtype:
        tangents = tangents.to(dtype)
    return _make(primal, tangents, tangents.shape[0])


def constant(out: Tensor, k: int) -> Tensor:
    """``out`` with zero tangents that are not stored, so that others may be written into it; plain where k is 0."""
    return _make(out, None, k) if k and (out.is_floating_point() or out.is_complex()) else out


def number(name: str, value: Any) -> float:
    """An argument of a layer that the operators take as a number."""
    if type(value) is DualTensor:
        raise RuntimeError(
            f"{name}{called_from()}: a DualTensor as an argument that is a number: its tangents would be lost; pass .item() if "
            "that is meant, or compute with tensor operations"
        )
    return float(value)


def lift(tangents: Tensor, out: Tensor) -> Tensor:
    """Tangents of an operand that broadcasts to ``out``: ``(k, *shape) -> (k, 1, .., 1, *shape)``, on ``out``'s device."""
    missing = out.dim() + 1 - tangents.dim()
    if missing > 0:
        tangents = tangents[(slice(None),) + (None,) * missing]
    if tangents.device != out.device:  # a 0-dim operand may live on the CPU
        tangents = tangents.to(out.device)
    return tangents


def full(tangents: Tensor, out: Tensor) -> Tensor:
    """Lifted tangents stretched to ``(k, *out.shape)``; dense, because something may be written into them in place."""
    if tangents.shape[1:] == out.shape:
        return tangents
    return tangents.expand(tangents.shape[0], *out.shape).clone(memory_format=torch.contiguous_format)


def share_memory(a: Tensor, b: Tensor) -> bool:
    return torch._C._is_alias_of(a, b)  # type: ignore[attr-defined]


def own(tangents: Tensor, out: Tensor) -> Tensor:
    """``full(lift(tangents, out), out)`` in memory of its own, also where axes of size 1 are all that is added."""
    moved = full(lift(tangents, out), out)
    return moved.clone() if share_memory(moved, tangents) else moved


def shift(dim: int, ndim: int) -> int:
    """The axis of the tangents that belongs to axis ``dim`` of a primal with ``ndim`` >= 1 axes."""
    return dim + ndim + 1 if dim < 0 else dim + 1


def rows_times(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows weight^T`` in the dtype of ``rows`` (*, in): on CPUs by the operator whose bits do not tell how many rows there
    are, and with that how many tangents."""
    if rows.is_cpu:
        return _linear_rows(rows.to(weight.dtype), weight).to(rows.dtype)
    return torch.matmul(rows, weight.t().to(rows.dtype))


def all_dims(x: Tensor) -> list[int]:
    """All axes of the tangents but k."""
    return list(range(1, x.dim() + 1))
