"""pointwise_jvp: every function against the float64 reference and torch.func.jvp; every instruction set to float32 rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_good_as_torch, assert_close32, assert_close64
from torch import Tensor

from frog_cuda import ops, reference

ROOT = Path(__file__).parent.parent
LOW = [torch.bfloat16, torch.float16]
#: name -> (alpha, beta, the same function of PyTorch)
FUNCTIONS: dict[str, tuple[float, float, Callable[[Tensor], Tensor]]] = {
    "identity": (0.0, 0.0, lambda x: x * 1),
    "relu": (0.0, 0.0, F.relu),
    "gelu": (0.0, 0.0, F.gelu),
    "gelu_tanh": (0.0, 0.0, lambda x: F.gelu(x, approximate="tanh")),
    "silu": (0.0, 0.0, F.silu),
    "tanh": (0.0, 0.0, torch.tanh),
    "sigmoid": (0.0, 0.0, torch.sigmoid),
    "softplus": (2.0, 3.0, lambda x: F.softplus(x, 2.0, 3.0)),
    "elu": (0.7, 0.0, lambda x: F.elu(x, 0.7)),
    "leaky_relu": (0.1, 0.0, lambda x: F.leaky_relu(x, 0.1)),
    "hardtanh": (-0.5, 0.8, lambda x: F.hardtanh(x, -0.5, 0.8)),
}
SHAPES = [(1,), (7,), (33,), (1025,), (7, 33), (3, 1, 1025), (0, 5), ()]
every_function = pytest.mark.parametrize("function", FUNCTIONS)


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def jvp(function: str, x: Tensor, dx: Tensor | None, **activity: Tensor) -> tuple[Tensor, Tensor]:
    alpha, beta, _ = FUNCTIONS[function]
    return ops.pointwise_jvp(x, dx, function, alpha=alpha, beta=beta, **activity)


def exact(function: str, x: Tensor, dx: Tensor | None, **activity: Tensor) -> tuple[Tensor, Tensor]:
    alpha, beta, _ = FUNCTIONS[function]
    return reference.pointwise_jvp(x, dx, function, alpha=alpha, beta=beta, **activity)


def torch_own(function: str, x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    pairs = [torch.func.jvp(FUNCTIONS[function][2], (x,), (t,)) for t in dx]
    return pairs[0][0], torch.stack([p[1] for p in pairs])


def test_every_function_is_tested():
    assert list(FUNCTIONS) == list(ops.POINTWISE)


@every_function
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_reference_and_torch(function, shape, k):
    x, dx = 3 * randn(*shape, seed=1), randn(k, *shape, seed=2)
    y, dy = jvp(function, x, dx)
    for value, tangents in (exact(function, x, dx), torch_own(function, x, dx)):
        assert_close64(y, value)
        assert_close64(dy, tangents)
    x, dx = x.float(), dx.float()
    y, dy = jvp(function, x, dx)
    value, tangents = exact(function, x, dx)
    assert_close32(y, value)
    assert_close32(dy, tangents)


@every_function
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_low_precision_is_as_good_as_torch(function, dtype):
    x, dx = 3 * randn(7, 1025, dtype=dtype, seed=1), randn(3, 7, 1025, dtype=dtype, seed=2)
    y, dy = jvp(function, x, dx)
    own, exactly = torch_own(function, x, dx), exact(function, x, dx)
    assert_as_good_as_torch(y, own[0], exactly[0])
    assert_as_good_as_torch(dy, own[1], exactly[1])


@every_function
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("tangent_dtype", [torch.float64, torch.float32, *LOW], ids=str)
def test_tangents_of_another_dtype(function, dtype, tangent_dtype):
    x, dx = randn(7, 33, dtype=dtype, seed=1), randn(3, 7, 33, dtype=tangent_dtype, seed=2)
    y, dy = jvp(function, x, dx)
    assert y.dtype == dtype and dy.dtype == tangent_dtype
    value, tangents = exact(function, x, dx)
    # the result of each is rounded once; against the exact value rounded to the same dtype
    assert_as_good_as_torch(y, value.to(dtype), value)
    if tangent_dtype == torch.float64:
        assert_close64(dy, tangents)
    else:
        assert_as_good_as_torch(dy, tangents.to(tangent_dtype), tangents)


@every_function
@pytest.mark.parametrize("own", [True, False], ids=["with dx", "activity alone"])
@pytest.mark.parametrize("suffix", [(), (1,), (33,), (7, 33), (5, 7, 33)], ids=str)
def test_activity(function, suffix, own):
    shape = (5, 7, suffix[-1] if suffix else 33)
    x, v = randn(*shape, seed=1), randn(3, *suffix, seed=3)
    dx = randn(3, *shape, seed=2) if own else None
    y, dy = jvp(function, x, dx, activity=v)
    value, tangents = exact(function, x, dx, activity=v)
    assert_close64(y, value)
    assert_close64(dy, tangents)


@pytest.mark.parametrize("period", [1, 7, 33, 1023, 1024, 1025, 2048, 2049, 5000])
def test_activity_across_blocks(period):
    x, dx, v = randn(5, period, dtype=torch.float32), randn(2, 5, period, dtype=torch.float32), randn(2, period)
    _, dy = jvp("silu", x, dx, activity=v.float())
    assert_close32(dy, exact("silu", x, dx, activity=v.float())[1])


def test_activity_takes_the_dtype_of_dx():
    x, dx, v = randn(5, 7), randn(2, 5, 7, dtype=torch.float32), randn(2, 7, dtype=torch.bfloat16)
    assert jvp("relu", x, dx, activity=v)[1].dtype == torch.float32
    assert jvp("relu", x, None, activity=v)[1].dtype == torch.bfloat16


@every_function
def test_non_contiguous(function):
    x, dx, v = randn(33, 14)[:, ::2].t(), randn(33, 3, 7).permute(1, 2, 0), randn(33, 3).t()
    y, dy = jvp(function, x, dx, activity=v)
    value, tangents = exact(function, x, dx, activity=v)
    assert_close64(y, value)
    assert_close64(dy, tangents)
    assert y.is_contiguous() and dy.is_contiguous()
    shared = randn(1, 7, 33).expand(3, 7, 33)
    assert_close64(jvp(function, x, shared)[1], exact(function, x, shared)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("function", ["relu", "leaky_relu", "hardtanh", "elu", "softplus"])
def test_kinks_are_pytorchs(function, dtype):
    alpha, beta, _ = FUNCTIONS[function]
    kinks = torch.tensor([-1.0, -0.0, 0.0, 1.0, alpha, beta, beta / alpha if alpha else 0.0], dtype=dtype)
    dx = torch.ones(1, len(kinks), dtype=dtype)
    y, dy = jvp(function, kinks, dx)
    value, tangents = torch_own(function, kinks, dx)
    torch.testing.assert_close(y, value, rtol=1e-6, atol=0)
    torch.testing.assert_close(dy, tangents, rtol=1e-6, atol=0)


@every_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW], ids=str)
def test_nan_and_infinity_are_pytorchs(function, dtype):
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e4, -1e4], dtype=dtype)
    x = torch.cat([special, torch.zeros(30, dtype=dtype), special])  # in a whole vector and in the rest
    dx = torch.ones(1, len(x), dtype=dtype)
    y, dy = jvp(function, x, dx)
    value, tangents = torch_own(function, x, dx)
    # PyTorch's own inf * 0 and inf - inf: some of its kernels give NaN for gelu and the slopes of gelu and silu at infinity
    defined = ~value.isnan() | x.isnan()
    torch.testing.assert_close(y[defined], value[defined], equal_nan=True, rtol=1e-2, atol=1e-6)
    # PyTorch's slopes of elu and hardtanh at NaN depend on whether the element is in a whole vector
    defined = torch.where(x.isnan(), function not in ("elu", "hardtanh"), ~tangents.isnan())
    torch.testing.assert_close(dy[defined], tangents[defined], equal_nan=True, rtol=1e-2, atol=1e-6)
    assert not dy[:, 5:35].isnan().any()


def test_relu_stops_infinite_tangents():
    x = torch.tensor([-1.0, 0.0, 2.0])
    dx = torch.full((1, 3), float("inf"))
    assert jvp("relu", x, dx)[1].tolist() == [[0.0, 0.0, float("inf")]]
    assert jvp("hardtanh", x, dx)[1].tolist() == [[0.0, float("inf"), 0.0]]


@every_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_with_any_number_of_threads(function, dtype):
    x, dx, v = randn(64, 1025, dtype=dtype), randn(4, 64, 1025, dtype=dtype, seed=2), randn(4, 1025, dtype=dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(jvp(function, x, dx, activity=v))
    finally:
        torch.set_num_threads(threads)
    for y, dy in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(dy, results[0][1])


def test_tangents_of_a_chunk_of_k_are_those_of_the_whole():
    x, dx = randn(7, 1025, dtype=torch.float32), randn(5, 7, 1025, dtype=torch.float32)
    whole = jvp("gelu", x, dx)[1]
    assert torch.equal(torch.cat([jvp("gelu", x, dx[:2])[1], jvp("gelu", x, dx[2:])[1]]), whole)


def test_primal_and_tangents_are_neighbours():
    """A linear layer that follows takes them in one matrix product, see csrc/cpu/linear.cpp."""
    y, dy = jvp("relu", randn(7, 33), randn(2, 7, 33))
    assert y.data_ptr() + y.nbytes == dy.data_ptr()
    del y
    assert torch.isfinite(dy).all()


# ---- accuracy over the whole range, in each instruction set

SCRIPT = """
import sys, torch
from frog_cuda import ops, reference
x = torch.cat([torch.linspace(-30, 30, 200001), torch.logspace(-30, 1.9, 20001), -torch.logspace(-30, 1.9, 20001)]).float()
one = torch.ones(1, len(x))
parameters = {"softplus": (1.0, 20.0), "elu": (1.0, 0.0), "leaky_relu": (0.1, 0.0), "hardtanh": (-0.5, 0.8)}
for name in ops.POINTWISE:
    a, b = parameters.get(name, (0.0, 0.0))
    y, dy = ops.pointwise_jvp(x, one, name, alpha=a, beta=b)
    value, slope = reference.pointwise_jvp(x, one, name, alpha=a, beta=b)
    if name == "gelu_tanh":  # without the cancellation of 1 + tanh(u) far below zero
        value = x.double() * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x.double() + 0.044715 * x.double() ** 3))
    rounded = value.float().abs()
    unit = (torch.nextafter(rounded, torch.tensor(float("inf"))) - rounded).double()
    normal = value.abs() > 1e-37
    ulp = torch.where(normal, (y - value).abs() / unit, 0.0).max().item()
    print(name, ulp, (dy - slope).abs().max().item())
