"""softmax_jvp and log_softmax_jvp against the float64 reference and torch.func.jvp."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_as_good_as_torch, assert_close32, assert_close64
from torch import Tensor

from frog_cuda import ops, reference

LOW = [torch.bfloat16, torch.float16]
INF = float("inf")
OPS = {
    "softmax": (ops.softmax_jvp, reference.softmax_jvp, torch.softmax),
    "log_softmax": (ops.log_softmax_jvp, reference.log_softmax_jvp, torch.log_softmax),
}
CASES = [
    ((1,), 0),
    ((7,), -1),
    ((33,), 0),
    ((1025,), 0),
    ((7, 33), 1),
    ((7, 33), 0),
    ((33, 1), 0),
    ((33, 1), 1),
    ((3, 7, 1025), -1),
    ((3, 7, 130), 1),
    ((3, 7, 130), -3),
    ((2, 1025, 3), 1),
    ((0, 5), 1),
    ((5, 0), 1),
    ((2, 0, 3), 2),
    ((), 0),
    ((), -1),
]
each = pytest.mark.parametrize("name", OPS)


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def torch_own(name: str, x: Tensor, dx: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    pairs = [torch.func.jvp(lambda v: OPS[name][2](v, dim), (x,), (t,)) for t in dx]
    return pairs[0][0], torch.stack([p[1] for p in pairs])


@each
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shape, dim", CASES, ids=str)
def test_against_reference_and_torch(name, shape, dim, k):
    op, exact, _ = OPS[name]
    x, dx = 3 * randn(*shape, seed=1), randn(k, *shape, seed=2)
    y, dy = op(x, dx, dim)
    assert_close64(y, exact(x, dx, dim)[0])
    assert_close64(y, torch_own(name, x, dx, dim)[0])
    # dy of a single class is exactly zero, which has no relative error
    assert_close64(dy + 1, exact(x, dx, dim)[1] + 1)
    assert_close64(dy + 1, torch_own(name, x, dx, dim)[1] + 1)
    x, dx = x.float(), dx.float()
    y, dy = op(x, dx, dim)
    value, tangents = exact(x, dx, dim)
    assert_close32(y, value)
    assert_close32(dy + 1, tangents + 1)


@each
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_low_precision_is_as_good_as_torch(name, dtype, dim):
    op, exact, _ = OPS[name]
    x, dx = 3 * randn(33, 130, dtype=dtype, seed=1), randn(3, 33, 130, dtype=dtype, seed=2)
    (y, dy), own, exactly = op(x, dx, dim), torch_own(name, x, dx, dim), exact(x, dx, dim)
    assert_as_good_as_torch(y, own[0], exactly[0])
    assert_as_good_as_torch(dy, own[1], exactly[1])


@each
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("tangent_dtype", [torch.float64, torch.float32, *LOW], ids=str)
def test_tangents_of_another_dtype(name, dtype, tangent_dtype, dim):
    op, exact, _ = OPS[name]
    x, dx = randn(7, 33, dtype=dtype, seed=1), randn(3, 7, 33, dtype=tangent_dtype, seed=2)
    y, dy = op(x, dx, dim)
    assert y.dtype == dtype and dy.dtype == tangent_dtype
    value, tangents = exact(x, dx, dim)
    assert_as_good_as_torch(y, value.to(dtype), value)
    if tangent_dtype == torch.float64:
        assert_close64(dy, tangents)
    elif tangent_dtype == torch.float32:
        assert_close32(dy, tangents)
    else:
        assert_as_good_as_torch(dy, tangents.to(tangent_dtype), tangents)


@each
@pytest.mark.parametrize("dim", [0, 1])
def test_non_contiguous(name, dim):
    op, exact, _ = OPS[name]
    x, dx = randn(33, 14)[:, ::2].t(), randn(33, 3, 7).permute(1, 2, 0)
    for tangents in (dx, randn(1, 7, 33).expand(3, 7, 33)):
        for got, wanted in zip(op(x, tangents, dim), exact(x, tangents, dim), strict=True):
            assert_close64(got, wanted)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_large_values_do_not_overflow(name, dtype):
    x = torch.tensor([[1e4, 1e4 - 1, -1e4], [-1e30, -1e30, -1e30], [88.0, 89.0, 90.0]], dtype=dtype)
    dx = randn(2, 3, 3, dtype=dtype)
    for got, wanted in zip(OPS[name][0](x, dx, 1), OPS[name][1](x, dx, 1), strict=True):
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-7)


@each
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW], ids=str)
def test_infinity_and_nan_are_pytorchs(name, dtype, dim):
    rows = torch.zeros(7, 21, dtype=dtype)
    rows[1] = -INF
    rows[2, 20] = -INF
    rows[3, 0] = rows[3, 5] = -INF
    rows[4, 17] = float("nan")
    rows[5, 3] = INF
    rows[6, :20] = -INF
    x = rows if dim == 1 else rows.t()
    dx = torch.ones(2, *x.shape, dtype=dtype)
    y, dy = OPS[name][0](x, dx, dim)
    value, tangents = torch_own(name, x, dx, dim)
    torch.testing.assert_close(y, value, equal_nan=True, rtol=2e-2, atol=1e-6)
    assert torch.equal(dy.isnan(), tangents.isnan())
    bound = 4 * torch.finfo(dtype).eps  # each difference of equal tangents, exactly zero, is a few roundings of 1
    torch.testing.assert_close(dy, tangents, equal_nan=True, rtol=0, atol=bound)


@each
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_with_any_number_of_threads(name, dtype, dim):
    x, dx = randn(129, 257, dtype=dtype), randn(4, 129, 257, dtype=dtype, seed=2)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(OPS[name][0](x, dx, dim))
    finally:
        torch.set_num_threads(threads)
    for y, dy in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(dy, results[0][1])


BAD = [
    (dict(x=torch.ones(4, 5, dtype=torch.int64)), "x has dtype Long; accepted are float32, float64"),
    (dict(dx=torch.ones(3, 4, 5, dtype=torch.int64)), "dx has dtype Long; accepted are float32, float64"),
    (dict(dx=randn(4, 5)), r"dx has shape \(4, 5\), expected \(4, 4, 5\)"),
    (dict(dx=randn(3, 5, 4)), r"dx has shape \(3, 5, 4\), expected \(3, 4, 5\)"),
    (dict(dx=randn(0, 4, 5)), "k is 0; at least 1 tangent is needed"),
    (dict(dim=2), r"dim is 2; accepted for x of shape \(4, 5\) are -2 to 1"),
    (dict(dim=-3), r"dim is -3; accepted for x of shape \(4, 5\) are -2 to 1"),
    (dict(dx=torch.ones(3, 4, 5, device="meta")), "arguments are on cpu and meta; all must be on one device"),
]


@each
@pytest.mark.parametrize("changes, message", BAD, ids=[message[:40] for _, message in BAD])
def test_bad_input(name, changes, message):
    with pytest.raises(RuntimeError, match=f"{name}_jvp: {message}"):
        OPS[name][0](**({"x": randn(4, 5), "dx": randn(3, 4, 5), "dim": 1} | changes))
