"""DualTensor: a tensor that carries k tangents through unmodified PyTorch code.

An operation on a DualTensor is served by the first of these that knows it:

1. a *function rule* (``@rule(F.linear)``), found in ``__torch_function__``: whole layers, computed by the fused operators of
   :mod:`frog_cuda.ops`;
2. an *aten rule* (``@aten(aten.mul.Tensor)``), found in ``__torch_dispatch__``: views, arithmetic, reductions, matrix products;
3. the decomposition of a composite operation into simpler ones, which start again at 2;
4. the fallback: PyTorch's own forward mode applied to this one operation, vectorised over the k tangents.

If PyTorch has no forward rule either, the error names the operation. No step ever answers with zero tangents in place of a
derivative it does not know. The rules live in :mod:`frog_cuda.rules`, one file per family.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass, _AutoDispatchBelowAutograd

from . import _copies
from .low_rank import Factors

__all__ = ["DualTensor", "SampledTangents", "add_activity", "aten", "primal_of", "rule", "tangents_of"]

#: function as seen by ``__torch_function__`` -> rule(*args, **kwargs); a rule may decline by returning NotImplemented
FUNCTION_RULES: dict[Any, Callable[..., Any]] = {}
#: aten overload -> rule(overload, *args, **kwargs); may decline likewise. Filled on demand for what has no rule of its own.
ATEN_RULES: dict[Any, Callable[..., Any]] = {}


def rule(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the decorated function as the rule of whole layers, e.g. ``@rule(F.linear)``; same signature as the layer."""

    def register(body: Callable[..., Any]) -> Callable[..., Any]:
        for function in functions:
            FUNCTION_RULES[function] = body
        return body

    return register


