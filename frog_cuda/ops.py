"""The Python face of every compiled operator: argument checks, names instead of codes, guards against silent loss of tangents.

Tangents are explicit arguments and results; ``k`` is always their leading axis. No operator records autograd. A
``torch.autograd.forward_ad`` dual or a functorch-wrapped tensor (inside ``torch.func.jvp``, ``grad`` or ``vmap``) is refused:
PyTorch would drop its tangent without a word.

Each function here has a float64 twin of the same name and signature in :mod:`frog_cuda.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd, _functorch
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from . import _autograd, _load

_load.load()
from . import _fakes  # noqa: E402, F401  # needs the schemas

_above_autograd = _autograd.register("frog_cuda")
_ops = torch.ops.frog_cuda

#: name -> code of ``distribution``
DISTRIBUTIONS = {"normal": 0, "rademacher": 1, "standard_basis": 2}

#: name -> code of the pointwise ``function`` / fused ``activation``; ``alpha`` and ``beta`` are the parameters in brackets
POINTWISE = {
    "identity": 0,
    "relu": 1,
    "gelu": 2,
    "gelu_tanh": 3,
    "silu": 4,
    "tanh": 5,
    "sigmoid": 6,
    "softplus": 7,  # (alpha=beta of torch, beta=threshold of torch)
    "elu": 8,  # (alpha)
    "leaky_relu": 9,  # (alpha=negative_slope)
    "hardtanh": 10,  # (alpha=min_val, beta=max_val)
}


def _guard(name: str, *tensors: Tensor | None) -> None:
    """Raises where PyTorch would silently drop a tangent or a gradient."""
    if forward_ad._current_level >= 0:
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


def sample_tangents(
    state: Tensor,
    k: int,
    numel: int,
    *,
    offset: int = 0,
    first: int = 0,
    distribution: str = "normal",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draws tangents ``first .. first+k`` restricted to the elements ``offset .. offset+numel`` of the global tangent vector.

    Element (i, j) is a pure function of (seed, step, first + i, offset + j) (Philox4x32-10, Salmon et al. 2011), whatever the
    chunk, slice, device or number of threads.

    Arguments:
        state: int64 ``(2,)`` holding ``[seed, step]``; for ``"standard_basis"`` the coordinates, int64 ``(>= first + k,)``.
            On a GPU the kernel reads it, without waiting: what the CPU refuses, a step outside ``[0, 2^32)`` or a negative
            coordinate, gives NaN there, in this operator and in all others that draw.
        distribution: ``"normal"``, ``"rademacher"`` or ``"standard_basis"``.
        dtype: floating dtype of the result; values are drawn in float32 and rounded.
    Returns:
        tangents ``(k, numel)``.
    """
    _guard("sample_tangents", state)
    code = _code(DISTRIBUTIONS, "distribution", distribution)
    with _AutoDispatchBelowAutograd():
        return _ops.sample_tangents(state, k, numel, offset, first, code, dtype)


def tangent_gram(state: Tensor, k: int, numel: int, *, offset: int = 0, first: int = 0, distribution: str = "normal") -> Tensor:
    """Gram matrix ``V^T V`` of the tangents that :func:`sample_tangents` would draw, without storing them.

    Returns:
        float64 ``(k, k)``, accumulated in float64 over blocks in a fixed order.
    """
    _guard("tangent_gram", state)
    code = _code(DISTRIBUTIONS, "distribution", distribution)
    with _AutoDispatchBelowAutograd():
        return _ops.tangent_gram(state, k, numel, offset, first, code)


def gram(tangents: Tensor) -> Tensor:
    """Gram matrix of given tangents ``(k, n)`` -> float64 ``(k, k)``, accumulated in float64."""
    _guard("gram", tangents)
    with _AutoDispatchBelowAutograd():
        return _ops.gram(tangents)


