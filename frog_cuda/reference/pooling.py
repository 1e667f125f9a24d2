"""Max pooling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
