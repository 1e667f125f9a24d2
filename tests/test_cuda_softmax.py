"""The CUDA kernels of softmax_jvp and log_softmax_jvp, run on the host, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from cuda_on_cpu.client import Kernels
from cuda_on_cpu.pairs import NAMES, PAIRS, check, given, name_of, randn, result

from frog_cuda import reference

INF = float("inf")
EXACT = {"softmax": reference.softmax_jvp, "log_softmax": reference.log_softmax_jvp}
each = pytest.mark.parametrize("name", EXACT)
each_pair = pytest.mark.parametrize("dtype, tangent_dtype", PAIRS, ids=lambda t: NAMES[t])


@pytest.fixture(scope="module")
def kernels():
    kernels = Kernels("softmax")
    yield kernels
    kernels.close()


def run(kernels, name, x, dx, dim, skew=False, seed=0):
    shape, k = tuple(x.shape), dx.shape[0]
    outer, n, inner = (int(torch.Size(s).numel()) for s in (shape[:dim], shape[dim : dim + 1], shape[dim + 1 :]))
    results = [result(shape, x.dtype, skew), result((k, *shape), dx.dtype, skew)]
    sizes = (outer, n, inner, k, name == "log_softmax")
    return kernels.run(f"softmax_{name_of(x.dtype, dx.dtype)}", *given((x, dx), skew), *results, *sizes, seed=seed)


# rows that a warp's part, a warp, a block of several warps can hold, and that none can; and columns
SHAPES = [
    ((1,), 0),
    ((33, 7), 1),
    ((5, 64), 1),
    ((3, 1025), 1),
    ((2, 1040), 1),
    ((2, 9001), 1),
    ((1, 9008), 1),
    ((7, 33), 0),
    ((2, 130, 3), 1),
    ((2, 200, 40), 1),
    ((9000, 1, 2), 0),
    ((0, 5), 1),
    ((5, 0), 1),
]


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape, dim", SHAPES, ids=str)
def test_shapes(kernels, name, shape, dim, dtype):
    x, dx = 3 * randn(*shape, dtype=dtype, seed=1), randn(2, *shape, dtype=dtype, seed=2)
    y, dy = run(kernels, name, x, dx, dim)
    value, tangents = EXACT[name](x, dx, dim)
    check([y], [value])
    check([dy], [tangents], shift=1.0)  # of a single class it is exactly zero


@each
@each_pair
@pytest.mark.parametrize("shape, dim", [((3, 40), 1), ((2, 8200), 1), ((33, 5), 0)], ids=str)
def test_types(kernels, name, shape, dim, dtype, tangent_dtype):
    x, dx = randn(*shape, dtype=dtype, seed=1), randn(3, *shape, dtype=tangent_dtype, seed=2)
    check(run(kernels, name, x, dx, dim), EXACT[name](x, dx, dim))


@each
@pytest.mark.parametrize("shape", [(3, 10), (2, 600), (1, 8200)], ids=str)
@pytest.mark.parametrize("k", [1, 5, 16])
def test_numbers_of_tangents(kernels, name, k, shape):
    x, dx = randn(*shape, dtype=torch.float32, seed=1), randn(k, *shape, dtype=torch.float32, seed=2)
    check(run(kernels, name, x, dx, 1), EXACT[name](x, dx, 1))


@each
@each_pair
@pytest.mark.parametrize("shape", [(3, 64), (1, 8200)], ids=str)
def test_addresses_that_are_not_multiples_of_16(kernels, name, shape, dtype, tangent_dtype):
    x, dx = randn(*shape, dtype=dtype, seed=1), randn(2, *shape, dtype=tangent_dtype, seed=2)
    check(run(kernels, name, x, dx, 1, skew=True), EXACT[name](x, dx, 1))


@each
@pytest.mark.parametrize("shape, dim", [((2, 600), 1), ((1, 8200), 1), ((100, 3), 0), ((300, 33), 0)], ids=str)
def test_the_same_bits_in_any_order_of_threads(kernels, name, shape, dim):
    x, dx = randn(*shape, dtype=torch.float32, seed=1), randn(3, *shape, dtype=torch.float32, seed=2)
    first, *others = [run(kernels, name, x, dx, dim, seed=seed) for seed in (0, 1, 2)]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@each
@pytest.mark.parametrize("width", [21, 8200])
@pytest.mark.parametrize("dim", [0, 1])
def test_infinity_and_nan(kernels, name, width, dim):
    rows = torch.zeros(7, width)
    rows[1] = -INF
    rows[2, 20] = -INF
    rows[3, 0] = rows[3, 5] = -INF
    rows[4, 17] = float("nan")
    rows[5, 3] = INF
    rows[6, : width - 1] = -INF
    x = rows if dim == 1 else rows.T.contiguous()
    dx = torch.ones(2, *x.shape)
    y, dy = run(kernels, name, x, dx, dim)
    value, tangents = EXACT[name](x, dx, dim)
    torch.testing.assert_close(y.double(), value, equal_nan=True, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dy.double(), tangents, equal_nan=True, rtol=0, atol=1e-6)


@each
def test_large_values_do_not_overflow(kernels, name):
    x = torch.tensor([[1e4, 1e4 - 1, -1e4], [-1e30, -1e30, -1e30], [88.0, 89.0, 90.0]])
    dx = randn(2, 3, 3, dtype=torch.float32)
    for got, wanted in zip(run(kernels, name, x, dx, 1), EXACT[name](x, dx, 1), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)
