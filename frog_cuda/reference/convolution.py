"""Convolutions: value and k tangents, and sampled tangents of a weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .tangents import sample_tangents


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


def narrow_convolution(x: Tensor, weight: Tensor, *, stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
    """The convolution of x."""
    return torch.convolution(x.double(), weight.double(), None, stride, padding, dilation, False, [0] * len(stride), 1)


def sampled_convolution_(
    self: Tensor,
    x: Tensor,
    state: Tensor,
    *,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool = False,
    output_padding: list[int] | None = None,
    groups: int = 1,
    offset: int = 0,
    first: int = 0,
    distribution: str = "normal",
    add: bool = True,
) -> Tensor:
    """``self[i] (+)= conv(x, dW_i)``; ``self`` keeps its dtype and is rounded to it once."""
    k, outputs, channels = self.shape[0], self.shape[2], x.shape[1]
    shape = (channels, outputs // groups, *kernel) if transposed else (outputs, channels // groups, *kernel)
    v = sample_tangents(state, k, math.prod(shape), offset=offset, first=first, distribution=distribution)
    options = (stride, padding, dilation, transposed, output_padding or [0] * len(kernel), groups)
    w = v.view(k, *shape)
    moved = torch.stack([torch.convolution(x.double(), w[i], None, *options) for i in range(k)])
    return self.copy_(self.double() + moved if add else moved)
