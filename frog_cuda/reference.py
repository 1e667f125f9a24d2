"""What every operator of :mod:`frog_cuda.ops` means, in plain float64 PyTorch: same names, same arguments, same results.

Slow, stored in full, and written to be read: the compiled kernels are tested against it. All arithmetic and all floating
results are float64; a ``dtype`` argument is accepted and has no effect. Tangents are drawn by an implementation of its own with
exact logarithm, sine and cosine: a kernel's float32 normals differ by a few units of float32 rounding, its signs not at all.

Needs none of the compiled libraries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# ---- Philox and the distributions


def philox4x32_10(counters: np.ndarray, k0: int, k1: int) -> np.ndarray:
    """Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011): counters ``(n, 4)`` and a key -> words ``(n, 4)``, all uint32."""
    c = np.asarray(counters).astype(np.uint64).T
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    for round in range(10):
        # the key moves on by the golden ratio and by sqrt(3) - 1, modulo 2^32
        key0 = np.uint64((k0 + round * 0x9E3779B9) & 0xFFFFFFFF)
        key1 = np.uint64((k1 + round * 0xBB67AE85) & 0xFFFFFFFF)
        p0 = np.uint64(0xD2511F53) * c[0]
        p1 = np.uint64(0xCD9E8D57) * c[2]
        c = np.stack([(p1 >> half) ^ c[1] ^ key0, p1 & low, (p0 >> half) ^ c[3] ^ key1, p0 & low])
    return c.T.astype(np.uint32)


def _words(seed: int, step: int, tangent: int, calls: np.ndarray) -> np.ndarray:
    """The four words of each call (uint64) of one tangent: counter = (call low, call high, tangent, step), key = seed."""
    seed &= 0xFFFFFFFFFFFFFFFF  # a negative seed counts as its two's complement
    counters = np.empty((len(calls), 4), np.uint64)
    counters[:, 0] = calls & np.uint64(0xFFFFFFFF)
    counters[:, 1] = calls >> np.uint64(32)
    counters[:, 2] = tangent
    counters[:, 3] = step
    return philox4x32_10(counters, seed & 0xFFFFFFFF, seed >> 32)


def _calls(offset: int, numel: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Place of each element within its group of ``group`` elements, and the first of the eight calls of that group."""
    index = np.uint64(offset) + np.arange(numel, dtype=np.uint64)
    return index % np.uint64(group), index // np.uint64(group) * np.uint64(8)


