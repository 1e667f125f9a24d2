"""What a gradient costs at least: floating point operations, drawn elements and bytes, to hold measurements against.

In units of one product of the batch with one parameter (2 B n FLOPs for all of them). The first layer's input is not perturbed
and needs no gradient, so it costs a product less than the others in every method but the primal pass.
"""

from __future__ import annotations

from dataclasses import dataclass

BATCH, INPUTS, CLASSES = 64, 784, 10


@dataclass(frozen=True)
class Floor:
    """``flops``: multiplications and additions of the matrix products. ``drawn``: tangent elements to draw. ``stored``: bytes
    that grow with the parameters beyond the parameters themselves."""

    flops: float
    drawn: float
    stored: float


def parameters(width: int) -> tuple[int, int]:
    """Weights of all layers, and of the first."""
    return INPUTS * width + width * width + width * CLASSES, INPUTS * width


def floor(method: str, width: int, k: int) -> Floor:
    """The floor of ``method`` as written, not of the best conceivable method.

    - backprop: the pass, weight gradients, input gradients of all layers but the first.
    - weight perturbation: for each tangent x dW^T in every layer, dx W^T in all but the first; tangents drawn twice, once in
      the pass and once for the combination.
    - activity perturbation: for each tangent dx W^T in all layers but the first, and a weight gradient of rank k or B.
    - vmap(jvp): as weight perturbation, tangents drawn once and stored.
    - loop of forward_ad: the primal pass k times.
    """
    n, first = parameters(width)
    product = 2.0 * BATCH  # FLOPs of a batch per parameter
    weights = width + width + CLASSES  # elements of the tangents of the activities
    one, other = product * n, product * (n - first)
    gradient = 4.0 * n
    if method == "forward only":
        return Floor(one, 0, 0)
    if method == "backprop":
        return Floor(2 * one + other, 0, gradient)
    if method.startswith("weight"):
        return Floor(one + k * (one + other), 2.0 * k * n, 0 if method.endswith("update_") else gradient)
    if method == "activity":
        return Floor(one + k * other + 2.0 * min(k, BATCH) * n, k * weights, gradient)
    if method == "vmap(jvp)":
        return Floor(one + k * (one + other), k * n, 4.0 * k * n + gradient)
    if method == "loop of forward_ad":
        return Floor(k * (2 * one + other), k * n, 4.0 * n + gradient)
    raise ValueError(f"no floor for method {method!r}")


def relative(method: str, width: int, k: int) -> float:
    """FLOPs in units of backprop's."""
    return floor(method, width, k).flops / floor("backprop", width, 0).flops
