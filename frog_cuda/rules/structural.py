"""Views and rearrangements: the tangents move as the value does, with k as their leading axis.

A view of a DualTensor views its tangents, too, so that an in-place operation on either reaches both.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._copies import extent
from ..dual import DualTensor, aten, called_from, resolve, rule
from .helpers import common_k, constant, full, lift, low_dtype, parts, share_memory, shift, wrap

_aten = torch.ops.aten

_DIM_NAMES = frozenset({"dim", "dims", "dim0", "dim1", "dim2", "dimension"})
_SAMPLED_VIEW = "a view of a parameter whose tangents are drawn on the fly"


def _view_parts(x: DualTensor) -> tuple[Tensor, Tensor, str | None]:
    """(value, tangents, readonly) of the base of a view; unlike ``parts`` this stores zero tangents."""
    if x.sampled is not None:
        return x._primal, x.tangents, _SAMPLED_VIEW
    return x._primal, x.tangents, x._readonly


def _view(value: Tensor, tangents: Tensor, readonly: str | None, low: torch.dtype | None) -> Tensor:
    out = wrap(value, tangents, low)
    if readonly is not None and type(out) is DualTensor:
        out._copied_from(value, readonly)
    return out


@aten(
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten._reshape_alias.default,
    _aten.squeeze.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.unsqueeze.default,
)
def reshaped(func: Any, x: DualTensor, *args: Any) -> Any:
    value, tangents, readonly = _view_parts(x)
    out = func(value, *args)
    shape = (tangents.shape[0], *out.shape)
    try:
        moved = tangents.view(shape)
    except RuntimeError:  # laid out in another way than the value
        moved = tangents.reshape(shape)
        readonly = readonly or "a view whose tangents had to be copied"
    return _view(out, moved, readonly, low_dtype(x))


@aten(_aten.expand.default)
def expand(func: Any, x: DualTensor, size: Any, *, implicit: bool = False) -> Any:
    value, tangents, readonly = _view_parts(x)
    out = func(value, size)
    return _view(out, lift(tangents, out).expand(x.k, *out.shape), readonly, low_dtype(x))


@aten(_aten.t.default)
def t(func: Any, x: DualTensor) -> Any:
    value, tangents, readonly = _view_parts(x)
    return _view(
        func(value), tangents.transpose(1, 2) if value.dim() == 2 else _aten.alias.default(tangents), readonly, low_dtype(x)
    )


@aten(_aten.permute.default)
def permute(func: Any, x: DualTensor, dims: Any) -> Any:
    value, tangents, readonly = _view_parts(x)
    moved = func(tangents, [0, *(d % value.dim() + 1 for d in dims)])
    return _view(func(value, dims), moved, readonly, low_dtype(x))


@aten(_aten.as_strided.default)
def as_strided(func: Any, x: DualTensor, size: Any, stride: Any, storage_offset: int | None = None) -> Any:
    """A view of the tangents, too, where each is laid out like a value without gaps and the view leaves neither."""
    out = func(x._primal, size, stride, storage_offset)
    value, tangents, readonly = _view_parts(x)
    alike = all(n == 1 or s == t for n, s, t in zip(value.shape, value.stride(), tangents.stride()[1:], strict=True))
    (begin, end), (first, last) = extent(value), extent(out)
    dense = end - begin == value.numel() * value.element_size() and torch._debug_has_internal_overlap(value) == 0
    if not alike or not dense or first < begin or last > end:
        return NotImplemented
    offset = tangents.storage_offset() + out.storage_offset() - value.storage_offset()
    moved = func(tangents, [x.k, *size], [tangents.stride(0), *stride], offset)
    return _view(out, moved, readonly, low_dtype(x))


@aten(_aten._conj.default, _aten._neg_view.default)
def lazy(func: Any, x: DualTensor) -> Any:
    """Conjugates or negates at once, because kernels called from ``__torch_dispatch__`` ignore a pending one."""
    if x.sampled is None:
        x._tangents = x.tangents  # stored, also where they are zero: what is made here has its own
    out = _aten.conj_physical.default(x) if func is _aten._conj.default else _aten.neg.default(x)
    out._copied_from(x._primal, f"a view made by {func}, whose values are a copy")
    return out


@aten(_aten.view_as_real.default, _aten.view_as_complex.default)
def as_pairs(func: Any, x: DualTensor) -> Any:
    value, tangents, readonly = _view_parts(x)
    out = func(value)
    own = tangents.to(value.dtype)  # not every narrower dtype has a complex one
    try:
        moved = func(own)
    except RuntimeError:  # pairs that begin at an odd place
        moved = func(own.contiguous())
    if not share_memory(moved, tangents):
        readonly = readonly or "a view whose tangents had to be copied"
    return _view(out, moved, readonly, None)


@aten(_aten.alias.default, _aten.lift_fresh.default, _aten.positive.default)
def alias(func: Any, x: DualTensor) -> Any:
    """``positive`` is the tensor itself in PyTorch."""
    value, tangents, readonly = _view_parts(x)
    return _view(func(value), _aten.alias.default(tangents), readonly, low_dtype(x))


def _shifted(func: Any) -> Any:
    """A rule for an operation that treats axes one by one: the same call on the tangents with every axis moved by one."""
    arguments = func._schema.arguments
    axes = [i for i, a in enumerate(arguments) if a.name in _DIM_NAMES]
    # unsafe_split shares memory, too, although its schema does not say so
    is_view = any(r.alias_info is not None for r in func._schema.returns) or "unsafe" in func._schema.name

    def body(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if type(x) is not DualTensor:
            return NotImplemented
        value = x._primal
        n = value.dim()
        if n == 0:
            if func is not _aten.transpose.int:
                return NotImplemented
            same = _aten.alias.default(x.tangents)
            return _view(func(value, *args, **kwargs), same, _view_parts(x)[2], low_dtype(x))
        value, tangents, readonly = _view_parts(x) if is_view else (*parts(x), None)
        if tangents is None or any(type(a) is DualTensor for a in args):
            return NotImplemented
        moved = [tangents, *args]
        for i in axes:
            if i >= len(moved) and arguments[i].name in kwargs:
                continue
            while len(moved) <= i:
                moved.append(arguments[len(moved)].default_value)
            dims = moved[i]
            moved[i] = [d % n + 1 for d in dims] if isinstance(dims, (list, tuple)) else shift(dims, n)
        named = {a: (shift(v, n) if a in _DIM_NAMES else v) for a, v in kwargs.items()}
        outs, d_outs = func(value, *args, **kwargs), func(*moved, **named)
        low = low_dtype(x)
        if isinstance(outs, Tensor):
            return _view(outs, d_outs, readonly, low)
        return type(outs)(_view(o, d, readonly, low) for o, d in zip(outs, d_outs, strict=True))

    return body


for _overload in (
    _aten.transpose.int,
    _aten.slice.Tensor,
    _aten.select.int,
    _aten.split.Tensor,
    _aten.split_with_sizes.default,
    _aten.unsafe_split.Tensor,
    _aten.unsafe_split_with_sizes.default,
    _aten.unbind.int,
    _aten.diagonal.default,
    _aten.unfold.default,
    _aten.flip.default,
    _aten.cumsum.default,
    _aten.index_select.default,
    _aten.tril.default,
    _aten.triu.default,
):
    aten(_overload)(_shifted(_overload))


@aten(_aten.clone.default)
def clone(func: Any, x: Any, *, memory_format: Any = None) -> Any:
    value, tangents = parts(x)
    out = func(value, memory_format=memory_format)
    if tangents is None:
        return constant(out, common_k(func, x))
    # channels_last and the like count axes, of which the tangents have one more
    same = memory_format in (None, torch.contiguous_format, torch.preserve_format)
    moved = tangents.clone(memory_format=memory_format if same and memory_format is not None else torch.preserve_format)
    return wrap(out, moved, low_dtype(x))


@aten(_aten._to_copy.default)
def to_copy(func: Any, x: Any, *, dtype: Any = None, memory_format: Any = None, **kwargs: Any) -> Any:
    value, tangents = parts(x)
    out = func(value, dtype=dtype, memory_format=memory_format, **kwargs)
    if tangents is None:
        return constant(out, common_k(func, x))
    kwargs.pop("layout", None)
    if out.dtype.itemsize < 2 and out.is_floating_point():
        raise TypeError(
            f"{func}{called_from()}: a DualTensor of dtype {out.dtype} would have tangents of 8 bits; at least 16 are needed"
        )
    low = low_dtype(x)
    return wrap(out, func(tangents, dtype=out.dtype if low is None else low, **kwargs), low)


@aten(_aten.roll.default)
def roll(func: Any, x: Any, shifts: Any, dims: Any = ()) -> Any:
    value, tangents = parts(x)
    out = func(value, shifts, dims)
    if tangents is None:
        return out
    if not dims:  # through the elements in order; k must stand apart from them
        moved = func(tangents.flatten(1) if value.dim() else tangents.unsqueeze(1), shifts, [1]).view(tangents.shape)
    else:
        moved = func(tangents, shifts, [shift(d, value.dim()) for d in dims]) if value.dim() else tangents.clone()
    return wrap(out, moved, low_dtype(x))


@aten(_aten.repeat.default)
def repeat(func: Any, x: Any, repeats: Any) -> Any:
    value, tangents = parts(x)
    out = func(value, repeats)
    if tangents is None:
        return constant(out, common_k(func, x))
    return wrap(out, func(lift(tangents, out), [1, *repeats]), low_dtype(x))


@aten(_aten.constant_pad_nd.default)
def constant_pad(func: Any, x: Any, pad: Any, value: Any = 0) -> Any:
    primal, tangents = parts(x)
    if tangents is None:
        return constant(func(primal, pad, value), common_k(func, x))
    if not any(pad):
        return NotImplemented
    return wrap(func(primal, pad, value), func(tangents, pad, 0), low_dtype(x))


@aten(_aten.masked_fill.Scalar)
def masked_fill(func: Any, x: Any, mask: Tensor, value: Any) -> Any:
    primal, tangents = parts(x)
    out = func(primal, mask, value)
    if tangents is None:
        return out
    return wrap(out, full(lift(tangents, out), out).masked_fill(mask, 0), low_dtype(x))


@aten(_aten.cat.default)
def cat(func: Any, tensors: Any, dim: int = 0) -> Any:
    return _joined(func, tensors, dim, tensors[0].dim())


@aten(_aten.stack.default)
def stack(func: Any, tensors: Any, dim: int = 0) -> Any:
    return _joined(func, tensors, dim, tensors[0].dim() + 1)


def _joined(func: Any, tensors: Any, dim: int, ndim: int) -> Any:
    k = common_k(func, *tensors)
    split = [parts(resolve(x)) for x in tensors]
    out = func([p for p, _ in split], dim)
    if all(tangents is None for _, tangents in split):
        return constant(out, k)
    if any(p.dim() != split[0][0].dim() for p, _ in split):
        return NotImplemented  # cat skips empty one-dimensional tensors
    low = low_dtype(*tensors)
    moved = [p.new_zeros(()).expand(k, *p.shape) if tangents is None else tangents for p, tangents in split]
    return wrap(out, func([m.to(low or out.dtype) for m in moved], shift(dim, ndim)), low)


@aten(_aten.index.Tensor)
def index(func: Any, x: Any, indices: Any) -> Any:
    value, tangents = parts(x)
    used = [i for i, j in enumerate(indices) if j is not None]
    # Separated index tensors move their axes to the front, before k
    if tangents is None or not used or used[-1] - used[0] + 1 != len(used):
        return NotImplemented
    return wrap(func(value, indices), func(tangents, [None, *indices]), low_dtype(x))


@aten(_aten.gather.default)
def gather(func: Any, x: Any, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Any:
    value, tangents = parts(x)
    if tangents is None or value.dim() == 0 or index.dim() == 0:
        return NotImplemented
    return wrap(
        func(value, dim, index),
        func(tangents, shift(dim, value.dim()), index.expand(tangents.shape[0], *index.shape)),
        low_dtype(x),
    )


@rule(F.embedding_bag)
def embedding_bag(
    input: Any,
    weight: Any,
    offsets: Any = None,
    max_norm: Any = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: Any = None,
) -> Any:
    """Sums and means are linear in the table and in the weights of samples; PyTorch has no forward mode for them."""
    w, dw = parts(weight)
    s, ds = parts(per_sample_weights)
    if mode not in ("sum", "mean") or max_norm is not None or (dw is None and ds is None):
        return NotImplemented
    k = common_k("embedding_bag", weight, per_sample_weights)

    def bags(table: Tensor, factors: Any) -> Tensor:
        last = include_last_offset, padding_idx
        return F.embedding_bag(input, table, offsets, None, norm_type, scale_grad_by_freq, mode, sparse, factors, *last)

    out = bags(w, s)
    moved = torch.zeros((k, *out.shape), dtype=out.dtype, device=out.device)
    for i in range(k):
        if dw is not None:
            moved[i] += bags(dw[i].to(w.dtype), s)
        if ds is not None:
            moved[i] += bags(w, ds[i].to(s.dtype))
    return wrap(out, moved, low_dtype(weight, per_sample_weights))