def tangent_combine(
    state: Tensor,
    coefficients: Tensor,
    numel: int,
    *,
    offset: int = 0,
    first: int = 0,
    distribution: str = "normal",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``V c``: the linear combination of replayed tangents, ``(numel,)``; ``coefficients`` is ``(k,)``, any float dtype."""
    _guard("tangent_combine", state, coefficients)
    code = _code(DISTRIBUTIONS, "distribution", distribution)
    with _AutoDispatchBelowAutograd():
        return _ops.tangent_combine(state, coefficients, numel, offset, first, code, dtype)


def tangent_combine_samples(
    state: Tensor,
    coefficients: Tensor,
    numel: int,
    *,
    offset: int = 0,
    first: int = 0,
    distribution: str = "normal",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Linear combinations of replayed tangents, each sample's with coefficients of its own; the tangents are never stored.

    Arguments:
        coefficients: ``(k, B)``, any float dtype.
        numel: elements of a sample; sample b has elements ``offset + b numel .. offset + (b + 1) numel`` of the tangents.
    Returns:
        ``(B, numel)``: row b is the sum over i of ``coefficients[i, b]`` times tangent ``first + i`` on that sample.
    """
    _guard("tangent_combine_samples", state, coefficients)
    code = _code(DISTRIBUTIONS, "distribution", distribution)
    with _AutoDispatchBelowAutograd():
        return _ops.tangent_combine_samples(state, coefficients, numel, offset, first, code, dtype)


def tangent_axpy_(
    self: Tensor,
    state: Tensor,
    coefficients: Tensor,
    *,
    alpha: float = 1.0,
    offset: int = 0,
    first: int = 0,
    distribution: str = "normal",
) -> Tensor:
    """``self += alpha * V c`` in place with replayed tangents; ``self`` is viewed as a flat vector of ``self.numel()``."""
    _guard("tangent_axpy_", self, state, coefficients)
    code = _code(DISTRIBUTIONS, "distribution", distribution)
    with _AutoDispatchBelowAutograd():
        _ops.tangent_axpy_(self, state, coefficients, alpha, offset, first, code)
    if not self.is_inference():
        increment_version(self)  # so that a backward pass that still needs the old values says so
    return self


def tangent_sgd_(
    self: Tensor,
    buffer: Tensor | None,
    state: Tensor,
    coefficients: Tensor,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    fresh: bool = False,
    offset: int = 0,
    first: int = 0,
    distribution: str = "normal",
) -> Tensor:
    """A step of :class:`torch.optim.SGD` in place with the gradient ``V c``, replayed as parameter and buffer are written.

    ``g = V c + weight_decay * self``; ``buffer = momentum * buffer + (1 - dampening) * g``, or ``g`` where ``fresh``; then
    ``self -= lr * d`` with d the buffer, ``g + momentum * buffer`` where ``nesterov``, or ``g`` without momentum. Low precision
    is computed in float32 and rounded once for each result.

    Arguments:
        self: any shape, viewed as a flat vector.  buffer: like ``self``, or None exactly where ``momentum`` is 0.
        coefficients: ``(k,)``, any float dtype.
        lr, dampening: finite.  momentum, weight_decay: finite, >= 0.  nesterov: needs momentum > 0 and dampening 0.
        fresh: the buffer holds nothing yet; what is in it is not read.
    """
    _guard("tangent_sgd_", self, buffer, state, coefficients)
    code = _code(DISTRIBUTIONS, "distribution", distribution)
    with _AutoDispatchBelowAutograd():
        _ops.tangent_sgd_(
            self, buffer, state, coefficients, lr, momentum, dampening, weight_decay, nesterov, fresh, offset, first, code
        )
    for t in (self, buffer):
        if t is not None and not t.is_inference():
            increment_version(t)
    return self


def cholesky_project(gram: Tensor, derivatives: Tensor, *, rtol: float = 1e-7) -> tuple[Tensor, Tensor]:
    """Coefficients ``c = G^+ d`` of the orthogonal projection P_U (Flügel et al., section 3.4) by pivoted Cholesky.

    Dependent tangents are dropped: tangents are scaled to unit length, and once none is farther than ``sqrt(rtol)`` from the
    span of those taken before, the rest get coefficient 0; the projection onto the span stays exact.

    Arguments:
        gram: symmetric positive semi-definite, ``(k, k)`` or batched ``(b, k, k)``.
        derivatives: ``(k, r)`` or ``(b, k, r)``: r right-hand sides.
    Returns:
        coefficients, float64, shaped like ``derivatives``; rank, int64, ``()`` or ``(b,)``.
    """
    _guard("cholesky_project", gram, derivatives)
    with _AutoDispatchBelowAutograd():
        return _ops.cholesky_project(gram, derivatives, rtol)


def linear_jvp(
    x: Tensor,
    dx: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
    activity: Tensor | None = None,
    state: Tensor | None = None,
    k: int,
    first: int = 0,
    distribution: str = "normal",
    weight_offset: int | None = None,
    bias_offset: int | None = None,
    activation: str = "identity",
    alpha: float = 0.0,
    beta: float = 0.0,
    want_gram: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``y = act(x W^T + b)`` and its k tangents ``dy_i = act'(.) * (dx_i W^T + x dW_i^T + db_i + v_i)``.

    Arguments:
        x: ``(*, in)``.  dx: ``(k, *, in)`` or None where nothing upstream is perturbed.
        weight: ``(out, in)``.  bias: ``(out,)`` or None.
        dweight, dbias: supplied tangents ``(k, out, in)``, ``(k, out)``.
        activity: an activity tangent added before the activation, ``(k, *s, out)`` with ``s`` a suffix of ``*`` (empty: shared
            by every row).
        state, weight_offset, bias_offset, first, distribution: sampled tangents of weight and bias, as in
            :func:`sample_tangents`; they are drawn block by block in cache and never stored. An offset of None means: that
            parameter is not sampled.
        activation, alpha, beta: see :data:`POINTWISE`.
        want_gram: also return the Gram matrix of the sampled weight and bias tangents.
    Returns:
        y ``(*, out)``; dy ``(k, *, out)`` in ``dx``'s dtype where given, else ``x``'s; gram float64 ``(k, k)``, or ``(0, 0)``.
    """
    _guard("linear_jvp", x, dx, weight, bias, dweight, dbias, activity)
    act = _code(POINTWISE, "activation", activation)
    code = _code(DISTRIBUTIONS, "distribution", distribution)
    with _AutoDispatchBelowAutograd():
        return _ops.linear_jvp(
            x,
            dx,
            weight,
            bias,
            dweight,
            dbias,
            activity,
            state,
            k,
            first,
            code,
            weight_offset,
            bias_offset,
            act,
            alpha,
            beta,
            want_gram,
        )


def linear_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """Gradient of a linear layer's weight from that of its output: ``gradient^T x``, summed over the rows.

    Arguments:
        gradient: ``(rows, out)``.  x: ``(rows, in)``, the same dtype.
    Returns:
        ``(out, in)``.
    """
    _guard("linear_gradient", gradient, x)
    with _AutoDispatchBelowAutograd():
        return _ops.linear_gradient(gradient, x)


def pointwise_jvp(
    x: Tensor, dx: Tensor | None, function: str, *, activity: Tensor | None = None, alpha: float = 0.0, beta: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``y = f(x)`` and ``dy_i = f'(x) * (dx_i + v_i)``, reading ``x`` once for all k tangents.

    Arguments:
        x: any shape.  dx: ``(k, *x.shape)`` or None.
        activity: tangent added to ``dx``, ``(k, *s)`` with ``s`` a suffix of ``x.shape``. One of dx and activity must be given.
        function, alpha, beta: see :data:`POINTWISE`. Derivatives at kinks are PyTorch's.
    Returns:
        y like ``x``; dy ``(k, *x.shape)`` in the tangents' dtype.
    """
    _guard("pointwise_jvp", x, dx, activity)
    code = _code(POINTWISE, "function", function)
    with _AutoDispatchBelowAutograd():
        return _ops.pointwise_jvp(x, dx, activity, code, alpha, beta)


def tangent_sum(
    a: Tensor, va: Tensor | None = None, b: Tensor | None = None, vb: Tensor | None = None, *, alpha: float = 1.0
) -> Tensor:
    """``a + va + alpha * (b + vb)``: tangents of a sum, with activity tangents still to be added on either side.

    Arguments:
        a: ``(k, *s)``.  b: the same shape, or None.
        va, vb: ``(k, *t)`` with ``t`` a suffix of ``s``, or None.
    Returns:
        ``(k, *s)`` in the dtype of ``a``.
    """
    _guard("tangent_sum", a, va, b, vb)
    with _AutoDispatchBelowAutograd():
        return _ops.tangent_sum(a, va, b, vb, alpha)


def convolution_jvp(
    x: Tensor,
    dx: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool = False,
    output_padding: list[int],
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """A convolution of ``x`` and of k tangents of ``x``, by the library, in one call where they are neighbours in memory.

    Arguments:
        x: ``(B, C, *s)``, s of one to three axes.  dx: ``(k, *x.shape)``, the same dtype.
        weight, bias, stride, padding, dilation, transposed, output_padding, groups: as in ``torch.ops.aten.convolution``; an
            integer for each axis of s.
    Returns:
        y ``(B, O, *t)``; dy ``(k, B, O, *t)``.
    """
    _guard("convolution_jvp", x, dx, weight, bias)
    with _AutoDispatchBelowAutograd():
        return _ops.convolution_jvp(x, dx, weight, bias, stride, padding, dilation, transposed, output_padding, groups)


def sampled_convolution_(
    self: Tensor,
    x: Tensor,
    state: Tensor,
    *,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    offset: int = 0,
    first: int = 0,
    distribution: str = "normal",
    add: bool = True,
) -> Tensor:
    """``self[i] += conv(x, dW_i)`` in place, or ``=`` without ``add``, for k sampled tangents of the weight of a convolution.

    The tangents ``(O, C, *kernel)`` are those of :func:`sample_tangents`. On a GPU they are drawn within the kernel, an
    implicit matrix product that reads x patch by patch; on the CPU one at a time, for the library's convolution.

    Arguments:
        self: ``(k, B, O, *t)``.  x: ``(B, C, *s)``, s of one to three axes, the same dtype.
        kernel, stride, padding, dilation: an integer for each axis of s. One group, not transposed.
        state, offset, first, distribution: as in :func:`sample_tangents`.
    """
    _guard("sampled_convolution_", self, x, state)
    code = _code(DISTRIBUTIONS, "distribution", distribution)
    with _AutoDispatchBelowAutograd():
        _ops.sampled_convolution_(self, x, state, kernel, stride, padding, dilation, offset, first, code, add)
    if not self.is_inference():
        increment_version(self)
    return self


def embedding_jvp(
    indices: Tensor,
    weight: Tensor,
    dweight: Tensor | None = None,
    *,
    state: Tensor | None = None,
    k: int,
    first: int = 0,
    distribution: str = "normal",
    weight_offset: int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``y = weight[indices]`` and its k tangents ``dy_i = dweight_i[indices]``, supplied or sampled.

    Arguments:
        indices: any shape, int64 or int32, each in ``0 .. rows - 1``. What the CPU refuses, an index that is no row, gives NaN
            on a GPU, which is not waited for.
        weight: ``(rows, dim)``.  dweight: ``(k, rows, dim)``, or None where tangents are sampled.
        state, weight_offset, first, distribution: sampled tangents of weight, as in :func:`sample_tangents`; of them only the
            rows looked up are drawn, so nothing of the size of k tables is stored.
        dtype: of sampled tangents; None means the weight's. Drawn in float32 and rounded.
    Returns:
        y ``(*indices.shape, dim)``; dy ``(k, *indices.shape, dim)`` in the tangents' dtype.
    """
    _guard("embedding_jvp", weight, dweight)
    code = _code(DISTRIBUTIONS, "distribution", distribution)
    with _AutoDispatchBelowAutograd():
        return _ops.embedding_jvp(indices, weight, dweight, state, k, first, code, weight_offset, dtype)


def softmax_jvp(x: Tensor, dx: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """``y = softmax(x, dim)`` and ``dy_i = y * (dx_i - sum(y * dx_i))``; ``dim`` counts the axes of ``x``."""
    _guard("softmax_jvp", x, dx)
    with _AutoDispatchBelowAutograd():
        return _ops.softmax_jvp(x, dx, dim)


def log_softmax_jvp(x: Tensor, dx: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """``y = log_softmax(x, dim)`` and ``dy_i = dx_i - sum(exp(y) * dx_i)``; ``dim`` counts the axes of ``x``."""
    _guard("log_softmax_jvp", x, dx)
    with _AutoDispatchBelowAutograd():
        return _ops.log_softmax_jvp(x, dx, dim)


def cross_entropy_jvp(
    logits: Tensor,
    dlogits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Per-sample cross entropy of ``logits`` (B, C) with class indices ``target`` int64 (B,), as ``reduction="none"``.

    Returns:
        loss ``(B,)``; dloss ``(k, B)``; ignored samples have both exactly 0. What the CPU refuses, a target that is no class,
        gives NaN on a GPU, which is not waited for.
    """
    _guard("cross_entropy_jvp", logits, dlogits, weight)
    with _AutoDispatchBelowAutograd():
        return _ops.cross_entropy_jvp(logits, dlogits, target, weight, ignore_index, label_smoothing)


def mse_jvp(input: Tensor, dinput: Tensor | None, target: Tensor, dtarget: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Elementwise squared error of same-shaped ``input`` and ``target``; one of dinput and dtarget must be given."""
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
    """Elementwise binary cross entropy, ``reduction="none"``; weight and pos_weight broadcast against ``input``.

    Without logits, logarithms are clamped at -100 as in :func:`torch.nn.functional.binary_cross_entropy`. What the CPU refuses,
    an input outside [0, 1], gives NaN on a GPU, which is not waited for.
    """
    _guard("bce_jvp", input, dinput, target, weight, pos_weight)
    with _AutoDispatchBelowAutograd():
        return _ops.bce_jvp(input, dinput, target, weight, pos_weight, with_logits)


def max_pool_jvp(
    x: Tensor,
    dx: Tensor,
    *,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool = False,
    want_indices: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Max pooling over one to three axes, of ``x`` and at the same places of k tangents, which the places are found once for.

    A place is PyTorch's: the first of a window's largest elements, or its last NaN. Where dilated windows lie in the padding
    altogether, the value is ``-inf`` and the tangents are 0.

    Arguments:
        x: ``(*, s)``, s as many axes as ``kernel`` has entries.  dx: ``(k, *x.shape)``.
        kernel, stride, padding, dilation: an integer for each axis of s.  ceil_mode: as in :class:`torch.nn.MaxPool2d`.
        want_indices: also return the places, counted through the flattened axes s; they exist as a tensor only then.
    Returns:
        y ``(*, t)``; dy ``(k, *, t)`` in the tangents' dtype; indices int64 ``(*, t)``, or ``(0,)``.
    """
    _guard("max_pool_jvp", x, dx)
    with _AutoDispatchBelowAutograd():
        return _ops.max_pool_jvp(x, dx, kernel, stride, padding, dilation, ceil_mode, want_indices)


def attention_jvp(
    query: Tensor,
    dquery: Tensor | None,
    key: Tensor,
    dkey: Tensor | None,
    value: Tensor,
    dvalue: Tensor | None,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``out = softmax(scale Q K^T + mask) V`` and its k tangents, in one pass over the keys for each block of queries.

    The softmax is computed once for all tangents, and the L x S matrices are never in memory (online softmax as in Dao et al.,
    "FlashAttention", 2022). Extra memory: that of key and value and their tangents.

    Arguments:
        query: ``(B, H, L, D)``.  key: ``(B, Hkv, S, D)``.  value: ``(B, Hkv, S, Dv)``; Hkv divides H (grouped-query heads).
        dquery, dkey, dvalue: ``(k, *)`` in front of the primal's shape, or None where not perturbed; at least one is given.
        mask: broadcasts to ``(B, H, L, S)``: boolean (True: takes part) or floating (added to the scores).
        is_causal: query i attends to keys 0 .. i, together with the mask if there is one.
        scale: None means ``1 / sqrt(D)``.
    Returns:
        out ``(B, H, L, Dv)``; dout ``(k, B, H, L, Dv)`` in the tangents' dtype. A query that may attend to no key gives zeros.
    """
    _guard("attention_jvp", query, dquery, key, dkey, value, dvalue, mask)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    with _AutoDispatchBelowAutograd():
        return _ops.attention_jvp(query, dquery, key, dkey, value, dvalue, mask, is_causal, factor)


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