"""


@pytest.mark.parametrize("simd", ["baseline", "avx2", "avx512"])
def test_float32_accuracy_of_each_instruction_set(simd):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=os.environ | {"FROG_CUDA_SIMD": simd}, capture_output=True, text=True
    )
    if done.returncode and f"FROG_CUDA_SIMD is '{simd}'" in done.stderr:
        pytest.skip(f"this machine has no {simd}")
    assert done.returncode == 0, done.stderr
    rows = {name: (float(a), float(b)) for name, a, b in (line.split() for line in done.stdout.splitlines())}
    assert list(rows) == list(ops.POINTWISE)
    for name, (ulp, slope) in rows.items():
        # gelu's tails: the exponential of -x^2 / 2 carries the rounding error of x^2 where multiply-add is not fused;
        # gelu_tanh's: the exponential of a polynomial that reaches -80, whose own rounding is 80 times that of the result
        bound = {"gelu": 100 if simd == "baseline" else 8, "gelu_tanh": 250}.get(name, 4)
        assert ulp <= bound, f"{name}: {ulp} units in the last place"
        assert slope <= 4e-7, f"{name}: slope off by {slope}"  # slopes are of order 1: a few roundings


# ---- bad input


def _with(**changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"x": randn(4, 5), "dx": randn(3, 4, 5), "activity": None, "function": "relu"}
    return given | changes


BAD = [
    (dict(dx=None), "pointwise_jvp: dx and activity are both None; at least one must be given"),
    (dict(x=torch.ones(4, 5, dtype=torch.int64)), "pointwise_jvp: x has dtype Long; accepted are float32, float64"),
    (dict(dx=torch.ones(3, 4, 5, dtype=torch.int32)), "pointwise_jvp: dx has dtype Int; accepted are float32, float64"),
    (dict(dx=randn(4, 5)), r"pointwise_jvp: dx has shape \(4, 5\), expected \(4, 4, 5\)"),
    (dict(dx=randn(3, 4, 6)), r"pointwise_jvp: dx has shape \(3, 4, 6\), expected \(3, 4, 5\)"),
    (dict(dx=randn(0, 4, 5)), "pointwise_jvp: k is 0; at least 1 tangent is needed"),
    (dict(dx=None, activity=torch.tensor(1.0)), r"pointwise_jvp: activity has shape \(\)"),
    (dict(activity=randn(2, 5)), r"activity has shape \(2, 5\), expected \(k, \*s\) with k = 3 and s a suffix of \(4, 5\)"),
    (dict(activity=randn(3, 4)), r"activity has shape \(3, 4\), expected \(k, \*s\) with k = 3"),
    (dict(activity=randn(3, 1, 4, 5)), r"activity has shape \(3, 1, 4, 5\)"),
    (dict(activity=torch.ones(3, 5, dtype=torch.int64)), "pointwise_jvp: activity has dtype Long; accepted are float32"),
    (dict(function="hardtanh", alpha=1.0, beta=-1.0), r"hardtanh has alpha \(min_val\) 1 and beta \(max_val\) -1"),
]


@pytest.mark.parametrize("changes, message", BAD, ids=[message[:50] for _, message in BAD])
def test_bad_input(changes, message):
    with pytest.raises(RuntimeError, match=message):
        ops.pointwise_jvp(**_with(**changes))


def test_unknown_function():
    with pytest.raises(ValueError, match="function is 'swish'; accepted are identity, relu"):
        ops.pointwise_jvp(**_with(function="swish"))
    with pytest.raises(RuntimeError, match="pointwise_jvp: function is 11; accepted are 0 to 10"):
        torch.ops.frog_cuda.pointwise_jvp(randn(4, 5), randn(3, 4, 5), None, 11, 0.0, 0.0)


def test_arguments_on_another_device_are_named():
    with pytest.raises(RuntimeError, match="pointwise_jvp: arguments are on cpu and meta; all must be on one device"):
        ops.pointwise_jvp(**_with(dx=torch.ones(3, 4, 5, device="meta")))
