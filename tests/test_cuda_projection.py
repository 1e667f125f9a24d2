"""The CUDA kernel of cholesky_project, run on the host, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from cuda_on_cpu.client import Kernels, Out
from helpers import assert_close64

from frog_cuda import reference


@pytest.fixture(scope="module")
def kernels():
    kernels = Kernels("projection")
    yield kernels
    kernels.close()


def run(kernels, gram, d, rtol=1e-10, seed=0):
    b, k, r = d.shape
    work = Out((b, k, k), torch.float64) if k > 128 else None
    results = kernels.run(
        "cholesky_project", gram, d, work, Out((b, k, r), torch.float64), Out((b,), torch.int64), b, k, r, rtol, seed=seed
    )
    return results[-2:]


def gram_of(b, k, n, generator):
    v = torch.randn(b, k, n, dtype=torch.float64, generator=generator)
    return v @ v.mT


@pytest.mark.parametrize("b,k,r", [(1, 1, 1), (3, 7, 2), (2, 33, 33), (1, 16, 300), (1, 64, 1), (1, 130, 3), (2, 5, 0)])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_reference(kernels, b, k, r, seed):
    generator = torch.Generator().manual_seed(k)
    gram = gram_of(b, k, k + 20, generator)
    d = torch.randn(b, k, r, dtype=torch.float64, generator=generator)
    c, rank = run(kernels, gram, d, seed=seed)
    expected, expected_rank = reference.cholesky_project(gram, d, rtol=1e-10)
    assert_close64(c, expected)
    assert rank.tolist() == expected_rank.tolist()


@pytest.mark.parametrize("r", [1, 40])
def test_dependent_tangents_are_dropped(kernels, r):
    generator = torch.Generator().manual_seed(r)
    gram = gram_of(2, 9, 4, generator)
    v = torch.randn(2, 9, r, dtype=torch.float64, generator=generator)
    c, rank = run(kernels, gram, gram @ v)
    assert rank.tolist() == [4, 4]
    assert_close64(gram @ c, gram @ v)
    assert ((c != 0).sum(1) == 4).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("r", [1, 40])
def test_a_matrix_that_is_none_gives_nan(kernels, bad, r):
    gram = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    gram[1, 2, 2] = bad
    c, rank = run(kernels, gram, torch.ones(2, 3, r, dtype=torch.float64))
    assert rank.tolist() == [3, -1]
    assert (c[0] == 1).all() and c[1].isnan().all()


def test_zero_tangents(kernels):
    gram = torch.zeros(1, 3, 3, dtype=torch.float64)
    c, rank = run(kernels, gram, torch.zeros(1, 3, 2, dtype=torch.float64))
    assert rank.tolist() == [0] and (c == 0).all()
