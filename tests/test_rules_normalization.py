from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from against_func import check, compare, draw, dual, expected
from torch import nn

from frog_cuda.rules import normalization as rules


@pytest.fixture
def fused(monkeypatch):
    calls = []
    original = rules._normalization_jvp
    monkeypatch.setattr(rules, "_normalization_jvp", lambda *a: calls.append(a) or original(*a))
    return calls


LAYERS = {
    "layer": (lambda x, w, b: F.layer_norm(x, (6,), w, b), (5, 6), 6),
    "layer, 3d": (lambda x, w, b: F.layer_norm(x, (6,), w, b, 0.1), (2, 5, 6), 6),
    "rms": (lambda x, w, b: F.rms_norm(x, (6,), w) + b, (5, 6), 6),
    "rms with eps": (lambda x, w, b: F.rms_norm(x, (6,), w, 0.1) + b, (5, 6), 6),
    "group": (lambda x, w, b: F.group_norm(x, 3, w, b), (2, 6, 4, 3), 6),
    "group, 2d": (lambda x, w, b: F.group_norm(x, 2, w, b), (3, 6), 6),
    "instance": (lambda x, w, b: F.instance_norm(x, weight=w, bias=b), (2, 6, 5), 6),
    "batch": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), (7, 6), 6),
    "batch, 2d": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True, eps=0.1), (3, 6, 2, 4), 6),
    "batch, evaluation": (
        lambda x, w, b: F.batch_norm(x, torch.arange(6.0).double(), torch.arange(1.0, 7).double(), w, b),
        (3, 6, 2, 4),
        6,
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, fused):
    layer, shape, channels = LAYERS[name]
    x, w, b = draw(*shape), draw(channels, seed=2), draw(channels, seed=3)
    check(layer, x, w, b)
    check(lambda x: layer(x, w, b), x, k=1)
    check(lambda w: layer(x, w, b), w)
    check(lambda x: layer(x, None, b), x)
    assert len(fused) == 4


def test_without_affine_parameters(fused):
    check(lambda x: F.layer_norm(x, (6,)) + F.group_norm(x, 2) + F.batch_norm(x, None, None, training=True), draw(7, 6))
    check(lambda x: F.instance_norm(x), draw(2, 3, 5))
    assert len(fused) == 4


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_running_statistics_move_once(momentum, fused):
    reference, norm = (nn.BatchNorm2d(3, momentum=momentum, dtype=torch.float64) for _ in range(2))
    for seed in (1, 2):
        x = draw(4, 3, 2, 2, seed=seed)
        reference(x)
        norm(dual(x))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.allclose(getattr(norm, name), getattr(reference, name), rtol=1e-12), name
    assert len(fused) == 2
    before = norm.running_mean.clone()
    norm.eval()(dual(draw(4, 3, 2, 2)))
    assert torch.equal(norm.running_mean, before)


def test_what_the_operator_does_not_take(fused):
    tracked = nn.InstanceNorm1d(3, track_running_stats=True, dtype=torch.float64)
    x = draw(2, 3, 5)
    (value,), (moved,) = expected(lambda x: F.instance_norm(x), [x], [dual(x).tangents])
    compare(tracked(dual(x)), value, moved)
    assert not torch.equal(tracked.running_mean, torch.zeros(3, dtype=torch.float64))
    check(lambda x: F.layer_norm(x, (6,)), draw(0, 6))
    assert not fused


def test_pytorchs_own_errors():
    for call in (
        lambda x: F.layer_norm(x, (5,)),
        lambda x: F.group_norm(x, 4),
        lambda x: F.batch_norm(x, None, None),
        lambda x: F.batch_norm(x[:1], None, None, training=True),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            call(dual(draw(7, 6)))
