"""The CUDA kernel of tangent_sum, run on the host, against the float64 reference."""

from __future__ import annotations

import math

import pytest
import torch
from cuda_on_cpu.client import Kernels, Out, Skewed
from helpers import assert_as_good_as_torch, assert_close32, assert_close64

from frog_cuda import reference

NAMES = {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@pytest.fixture(scope="module")
def kernels():
    kernels = Kernels("sum")
    yield kernels
    kernels.close()


@pytest.mark.parametrize("dtype", list(NAMES), ids=NAMES.get)
@pytest.mark.parametrize("skew", [False, True], ids=["aligned", "skewed"])
@pytest.mark.parametrize("shape, suffix", [((5, 33), (33,)), ((9, 64), (64,)), ((1025,), ()), ((2, 16), (2, 16)), ((7,), (7,))])
@pytest.mark.parametrize("k", [1, 3])
def test_equals_reference(kernels, dtype, skew, shape, suffix, k):
    def draw(*sizes):
        generator = torch.Generator().manual_seed(sum(sizes))
        return torch.randn(sizes, dtype=torch.float64, generator=generator).to(dtype)

    for given in ((), ("va",), ("b",), ("vb",), ("va", "b", "vb")):
        a = draw(k, *shape)
        others = {"va": draw(k, *suffix), "b": draw(k, *shape) + 1, "vb": draw(k, *suffix) - 1}
        va, b, vb = (others[name] if name in given else None for name in others)
        tensors = [Skewed(t) if skew and t is not None else t for t in (a, va, b, vb)]
        out = Out(tuple(a.shape), dtype, dtype.itemsize if skew else 0)
        period = math.prod(suffix)
        (got,) = kernels.run(f"sum_{NAMES[dtype]}", *tensors, out, math.prod(shape), period, period, k, -0.5)
        exact = reference.tangent_sum(a, va, b, vb, alpha=-0.5)
        if dtype == torch.float64:
            assert_close64(got, exact)
        elif dtype == torch.float32:
            assert_close32(got, exact)
        else:  # rounded once
            assert_as_good_as_torch(got, exact.to(dtype), exact)


def test_an_empty_batch_launches_nothing(kernels):
    out = Out((3, 0, 4))
    (got,) = kernels.run("sum_f32", torch.ones(3, 0, 4), torch.ones(3, 4), None, None, out, 0, 4, 1, 3, 1.0)
    assert got.shape == (3, 0, 4)
