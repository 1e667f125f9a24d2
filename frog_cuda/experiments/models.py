"""The networks of the paper's training experiments (Flügel et al., arXiv 2410.17764, section 4.4), in plain torch.nn.

Each model takes images ``(B, *shape)`` and returns ``(B, classes)``. Its ``groups()`` are the layers whose outputs activity
perturbation perturbs: ``ForwardGradient(model, ..., layers=model.groups())``. Every parameter belongs to exactly one group, and
to one innermost module, so that the default (``layers=None``) leaves none out either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MODELS", "FullyConnected", "LeNet5", "MLPMixer", "ResNet18", "VisionTransformer", "build"]

Shape = tuple[int, int, int]
Groups = list[list[str]]


class FullyConnected(nn.Module):
    """Two hidden layers of ``width`` units with ReLU: 784-w-w-10 for images of 1x28x28.

    Groups: the three linear layers.
    """

    def __init__(self, shape: Shape = (1, 28, 28), classes: int = 10, *, width: int = 1024) -> None:
        super().__init__()
        channels, height, columns = shape
        self.first = nn.Linear(channels * height * columns, width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x.flatten(1)))
        return self.last(F.relu(self.second(x)))

    def groups(self) -> Groups:
        return [["first"], ["second"], ["last"]]


class LeNet5(nn.Module):
    """Two convolutions and three linear layers, with ReLU and max pooling; smaller images are padded to 32x32.

    Groups: the five layers.
    """

    def __init__(self, shape: Shape = (1, 28, 28), classes: int = 10) -> None:
        super().__init__()
        channels, height, columns = shape
        if not all(1 <= side <= 32 and side % 2 == 0 for side in (height, columns)):
            raise ValueError(f"LeNet5: shape is {shape}; expected images with even sides of at most 32")
        self.conv1 = nn.Conv2d(channels, 6, 5, padding=((32 - height) // 2, (32 - columns) // 2))
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.linear1 = nn.Linear(16 * 5 * 5, 120)
        self.linear2 = nn.Linear(120, 84)
        self.linear3 = nn.Linear(84, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.linear1(x.flatten(1)))
        return self.linear3(F.relu(self.linear2(x)))

    def groups(self) -> Groups:
        return [["conv1"], ["conv2"], ["linear1"], ["linear2"], ["linear3"]]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation, and a shortcut that is projected where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet18 with its 7x7 stem.

    In train mode batch normalisation makes a sample's loss depend on the others: activity perturbation is exact there with
    ``per_sample=False``. It also takes away most of a tangent that all samples share: use ``shared_across_batch=False``.

    Groups: stem, four residual stages, head.
    """

    def __init__(self, shape: Shape = (3, 32, 32), classes: int = 10, *, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(shape[0], width, 7, 2, padding=3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, padding=1),
        )
        self.stage1 = self._stage(width, width, 1)
        self.stage2 = self._stage(width, 2 * width, 2)
        self.stage3 = self._stage(2 * width, 4 * width, 2)
        self.stage4 = self._stage(4 * width, 8 * width, 2)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, classes))

    @staticmethod
    def _stage(channels_in: int, channels: int, stride: int) -> nn.Sequential:
        return nn.Sequential(ResidualBlock(channels_in, channels, stride), ResidualBlock(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in (self.stage1, self.stage2, self.stage3, self.stage4):
            x = stage(x)
        return self.head(x)

    def groups(self) -> Groups:
        return [["stem"], ["stage1"], ["stage2"], ["stage3"], ["stage4"], ["head"]]


class Patches(nn.Module):
    """Images ``(B, C, H, W)`` as a sequence ``(B, T, width)`` of linearly embedded patches."""

    def __init__(self, shape: Shape, patch: int, width: int) -> None:
        super().__init__()
        channels, height, columns = shape
        if height % patch or columns % patch:
            raise ValueError(f"shape is {shape}; its sides must be multiples of the patch size {patch}")
        self.length = (height // patch) * (columns // patch)
        self.embed = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x).flatten(2).transpose(1, 2)


class ClassToken(nn.Module):
    """Puts a learned token in front of each sequence."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(x.shape[0], 1, -1), x], 1)


class Position(nn.Module):
    """Adds a learned vector for each position."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(0.02 * torch.randn(length, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.embedding


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, D) each
        y = F.scaled_dot_product_attention(q, k, v)
        return self.project(y.transpose(1, 2).flatten(2))


def _mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class EncoderLayer(nn.Module):
    """Self-attention, then an MLP, each normalised at its input and added to it."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = _mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Vision transformer: 6 encoder layers with 4 heads, hidden size 256, MLP 512, patches of 4x4, a class token.

    Groups: each encoder layer; the first holds the input processing, the last the output processing.
    """

    def __init__(
        self,
        shape: Shape = (3, 32, 32),
        classes: int = 10,
        *,
        layers: int = 6,
        heads: int = 4,
        width: int = 256,
        hidden: int = 512,
        patch: int = 4,
    ) -> None:
        super().__init__()
        patches = Patches(shape, patch, width)
        self.input = nn.Sequential(patches, ClassToken(width), Position(patches.length + 1, width))
        self.layers = nn.Sequential(*(EncoderLayer(width, heads, hidden) for _ in range(layers)))
        self.output = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.layers(self.input(x))[:, 0])

    def groups(self) -> Groups:
        return _around_layers(len(self.layers))


class MixerLayer(nn.Module):
    """An MLP over the positions, then one over the channels, each normalised at its input and added to it."""

    def __init__(self, length: int, width: int, hidden_positions: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.positions = _mlp(length, hidden_positions)
        self.norm2 = nn.LayerNorm(width)
        self.channels = _mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positions(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class MLPMixer(nn.Module):
    """MLP-Mixer with patches of 4x4; 6 layers of hidden size 256 give it about as many parameters as the vision transformer.

    Groups: each mixer layer; the first holds the input processing, the last the output processing.
    """

    def __init__(
        self,
        shape: Shape = (3, 32, 32),
        classes: int = 10,
        *,
        layers: int = 6,
        width: int = 256,
        hidden_positions: int = 128,
        hidden: int = 1024,
        patch: int = 4,
    ) -> None:
        super().__init__()
        self.input = Patches(shape, patch, width)
        self.layers = nn.Sequential(*(MixerLayer(self.input.length, width, hidden_positions, hidden) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.norm(self.layers(self.input(x))).mean(1))

    def groups(self) -> Groups:
        groups = _around_layers(len(self.layers))
        groups[-1].insert(-1, "norm")
        return groups


def _around_layers(count: int) -> Groups:
    groups = [[f"layers.{i}"] for i in range(count)]
    groups[0].insert(0, "input")
    groups[-1].append("output")
    return groups


#: by the names that the command line takes
MODELS: dict[str, Callable[..., Any]] = {
    "fc": FullyConnected,
    "lenet5": LeNet5,
    "resnet18": ResNet18,
    "vit": VisionTransformer,
    "mixer": MLPMixer,
}


def build(name: str, shape: Shape = (1, 28, 28), classes: int = 10, **sizes: int) -> Any:
    """The model called ``name`` for images ``(B, *shape)``; ``sizes`` are the keyword arguments of its class.

    Raises:
        ValueError: unknown name, or a shape that the model does not take.

    >>> build("lenet5", (1, 28, 28)).groups()
    [['conv1'], ['conv2'], ['linear1'], ['linear2'], ['linear3']]
    """
    if name not in MODELS:
        raise ValueError(f"name is {name!r}; accepted are {', '.join(MODELS)}")
    return MODELS[name](shape, classes, **sizes)
