"""Sampling, combining and the Gram matrix of tangents, on one thread, beside plain torch that stores them."""

from __future__ import annotations

import pytest
import torch
from conftest import Compare
from torch import Tensor

import frog_cuda as frog

pytestmark = pytest.mark.usefixtures("single_thread")

K = 16
#: elements of a tangent: 16 of them fill 256 KB (second-level cache), 1 MB and 4 MB (third-level)
SIZES = [4096, 16384, 65536]
DISTRIBUTIONS = ["normal", "rademacher"]
STATE = torch.tensor([3, 5])


def torch_draws(k: int, n: int, distribution: str) -> Tensor:
    """What torch draws: integers for signs, as its fastest way to random bits per element."""
    return torch.randn(k, n) if distribution == "normal" else torch.randint(0, 2, (k, n))


def stored(k: int, n: int, distribution: str) -> Tensor:
    """Stored tangents, as plain torch would draw them to work with."""
    return torch.randn(k, n) if distribution == "normal" else torch.randint(0, 2, (k, n), dtype=torch.float32).mul_(2).sub_(1)


def assert_moments(v: Tensor, distribution: str) -> None:
    """Mean 0 and variance 1 within 6 standard errors; signs are signs."""
    v = v.double()
    assert abs(v.mean().item()) < 6 / v.numel() ** 0.5
    if distribution == "rademacher":
        assert bool((v.abs() == 1).all())
    else:
        assert abs(v.square().mean().item() - 1) < 6 * (2 / v.numel()) ** 0.5


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_sample(distribution: str, n: int, compare: Compare) -> None:
    compare(
        lambda: frog.ops.sample_tangents(STATE, K, n, distribution=distribution),
        lambda: torch_draws(K, n, distribution),
        table="op",
        op=f"sample {distribution}",
        against_name="torch.randn" if distribution == "normal" else "torch.randint",
        case=f"16 x {n}",
        elements=K * n,
    )
    assert_moments(frog.ops.sample_tangents(STATE, K, n, distribution=distribution), distribution)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_combine(distribution: str, compare: Compare) -> None:
    n, c = 65536, torch.linspace(-1, 1, K)

    def against() -> Tensor:
        return c @ stored(K, n, distribution)

    def ours() -> Tensor:
        return frog.ops.tangent_combine(STATE, c, n, distribution=distribution)

    compare(
        ours,
        against,
        table="op",
        op=f"combine {distribution}",
        against_name="draw, then c @ V",
        case=f"16 x {n}",
        elements=K * n,
    )
    expected = c.double() @ frog.ops.sample_tangents(STATE, K, n, distribution=distribution).double()
    torch.testing.assert_close(ours().double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_combine_samples(distribution: str, compare: Compare) -> None:
    """64 samples of 1024 activities, each with coefficients of its own."""
    batch, m = 64, 1024
    c = torch.randn(K, batch, generator=torch.Generator().manual_seed(0))

    def against() -> Tensor:
        v = frog.ops.sample_tangents(STATE, K, batch * m, distribution=distribution)
        return torch.einsum("kb,kbm->bm", c, v.view(K, batch, m))

    def ours() -> Tensor:
        return frog.ops.tangent_combine_samples(STATE, c, m, distribution=distribution)

    compare(
        ours,
        against,
        table="op",
        op=f"combine samples {distribution}",
        against_name="draw by this package, then einsum",
        case=f"16 x {batch} x {m}",
        elements=K * batch * m,
    )
    expected = against()
    torch.testing.assert_close(ours(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_update_with_momentum(distribution: str, compare: Compare) -> None:
    """Parameter and momentum of a million elements: beside combining into a gradient and torch.optim.SGD."""
    n, c = 1 << 20, torch.linspace(-1, 1, K) / K
    options = dict(lr=1e-4, momentum=0.9, weight_decay=1e-4)
    p, buffer = torch.zeros(n), torch.zeros(n)
    twin = torch.zeros(n, requires_grad=True)
    optimizer = torch.optim.SGD([twin], foreach=True, **options)

    def ours() -> Tensor:
        return frog.ops.tangent_sgd_(p, buffer, STATE, c, distribution=distribution, **options)

    def against() -> Tensor:
        twin.grad = frog.ops.tangent_combine(STATE, c, n, distribution=distribution)
        optimizer.step()
        return twin

    compare(
        ours,
        against,
        table="op",
        op=f"SGD {distribution}",
        against_name="combine, then torch.optim.SGD(foreach=True)",
        case=f"16 x {n}",
        elements=K * n,
    )
    p.zero_(), buffer.zero_()
    other, moved = torch.zeros(n), torch.zeros(n)
    for _ in range(3):
        ours()
        g = frog.ops.tangent_combine(STATE, c, n, distribution=distribution) + 1e-4 * other
        moved = 0.9 * moved + g
        other = other - 1e-4 * moved
    torch.testing.assert_close(p, other, rtol=0, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_gram(distribution: str, compare: Compare) -> None:
    """In double precision on both sides: the projection needs it."""
    n = 65536

    def against() -> Tensor:
        v = stored(K, n, distribution).double()
        return v @ v.T

    def ours() -> Tensor:
        return frog.ops.tangent_gram(STATE, K, n, distribution=distribution)

    compare(
        ours, against, table="op", op=f"Gram {distribution}", against_name="draw, then V V^T", case=f"16 x {n}", elements=K * n
    )
    v = frog.ops.sample_tangents(STATE, K, n, distribution=distribution).double()
    torch.testing.assert_close(ours(), v @ v.T, rtol=1e-10, atol=1e-10 * n)
