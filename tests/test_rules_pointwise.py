from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from against_func import check, compare, draw, dual, expected
from torch import nn

from frog_cuda.dual import DualTensor, add_activity

ACTIVATIONS = {
    "torch.relu": torch.relu,
    "Tensor.relu": lambda x: x.relu(),
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x * 1, inplace=True),
    "F.relu positional": lambda x: F.relu(x * 1, True),
    "relu_": lambda x: (x * 1).relu_(),
    "torch.relu_": lambda x: torch.relu_(x * 1),
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "silu in place": lambda x: F.silu(x * 1, inplace=True),
    "torch.tanh": torch.tanh,
    "tanh_": lambda x: (x * 1).tanh_(),
    "F.tanh": F.tanh,
    "sigmoid": lambda x: torch.sigmoid(x) + x.sigmoid() + F.sigmoid(x) + torch.special.expit(x),
    "softplus": F.softplus,
    "softplus(2, 1)": lambda x: F.softplus(x, 2, 1) + F.softplus(x, threshold=1, beta=2),
    "elu": F.elu,
    "elu(0.5)": lambda x: F.elu(x, 0.5) + F.elu(x * 1, alpha=0.5, inplace=True) + F.elu(x * 1, 0.3, True),
    "leaky_relu": lambda x: F.leaky_relu(x) + F.leaky_relu(x, 0.3) + F.leaky_relu_(x * 1, 0.2),
    "hardtanh": lambda x: F.hardtanh(x) + F.hardtanh(x, -0.3, 0.5) + F.hardtanh(x, max_val=0.2),
    "relu6": lambda x: F.relu6(x * 5),
    "fallbacks": lambda x: F.selu(x) + F.celu(x, 0.5) + F.mish(x) + F.hardswish(x) + F.logsigmoid(x) + F.softsign(x),
    "more": lambda x: F.hardsigmoid(x) + F.tanhshrink(x) + F.softshrink(x) + F.hardshrink(x) + F.threshold(x, 0.1, 2),
    "glu": lambda x: F.glu(torch.cat([x, x * x], -1), -1),
    "modules": nn.Sequential(nn.ReLU(inplace=False), nn.GELU(), nn.Tanh(), nn.ELU(), nn.LeakyReLU(0.2), nn.Softplus()),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    fn = ACTIVATIONS[name]
    for shape in ((1,), (7, 33), (0, 5)):
        check(fn, draw(*shape))
    check(fn, draw(33, 7).t(), k=1)


def test_kinks_follow_pytorch():
    x = torch.tensor([-1.0, -0.0, 0.0, 1.0, 6.0], dtype=torch.float64)
    for fn in (F.relu, F.leaky_relu, F.hardtanh, F.relu6, F.elu, F.hardshrink):
        check(fn, x)


@pytest.mark.parametrize("suffix", [(33,), (7, 33), ()], ids=str)
@pytest.mark.parametrize("own", [True, False], ids=["with tangents", "plain"])
@pytest.mark.parametrize("fn", [F.relu, torch.tanh, F.selu, lambda x: F.gelu(x * 2)], ids=["relu", "tanh", "selu", "mul"])
def test_pending_activity(fn, suffix, own):
    x, dx, v = draw(7, 33), draw(3, 7, 33, seed=2), draw(3, *suffix, seed=3)
    total = v.reshape(3, *(1,) * (2 - len(suffix)), *suffix) + (dx if own else torch.zeros_like(dx))
    (value,), (moved,) = expected(fn, [x], [total])
    compare(fn(add_activity(DualTensor(x, dx.clone()) if own else x, v)), value, moved)


def test_activation_in_place_after_a_pending_activity():
    x, v = draw(7, 33), draw(3, 33, seed=3)
    y = add_activity(x.clone(), v)
    z = F.relu(y, inplace=True)
    assert z is y
    (value,), (moved,) = expected(F.relu, [x], [v[:, None].expand(3, 7, 33)])
    compare(y, value, moved)


def test_in_place_through_a_view_reaches_the_base():
    def fn(x):
        y = x * 2
        torch.relu_(y[0])
        F.relu(y[1:3], inplace=True)
        return y

    check(fn, draw(7, 33))


def test_dtypes_of_lower_precision():
    x = dual(draw(4, 5))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y = F.relu(x.to(dtype))
        assert y.dtype == y.tangents.dtype == dtype
        assert torch.equal(y.tangents, x.tangents.to(dtype) * (x.primal > 0))


@pytest.mark.parametrize("function", [torch.tanh, torch.sigmoid])
def test_results_cannot_be_put_elsewhere(function):
    with pytest.raises(NotImplementedError, match="out= is not supported with a DualTensor"):
        function(dual(draw(3)), out=torch.empty(3, dtype=torch.float64))
    check(lambda x: function(x, out=None), draw(3))
