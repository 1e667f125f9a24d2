"""The float64 reference itself, against PyTorch's own functions and their forward-mode derivatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close64

from frog_cuda import reference

F64 = torch.float64

# Both sides of every kink, the kinks themselves, and far out; not NaN, where PyTorch's vectorised and scalar code differ
X = torch.cat(
    [
        torch.randn(300, dtype=F64, generator=torch.Generator().manual_seed(0)) * 4,
        torch.tensor([0.0, -0.0, -1.0, 0.5, 2.0 / 1.5, 30.0, -30.0, 800.0, -800.0], dtype=F64),
    ]
)

ACTIVATIONS = {
    "identity": (torch.clone, 0.0, 0.0),
    "relu": (F.relu, 0.0, 0.0),
    "gelu": (F.gelu, 0.0, 0.0),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), 0.0, 0.0),
    "silu": (F.silu, 0.0, 0.0),
    "tanh": (torch.tanh, 0.0, 0.0),
    "sigmoid": (torch.sigmoid, 0.0, 0.0),
    "softplus": (lambda x: F.softplus(x, 1.5, 2.0), 1.5, 2.0),
    "elu": (lambda x: F.elu(x, 1.3), 1.3, 0.0),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.1), 0.1, 0.0),
    "hardtanh": (lambda x: F.hardtanh(x, -1.0, 0.5), -1.0, 0.5),
}


def torch_jvp(f, x, tangents):
    return torch.func.vmap(lambda v: torch.func.jvp(f, (x,), (v,)), out_dims=(None, 0))(tangents)


def assert_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        # 1e-13: some ten roundings
        assert_close64(a, e, 1e-13)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def test_every_activation_is_checked():
    assert ACTIVATIONS.keys() == reference.POINTWISE.keys()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    f, alpha, beta = ACTIVATIONS[name]
    tangents = torch.stack([torch.ones_like(X), randn(len(X))])
    expected_y, expected_dy = torch_jvp(f, X, tangents)
    y, dy = reference.pointwise_jvp(X, tangents, name, alpha=alpha, beta=beta)
    for a, e in [(y, expected_y), (dy, expected_dy)]:
        # entry by entry, so that beside an activation of 800 a small one must be right as well; 1e-15: a few roundings of 1
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-15)
    y, dy = reference.pointwise_jvp(X, None, name, activity=tangents, alpha=alpha, beta=beta)
    torch.testing.assert_close(dy, expected_dy, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_softmax(dim):
    x, dx = randn(5, 7), randn(3, 5, 7, seed=1)
    assert_same(reference.softmax_jvp(x, dx, dim), torch_jvp(lambda t: torch.softmax(t, dim), x, dx))
    assert_same(reference.log_softmax_jvp(x, dx, dim), torch_jvp(lambda t: torch.log_softmax(t, dim), x, dx))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_cross_entropy(weighted, smoothing, reduction):
    x, dx = randn(5, 7), randn(3, 5, 7, seed=1)
    target, weight = torch.tensor([0, 6, 2, 3, 3]), randn(7, seed=2).abs() if weighted else None
    how = dict(weight=weight, ignore_index=2, label_smoothing=smoothing, reduction=reduction)
    expected = torch_jvp(lambda t: F.cross_entropy(t, target, **how), x, dx)
    assert_same(reference.cross_entropy_jvp(x, dx, target, **how), expected)


def test_mse():
    x, dx, t, dt = randn(5, 7), randn(3, 5, 7, seed=1), randn(5, 7, seed=2), randn(3, 5, 7, seed=3)
    assert_same(reference.mse_jvp(x, dx, t), torch_jvp(lambda a: F.mse_loss(a, t, reduction="none"), x, dx))
    assert_same(reference.mse_jvp(x, None, t, dt), torch_jvp(lambda b: F.mse_loss(x, b, reduction="none"), t, dt))
    both = torch_jvp(lambda ab: F.mse_loss(ab[0], ab[1], reduction="none"), torch.stack([x, t]), torch.stack([dx, dt], 1))
    assert_same(reference.mse_jvp(x, dx, t, dt), both)


@pytest.mark.parametrize("weighted", [False, True])
def test_bce(weighted):
    x, dx, t = 4 * randn(5, 7), randn(3, 5, 7, seed=1), torch.sigmoid(randn(5, 7, seed=2))
    weight, pos_weight = (randn(7, seed=3).abs(), randn(5, 1, seed=4).abs()) if weighted else (None, None)
    expected = torch_jvp(
        lambda a: F.binary_cross_entropy_with_logits(a, t, weight, pos_weight=pos_weight, reduction="none"), x, dx
    )
    assert_same(reference.bce_jvp(x, dx, t, weight=weight, pos_weight=pos_weight), expected)
    p = torch.sigmoid(x)
    p[0, :2], t[0, :2] = torch.tensor([0.0, 1.0], dtype=F64), torch.tensor([1.0, 0.0], dtype=F64)
    expected = torch_jvp(lambda a: F.binary_cross_entropy(a, t, weight, reduction="none"), p, dx)
    loss, dloss = reference.bce_jvp(p, dx, t, weight=weight, with_logits=False)
    torch.testing.assert_close(loss, expected[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(dloss, expected[1], rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="pos_weight is given; it needs with_logits=True"):
        reference.bce_jvp(p, dx, t, pos_weight=torch.ones(7), with_logits=False)


def test_linear():
    k, x, w, b = 3, randn(5, 7), randn(9, 7, seed=1), randn(9, seed=2)
    tangents = (randn(k, 5, 7, seed=3), randn(k, 9, 7, seed=4), randn(k, 9, seed=5), randn(k, 5, 9, seed=6))

    def layer(x, w, b, v):
        return torch.tanh(F.linear(x, w, b) + v)

    def jvp(*t):
        return torch.func.jvp(layer, (x, w, b, torch.zeros(5, 9, dtype=F64)), t)

    expected = torch.func.vmap(jvp, out_dims=(None, 0))(*tangents)
    dx, dw, db, v = tangents
    y, dy, gram = reference.linear_jvp(x, dx, w, b, dweight=dw, dbias=db, activity=v, k=k, activation="tanh")
    assert_same((y, dy), expected)
    assert gram.shape == (0, 0)


def test_projection():
    v, g = randn(6, 20), randn(20, 2, seed=1)
    v[3] = v[0] - v[1]
    v[4] = 0
    c, rank = reference.cholesky_project(reference.gram(v), v @ g)
    assert int(rank) == 4
    assert_close64(v.T @ c, torch.linalg.pinv(v) @ (v @ g))
