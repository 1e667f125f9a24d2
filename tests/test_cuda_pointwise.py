"""The CUDA kernels of pointwise_jvp, run on the host, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from cuda_on_cpu.client import Kernels, Out, Skewed
from cuda_on_cpu.pairs import NAMES, PAIRS, check, given, name_of, randn, result

from frog_cuda import ops, reference

PARAMETERS = {"softplus": (2.0, 3.0), "elu": (0.7, 0.0), "leaky_relu": (0.1, 0.0), "hardtanh": (-0.5, 0.8)}
each_pair = pytest.mark.parametrize("dtype, tangent_dtype", PAIRS, ids=lambda t: NAMES[t])


@pytest.fixture(scope="module")
def kernels():
    kernels = Kernels("pointwise")
    yield kernels
    kernels.close()


def run(kernels, x, dx, v, function, skew=False, seed=0):
    tangents = dx if dx is not None else v
    k = tangents.shape[0]
    alpha, beta = PARAMETERS.get(function, (0.0, 0.0))
    results = [result(x.shape, x.dtype, skew), result((k, *x.shape), tangents.dtype, skew)]
    period = max(1, v.numel() // k) if v is not None else 1
    name = f"pointwise_{name_of(x.dtype, tangents.dtype)}"
    code = ops.POINTWISE[function]
    return kernels.run(name, *given((x, dx, v), skew), *results, x.numel(), period, k, code, alpha, beta, seed=seed)


def compare(results, x, dx, v, function):
    alpha, beta = PARAMETERS.get(function, (0.0, 0.0))
    check(results, reference.pointwise_jvp(x, dx, function, activity=v, alpha=alpha, beta=beta))


@each_pair
@pytest.mark.parametrize("function", ops.POINTWISE)
def test_each_function(kernels, function, dtype, tangent_dtype):
    x, dx = 3 * randn(40, dtype=dtype), randn(3, 40, dtype=tangent_dtype, seed=1)
    compare(run(kernels, x, dx, None, function), x, dx, None, function)


@each_pair
@pytest.mark.parametrize("shape", [(1,), (7,), (33,), (1025,), (3, 1024), (0, 5)], ids=str)
def test_sizes(kernels, shape, dtype, tangent_dtype):
    x, dx = randn(*shape, dtype=dtype), randn(2, *shape, dtype=tangent_dtype, seed=1)
    compare(run(kernels, x, dx, None, "silu"), x, dx, None, "silu")


@pytest.mark.parametrize("k", [1, 4, 5, 16, 33])
@pytest.mark.parametrize("numel", [5, 64, 4099])
def test_numbers_of_tangents(kernels, k, numel):
    x, dx, v = randn(numel), randn(k, numel, seed=1), randn(k, numel, seed=2)
    compare(run(kernels, x, dx, v, "tanh"), x, dx, v, "tanh")


@pytest.mark.parametrize("own", [True, False], ids=["with dx", "activity alone"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows, suffix", [(48, ()), (48, (1,)), (16, (3,)), (7, (33,)), (5, (40,)), (9, (272,)), (1, (80,))])
def test_activity(kernels, rows, suffix, dtype, own):
    x = randn(rows, *suffix, dtype=dtype)
    v = randn(3, *suffix, dtype=dtype, seed=2)
    dx = randn(3, *x.shape, dtype=dtype, seed=1) if own else None
    compare(run(kernels, x, dx, v, "sigmoid"), x, dx, v, "sigmoid")


@each_pair
def test_addresses_that_are_not_multiples_of_16(kernels, dtype, tangent_dtype):
    x, dx, v = randn(5, 72, dtype=dtype), randn(2, 5, 72, dtype=tangent_dtype), randn(2, 72, dtype=tangent_dtype)
    straight, skewed = (run(kernels, x, dx, v, "gelu", skew=skew, seed=skew) for skew in (False, True))
    compare(skewed, x, dx, v, "gelu")
    assert all(torch.equal(a, b) for a, b in zip(straight, skewed, strict=True))


def test_a_misaligned_activity_alone(kernels):
    x, v = randn(5, 72, dtype=torch.float32), randn(2, 72, dtype=torch.float32)
    out = [Out((5, 72)), Out((2, 5, 72))]
    results = kernels.run("pointwise_f32_f32", x, None, Skewed(v), *out, 360, 72, 2, ops.POINTWISE["tanh"], 0.0, 0.0)
    compare(results, x, None, v, "tanh")


def test_infinite_tangents_stop_at_relu(kernels):
    x = torch.tensor([-1.0, 0.0, 2.0, 3.0])
    dx = torch.full((1, 4), float("inf"))
    assert run(kernels, x, dx, None, "relu")[1].tolist() == [[0.0, 0.0, float("inf"), float("inf")]]
