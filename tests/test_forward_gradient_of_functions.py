"""frog_cuda.forward_gradient: estimates of the gradients of closed-form functions."""

from __future__ import annotations

import torch
from helpers import assert_close32, assert_close64
from test_forward_gradient import DISTRIBUTIONS

import frog_cuda as frog


def test_forward_gradient_of_functions():
    x = torch.linspace(-1, 2, 7, dtype=torch.float64)

    def rosenbrock(x):
        return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()

    true = torch.func.grad(rosenbrock)(x)
    for distribution in DISTRIBUTIONS:
        for aggregate in ("orthogonal", "mean", lambda v, d: d @ v):
            for step in (0, 5):
                options = dict(k=4, tangents=distribution, aggregate=aggregate, seed=2, step=step)
                value, estimate = frog.forward_gradient(rosenbrock, x, **options)
                simulated = frog.forward_gradient(rosenbrock, x, simulate=True, **options)
                assert_close64(value, rosenbrock(x))
                assert_close64(estimate, simulated[1])
        v = frog.tangents.sample(distribution, 4, 7, seed=2, step=5, dtype=torch.float64)
        value, estimate = frog.forward_gradient(rosenbrock, x, k=4, tangents=distribution, aggregate="sum", seed=2, step=5)
        assert_close64(estimate, (v @ true) @ v)
    assert_close64(frog.forward_gradient(rosenbrock, x, k=7)[1], true, 1e-7)
    matrix = torch.randn(3, 4)
    estimate = frog.forward_gradient(lambda x: (x**2).sum(), matrix, k=12, tangents="orthonormal")[1]
    assert_close32(estimate, 2 * matrix.double(), 1e-4)


def test_forward_gradient_of_a_number():
    x = torch.tensor(3.0, dtype=torch.float64)
    for options in (dict(), dict(simulate=True), dict(tangents=torch.full((1,), 2.0))):
        value, estimate = frog.forward_gradient(lambda x: x * x, x, k=1, **options)
        assert value.item() == 9 and estimate.shape == ()
        assert_close64(estimate, 2 * x)
