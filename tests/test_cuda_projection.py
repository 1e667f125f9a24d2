"""The CUDA kernel of cholesky_project, run on the host, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from cuda_on_cpu.client import SMALLEST_SHARED, Kernels, Out
from helpers import assert_close64

from frog_cuda import reference


@pytest.fixture(scope="module")
def kernels():
    kernels = Kernels("projection")
    yield kernels
    kernels.close()


def run(kernels, gram, d, rtol=1e-10, seed=0, shared=SMALLEST_SHARED):
    b, k, r = d.shape
    matrix_shared, _, _ = plan(kernels, k, shared)
    work = None if matrix_shared else Out((b, k, k), torch.float64)
    arguments = gram, d, work, Out((b, k, r), torch.float64), Out((b,), torch.int64), b, k, r, rtol
    return kernels.run("cholesky_project", *arguments, seed=seed, shared=shared)[-2:]


def plan(kernels, k, shared=SMALLEST_SHARED):
    """Whether the matrix lies in shared memory, how many warps solve, and the bytes of shared memory."""
    return kernels.run("projection_plan", Out((3,), torch.int64), k, shared=shared)[0].tolist()


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


@pytest.mark.parametrize("k,shared,expected", [
    (107, SMALLEST_SHARED, (1, 8)),
    (108, SMALLEST_SHARED, (0, 8)),
    (128, SMALLEST_SHARED, (0, 8)),
    (128, 163 * 1024, (1, 8)),
    (129, 163 * 1024, (0, 8)),
    (1333, SMALLEST_SHARED, (0, 8)),
    (1334, SMALLEST_SHARED, (0, 7)),
    (2048, SMALLEST_SHARED, (0, 4)),
    (2048, 163 * 1024, (0, 8)),
])  # fmt: skip
def test_shared_memory_is_what_the_device_has(kernels, k, shared, expected):
    """The emulation ends a launch that asks for more. Two matrices of rank 3, whose factors have few columns."""
    assert tuple(plan(kernels, k, shared)[:2]) == expected
    generator = torch.Generator().manual_seed(k)
    gram = gram_of(2, k, 3, generator)
    d = gram @ torch.randn(2, k, 11, dtype=torch.float64, generator=generator)
    c, rank = run(kernels, gram, d, shared=shared)
    assert rank.tolist() == [3, 3]
    assert_close64(gram @ c, d)


def test_every_number_of_tangents_fits_the_smallest_device(kernels):
    for k in [*range(1, 140), *range(140, 2048, 61), 2048]:
        assert plan(kernels, k)[2] <= SMALLEST_SHARED


@pytest.mark.parametrize("solvers", range(1, 8))
def test_few_warps_solve_as_all_do(kernels, solvers):
    """On devices of ever less shared memory: the same bits."""
    generator = torch.Generator().manual_seed(solvers)
    gram = gram_of(2, 33, 50, generator)
    d = torch.randn(2, 33, 9, dtype=torch.float64, generator=generator)
    shared = 33 * 8 + 8 + 36 * 4 + solvers * 33 * 8
    assert plan(kernels, 33, shared) == [0, solvers, shared]
    for few, all_of_them in zip(run(kernels, gram, d, shared=shared), run(kernels, gram, d), strict=True):
        assert torch.equal(few, all_of_them)


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
