"""Tensor-core steps on the host: fragments against a matrix product, sums that are cut off, matrices from shared memory."""

from __future__ import annotations

import pytest
import torch
from cuda_on_cpu.client import Kernels, Out
from helpers import assert_close64

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module")
def kernels():
    kernels = Kernels("mma")
    yield kernels
    kernels.close()


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("seed", range(3))
def test_step_is_a_matrix_product(kernels, name, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b, c = (torch.randn(shape, generator=generator) for shape in ((16, 16), (8, 16), (16, 8)))
    a, b = a.to(TYPES[name]), b.to(TYPES[name])
    (out,) = kernels.run(f"step_{name}", a, b, c, Out((16, 8)), seed=seed)
    exact = c.double() + a.double() @ b.double().T
    last_bit = torch.finfo(torch.float32).eps * exact.abs()
    assert ((out.double() - exact).abs() <= last_bit).all()
    assert (out.double().abs() <= exact.abs()).all(), "sums are cut off, not rounded"
    assert (out.double() != exact).any()


@pytest.mark.parametrize("name", TYPES)
def test_values_that_are_not_finite_stay_in_their_row(kernels, name):
    a, b, c = torch.ones(16, 16), torch.ones(8, 16), torch.zeros(16, 8)
    a[3, 5], a[11, 0] = float("nan"), float("-inf")
    (out,) = kernels.run(f"step_{name}", a.to(TYPES[name]), b.to(TYPES[name]), c, Out((16, 8)))
    assert out[3].isnan().all() and (out[11] == -torch.inf).all()
    assert (out[[i for i in range(16) if i not in (3, 11)]] == 16).all()


def test_float64_step_is_a_matrix_product(kernels):
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((8, 4), (8, 4), (8, 8)))
    (out,) = kernels.run("step_double", a, b, c, Out((8, 8), torch.float64))
    assert_close64(out, c + a @ b.T, 1e-15)


def test_bit_step_counts_shared_bits(kernels):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-(2**31), 2**31, (8, 4), generator=generator).int() for _ in range(2))
    c = torch.arange(64, dtype=torch.int32).view(8, 8)
    (out,) = kernels.run("step_bits", a, b, c, Out((8, 8), torch.int32))
    bits = [(((w[..., None] >> torch.arange(32)) & 1).flatten(1)).double() for w in (a, b)]
    assert torch.equal(out, c + (bits[0] @ bits[1].T).int())


def test_matrices_from_shared_memory(kernels):
    matrices = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    (out,) = kernels.run("matrices", matrices, Out((8, 4, 4, 2), torch.int16))  # [g, t, matrix, element]
    assert torch.equal(out, matrices.view(4, 8, 4, 2).permute(1, 2, 0, 3))
    (out,) = kernels.run("matrices_transposed", matrices, Out((8, 4, 4, 2), torch.int16))
    assert torch.equal(out, matrices.mT.reshape(4, 8, 4, 2).permute(1, 2, 0, 3))
