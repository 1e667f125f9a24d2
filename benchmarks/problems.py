"""The models and batches that gradients are measured on."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, replace_all_batch_norm_modules_

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
    def make() -> tuple[nn.Module, Tensor, Tensor]:
        model = models.build(name, shape, 10, **sizes)
        # vmap cannot write running statistics; nobody reads them here
        return replace_all_batch_norm_modules_(model), torch.randn(batch, *shape), torch.randint(0, 10, (batch,))

    return make


def _text(length: int, batch: int, **sizes: int) -> Callable[[], tuple[nn.Module, Tensor, Tensor]]:
    def make() -> tuple[nn.Module, Tensor, Tensor]:
        model = GPT(length, **sizes)
        tokens = torch.randint(0, model.embedding.num_embeddings, (batch, length + 1))
        return model, tokens[:, :-1], tokens[:, 1:]

    return make


#: name -> (model, input, target); the tiny ones are for tests and for warming up. fc256 and any other width go too.
MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor]]] = {
    "lenet5": _images("lenet5", (1, 28, 28), 64),
    "resnet18": _images("resnet18", (3, 32, 32), 32),
    "resnet18-128": _images("resnet18", (3, 32, 32), 128),
    "vit": _images("vit", (3, 32, 32), 32),
    "vit-128": _images("vit", (3, 32, 32), 128),
    "mixer": _images("mixer", (3, 32, 32), 32),
    "gpt256": _text(256, 4),
    "gpt1024": _text(1024, 1),
    "gpt2-small": _text(1024, 8, tokens=50257, width=768, heads=12, layers=12),
    "tiny-lenet5": _images("lenet5", (1, 4, 4), 2),
    "tiny-resnet18": _images("resnet18", (1, 8, 8), 4, width=4),
    "tiny-vit": _images("vit", (1, 8, 8), 4, layers=2, heads=2, width=8, hidden=12),
    "tiny-mixer": _images("mixer", (1, 8, 8), 4, layers=2, width=8, hidden_positions=6, hidden=12),
    "tiny-gpt": _text(8, 3, tokens=11, width=8, heads=2, layers=2),
}
ACCEPTED = f"fc and a width, {', '.join(MODELS)}"
PAPER = ["fc256", "fc1024", "fc4096", "lenet5", "resnet18", "vit", "mixer", "gpt256", "gpt1024"]


def tiny(name: str) -> str:
    """The smallest problem of the same kind."""
    family = re.match("[a-z]+", name.removeprefix("tiny-"))
    return "fc16" if name.startswith("fc") else next(n for n in MODELS if family and n.startswith(f"tiny-{family[0]}"))


def losses(output: Tensor, target: Tensor) -> Tensor:
    """One loss per sample; of a text, the mean over its tokens."""
    if output.dim() == 2:
        return F.cross_entropy(output, target, reduction="none")
    each = F.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="none")
    return each.unflatten(0, target.shape).mean(1)


class Problem:
    """A model, a batch of it, and its mean loss. The values of the batch do not matter for time."""

    def __init__(
        self,
        name: str,
        make: Callable[[], tuple[nn.Module, Tensor, Tensor]] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        width = re.fullmatch(r"fc(\d+)", name)
        if make is None:
            make = _images("fc", (1, 28, 28), 64, width=int(width[1])) if width else MODELS.get(name)
        if make is None:
            raise ValueError(f"model is {name!r}; accepted are {ACCEPTED}")
        torch.manual_seed(0)
        self.name = name
        model, x, target = make()
        self.model, self.x, self.target = model.to(device), x.to(device), target.to(device)
        self.start = {name: p.detach().clone() for name, p in self.parameters.items()}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Those that are trained."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def n(self) -> int:
        return sum(p.numel() for p in self.parameters.values())

    @property
    def per_sample(self) -> bool:
        """Batch normalisation mixes samples: exact with one derivative for the batch."""
        return not any(isinstance(m, nn.BatchNorm2d) for m in self.model.modules())

    def loss(self, values: dict[str, Tensor] | None = None) -> Tensor:
        """Mean loss of the model, or of the same model with other values of its parameters."""
        output = self.model(self.x) if values is None else functional_call(self.model, values, self.x)
        return losses(output, self.target).mean()

    def true_gradients(self) -> dict[str, Tensor]:
        found = torch.autograd.grad(self.loss(), list(self.parameters.values()))
        return dict(zip(self.parameters, found, strict=True))

    def restore(self) -> None:
        """Takes back what rounding left of perturbations in place."""
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(self.start[name])
                p.grad = None

    def in_float64(self) -> Problem:
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model).double()
        twin.x = self.x.double() if self.x.is_floating_point() else self.x
        return twin

    def blocks(self) -> list[nn.Module]:
        """What checkpointed backprop keeps only the inputs of: layers of a transformer, stages of ResNet, else the model."""
        if hasattr(self.model, "layers"):
            return list(self.model.layers)
        stages = [m for name, m in self.model.named_children() if name.startswith("stage")]
        return stages or [self.model]