def aten(*overloads: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the decorated function ``(overload, *args, **kwargs)`` as the rule of aten overloads."""

    def register(body: Callable[..., Any]) -> Callable[..., Any]:
        for overload in overloads:
            ATEN_RULES[overload] = body
        return body

    return register


def existing(owner: Any, *names: str) -> list[Any]:
    """Those of ``owner``'s members, by dotted names, that this version of PyTorch has."""
    found = []
    for name in names:
        member = functools.reduce(lambda o, part: getattr(o, part, None), name.split("."), owner)
        if member is not None:
            found.append(member)
    return found


@dataclass(frozen=True, eq=False)
class SampledTangents:
    """Which tangents a parameter has, without storing them: the arguments of :func:`frog_cuda.ops.sample_tangents`.

    Arguments:
        state: int64 ``(2,)`` ``[seed, step]``, or the coordinates of ``"standard_basis"``.
        k, first: tangents ``first .. first + k`` of the whole set.
        offset: position of the parameter's first element in the global tangent vector.
        distribution: ``"normal"``, ``"rademacher"`` or ``"standard_basis"``.
        grams: where given, fused rules leave here, under the parameter's offset, what returns the Gram matrix (float64
            ``(whole, whole)``) of the tangents they drew; a bias drawn together with its weight is counted in the weight's
            entry and gets zeros.
        touched: where given, the offset is added to it when an operation reads the tangents: the parameter takes part.
        dtype: of the tangents; None means the parameter's.
        whole: how many tangents the whole set has; None means k.
        stored: the tangents (k, *shape), where they are there anyway; not to be written to.
    """

    state: Tensor
    k: int
    first: int
    offset: int
    distribution: str
    grams: dict[int, Callable[[], Tensor]] | None = None
    touched: set[int] | None = None
    dtype: torch.dtype | None = None
    whole: int | None = None
    stored: Tensor | None = None


_make_wrapper = torch.Tensor._make_wrapper_subclass  # type: ignore[attr-defined]


@final
class DualTensor(torch.Tensor):
    """A primal tensor and k tangents of the same shape, usable wherever PyTorch expects a tensor.

    Arguments:
        primal: any shape, floating point or complex; detached.
        tangents: ``(k, *primal.shape)``, k >= 1; the primal's dtype, or for a floating primal any other floating dtype
            (bfloat16 tangents of a float32 primal halve their memory). Used as they are: in-place operations write into them.
    Raises:
        TypeError: an argument is no plain tensor, or its dtype is not accepted.
        ValueError: shape or device do not fit.
    """

    # Exactly one of these describes the tangents: stored ones and/or an activity tangent still to be added to them; a recipe
    # for drawing them; or nothing at all, which means zeros (a buffer made by zeros_like that something may be written into).
    k: int
    sampled: SampledTangents | Factors | None = None
    _primal: Tensor
    _tangents: Tensor | None = None
    _activity: Tensor | None = None
    # called where the activity tangent is added to stored ones because no operator took it along
    _on_adding: Callable[[], None] | None = None
    # whether lookups of an embedding's padding have no derivative, as in backprop but not in PyTorch's forward mode
    stops_padding: bool = False
    # why tangents are not the memory that a view's base sees, so that an in-place operation must be refused
    _readonly: str | None = None

    @staticmethod
    def __new__(cls, primal: Tensor, tangents: Tensor) -> DualTensor:
        _check_plain("primal", primal)
        _check_plain("tangents", tangents)
        if tangents.dim() < 1 or tangents.shape[0] < 1 or tangents.shape[1:] != primal.shape:
            raise ValueError(
                f"DualTensor: tangents have shape {tuple(tangents.shape)}; expected (k, *primal.shape) with k >= 1 and "
                f"primal.shape {tuple(primal.shape)}"
            )
        if tangents.dtype != primal.dtype and not (primal.is_floating_point() and tangents.is_floating_point()):
            raise TypeError(f"DualTensor: tangents have dtype {tangents.dtype}, but the primal has {primal.dtype}")
        if tangents.device != primal.device:
            raise ValueError(f"DualTensor: tangents are on {tangents.device}, but the primal is on {primal.device}")
        tangents = resolve(tangents.detach())
        if torch._debug_has_internal_overlap(tangents) == 1:  # expanded: could not be written to in place
            tangents = tangents.clone(memory_format=torch.contiguous_format)
        custom_functions.stay()
        return _make(resolve(primal.detach()), tangents, tangents.shape[0])

    @staticmethod
    def sampled_from(primal: Tensor, sampled: SampledTangents | Factors) -> DualTensor:
        """A parameter whose tangents are drawn inside the fused operators and never stored.

        Operations without a fused rule draw them on the spot and drop them again afterwards.
        """
        _check_plain("primal", primal)
        if sampled.k < 1:
            raise ValueError(f"DualTensor.sampled_from: sampled.k is {sampled.k}; at least 1 tangent is needed")
        if primal.is_complex():
            raise TypeError(f"DualTensor.sampled_from: primal has dtype {primal.dtype}; sampled tangents are real")
        custom_functions.stay()
        dual = _make(resolve(primal.detach()), None, sampled.k)
        dual.sampled = sampled
        return dual

    @property
    def primal(self) -> Tensor:
        """The value, a plain tensor sharing memory with this one."""
        return self._primal

    @property
    def tangents(self) -> Tensor:
        """Tangents ``(k, *shape)``. Sampled ones are drawn anew at each access; a pending activity tangent is added in."""
        tangents = self._tangents
        if tangents is None or self._activity is not None:
            return self._materialise()
        return tangents

    def _materialise(self) -> Tensor:
        if self.sampled is not None:
            return draw(self._primal, self.sampled)
        shape = (self.k, *self._primal.shape)
        if self._activity is None:
            tangents = self._primal.new_zeros(shape)
        else:
            activity = _lifted(self._activity, len(shape))
            if self._tangents is None:
                # A copy, because an expanded tensor could not be written to in place later
                tangents = activity.expand(shape).clone(memory_format=torch.contiguous_format)
            else:
                if self._on_adding is not None:
                    self._on_adding()
                if self._tangents.is_cpu and self._tangents.is_floating_point():
                    tangents = torch.ops.frog_cuda.tangent_sum.default(self._tangents, self._activity, None, None, 1.0)
                else:
                    tangents = self._tangents + activity.to(self._tangents.dtype)
            self._activity = None
        self._tangents = tangents
        return tangents

    def _write(self, primal: Tensor, tangents: Tensor | None, name: object) -> DualTensor:
        """Overwrites value and tangents in place, so that views of this tensor and its base see both; None means zeros."""
        if self._readonly is not None:
            raise RuntimeError(f"{name}{called_from()}: in-place operation on {self._readonly}; clone() it first")
        view = _copies.missing(self, self._primal)  # not the tensor itself, which an error would keep alive
        if view is not None:
            raise RuntimeError(
                f"{name}{called_from()}: this in-place operation would be missed by a view that is still in use: {view}; "
                "clone() the view, or the tensor before it is viewed"
            )
        if primal.shape != self._primal.shape or not torch.can_cast(primal.dtype, self._primal.dtype):
            raise RuntimeError(
                f"{name}: the in-place result has shape {tuple(primal.shape)} and dtype {primal.dtype}, which does not fit a "
                f"tensor of shape {tuple(self._primal.shape)} and dtype {self._primal.dtype}"
            )
        self._primal.copy_(primal)
        if not self._primal.is_inference():  # below autograd nobody else counts the change
            torch.autograd.graph.increment_version(self._primal)
        if self._tangents is not None:
            if tangents is None:
                self._tangents.zero_()
            else:
                self._tangents.copy_(tangents)
        elif tangents is not None:
            # No view can exist yet: taking one stores the tangents first
            self._tangents = tangents
        self._activity = None
        self.sampled = None
        return self

    def _copied_from(self, seen: Tensor, why: str) -> None:
        """Makes this a view that may not be written, nor what it views as long as it lives; ``seen``: that memory."""
        self._readonly = why
        _copies.remember(self, seen)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        how = "sampled tangents" if self.sampled is not None else "tangents"
        return f"DualTensor({self._primal!r}, k={self.k}, {how})"

    def __format__(self, format_spec: str) -> str:
        return format(self._primal, format_spec) if format_spec else repr(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> DualTensor:
        copy = _make(self._primal.clone(), None, self.k)
        copy.sampled = self.sampled
        copy._tangents = None if self._tangents is None else self._tangents.clone()
        copy._activity = self._activity
        memo[id(self)] = copy
        return copy

    def __copy__(self) -> DualTensor:
        return torch.ops.aten.alias.default(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("DualTensor: cannot be pickled; save .primal and .tangents")

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if stopping.stopped():
            return stopping.on_values(func, args, kwargs or {})
        body = FUNCTION_RULES.get(func)
        if body is not None and not (kwargs and "out" in kwargs):  # which no rule takes, and the fallback refuses
            # Nothing is recorded for backward, whatever a plain argument requires
            with _AutoDispatchBelowAutograd():
                out = body(*args, **kwargs) if kwargs else body(*args)
            if out is not NotImplemented:
                return out
        if len(types) > 1 and not all(issubclass(t, DualTensor) or t in _PLAIN_TYPES for t in types):
            return NotImplemented
        # Below autograd, composite operations reach __torch_dispatch__ whole, so that layers have rules there too
        with DisableTorchFunctionSubclass(), _AutoDispatchBelowAutograd():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        body = ATEN_RULES.get(func)
        if body is None:
            body = ATEN_RULES[func] = rules.fallback.plan(func)
        k = 0
        lazy = False
        for arg in args:
            if type(arg) is DualTensor:
                if arg.k != k:
                    if k:
                        raise _k_mismatch(func, k, arg.k)
                    k = arg.k
            elif isinstance(arg, Tensor):
                if arg.is_conj() or arg.is_neg():
                    lazy = True
                elif arg.layout is not torch.strided or arg.is_quantized:
                    _refuse_unusual(func, arg)
        if lazy:
            args = tuple(resolve(a) for a in args)
        out = body(func, *args, **kwargs) if kwargs else body(func, *args)
        if out is NotImplemented:
            out = rules.fallback.fallback(func, *args, **(kwargs or {}))
        return out


_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def _make(primal: Tensor, tangents: Tensor | None, k: int) -> DualTensor:
    """The constructor used by rules: no checks. ``primal`` must not require grad."""
    dual = _make_wrapper(
        DualTensor,
        primal.size(),
        strides=primal.stride(),
        storage_offset=primal.storage_offset(),
        dtype=primal.dtype,
        device=primal.device,
    )
    dual._primal = primal
    dual._tangents = tangents
    dual.k = k
    return dual


def resolve(x: Any) -> Any:
    """Carries out a pending conjugation or negation of a plain tensor: kernels called from ``__torch_dispatch__`` ignore it."""
    if isinstance(x, Tensor) and not isinstance(x, DualTensor) and (x.is_conj() or x.is_neg()):
        return x.resolve_conj().resolve_neg()
    return x


#: operations whose rules take a sparse matrix beside a DualTensor
_TAKE_SPARSE = frozenset(
    {f"aten::{name}" for name in ("matmul", "mm", "mv", "bmm", "addmm", "addmv", "_sparse_addmm", "_sparse_mm", "add", "t")}
)


def _refuse_unusual(func: Any, arg: Tensor) -> None:
    """Quantized tensors, and sparse ones but for products and sums: results would be laid out unlike their tangents."""
    if arg.is_quantized:
        raise NotImplementedError(
            f"{func}{called_from()}: an argument is a quantized tensor ({arg.dtype}), through which no tangents go; "
            "dequantize() it first"
        )
    if func._schema.name not in _TAKE_SPARSE:
        raise NotImplementedError(
            f"{func}{called_from()}: an argument has layout {arg.layout}, which only products with a sparse matrix and sums "
            "take; use to_dense()"
        )


def _check_plain(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor) or isinstance(tensor, DualTensor):
        raise TypeError(f"DualTensor: {name} is of type {type(tensor).__name__}; expected a plain torch.Tensor")
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise TypeError(f"DualTensor: {name} has dtype {tensor.dtype}; only floating point and complex tensors have tangents")
    if tensor.dtype.itemsize < 2:
        raise TypeError(f"DualTensor: {name} has dtype {tensor.dtype}; floating point tensors need at least 16 bits")
    if tensor.layout != torch.strided:
        raise TypeError(f"DualTensor: {name} has layout {tensor.layout}; only torch.strided is supported")


def draw(primal: Tensor, sampled: SampledTangents | Factors, first: int = 0, count: int | None = None) -> Tensor:
    """Tangents ``first .. first + count`` of those ``sampled`` describes, stored: (count, *primal.shape)."""
    from . import ops

    if isinstance(sampled, Factors):
        sampled.touch()
        return sampled.dense(first, count)
    if sampled.touched is not None:
        sampled.touched.add(sampled.offset)
    count = sampled.k if count is None else count
    if sampled.stored is not None:
        return sampled.stored[first : first + count].clone()
    flat = ops.sample_tangents(
        sampled.state,
        count,
        primal.numel(),
        offset=sampled.offset,
        first=sampled.first + first,
        distribution=sampled.distribution,
        dtype=sampled.dtype or primal.dtype,
    )
    return flat.view(count, *primal.shape)


def _k_mismatch(where: object, first: int, second: int) -> ValueError:
    return ValueError(f"{where}: tangents disagree in number: one DualTensor has k = {first}, another k = {second}")


def called_from() -> str:
    """For errors: `` (called from layers.0.attention, a SelfAttention of VisionTransformer)``; empty outside modules.

    Reads the modules off the stack of Python calls, so that a pass without errors pays nothing for it.
    """
    modules: list[torch.nn.Module] = []
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        # Reading the variables of a frame keeps them alive
        named = "self" in code.co_varnames or "self" in code.co_cellvars or "self" in code.co_freevars
        owner = frame.f_locals.get("self") if named else None
        if isinstance(owner, torch.nn.Module):
            modules.append(owner)
        frame = frame.f_back  # type: ignore[assignment]
    if not modules:
        return ""
    inner, outer = modules[0], modules[-1]
    kind = type(inner).__name__
    if inner is outer:
        return f" (called from a {kind})"
    path = next((name for name, module in outer.named_modules() if module is inner), "a module")
    return f" (called from {path}, a {kind} of {type(outer).__name__})"


def primal_of(t: Any) -> Any:
    """The value of a DualTensor; anything else as it is."""
    return t._primal if isinstance(t, DualTensor) else t


def tangents_of(t: Any) -> Tensor | None:
    """Tangents ``(k, *shape)`` of a DualTensor; None for anything else."""
    return t.tangents if isinstance(t, DualTensor) else None


def add_activity(t: Tensor, v: Tensor) -> DualTensor:
    """``t`` with the tangents ``v`` added to its own: the perturbation of an activity.

    The sum is not formed here: the next fused pointwise or linear rule takes ``v`` along, everything else adds it first.
    The value is shared with ``t``.

    Arguments:
        t: a plain tensor or a DualTensor, floating point.
        v: ``(k, *s)`` with ``s`` a suffix of ``t.shape``; ``(k, *t.shape)`` perturbs every row on its own, a shorter suffix is
            shared by the leading axes.
    Raises:
        TypeError, ValueError: ``v`` does not fit ``t``, or another k than ``t``'s.
    """
    primal = primal_of(t)
    _check_plain("v", v)
    _check_plain("t", primal)
    suffix = v.shape[1:]
    if v.dim() < 1 or v.shape[0] < 1 or len(suffix) > primal.dim() or primal.shape[primal.dim() - len(suffix) :] != suffix:
        raise ValueError(
            f"add_activity: v has shape {tuple(v.shape)}; expected (k, *s) with k >= 1 and s a suffix of t's shape "
            f"{tuple(primal.shape)}"
        )
    if isinstance(t, DualTensor) and t.k != v.shape[0]:
        raise _k_mismatch("add_activity", t.k, v.shape[0])
    return perturbed(t, resolve(v.detach()))


def perturbed(t: Tensor, v: Tensor, on_adding: Callable[[], None] | None = None) -> DualTensor:
    """:func:`add_activity` for arguments that are known to fit.

    Arguments:
        on_adding: called where ``v`` is added to stored tangents by itself, unless a linear layer has read it before.
    """
    if type(t) is DualTensor:
        given = t.sampled is not None or t._tangents is not None or t._activity is not None
        primal, tangents = t._primal, t.tangents if given else None
    else:
        primal, tangents = resolve(t.detach()), None
    out = _make(primal, tangents, v.shape[0])
    out._activity = v
    out._on_adding = on_adding
    return out


def perturbed_(t: Tensor, v: Tensor) -> DualTensor:
    """The same in place where ``t`` has tangents, which nobody else may have."""
    if type(t) is not DualTensor or t._tangents is None or t._activity is not None or not t._tangents.is_contiguous():
        return perturbed(t, v)
    t._tangents.add_(_lifted(v, t._tangents.dim()))
    return t


def _lifted(v: Tensor, dim: int) -> Tensor:
    """(k, *s) -> (k, 1, .., 1, *s) of so many axes."""
    return v.reshape(v.shape[0], *(1,) * (dim - v.dim()), *v.shape[1:])


# The rules register themselves with the tables above and need the names of this module, hence the place.
from . import custom_functions, rules, stopping  # noqa: E402
