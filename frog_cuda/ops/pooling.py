"""Max pooling."""

from __future__ import annotations

from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd

from .helpers import _guard, _ops


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
    """Max pooling over one to three axes, of ``x`` and at the same places of k tangents, which the places are found once for.

    A place is PyTorch's: the first of a window's largest elements, or its last NaN. Where dilated windows lie in the padding
    altogether, the value is ``-inf`` and the tangents are 0.

    Arguments:
        x: ``(*, s)``, s as many axes as ``kernel`` has entries.  dx: ``(k, *x.shape)``.
        kernel, stride, padding, dilation: an integer for each axis of s.  ceil_mode: as in :class:`torch.nn.MaxPool2d`.
        want_indices: also return the places, counted through the flattened axes s; they exist as a tensor only then.
    Returns:
        y ``(*, t)``; dy ``(k, *, t)`` in the tangents' dtype; indices int64 ``(*, t)``, or ``(0,)``.
    """
    _guard("max_pool_jvp", x, dx)
    with _AutoDispatchBelowAutograd():
        return _ops.max_pool_jvp(x, dx, kernel, stride, padding, dilation, ceil_mode, want_indices)
