"""Three ways to put a gradient into ``.grad``, behind one signature, so that they can be swapped, compared and timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp, vmap
from torch.nn import functional as F

import frog_cuda as frog

__all__ = ["Gradient", "backprop", "forward", "vmap_jvp"]

#: (input, target) -> mean loss; adds a gradient, or an estimate of it, to ``.grad``
Gradient = Callable[[Tensor, Tensor], Tensor]


def forward(model: nn.Module, k: int, aggregate: str, seed: int, tangents: Any = "normal") -> frog.ForwardGradient:
    """frog_cuda: k tangents over the activities, shared by the batch, one directional derivative per sample."""
    loss_fn = nn.CrossEntropyLoss(reduction="none")
    return frog.ForwardGradient(model, loss_fn, k=k, tangents=tangents, aggregate=aggregate, seed=seed, perturb="activity")


@dataclass(frozen=True)
class backprop:
    """The true gradient."""

    model: nn.Module

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        return loss.detach()


@dataclass(frozen=True)
class vmap_jvp:
    """What :func:`forward` makes, in plain PyTorch: the same estimator, through ``torch.func.vmap(jvp)``.

    Zeros are added to the output of each linear layer, and perturbed by k tangents from torch.randn that the batch shares. This
    gives one derivative for each tangent and sample; a layer gets the outer product of its inputs and the estimates for its
    outputs.

    Arguments:
        model: its layers with parameters are linear.
        aggregate: ``"mean"`` or ``"orthogonal"``.
    """

    model: nn.Sequential
    k: int
    aggregate: str

    @torch.no_grad()
    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        layers = [layer for layer in self.model if isinstance(layer, nn.Linear)]
        zeros = tuple(layer.weight.new_zeros(layer.out_features) for layer in layers)
        tangents = tuple(torch.randn(self.k, len(z), dtype=z.dtype, device=z.device) for z in zeros)  # each (k, m)

        def losses(*shifts: Tensor) -> tuple[Tensor, list[Tensor]]:
            """Loss of each sample (B,), and the inputs of the linear layers, each (B, n)."""
            h, inputs, left = x, [], iter(shifts)
            for layer in self.model:
                if isinstance(layer, nn.Linear):
                    inputs.append(h)
                    h = layer(h) + next(left)
                else:
                    h = layer(h)
            return F.cross_entropy(h, y, reduction="none"), inputs

        def derivative(*v: Tensor) -> Any:
            return jvp(losses, zeros, v, has_aux=True)

        out_dims: Any = (None, 0, None)  # losses and inputs are the same for all tangents
        values, d, inputs = vmap(derivative, out_dims=out_dims)(*tangents)  # d (k, B)
        if self.aggregate == "orthogonal":
            gram = torch.stack([v @ v.T for v in tangents]).sum(0)
            c = torch.cholesky_solve(d, torch.linalg.cholesky(gram))
        else:
            c = d / self.k
        c = c / len(x)  # of the mean loss
        for layer, v, h in zip(layers, tangents, inputs, strict=True):
            outputs = c.T @ v  # estimates for the layer's outputs, (B, m)
            _add(layer.weight, outputs.T @ h)
            if layer.bias is not None:
                _add(layer.bias, outputs.sum(0))
        return values.mean()


def _add(p: Tensor, gradient: Tensor) -> None:
    p.grad = gradient if p.grad is None else p.grad.add_(gradient)
