"""Whole models, the two parts of a forward gradient of them, and for each a check that what was timed is right."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cases import WrongResult, distance
from torch import Tensor, nn

import frog_cuda as frog
from frog_cuda.experiments import models
from frog_cuda.experiments.models import EncoderLayer, Position


class CausalAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.project(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class GPT(nn.Module):
    """A decoder in the manner of GPT-2 that scores every next token: (B, T) -> (B, T, tokens).

    The embeddings are frozen, for backprop as well: what is compared is the layers.
    """

    def __init__(self, length: int, *, tokens: int = 256, width: int = 128, heads: int = 4, layers: int = 4) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(tokens, width), Position(length, width)
        self.layers = nn.Sequential(*(EncoderLayer(width, heads, 4 * width) for _ in range(layers)))
        for layer in self.layers:
            layer.attention = CausalAttention(width, heads)
        self.norm, self.output = nn.LayerNorm(width), nn.Linear(width, tokens)
        self.embedding.requires_grad_(False)
        self.position.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.norm(self.layers(self.position(self.embedding(x)))))


def _images(name: str, shape: tuple[int, int, int], batch: int, **sizes: int) -> Callable[[], tuple[nn.Module, Tensor, Tensor]]:
    return lambda: (models.build(name, shape, 10, **sizes), torch.randn(batch, *shape), torch.randint(0, 10, (batch,)))


def _text(length: int, batch: int, **sizes: int) -> Callable[[], tuple[nn.Module, Tensor, Tensor]]:
    def make() -> tuple[nn.Module, Tensor, Tensor]:
        model = GPT(length, **sizes)
        tokens = torch.randint(0, model.embedding.num_embeddings, (batch, length + 1))
        return model, tokens[:, :-1], tokens[:, 1:]

    return make


#: name -> (model, input, target); the tiny ones are for tests
MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor]]] = {
    "resnet18": _images("resnet18", (3, 32, 32), 32),
    "vit": _images("vit", (3, 32, 32), 32),
    "gpt256": _text(256, 4),
    "gpt1024": _text(1024, 1),
    "tiny-resnet18": _images("resnet18", (1, 8, 8), 4, width=4),
    "tiny-vit": _images("vit", (1, 8, 8), 4, layers=2, heads=2, width=8, hidden=12),
    "tiny-gpt": _text(8, 3, tokens=11, width=8, heads=2, layers=2),
}

BACKPROP, FORWARD, LAYERS = "backprop", "forward only", "layers alone"
LEAVES, GROUPS, WEIGHT = "activity, innermost modules", "activity, groups", "weight, Rademacher"
#: a whole gradient, or only the pass up to the coefficients of the projection
GRADIENT, DERIVATIVES = "gradient", "derivatives"


#: Relative error (2-norm) in float64, where a right result shows.
BOUND = 1e-8
#: The same in float32. A derivative sums what the tangents of every layer contribute, and little of it is left; where rounding
#: moves an activation across the kink of a ReLU, more is lost: up to 5e-2 was seen in ResNet18 with k = 1.
BOUND32 = 0.2


def losses(output: Tensor, target: Tensor) -> Tensor:
    """One loss per sample; of a text, the mean over its tokens."""
    if output.dim() == 2:
        return F.cross_entropy(output, target, reduction="none")
    each = F.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="none")
    return each.unflatten(0, target.shape).mean(1)


class Problem:
    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.name = name
        self.model, self.x, self.target = MODELS[name]()

    def in_float64(self) -> Problem:
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model).double()
        twin.x = self.x.double() if self.x.is_floating_point() else self.x
        return twin

    def methods(self) -> list[str]:
        return [LEAVES, GROUPS] if hasattr(self.model, "groups") else [LEAVES, WEIGHT]

    def backprop(self) -> None:
        self.model.zero_grad()
        losses(self.model(self.x), self.target).mean().backward()

    def forward_only(self) -> Tensor:
        with torch.no_grad():
            return losses(self.model(self.x), self.target).mean()

    def forward_gradient(self, method: str, k: int) -> Step:
        return Step(self, method, k)

    def layers_alone(self, k: int) -> Callable[[], None]:
        """The convolutions and linear layers of the model, one after the other, on 1 + k times the rows: what the library needs
        for the products alone. The first layer, whose input is not perturbed, gets the rows of the value."""
        calls: list[tuple[Any, Tensor]] = []
        handles = [
            m.register_forward_hook(lambda m, args, out: calls.append((m, args[0])))
            for m in self.model.modules()
            if isinstance(m, (nn.Conv2d, nn.Linear))
        ]
        self.forward_only()
        for handle in handles:
            handle.remove()
        inputs = [(m, x if i == 0 else x.repeat(1 + k, *[1] * (x.dim() - 1))) for i, (m, x) in enumerate(calls)]

        def run() -> None:
            with torch.no_grad():
                for m, x in inputs:
                    m(x)

        return run


class Step:
    """A forward gradient of a problem's model; called, it leaves its gradient in ``.grad``."""

    def __init__(self, problem: Problem, method: str, k: int) -> None:
        self.problem, self.method, self.k = problem, method, k
        options: dict[str, Any] = {"perturb": "activity"}
        if method == WEIGHT:
            options = {"perturb": "weight", "tangents": "rademacher"}
        elif method == GROUPS:
            options["layers"] = problem.model.groups()
        # Batch normalisation mixes samples: exact with one derivative for the batch
        per_sample = not any(isinstance(m, nn.BatchNorm2d) for m in problem.model.modules())
        self.fg = frog.ForwardGradient(problem.model, losses, k=k, seed=1, per_sample=per_sample, **options)

    def __call__(self) -> None:
        self.problem.model.zero_grad()
        self.fg(self.problem.x, self.problem.target)

    def derivatives(self) -> None:
        self.fg.derivatives(self.problem.x, self.problem.target)

    def check(self) -> float:
        """Repeats the call, also in float64 with at most two tangents; returns the relative error there.

        Raises:
            WrongResult: derivatives or gradient are off by more than the bounds, or NaN.
        """
        wide = Step(self.problem.in_float64(), self.method, min(self.k, 2))
        error = wide._error()
        for off, bound, dtype in ((error, BOUND, "float64"), (self._error(), BOUND32, "float32")):
            if not off <= bound:
                what = f"{self.method} of {self.problem.name}, k {self.k}, {dtype}"
                raise WrongResult(f"{what}: relative error {off:.3g}, bound {bound}")
        return error

    def _error(self) -> float:
        p = self.problem
        simulated = frog.simulate(self.fg, p.x, p.target)
        self()
        got = {name: q.grad for name, q in p.model.named_parameters() if q.grad is not None}
        d = {"d": self.fg.last.directional_derivatives}
        errors = distance(got, simulated.gradients), distance(d, {"d": simulated.directional_derivatives})
        return float("nan") if any(math.isnan(e) for e in errors) else max(errors)
