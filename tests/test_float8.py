"""Tangents in float8: the product against exact sums of the rounded numbers, and whole estimates against float32's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import frog_cuda as frog
from frog_cuda import float8

#: half a step of e4m3's three bits behind the point, relative; bfloat16's eight
EIGHT_BITS, SIXTEEN_BITS = 2.0**-4, 2.0**-8


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1.0, 1e30])
def test_rounding(magnitude, dtype):
    x = (magnitude * draw(33, 48)).to(dtype)
    eight, scale = float8._rounded(x)
    assert eight.dtype == torch.float8_e4m3fn and eight.double().abs().max() == 448
    # below 448 / 2^15 numbers of e4m3 are 2^-9 apart; a bfloat16 is rounded once more when it is scaled
    step = torch.maximum(EIGHT_BITS * x.double().abs(), 2.0**-10 * scale.double()) * (1 + SIXTEEN_BITS * 2)
    assert ((eight.double() * scale.double() - x.double()).abs() <= step + SIXTEEN_BITS * x.double().abs()).all()


@pytest.mark.parametrize("shape, outputs", [((1, 1, 16), 16), ((3, 7, 5, 48), 32), ((2, 33, 1040), 16)], ids=str)
@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e5])
def test_product(shape, outputs, magnitude):
    dx, w = (magnitude * draw(*shape, seed=1)).bfloat16(), draw(outputs, shape[-1], seed=2) / magnitude
    got = float8.product(dx, w)
    assert got.shape == (*shape[:-1], outputs) and got.dtype == torch.bfloat16
    (a, a_scale), (b, b_scale) = float8._rounded(dx), float8._rounded(w)
    exact = (a.double() @ b.double().T) * (a_scale.double() * b_scale.double())
    # sums in float32, rounded to bfloat16 once, and perhaps once more when they are scaled
    assert ((got.double() - exact).abs() <= 2 * SIXTEEN_BITS * exact.abs() + 1e-5 * exact.abs().max()).all()
    wide = dx.double() @ w.double().T
    assert (got.double() - wide).norm() <= EIGHT_BITS * wide.norm()


def test_operands_are_row_major_whatever_they_were():
    """GPUs multiply no other."""
    dx, w = draw(2, 32, 3, dtype=torch.bfloat16).transpose(1, 2), draw(32, 16).t()
    for x in (dx, w):
        assert float8._rounded(x)[0].is_contiguous()
    assert torch.equal(float8.product(dx, w), float8.product(dx.contiguous(), w.contiguous()))


def test_small_weights_in_float16():
    """A scale below float16's smallest number."""
    w = (1e-6 * draw(16, 32)).half()
    eight, scale = float8._rounded(w)
    assert scale.dtype == torch.float32 and 0 < scale < 2.0**-24
    assert ((eight.double() * scale.double() - w.double()).norm()) <= EIGHT_BITS * w.double().norm()
    assert (float8._rounded(torch.zeros(16, 32).half())[0].float() == 0).all()


def test_product_of_zeros_and_of_what_is_not_finite():
    w = draw(16, 32)
    assert (float8.product(torch.zeros(2, 3, 32, dtype=torch.bfloat16), w) == 0).all()
    dx = draw(2, 3, 32).bfloat16()
    dx[1, 2, 5] = float("inf")
    assert not float8.product(dx, w).isfinite().all()  # never hidden


def test_which_products():
    dx, w = draw(2, 3, 32).bfloat16(), draw(16, 32)
    cpu = torch.device("cpu")
    assert not float8.takes(dx, w)
    with float8.products(torch.float8_e4m3fn, cpu):
        assert float8.takes(dx, w)
        assert not float8.takes(dx, draw(10, 32)) and not float8.takes(dx[..., :31], draw(16, 31))
        assert not float8.takes(dx.float(), w) and not float8.takes(dx[:, :0], w) and not float8.takes(dx, w[:0])
        with float8.products(torch.bfloat16, cpu):
            assert not float8.takes(dx, w)
        assert float8.takes(dx, w)
    with pytest.raises(ZeroDivisionError), float8.products(torch.float8_e4m3fn, cpu):
        raise ZeroDivisionError
    assert not float8.takes(dx, w)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 48), nn.LayerNorm(48), nn.GELU(), nn.Linear(48, 10))


def per_sample(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")


def estimate(tangent_dtype: torch.dtype | None, **options: object) -> tuple[Tensor, Tensor]:
    """Directional derivatives and gradient."""
    model = network()
    fg = frog.ForwardGradient(model, per_sample, k=4, tangent_dtype=tangent_dtype, **options)
    fg(draw(20, 32, seed=3), torch.arange(20) % 10)
    return fg.last.directional_derivatives, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    "options",
    [
        dict(perturb="weight"),
        dict(perturb="weight", tangents=frog.tangents.LowRank(1)),
        dict(perturb="activity"),
        dict(perturb="activity", shared_across_batch=False),
        dict(perturb="activity", chunk_size=3),
        dict(perturb="activity", chunk_size="auto"),
    ],
    ids=str,
)
def test_estimates(options):
    (d, g), (d16, _), (d8, g8) = (estimate(t, **options) for t in (None, torch.bfloat16, torch.float8_e4m3fn))
    error, error16 = ((x.double() - d.double()).norm() / d.norm() for x in (d8, d16))
    assert 2 * error16 < error < 2 * EIGHT_BITS  # the products are in 8 bits, and right
    assert F.cosine_similarity(g8.double(), g.double(), dim=0) > 0.99


def test_results_do_not_depend_on_chunks_beyond_the_scale():
    """The scale is that of the largest tangent of a pass: close, not the same bits."""
    (whole, _), (parts, _) = (estimate(torch.float8_e4m3fn, chunk_size=size) for size in (None, 1))
    assert (whole - parts).norm() < EIGHT_BITS * whole.norm()


def test_other_dtypes_are_refused():
    for dtype in (torch.float8_e5m2, torch.int32, "float8"):
        with pytest.raises(ValueError, match="tangent_dtype is .*accepted are torch.float64, .*torch.float8_e4m3fn and None"):
            frog.ForwardGradient(network(), per_sample, k=2, tangent_dtype=dtype)


def test_a_gpu_without_such_numbers_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(RuntimeError, match=r"float8_e4m3fn, but A100 has compute capability 8\.0; 8\.9 at least is needed"):
        with float8.products(torch.float8_e4m3fn, torch.device("cuda", 0)):
            pass
    with float8.products(torch.bfloat16, torch.device("cuda", 0)):
        pass
