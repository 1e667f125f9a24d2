"""linear_jvp beside plain torch: incoming tangents, sampled weight tangents, and both."""

from __future__ import annotations

import pytest
import torch
from conftest import Compare
from torch import Tensor

import frog_cuda as frog

B, WIDTH = 64, 1024
STATE = torch.tensor([3, 5])


@pytest.mark.parametrize("k", [1, 4, 16])
@pytest.mark.parametrize("perturbed", ["input", "weight", "both"])
def test_linear(perturbed: str, k: int, compare: Compare) -> None:
    generator = torch.Generator().manual_seed(k)
    x, w = torch.randn(B, WIDTH, generator=generator), torch.randn(WIDTH, WIDTH, generator=generator) / 32
    dx = torch.randn(k, B, WIDTH, generator=generator) if perturbed != "weight" else None
    sampled = perturbed != "input"

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        return frog.ops.linear_jvp(x, dx, w, k=k, state=STATE, weight_offset=0 if sampled else None)

    def against() -> tuple[Tensor, Tensor]:
        y = x @ w.T
        dy = torch.zeros(()) if dx is None else (dx.flatten(0, 1) @ w.T).view(k, B, WIDTH)
        return y, dy + x @ torch.randn(k, WIDTH, WIDTH).mT if sampled else dy

    compare(
        ours, against, table="op", op=f"linear, {perturbed} perturbed", against_name="torch, tangents stored", case=f"k = {k}"
    )
    y, dy, _ = ours()
    xs, ws = x.double(), w.double()
    expected = torch.zeros(k, B, WIDTH, dtype=torch.float64) if dx is None else dx.double() @ ws.T
    if sampled:
        expected = expected + xs @ frog.ops.sample_tangents(STATE, k, w.numel()).double().view(k, WIDTH, WIDTH).mT
    for got, exact in ((y, xs @ ws.T), (dy, expected)):
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-5 * exact.abs().max().item())
