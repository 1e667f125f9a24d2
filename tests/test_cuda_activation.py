"""The pointwise family as CUDA kernels compute it, run on the host, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from cuda_on_cpu.client import Kernels, Out

from frog_cuda import ops, reference

PARAMETERS = {"softplus": (1.0, 20.0), "elu": (0.7, 0.0), "leaky_relu": (0.1, 0.0), "hardtanh": (-0.5, 0.8)}
every_function = pytest.mark.parametrize("function", ops.POINTWISE)
INF = float("inf")


@pytest.fixture(scope="module")
def kernels():
    kernels = Kernels("activation")
    yield kernels
    kernels.close()


def run(kernels, x, tangent, function, parameters=None):
    a, b = parameters or PARAMETERS.get(function, (0.0, 0.0))
    name = {torch.float32: "activate_f32", torch.float64: "activate_f64"}[x.dtype]
    out = Out(tuple(x.shape), x.dtype)
    return kernels.run(name, x, tangent, out, out, x.numel() // 4, ops.POINTWISE[function], a, b)


def exact(x, function, parameters=None):
    a, b = parameters or PARAMETERS.get(function, (0.0, 0.0))
    y, slope = reference.POINTWISE[function](x.double(), a, b)
    if function == "gelu_tanh":  # without the cancellation of 1 + tanh(u) far below zero
        y = x.double() * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x.double() + 0.044715 * x.double() ** 3))
    return y, slope


@every_function
def test_float32_over_the_whole_range(kernels, function):
    tails = torch.logspace(-30, 1.9, 2000)
    x = torch.cat([torch.linspace(-30, 30, 20000), tails, -tails]).float()
    y, slope = run(kernels, x, torch.ones_like(x), function)
    value, exact_slope = exact(x, function)
    rounded = value.float().abs()
    unit = (torch.nextafter(rounded, torch.tensor(INF)) - rounded).double()
    normal = value.abs() > 1e-37
    # gelu_tanh: the exponential of a polynomial that reaches -80, whose own rounding is 80 times that of the result
    assert torch.where(normal, (y - value).abs() / unit, 0.0).max().item() <= {"gelu_tanh": 250}.get(function, 4)
    assert (slope - exact_slope).abs().max().item() <= 4e-7  # slopes are of order 1: a few roundings


@every_function
@pytest.mark.parametrize("parameters", [None, (2.0, 3.0)])
def test_float64(kernels, function, parameters):
    x = torch.cat([torch.linspace(-30, 30, 2000), torch.tensor([0.0, -0.0, 2.0, 3.0])]).double()
    tangent = torch.randn(len(x), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y, dy = run(kernels, x, tangent, function, parameters)
    value, slope = exact(x, function, parameters)
    torch.testing.assert_close(y, value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dy, slope * tangent, rtol=1e-12, atol=1e-12)


@every_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_special_values(kernels, function, dtype):
    x = torch.tensor([float("nan"), INF, -INF, 1e4, -1e4, 0.0, -0.0, 1.0], dtype=dtype)
    y, dy = run(kernels, x, torch.ones_like(x), function)
    value, slope = ops.pointwise_jvp(
        x, torch.ones(1, 8, dtype=dtype), function, **dict(zip(("alpha", "beta"), PARAMETERS.get(function, ()), strict=False))
    )
    torch.testing.assert_close(y, value, rtol=1e-6, atol=1e-30, equal_nan=True)
    torch.testing.assert_close(dy, slope[0], rtol=1e-6, atol=1e-30, equal_nan=True)


def test_infinite_tangents_stop(kernels):
    x = torch.tensor([-1.0, 0.0, 2.0, 0.5])
    endless = torch.full((4,), INF)
    assert run(kernels, x, endless, "relu")[1].tolist() == [0.0, 0.0, INF, INF]
    assert run(kernels, x, endless, "hardtanh")[1].tolist() == [0.0, INF, 0.0, INF]
