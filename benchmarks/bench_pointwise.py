"""pointwise_jvp beside plain torch formulas for value and tangents."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import Compare
from torch import Tensor

import frog_cuda as frog

K, SHAPE = 16, (64, 1024)


def _gelu_slope(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * torch.exp(-0.5 * x * x) * 0.3989422804014327


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "relu": (F.relu, lambda x, y: (x > 0).to(x.dtype)),
    "gelu": (F.gelu, lambda x, y: _gelu_slope(x)),
    "tanh": (torch.tanh, lambda x, y: 1 - y * y),
    "silu": (F.silu, lambda x, y: torch.sigmoid(x) * (1 + x - y)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_pointwise(name: str, compare: Compare) -> None:
    value, slope = FUNCTIONS[name]
    generator = torch.Generator().manual_seed(1)
    x, dx = torch.randn(SHAPE, generator=generator), torch.randn(K, *SHAPE, generator=generator)

    def against() -> tuple[Tensor, Tensor]:
        y = value(x)
        return y, slope(x, y) * dx

    compare(
        lambda: frog.ops.pointwise_jvp(x, dx, name),
        against,
        table="op",
        op=f"{name}, value and 16 tangents",
        against_name="torch formulas",
        case="64 x 1024",
    )
    wide = x.double()
    exact = value(wide)
    for got, expected in zip(frog.ops.pointwise_jvp(x, dx, name), (exact, slope(wide, exact) * dx.double()), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
