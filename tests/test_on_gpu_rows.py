"""On a GPU: rows and columns of every length, offsets and types, against the same operator on the CPU."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error
from torch import Tensor

from frog_cuda import ops

pytestmark = pytest.mark.cuda

DEVICE = "cuda"
#: of the largest entry, between two devices that both keep the bound against float64
BOUNDS = {torch.float64: 2e-10, torch.float32: 2e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
DTYPES = pytest.mark.parametrize("dtype", list(BOUNDS), ids=lambda d: str(d).removeprefix("torch."))
LENGTHS = [1, 7, 33, 512, 1025, 8192, 8193, 50257]  # a warp's part up to what no block can hold


def randn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def compare(op, *arguments, **options):
    """20 runs on the GPU give the same bits, and those are the CPU's to the bound of their type."""
    expected = op(*arguments, **options)
    there = [a.to(DEVICE) if isinstance(a, Tensor) else a for a in arguments]
    options = {key: o.to(DEVICE) if isinstance(o, Tensor) else o for key, o in options.items()}
    first = op(*there, **options)
    for actual, wanted in zip(first, expected, strict=True):
        assert actual.dtype == wanted.dtype
        # + 1: a softmax over one class has derivatives that are exactly zero
        assert relative_error(actual.cpu().double() + 1, wanted.double() + 1) <= BOUNDS[wanted.dtype]
    for _ in range(19):
        again = op(*there, **options)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@DTYPES
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("op", [ops.softmax_jvp, ops.log_softmax_jvp], ids=["softmax", "log_softmax"])
def test_softmax(op, n, dtype):
    x, dx = randn(5, n, dtype=dtype, seed=1), randn(3, 5, n, dtype=dtype, seed=2)
    compare(op, x, dx, 1)
    compare(op, x.T.contiguous(), dx.mT.contiguous(), 0)
    compare(op, x[:, 1:] if n > 1 else x, dx[..., 1:] if n > 1 else dx, -1)


@DTYPES
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(n, smoothing, dtype):
    x, dx = randn(40, n, dtype=dtype, seed=1), randn(3, 40, n, dtype=dtype, seed=2)
    target = torch.randint(n, (40,), generator=torch.Generator().manual_seed(3))
    target[::7] = -100
    for reduction in ("none", "mean", "sum"):
        compare(ops.cross_entropy_jvp, x, dx, target, label_smoothing=smoothing, reduction=reduction)
    compare(ops.cross_entropy_jvp, x, dx, target, weight=randn(n, dtype=dtype, seed=4).abs(), label_smoothing=smoothing)


@DTYPES
@pytest.mark.parametrize("n", [n for n in LENGTHS if n > 1])
@pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
def test_layer_and_rms_norm(n, centred, dtype):
    x, dx = randn(40, n, dtype=dtype, seed=1), randn(3, 40, n, dtype=dtype, seed=2)
    w, dw = randn(n, dtype=dtype, seed=3), randn(3, n, dtype=dtype, seed=4)
    compare(ops.normalization_jvp, x, dx, w, dw, w, dw, groups=40, centred=centred)


@DTYPES
@pytest.mark.parametrize("shape", [(33, 5), (300, 70), (7, 5, 28, 28), (64, 3, 31, 31)], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["own statistics", "given statistics"])
def test_batch_norm(shape, given, dtype):
    x, dx, channels = randn(*shape, dtype=dtype, seed=1), randn(3, *shape, dtype=dtype, seed=2), shape[1]
    w, dw = randn(channels, dtype=dtype, seed=3), randn(3, channels, dtype=dtype, seed=4)
    options = dict(outer=shape[0], groups=channels, weight_groups=channels)
    if given:
        options |= dict(mean=randn(channels, dtype=dtype, seed=5), var=randn(channels, dtype=dtype, seed=6).square() + 0.1)
    compare(ops.normalization_jvp, x, dx, w, dw, w, dw, **options)


@DTYPES
@pytest.mark.parametrize("shape, groups", [((4, 6, 5, 3), 2), ((4, 64, 28, 28), 8), ((2, 6, 101, 101), 3)], ids=str)
def test_group_norm(shape, groups, dtype):
    x, dx, channels = randn(*shape, dtype=dtype, seed=1), randn(3, *shape, dtype=dtype, seed=2), shape[1]
    w, dw = randn(channels, dtype=dtype, seed=3), randn(3, channels, dtype=dtype, seed=4)
    compare(ops.normalization_jvp, x, dx, w, dw, w, dw, groups=shape[0] * groups, weight_groups=groups)


@DTYPES
@pytest.mark.parametrize("n", [1, 33, 1025, 100_003, 1 << 20])
def test_elementwise(n, dtype):
    x, dx, target = (randn(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate([(n,), (3, n), (n,)]))
    for function in ops.POINTWISE:
        compare(ops.pointwise_jvp, x, dx, function, alpha=0.5, beta=1.0)
    compare(ops.mse_jvp, x, dx, target, dx.flip(0))
    compare(ops.bce_jvp, x, dx, target.sigmoid(), pos_weight=target.abs())
    compare(ops.bce_jvp, x.sigmoid(), dx, target.sigmoid(), weight=target.abs()[:1], with_logits=False)


@pytest.mark.parametrize("tangent_dtype", BOUNDS, ids=lambda d: str(d).removeprefix("torch."))
@DTYPES
def test_tangents_of_another_dtype(dtype, tangent_dtype):
    x, dx = randn(9, 40, dtype=dtype, seed=1), randn(3, 9, 40, dtype=tangent_dtype, seed=2)
    compare(ops.pointwise_jvp, x, dx, "gelu", activity=randn(3, 40, dtype=dtype, seed=3))
    compare(ops.softmax_jvp, x, dx, 1)
    compare(ops.log_softmax_jvp, x, dx, 0)
    compare(ops.cross_entropy_jvp, x, dx, torch.arange(9))
    compare(ops.mse_jvp, x, dx, x.flip(0))
    compare(ops.bce_jvp, x, dx, x.sigmoid())
    compare(ops.normalization_jvp, x, dx, x[0], None, x[0], dx[:, 0].contiguous(), groups=9)


def test_what_cannot_be_refused_without_waiting_gives_nan():
    x, dx = randn(4, 9, dtype=torch.float32, seed=1).to(DEVICE), randn(2, 4, 9, dtype=torch.float32, seed=2).to(DEVICE)
    for t in ops.cross_entropy_jvp(x, dx, torch.tensor([0, -1, 9, -100], device=DEVICE)):
        assert t.isnan().reshape(-1, 4).tolist() == [[False, True, True, False]] * (t.numel() // 4)
    for t in ops.bce_jvp(x.sigmoid() + 1, dx, x.sigmoid(), with_logits=False):
        assert t.isnan().all()
