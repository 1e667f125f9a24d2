"""Convolutions with k = 4 tangents of the input or of the weight, beside what PyTorch offers, on the shapes of a ResNet.

Weight tangents also beside a matrix product of all k with the unfolded input, which the k tangents share, and their operator by
itself beside one library call for each tangent. Convolutions with as few filters as tangents of low rank have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from conftest import Compare
from torch import Tensor
from torch.func import jvp, vmap

import frog_cuda as frog
from frog_cuda.dual import DualTensor, SampledTangents

K, BATCH = 4, 8
STATE = torch.tensor([3, 5])


@dataclass(frozen=True)
class Shape:
    name: str
    channels: int
    outputs: int
    side: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    transposed: bool = False

    def make(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.channels)
        x = torch.randn(BATCH, self.channels, self.side, self.side, generator=generator)
        first, second = (self.channels, self.outputs) if self.transposed else (self.outputs, self.channels)
        w = torch.randn(first, second // self.groups, self.kernel, self.kernel, generator=generator)
        return x, w / (w[0].numel() ** 0.5)

    def convolve(self, x: Tensor, w: Tensor) -> Tensor:
        if self.transposed:
            return F.conv_transpose2d(x, w, None, self.stride, (self.kernel - 1) // 2, 0, self.groups)
        return F.conv2d(x, w, None, self.stride, self.kernel // 2, 1, self.groups)


SHAPES = [
    Shape("3x3, 64 channels", 64, 64, 32),
    Shape("3x3, 128 channels", 128, 128, 16),
    Shape("3x3, 256 channels", 256, 256, 8),
    Shape("3x3, 512 channels", 512, 512, 4),
    Shape("1x1, 256 to 64", 256, 64, 16, kernel=1),
    Shape("depthwise, 128", 128, 128, 16, groups=128),
    Shape("stride 2, 64 to 128", 64, 128, 32, stride=2),
]
VMAP, LOOP, UNFOLDED = "vmap(jvp)", "loop of forward_ad", "unfolded input"

Result = tuple[Tensor, Tensor]


@pytest.mark.parametrize("against_name", [VMAP, LOOP])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_input_tangents(shape: Shape, against_name: str, compare: Compare) -> None:
    x, w = shape.make()
    dx = torch.randn(K, *x.shape, generator=torch.Generator().manual_seed(1))

    def ours() -> Result:
        out = shape.convolve(DualTensor(x, dx), w)
        return out.primal, out.tangents

    against = _pytorch(against_name, lambda x: shape.convolve(x, w), x, lambda: dx)
    _compare(compare, ours, against, shape, "input", against_name)
    exact = torch.stack([shape.convolve(t.double(), w.double()) for t in dx])
    _check(ours(), shape.convolve(x.double(), w.double()), exact)


@pytest.mark.parametrize("against_name", [VMAP, LOOP, UNFOLDED])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_sampled_weight_tangents(shape: Shape, against_name: str, compare: Compare) -> None:
    x, w = shape.make()
    if against_name == UNFOLDED and shape.groups > 1:
        pytest.skip("grouped: k small products for each group, not one")

    def ours() -> Result:
        out = shape.convolve(x, DualTensor.sampled_from(w, SampledTangents(STATE, K, 0, 0, "normal")))
        return out.primal, out.tangents

    def drawn() -> Tensor:
        return frog.ops.sample_tangents(STATE, K, w.numel())

    if against_name == UNFOLDED:

        def against() -> Result:
            y = shape.convolve(x, w)
            columns = F.unfold(x, shape.kernel, 1, shape.kernel // 2, shape.stride)  # (B, C * kernel, L)
            moved = drawn().view(K * shape.outputs, -1) @ columns  # (B, k * O, L)
            return y, moved.view(BATCH, K, *y.shape[1:]).transpose(0, 1)

    else:
        against = _pytorch(
            against_name, lambda w: shape.convolve(x, w), w, lambda: torch.randn(K, *w.shape), one=lambda: torch.randn_like(w)
        )
    _compare(compare, ours, against, shape, "weight", against_name)
    exact = torch.stack([shape.convolve(x.double(), t) for t in drawn().double().view(K, *w.shape)])
    _check(ours(), shape.convolve(x.double(), w.double()), exact)
    if against_name == UNFOLDED:
        _check(against(), shape.convolve(x.double(), w.double()), exact)


#: batch and shape, as they come in a ResNet18 with images of 32x32, and one of more pixels
STAGES = [
    (8, Shape("3x3, 64 channels, 32x32", 64, 64, 32)),
    (32, Shape("7x7, stride 2, 3 to 64, 32x32", 3, 64, 32, kernel=7, stride=2)),
    (32, Shape("3x3, 64 channels, 8x8", 64, 64, 8)),
    (32, Shape("3x3, stride 2, 64 to 128, 8x8", 64, 128, 8, stride=2)),
    (32, Shape("3x3, 128 channels, 4x4", 128, 128, 4)),
    (32, Shape("1x1, stride 2, 128 to 256, 4x4", 128, 256, 4, kernel=1, stride=2)),
    (32, Shape("3x3, 256 channels, 2x2", 256, 256, 2)),
    (32, Shape("3x3, 512 channels, 1x1", 512, 512, 1)),
    # of a MobileNet, a ConvNeXt, a ResNeXt and a generator of images
    (32, Shape("depthwise 3x3, 192 channels, 8x8", 192, 192, 8, groups=192)),
    (32, Shape("depthwise 7x7, 384 channels, 4x4", 384, 384, 4, kernel=7, groups=384)),
    (32, Shape("3x3, 32 groups of 4, 8x8", 128, 128, 8, groups=32)),
    (32, Shape("transposed 4x4, stride 2, 128 to 64, 8x8", 128, 64, 8, kernel=4, stride=2, transposed=True)),
    (2, Shape("transposed 4x4, stride 2, 128 to 64, 8x8", 128, 64, 8, kernel=4, stride=2, transposed=True)),
]


@pytest.mark.parametrize("k", [1, 4, 16])
@pytest.mark.parametrize("batch, shape", STAGES, ids=lambda s: s.name if isinstance(s, Shape) else str(s))
def test_sampled_operator(batch: int, shape: Shape, k: int, compare: Compare) -> None:
    x, w = shape.make()
    x = x.repeat(-(-batch // BATCH), 1, 1, 1)[:batch].contiguous()
    moved = torch.zeros(k, *shape.convolve(x, w).shape)
    padding = (shape.kernel - shape.transposed) // 2
    options = dict(kernel=[shape.kernel] * 2, stride=[shape.stride] * 2, padding=[padding] * 2, dilation=[1, 1])
    options |= dict(transposed=shape.transposed, groups=shape.groups)

    def ours() -> Tensor:
        return frog.ops.sampled_convolution_(moved, x, STATE, **options, distribution="rademacher", add=False)

    def against() -> Tensor:
        for i in range(k):
            v = frog.ops.sample_tangents(STATE, 1, w.numel(), first=i, distribution="rademacher")
            moved[i] = shape.convolve(x, v.view(w.shape))
        return moved

    case = f"{shape.name}, batch {batch}, k = {k}"
    compare(ours, against, table="op", op="conv2d, sampled operator", against_name="a library call each", case=case)
    exact = against().double()
    assert (ours() - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("filters", [1, 4, 16])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s.groups == 1], ids=lambda s: s.name)
def test_few_filters(shape: Shape, filters: int, compare: Compare) -> None:
    """The right factors of k tangents of rank 1 are k filters."""
    x, w = shape.make()
    w = w[:filters]
    options = dict(stride=[shape.stride] * 2, padding=[shape.kernel // 2] * 2, dilation=[1, 1])

    def ours() -> Tensor:
        return frog.ops.narrow_convolution(x, w, **options)

    compare(
        ours,
        lambda: shape.convolve(x, w),
        table="op",
        op="conv2d, few filters",
        against_name="torch",
        case=f"{shape.name}, {filters} filter{'s' * (filters > 1)}",
    )
    exact = shape.convolve(x.double(), w.double())
    assert (ours() - exact).abs().max() <= 1e-5 * exact.abs().max()


def _pytorch(
    name: str,
    function: Callable[[Tensor], Tensor],
    primal: Tensor,
    tangents: Callable[[], Tensor],
    one: Callable[[], Tensor] | None = None,
) -> Callable[[], Result]:
    """``one``: how the loop draws a single tangent; it takes those of ``tangents()`` in turn where they are given."""

    def vectorised() -> Result:
        with torch.no_grad():
            values, moved = vmap(lambda t: jvp(function, (primal,), (t,)))(tangents())
            return values[0], moved

    def loop() -> Result:
        given = iter(tangents()) if one is None else None
        moved = []
        with torch.no_grad(), forward_ad.dual_level():
            for _ in range(K):
                t = one() if one is not None else next(given)  # type: ignore[arg-type]
                value, d = forward_ad.unpack_dual(function(forward_ad.make_dual(primal, t)))
                moved.append(d)
            return value, torch.stack(moved)

    return vectorised if name == VMAP else loop


def _compare(
    compare: Compare, ours: Callable[[], Result], against: Callable[[], Result], shape: Shape, perturbed: str, name: str
) -> None:
    compare(ours, against, table="op", op=f"conv2d, {perturbed} perturbed", against_name=name, case=f"{shape.name}, k = {K}")


def _check(got: Result, value: Tensor, moved: Tensor) -> None:
    for actual, exact in zip(got, (value, moved), strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=0, atol=1e-5 * exact.abs().max().item())
