"""Convolutions: value and k tangents, few filters, and sampled tangents of a weight."""

from __future__ import annotations

from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd
from torch.autograd.graph import increment_version

from .helpers import _code, _guard, _guard_written, _ops
from .tangents import DISTRIBUTIONS


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
    """A convolution of ``x`` and of k tangents of ``x``, by the library, in one call where they are neighbours in memory.

    Arguments:
        x: ``(B, C, *s)``, s of one to three axes.  dx: ``(k, *x.shape)``, the same dtype.
        weight, bias, stride, padding, dilation, transposed, output_padding, groups: as in ``torch.ops.aten.convolution``; an
            integer for each axis of s.
    Returns:
        y ``(B, O, *t)``; dy ``(k, B, O, *t)``.
    """
    _guard("convolution_jvp", x, dx, weight, bias)
    with _AutoDispatchBelowAutograd():
        return _ops.convolution_jvp(x, dx, weight, bias, stride, padding, dilation, transposed, output_padding, groups)


def narrow_convolution(x: Tensor, weight: Tensor, *, stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
    """A convolution with few filters: in one group, padded with zeros, without a bias.

    Libraries take filters 16 at a time on CPUs, and by other ways where there are one or two. This takes time in proportion to
    their number, and a filter's result does not depend on how many there are. On a GPU it is the library's convolution.

    Arguments:
        x: ``(B, C, *s)``, s of one to three axes.  weight: ``(F, C, *)``, the same dtype. Low precision is summed in float32
            and rounded once.
        stride, padding, dilation: an integer for each axis of s.
    Returns:
        ``(B, F, *t)``.
    """
    _guard("narrow_convolution", x, weight)
    with _AutoDispatchBelowAutograd():
        return _ops.narrow_convolution(x, weight, stride, padding, dilation)


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
    """``self[i] += conv(x, dW_i)`` in place, or ``=`` without ``add``, for k sampled tangents of the weight of a convolution.

    The tangents ``(O, C / groups, *kernel)``, or ``(C, O / groups, *kernel)`` where transposed, are those of
    :func:`sample_tangents`. All k share the unfolded input, an implicit matrix product; of it, as of the tangents, little is
    ever there. On a GPU they are drawn within the kernel. Low precision is summed in float32 and rounded once.

    Arguments:
        self: ``(k, B, O, *t)``.  x: ``(B, C, *s)``, s of one to three axes, the same dtype.
        kernel: sizes of the weight's axes after the first two.
        stride, padding, dilation, transposed, output_padding, groups: as in ``torch.ops.aten.convolution``; an integer for
            each axis of s. Without ``output_padding``, zeros.
        state, offset, first, distribution: as in :func:`sample_tangents`.
    Returns:
        ``self``.
    """
    _guard("sampled_convolution_", self, x, state)
    _guard_written("sampled_convolution_", self=self)
    options = (stride, padding, dilation, transposed, output_padding or [0] * len(stride), groups)
    code = _code(DISTRIBUTIONS, "distribution", distribution)
    with _AutoDispatchBelowAutograd():
        _ops.sampled_convolution_(self, x, state, kernel, *options, offset, first, code, add)
    if not self.is_inference():
        increment_version(self)
    return self
