"""What a gradient costs at least: floating point operations, drawn elements and bytes, to hold measurements against.

The products of a model are counted from one forward pass: layers by their shapes, attention by PyTorch's counter. What
backprop and PyTorch's forward mode do is counted by ``torch.utils.flop_counter`` as it runs; the counter cannot see into
compiled operators and JAX, so these have closed forms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from problems import Problem
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Products:
    """FLOPs (multiplications and additions) of one forward pass of a batch, and sizes that floors depend on.

    ``first``: of the layers whose input is not perturbed. ``thin``: of a tangent of rank one through all layers, in place of
    ``linear``. ``rows``: the most that a layer gets. ``outputs``: elements of all layers' outputs for one sample.
    ``factors``: elements of the factors of a tangent of rank one.
    """

    linear: float
    first: float
    attention: float
    thin: float
    rows: int
    batch: int
    n: int
    outputs: int
    factors: int

    @property
    def forward(self) -> float:
        return self.linear + self.attention


def products(problem: Problem) -> Products:
    linear = first = thin = 0.0
    rows = outputs = factors = 0

    def count(module: nn.Module, args: tuple, out: torch.Tensor) -> None:
        nonlocal linear, first, thin, rows, outputs, factors
        weight = module.weight
        calls, fan_in = out.numel() // weight.shape[0], weight[0].numel()
        flops = 2.0 * calls * fan_in * weight.shape[0]
        first = first or flops
        linear, rows, outputs = linear + flops, max(rows, calls), outputs + out.numel() // problem.x.shape[0]
        thin, factors = thin + 2.0 * calls * (fan_in + weight.shape[0]), factors + fan_in + weight.shape[0]

    layers = [m for m in problem.model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    handles = [m.register_forward_hook(count) for m in layers]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        problem.loss()
    for handle in handles:
        handle.remove()
    # The text models' embeddings are frozen: the input of their first linear layer is not perturbed either
    attention = max(0.0, counter.get_total_flops() - linear)
    return Products(linear, first, attention, thin, rows, problem.x.shape[0], problem.n, outputs, factors)


def counted(fn: Callable[[], object]) -> float:
    """FLOPs of one call by PyTorch's counter; attention counted as the products that it is."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        fn()
    return float(counter.get_total_flops())


@dataclass(frozen=True)
class Floor:
    """``flops``: of the matrix products. ``drawn``: tangent elements to draw. ``stored``: bytes that grow with the parameters
    beyond the parameters themselves."""

    flops: float
    drawn: float
    stored: float


def floor(method: str, p: Products, k: int) -> Floor:
    """The floor of ``method`` as written, not of the best conceivable method.

    - backprop: the pass, weight gradients, input gradients of all layers but the first; attention's gradient is four products
      to its two.
    - weight perturbation: for each tangent x dW^T in every layer, dx W^T in all but the first, attention's four products;
      tangents drawn twice, once in the pass and once for the combination. Low rank: x dW^T through the factors.
    - activity perturbation: for each tangent dx W^T in all layers but the first, attention's four, and a weight gradient, of
      rank k where that is less than the batch; with groups as layers, of all rows.
    - vmap(jvp): as weight perturbation, tangents drawn once and stored.
    - loop of forward_ad: the primal pass k times. MeZO: two passes for each vector, which is drawn four times.
    """
    one, other = p.forward, p.linear - p.first + 2 * p.attention
    gradient = 4.0 * p.n
    name = method.removesuffix(" tangents").removesuffix(", bf16")
    if name == "forward only":
        return Floor(one, 0, 0)
    if name in ("backprop", "JAX jit, grad"):
        return Floor(one + p.linear + other, 0, gradient)
    if name == "checkpointed backprop":
        return Floor(2 * one + p.linear + other, 0, gradient)
    if name == "weight, low rank":
        return Floor(one + k * (p.thin + other), k * p.factors, gradient)
    if name.startswith("weight"):
        return Floor(one + k * (p.linear + other), 2.0 * k * p.n, 0 if name.endswith("update_") else gradient)
    if name.startswith("activity"):
        share = 1.0 if name.endswith("groups") else min(k, p.batch) / p.batch
        return Floor(one + k * other + share * p.linear, k * p.outputs, gradient)
    if name.endswith("vmap(jvp)"):
        return Floor(one + k * (p.linear + other), k * p.n, 4.0 * k * p.n + gradient)
    if name == "loop of forward_ad":
        return Floor(k * (one + p.linear + other), k * p.n, 4.0 * p.n + gradient)
    if name == "MeZO":
        return Floor(2 * k * one, 4.0 * k * p.n, gradient)
    raise ValueError(f"no floor for method {method!r}")


def relative(method: str, p: Products, k: int) -> float:
    """FLOPs in units of backprop's."""
    return floor(method, p, k).flops / floor("backprop", p, 0).flops
