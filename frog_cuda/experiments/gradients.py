"""Three ways to put a gradient into ``.grad``, behind one signature, so that they can be swapped, compared and timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap
from torch.nn import functional as F

import frog_cuda as frog

__all__ = ["Gradient", "backprop", "forward", "vmap_jvp"]

#: (input, target) -> mean loss; adds a gradient, or an estimate of it, to ``.grad``
Gradient = Callable[[Tensor, Tensor], Tensor]


def forward(model: nn.Module, k: int, aggregate: str, seed: int) -> frog.ForwardGradient:
    """frog_cuda: k tangents over the activities, one directional derivative per sample."""
    loss_fn = nn.CrossEntropyLoss(reduction="none")
    return frog.ForwardGradient(model, loss_fn, k=k, perturb="activity", aggregate=aggregate, seed=seed)


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
    """The same estimator in plain PyTorch: k weight tangents from torch.randn, stored, through ``torch.func.vmap(jvp)``.

    Arguments:
        aggregate: ``"mean"`` or ``"orthogonal"``.
    """

    model: nn.Module
    k: int
    aggregate: str

    @torch.no_grad()
    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        parameters = {name: p.detach() for name, p in self.model.named_parameters()}
        tangents = {name: torch.randn(self.k, *p.shape, dtype=p.dtype, device=p.device) for name, p in parameters.items()}

        def loss(p: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(functional_call(self.model, p, (x,)), y)

        def derivative(v: dict[str, Tensor]) -> Any:
            return jvp(loss, (parameters,), (v,))

        out_dims: Any = (None, 0)  # the loss is the same for all tangents
        value, d = vmap(derivative, out_dims=out_dims)(tangents)
        if self.aggregate == "orthogonal":
            gram = sum(v.flatten(1) @ v.flatten(1).T for v in tangents.values())
            c = torch.cholesky_solve(d.unsqueeze(1), torch.linalg.cholesky(gram)).squeeze(1)
        else:
            c = d / self.k
        for name, p in self.model.named_parameters():
            g = torch.tensordot(c, tangents[name], 1)
            p.grad = g if p.grad is None else p.grad.add_(g)
        return value