def _normal(seed: int, step: int, tangent: int, offset: int, numel: int) -> np.ndarray:
    """Box-Muller: a word of Philox gives two elements.

    Groups of 64 elements take eight calls. Word w of call c holds element 32 (w // 2) + 16 (c % 2) + 4 (c // 2) + 2 (w % 2) and
    the next one.
    """
    e, first = _calls(offset, numel, 64)
    e = e.astype(np.int64)
    call = first + (2 * (e // 4 % 4) + e // 16 % 2).astype(np.uint64)
    word = _one_of_four(_words(seed, step, tangent, call), 2 * (e // 32) + e // 2 % 2)
    # Radius: midpoints of 2^23 equal cells of (0, 1), from bits 8..31. Angle: odd multiples of 2^-15 in (-1, 1) quarter turns,
    # from bits 1..15. Bit 0: the sign of the cosine.
    u = ((word >> 8) | 1) / 2.0**24
    x = ((word & 0xFFFF) | 1) / 2.0**15 - 1
    radius = np.sqrt(-2 * np.log(u))
    cosine = radius * np.cos(x * math.pi / 2) * np.where(word & 1, -1.0, 1.0)
    sine = radius * np.sin(x * math.pi / 2)
    return np.where(e % 2 == 0, cosine, sine)


def _rademacher(seed: int, step: int, tangent: int, offset: int, numel: int) -> np.ndarray:
    """A bit gives one element; a set bit is -1.

    Eight calls give a group of 1024. Element e is bit e % 32 of word 2 (e // 512) + (e // 32) % 2 of call (e // 64) % 8.
    """
    e, first = _calls(offset, numel, 1024)
    e = e.astype(np.int64)
    call = first + (e // 64 % 8).astype(np.uint64)
    word = _one_of_four(_words(seed, step, tangent, call), 2 * (e // 512) + e // 32 % 2)
    return np.where((word >> (e % 32)) & 1, -1.0, 1.0)


def _one_of_four(words: np.ndarray, which: np.ndarray) -> np.ndarray:
    return np.take_along_axis(words.astype(np.int64), which[:, None], axis=1)[:, 0]


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
    """Tangents ``first .. first+k``, elements ``offset .. offset+numel``: float64 ``(k, numel)``."""
    if distribution == "standard_basis":
        v = torch.zeros(k, numel, dtype=torch.float64)
        for i, coordinate in enumerate(state.tolist()[first : first + k]):
            if offset <= coordinate < offset + numel:
                v[i, coordinate - offset] = 1
        return v
    draw = {"normal": _normal, "rademacher": _rademacher}[distribution]
    seed, step = state.tolist()
    v = torch.empty(k, numel, dtype=torch.float64)
    for i in range(k):
        v[i] = torch.from_numpy(draw(seed, step, first + i, offset, numel))
    return v


def tangent_gram(state: Tensor, k: int, numel: int, *, offset: int = 0, first: int = 0, distribution: str = "normal") -> Tensor:
    """``V^T V`` of sampled tangents: ``(k, k)``."""
    return gram(sample_tangents(state, k, numel, offset=offset, first=first, distribution=distribution))


def gram(tangents: Tensor) -> Tensor:
    """``V^T V`` of the tangents in the rows of ``(k, n)``: ``(k, k)``."""
    v = tangents.double()
    return v @ v.T


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
    """``V c``: ``(numel,)``."""
    k = coefficients.numel()
    v = sample_tangents(state, k, numel, offset=offset, first=first, distribution=distribution)
    return coefficients.double() @ v


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
    """``sum_i c_ib v_ib`` for every sample b: ``(B, numel)``."""
    k, batch = coefficients.shape
    v = sample_tangents(state, k, batch * numel, offset=offset, first=first, distribution=distribution)
    return torch.einsum("kb,kbm->bm", coefficients.double(), v.view(k, batch, numel))


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
    """``self += alpha V c``; ``self`` keeps its dtype and is rounded to it once."""
    step = tangent_combine(state, coefficients, self.numel(), offset=offset, first=first, distribution=distribution)
    return self.copy_(self.double() + alpha * step.view(self.shape))


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
    """A step of SGD along ``V c``; ``self`` and ``buffer`` keep their dtype and are rounded to it once."""
    g = tangent_combine(state, coefficients, self.numel(), offset=offset, first=first, distribution=distribution)
    g = g.view(self.shape) + weight_decay * self.double()
    if buffer is not None:
        moved = g if fresh else momentum * buffer.double() + (1 - dampening) * g
        buffer.copy_(moved)
        g = g + momentum * moved if nesterov else moved
    return self.copy_(self.double() - lr * g)


# ---- projection


def cholesky_project(gram: Tensor, derivatives: Tensor, *, rtol: float = 1e-7) -> tuple[Tensor, Tensor]:
    """Coefficients of P_U (Flügel et al., section 3.4): ``c = G^-1 d`` over as many tangents as are linearly independent.

    With tangents scaled to unit length, the one farthest from the span of those taken so far is taken next, until the square of
    that distance is ``rtol`` or less. Those left over get coefficient 0.
    """
    if gram.dim() == 3:
        pairs = [cholesky_project(g, d, rtol=rtol) for g, d in zip(gram, derivatives, strict=True)]
        if not pairs:
            return derivatives.double().clone(), torch.empty(0, dtype=torch.int64)
        return torch.stack([c for c, _ in pairs]), torch.stack([rank for _, rank in pairs])
    g, d = gram.double(), derivatives.double()
    lengths = g.diagonal().sqrt()
    scale = torch.where(lengths > 0, 1 / lengths, 0.0)
    unit = g * (scale[:, None] * scale)
    rest = unit.clone()  # Gram matrix of what the span of the tangents taken so far does not explain
    taken: list[int] = []
    while len(taken) < len(g):
        distance = rest.diagonal().clone()
        distance[taken] = -1
        best = int(distance.argmax())
        if not distance[best] > rtol:
            break
        taken.append(best)
        rest = rest - torch.outer(rest[:, best], rest[best]) / rest[best, best]
    c = torch.zeros_like(d)
    if taken:
        factor = torch.linalg.cholesky(unit[taken][:, taken])
        c[taken] = scale[taken, None] * torch.cholesky_solve(scale[taken, None] * d[taken], factor)
    return c, torch.tensor(len(taken))


# ---- layers and activations


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
    """``y = act(x W^T + b)``, ``dy_i = act'(.) (dx_i W^T + x dW_i^T + db_i + v_i)``, Gram of the sampled ``[dW, db]``."""
    out = weight.shape[0]
    x, w = x.double(), weight.double()
    total = torch.zeros(k if want_gram else 0, k if want_gram else 0, dtype=torch.float64)
    how: dict[str, Any] = {"first": first, "distribution": distribution}
    if weight_offset is not None:
        assert state is not None
        dweight = sample_tangents(state, k, weight.numel(), offset=weight_offset, **how).view(k, *weight.shape)
        if want_gram:
            total = total + gram(dweight.flatten(1))
    if bias_offset is not None:
        assert state is not None
        dbias = sample_tangents(state, k, out, offset=bias_offset, **how)
        if want_gram:
            total = total + gram(dbias)

    z = x @ w.T  # (*, out)
    dz = torch.zeros(k, *z.shape, dtype=torch.float64)
    if bias is not None:
        z = z + bias.double()
    if dx is not None:
        dz = dz + dx.double() @ w.T
    for i in range(k):
        if dweight is not None:
            dz[i] += x @ dweight[i].double().T
        if dbias is not None:
            dz[i] += dbias[i].double()
        if activity is not None:
            dz[i] += activity[i].double()
    y, slope = POINTWISE[activation](z, alpha, beta)
    return y, slope * dz, total


def _identity(x: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
    return x, torch.ones_like(x)


def _relu(x: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
    return x.relu(), torch.where(x <= 0, 0.0, 1.0).to(x)


def _gelu(x: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
    cdf = torch.special.erfc(-x / math.sqrt(2)) / 2
    pdf = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return x * cdf, cdf + x * pdf


def _gelu_tanh(x: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
    c = math.sqrt(2 / math.pi)
    t = torch.tanh(c * (x + 0.044715 * x**3))
    return x * (1 + t) / 2, (1 + t) / 2 + x * (1 - t * t) / 2 * c * (1 + 3 * 0.044715 * x * x)


def _silu(x: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(x)
    return x * s, s * (1 + x * (1 - s))


def _tanh(x: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
    y = torch.tanh(x)
    return y, 1 - y * y


def _sigmoid(x: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
    y = torch.sigmoid(x)
    return y, y * (1 - y)


def _softplus(x: Tensor, beta: float, threshold: float) -> tuple[Tensor, Tensor]:
    linear = x * beta > threshold
    soft = torch.log1p(torch.exp(torch.where(linear, 0.0, x * beta))) / beta
    return torch.where(linear, x, soft), torch.where(linear, 1.0, torch.sigmoid(x * beta))


def _elu(x: Tensor, alpha: float, b: float) -> tuple[Tensor, Tensor]:
    low = x <= 0
    negative = torch.where(low, x, 0.0)
    return torch.where(low, alpha * torch.expm1(negative), x), torch.where(low, alpha * torch.exp(negative), 1.0)


def _leaky_relu(x: Tensor, slope: float, b: float) -> tuple[Tensor, Tensor]:
    return torch.where(x > 0, x, slope * x), torch.where(x > 0, torch.ones_like(x), slope)


def _hardtanh(x: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    return x.clamp(low, high), ((x > low) & (x < high)).to(x)


#: name -> (x, alpha, beta) -> (f(x), f'(x)). At a kink f' is what PyTorch's own derivative gives; of NaN it is not specified.
POINTWISE: dict[str, Callable[[Tensor, float, float], tuple[Tensor, Tensor]]] = {
    "identity": _identity,
    "relu": _relu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "softplus": _softplus,
    "elu": _elu,
    "leaky_relu": _leaky_relu,
    "hardtanh": _hardtanh,
}


def linear_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """``gradient^T x``."""
    return gradient.double().T @ x.double()


def pointwise_jvp(
    x: Tensor, dx: Tensor | None, function: str, *, activity: Tensor | None = None, alpha: float = 0.0, beta: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``y = f(x)``, ``dy_i = f'(x) (dx_i + v_i)``."""
    given = dx if dx is not None else activity
    assert given is not None, "one of dx and activity must be given"
    y, slope = POINTWISE[function](x.double(), alpha, beta)
    dy = torch.zeros(given.shape[0], *x.shape, dtype=torch.float64)
    for i in range(len(dy)):
        if dx is not None:
            dy[i] += dx[i].double()
        if activity is not None:
            dy[i] += activity[i].double()
    return y, slope * dy


def tangent_sum(
    a: Tensor, va: Tensor | None = None, b: Tensor | None = None, vb: Tensor | None = None, *, alpha: float = 1.0
) -> Tensor:
    """``a_i + va_i + alpha (b_i + vb_i)``."""
    out = a.double().clone()
    for i in range(len(out)):
        for t, factor in ((va, 1.0), (b, alpha), (vb, alpha)):
            if t is not None:
                out[i] += factor * t[i].double()
    return out


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
    """The convolution of x, and without its bias that of every tangent."""
    options = (stride, padding, dilation, transposed, output_padding, groups)
    w = weight.double()
    y = torch.convolution(x.double(), w, None if bias is None else bias.double(), *options)
    return y, torch.stack([torch.convolution(v, w, None, *options) for v in dx.double()])


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
    """``self[i] (+)= conv(x, dW_i)``; ``self`` keeps its dtype and is rounded to it once."""
    k, outputs, channels = self.shape[0], self.shape[2], x.shape[1]
    numel = outputs * channels * math.prod(kernel)
    v = sample_tangents(state, k, numel, offset=offset, first=first, distribution=distribution)
    options = (stride, padding, dilation, False, [0] * len(kernel), 1)
    w = v.view(k, outputs, channels, *kernel)
    moved = torch.stack([torch.convolution(x.double(), w[i], None, *options) for i in range(k)])
    return self.copy_(self.double() + moved if add else moved)


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
    """``weight[indices]`` and the same rows of every tangent, all of which are drawn here."""
    if dweight is None:
        assert state is not None and weight_offset is not None
        drawn = sample_tangents(state, k, weight.numel(), offset=weight_offset, first=first, distribution=distribution)
        dweight = drawn.view(k, *weight.shape)
    return weight.double()[indices.long()], dweight.double()[:, indices.long()]


def softmax_jvp(x: Tensor, dx: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """``y = softmax(x)``, ``dy_i = y (dx_i - sum(y dx_i))``."""
    dim = dim % max(x.dim(), 1)
    y, dx = torch.softmax(x.double(), dim), dx.double()
    mean = torch.stack([_sum(y * v, dim) for v in dx])
    return y, y * (dx - mean)


def log_softmax_jvp(x: Tensor, dx: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """``y = log softmax(x)``, ``dy_i = dx_i - sum(exp(y) dx_i)``."""
    dim = dim % max(x.dim(), 1)
    y, dx = torch.log_softmax(x.double(), dim), dx.double()
    return y, dx - torch.stack([_sum(y.exp() * v, dim) for v in dx])


def _sum(x: Tensor, dim: int) -> Tensor:
    return x.sum(dim, keepdim=True) if x.dim() else x


# ---- losses, one for each sample or element


def cross_entropy_jvp(
    logits: Tensor,
    dlogits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``-(1 - s) w_t log p_t - (s / C) sum_c w_c log p_c`` with ``p = softmax(logits)``, which is linear in ``log p``."""
    classes = logits.shape[1]
    w = torch.ones(classes, dtype=torch.float64) if weight is None else weight.double()
    ignored = target == ignore_index
    t = torch.where(ignored, 0, target)
    log_p, dlog_p = log_softmax_jvp(logits, dlogits, 1)  # (B, C), (k, B, C)

    def loss(v: Tensor) -> Tensor:
        total = -(1 - label_smoothing) * w[t] * v.gather(1, t[:, None])[:, 0]
        if label_smoothing > 0:  # else a logit of -inf would give 0 * inf
            total = total - label_smoothing / classes * (w * v).sum(1)
        return torch.where(ignored, 0.0, total)

    return loss(log_p), torch.stack([loss(v) for v in dlog_p])


def mse_jvp(input: Tensor, dinput: Tensor | None, target: Tensor, dtarget: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``(a - b)^2``, ``2 (a - b) (da_i - db_i)``."""
    difference = input.double() - target.double()
    assert dinput is not None or dtarget is not None, "one of dinput and dtarget must be given"
    change = 0 if dinput is None else dinput.double()
    if dtarget is not None:
        change = change - dtarget.double()
    return difference**2, 2 * difference * change


def bce_jvp(
    input: Tensor,
    dinput: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    with_logits: bool = True,
) -> tuple[Tensor, Tensor]:
    """``-w (q t log p + (1 - t) log(1 - p))`` with p the input or its sigmoid, w ``weight`` and q ``pos_weight``.

    Where p itself is given, logarithms are at least -100 and ``p (1 - p)`` in the derivative at least 1e-12, as in PyTorch.
    """
    x, t = input.double(), target.double()
    w = 1.0 if weight is None else weight.double()
    if with_logits:
        q = 1.0 if pos_weight is None else pos_weight.double()
        mixed = 1 + (q - 1) * t
        # log p = -softplus(-x) and log(1 - p) = -x - softplus(-x)
        loss = (1 - t) * x + mixed * torch.nn.functional.softplus(-x, threshold=700)
        slope = (1 - t) - mixed * torch.sigmoid(-x)
    else:
        if pos_weight is not None:
            raise ValueError("bce_jvp: pos_weight is given; it needs with_logits=True")
        loss = -(t * x.log().clamp(min=-100) + (1 - t) * torch.log1p(-x).clamp(min=-100))
        # PyTorch's 1e-12 is a float32 at every precision
        slope = (x - t) / (x * (1 - x)).clamp(min=float(np.float32(1e-12)))
    return w * loss, w * slope * dinput.double()


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
    """The largest element of every window, and the same element of every tangent, gathered by PyTorch's own indices."""
    axes = len(kernel)
    lead, planes = x.shape[: x.dim() - axes], x.double().reshape(-1, 1, *x.shape[x.dim() - axes :])

    def pool(t: Tensor) -> tuple[Tensor, Tensor]:
        function = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[axes - 1]
        return function(t, kernel, stride, padding, dilation, ceil_mode, return_indices=True)  # type: ignore[return-value]

    y, indices = pool(planes)
    somewhere = pool(torch.zeros_like(planes))[0] == 0  # not so for a window that lies in the padding
    flat = dx.double().reshape(len(dx), *planes.shape).flatten(2)  # (k, planes, elements)
    places = torch.where(somewhere, indices, 0).flatten(1).expand(len(dx), -1, -1)
    dy = torch.where(somewhere, flat.gather(-1, places).view(len(dx), *y.shape), 0.0)
    shape = (*lead, *y.shape[2:])
    kept = indices.reshape(shape) if want_indices else indices.new_empty(0)
    return y.reshape(shape), dy.reshape(len(dx), *shape), kept


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
    """``P V`` with ``P = softmax(S)``, ``S = scale Q K^T + mask``, and ``dP = P (dS - sum(P dS))``, all of them stored."""
    q, k, v = query.double(), key.double(), value.double()
    groups = q.shape[1] // k.shape[1]  # query heads that share a key head

    def shared(t: Tensor) -> Tensor:
        return t.double().repeat_interleave(groups, dim=-3)

    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q @ shared(k).mT * factor
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    nothing = (scores == -math.inf).all(-1, keepdim=True)  # a query that may attend to no key gives zeros
    p = torch.where(nothing, 0.0, torch.softmax(scores, -1))
    out = p @ shared(v)
    tangents = []
    for i in range(next(t for t in (dquery, dkey, dvalue) if t is not None).shape[0]):
        ds = torch.zeros_like(scores)
        if dquery is not None:
            ds = ds + dquery[i].double() @ shared(k).mT * factor
        if dkey is not None:
            ds = ds + q @ shared(dkey[i]).mT * factor
        moved = (p * (ds - (p * ds).sum(-1, keepdim=True))) @ shared(v)
        tangents.append(moved if dvalue is None else moved + p @ shared(dvalue[i]))
    return out, torch.stack(tangents)


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
    """``y = w h + b`` with ``h = (x - mean) r``, ``r = 1 / sqrt(var + eps)``; ``dh = r (dx - mean(dx) - h mean(dx h))``."""
    inner = x.numel() // max(1, outer * groups)
    rows = x.double().reshape(outer, groups, inner)
    dims = (-3, -1)
    given = mean is not None and var is not None
    m = mean.double().view(1, -1, 1) if mean is not None else rows.mean(dims, keepdim=True) * centred
    v = var.double().view(1, -1, 1) if var is not None else ((rows - m) ** 2).mean(dims, keepdim=True)
    r = (v + eps).rsqrt()
    h = (rows - m) * r

    def spread(w: Tensor) -> Tensor:
        """(*, weight_groups * weight_inner) -> (*, 1, groups, inner), constant over runs."""
        w = w.double().unflatten(-1, (weight_groups, -1))
        w = w.repeat_interleave(inner // max(1, w.shape[-1]), dim=-1)
        return w.repeat(*(1,) * (w.dim() - 2), groups // weight_groups, 1).unsqueeze(-3)

    y = h if weight is None else h * spread(weight.flatten())
    y = y if bias is None else y + spread(bias.flatten())
    k = next(t for t in (dx, dweight, dbias) if t is not None).shape[0]
    dy = torch.zeros((k, *rows.shape), dtype=torch.float64)
    if dx is not None:
        moved = dx.double().reshape(k, *rows.shape)
        if not given:
            moved = moved - moved.mean(dims, keepdim=True) * centred - h * (moved * h).mean(dims, keepdim=True)
        dy = dy + r * moved * (1 if weight is None else spread(weight.flatten()))
    if dweight is not None:
        dy = dy + spread(dweight.flatten(1)) * h
    if dbias is not None:
        dy = dy + spread(dbias.flatten(1))
    return y.view(x.shape), dy.view(k, *x.shape), m.flatten().expand(groups).clone(), v.flatten()
