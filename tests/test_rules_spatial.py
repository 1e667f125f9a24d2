from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from against_func import check, draw

from frog_cuda.dual import DualTensor
from frog_cuda.rules import fallback, spatial

CALLS = {
    "max_pool1d": (lambda x: F.max_pool1d(x, 3, 2), (2, 3, 9)),
    "max_pool2d": (lambda x: F.max_pool2d(x, 3, 2, 1), (2, 3, 7, 6)),
    "max_pool2d, dilated": (lambda x: F.max_pool2d(x, 2, 1, dilation=2, ceil_mode=True), (2, 3, 7, 6)),
    "max_pool3d": (lambda x: F.max_pool3d(x, 2), (2, 3, 4, 5, 6)),
    "indices": (lambda x: F.max_pool2d(x, 2, return_indices=True), (2, 3, 7, 6)),
    "adaptive_max_pool1d": (lambda x: F.adaptive_max_pool1d(x, 4), (2, 3, 9)),
    "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, (3, 2)), (2, 3, 7, 6)),
    "adaptive_max_pool3d": (lambda x: F.adaptive_max_pool3d(x, 2), (2, 3, 4, 5, 6)),
    "avg_pool1d": (lambda x: F.avg_pool1d(x, 3, 2, 1), (2, 3, 9)),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False), (2, 3, 7, 6)),
    "avg_pool3d": (lambda x: F.avg_pool3d(x, 2), (2, 3, 4, 5, 6)),
    "adaptive_avg_pool1d": (lambda x: F.adaptive_avg_pool1d(x, 4), (2, 3, 9)),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (3, 2)), (2, 3, 7, 6)),
    "adaptive_avg_pool2d to one": (lambda x: F.adaptive_avg_pool2d(x, 1), (2, 3, 7, 6)),
    "adaptive_avg_pool3d": (lambda x: F.adaptive_avg_pool3d(x, (1, 2, 3)), (2, 3, 4, 5, 6)),
    "lp_pool2d": (lambda x: F.lp_pool2d(x, 2, 2), (2, 3, 6, 6)),
    "reflect": (lambda x: F.pad(x, (1, 2, 2, 1), mode="reflect"), (2, 3, 7, 6)),
    "replicate": (lambda x: F.pad(x, (1, 2), mode="replicate"), (2, 3, 7)),
    "circular": (lambda x: F.pad(x, (1, 2, 2, 1), mode="circular"), (2, 3, 7, 6)),
    "constant": (lambda x: F.pad(x, (1, 2, -1, 1), value=3.0), (2, 3, 7, 6)),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2.5), (2, 3, 7, 6)),
    "nearest-exact": (lambda x: F.interpolate(x, 9, mode="nearest-exact"), (2, 3, 7)),
    "linear": (lambda x: F.interpolate(x, 9, mode="linear"), (2, 3, 7)),
    "bilinear": (lambda x: F.interpolate(x, (9, 4), mode="bilinear", align_corners=True), (2, 3, 7, 6)),
    "bicubic": (lambda x: F.interpolate(x, (9, 4), mode="bicubic"), (2, 3, 7, 6)),
    "antialias": (lambda x: F.interpolate(x, (3, 4), mode="bilinear", antialias=True), (2, 3, 7, 6)),
    "trilinear": (lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"), (1, 2, 2, 3, 2)),
    "unfold": (lambda x: F.unfold(x, 3, padding=1), (2, 3, 7, 6)),
    "fold": (lambda x: F.fold(x, (5, 4), 2), (2, 8, 12)),
}


@pytest.fixture
def no_fallback(monkeypatch):
    def refuse(func, *args, **kwargs):
        raise AssertionError(f"{func} took the fallback")

    monkeypatch.setattr(fallback, "fallback", refuse)


@pytest.mark.parametrize("name", CALLS)
def test_against_torch_func(name, no_fallback):
    call, shape = CALLS[name]
    check(call, draw(*shape))
    check(call, draw(*shape).mT.contiguous().mT, k=1)


@pytest.mark.parametrize("name", [n for n, (_, shape) in CALLS.items() if len(shape) > 3])
def test_channels_last(name, no_fallback):
    call, shape = CALLS[name]
    check(call, draw(*shape).to(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d))


@pytest.mark.parametrize("name", [n for n in CALLS if "pool" in n and n != "lp_pool2d" or n in ("reflect", "unfold")])
def test_without_a_batch_axis(name):
    call, shape = CALLS[name]
    check(call, draw(*shape[1:]))


def test_ties_go_where_pytorchs_gradient_goes():
    x = torch.ones(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    out = F.max_pool2d(x, 2)
    out.sum().backward()
    tangents = torch.eye(16, dtype=torch.float64).view(16, 1, 1, 4, 4)
    moved = F.max_pool2d(DualTensor(x.detach(), tangents), 2).tangents
    assert torch.equal(moved.sum((1, 2, 3, 4)), x.grad.flatten())


def test_batch_of_none():
    call, _ = CALLS["max_pool2d"]
    check(call, draw(0, 3, 7, 6))
    check(CALLS["avg_pool2d"][0], draw(0, 3, 7, 6))


def test_every_name_exists():
    assert all(hasattr(torch.ops.aten, n) for n in (*spatial.LINEAR, *spatial.MAXIMUM))
