"""The CUDA kernels of embedding_jvp, run on the host, against the CPU's draws bit for bit."""

from __future__ import annotations

import pytest
import torch
from cuda_on_cpu.client import Kernels
from cuda_on_cpu.pairs import NAMES, given, randn, result

from frog_cuda import ops

INDICES = torch.tensor([3, 0, 10, 3, 3, 7])
ROWS, K, FIRST = 11, 3, 2
DTYPES = pytest.mark.parametrize("dtype", list(NAMES), ids=NAMES.get)
DISTRIBUTIONS = pytest.mark.parametrize("distribution", ops.DISTRIBUTIONS)


@pytest.fixture(scope="module")
def kernels():
    kernels = Kernels("embedding")
    yield kernels
    kernels.close()


def look_up(kernels, tables, indices, skew=False, seed=0):
    count, rows, dim = tables.shape
    out = result((count, len(indices), dim), tables.dtype, skew)
    arguments = (*given((tables, indices), skew), out, count, rows, dim, len(indices))
    return kernels.run(f"look_up_{NAMES[tables.dtype]}", *arguments, seed=seed)[0]


def draw_rows(kernels, state, indices, dim, dtype, offset, distribution, k=K, rows=ROWS, skew=False, seed=0):
    out = result((k, len(indices), dim), dtype, skew)
    code = ops.DISTRIBUTIONS[distribution]
    numbers = (k, rows, dim, len(indices), offset, FIRST, code)
    return kernels.run(f"draw_rows_{NAMES[dtype]}", state, indices, out, *numbers, seed=seed)[0]


def state_for(distribution, dim, offset):
    coordinates = [0, 1, offset + 3 * dim, offset + 4 * dim - 1, offset + 5 * dim]
    return torch.tensor(coordinates) if distribution == "standard_basis" else torch.tensor([5, 9])


@DTYPES
@pytest.mark.parametrize("skew", [False, True], ids=["aligned", "skewed"])
@pytest.mark.parametrize("dim", [1, 8, 33, 520])
@pytest.mark.parametrize("count", [1, 5])
def test_look_up(kernels, dtype, skew, dim, count):
    tables = randn(count, ROWS, dim, dtype=dtype)
    assert torch.equal(look_up(kernels, tables, INDICES, skew), tables[:, INDICES])


@DTYPES
@DISTRIBUTIONS
@pytest.mark.parametrize("skew", [False, True], ids=["aligned", "skewed"])
@pytest.mark.parametrize("dim, offset", [(64, 128), (33, 0), (130, 1021)])
def test_drawn_rows_are_the_cpus(kernels, dtype, distribution, skew, dim, offset):
    state = state_for(distribution, dim, offset)
    drawn = draw_rows(kernels, state, INDICES, dim, dtype, offset, distribution, skew=skew)
    options = dict(offset=offset, first=FIRST, distribution=distribution, dtype=dtype)
    whole = ops.sample_tangents(state, K, ROWS * dim, **options).view(K, ROWS, dim)
    assert torch.equal(drawn, whole[:, INDICES])


@DISTRIBUTIONS
@pytest.mark.parametrize("dim", [1, 2, 63, 64, 65, 127, 1024, 1500])
@pytest.mark.parametrize("offset", [0, 1, 63, 960])
def test_every_way_of_touching_groups(kernels, distribution, dim, offset):
    state = state_for(distribution, dim, offset)
    drawn = draw_rows(kernels, state, INDICES, dim, torch.float32, offset, distribution)
    whole = ops.sample_tangents(state, K, ROWS * dim, offset=offset, first=FIRST, distribution=distribution)
    assert torch.equal(drawn, whole.view(K, ROWS, dim)[:, INDICES])


def test_an_index_that_is_no_row_gives_nan(kernels):
    indices, wrong = torch.tensor([-1, 2, 11, 10, 2**40]), [True, False, True, False, True]
    for dim in (5, 64):
        tables = randn(2, ROWS, dim, dtype=torch.float32)
        found = look_up(kernels, tables, indices).isnan()
        assert torch.equal(found, torch.tensor(wrong)[None, :, None].expand_as(found))
        for distribution in ops.DISTRIBUTIONS:
            state = state_for(distribution, dim, 0)
            found = draw_rows(kernels, state, indices, dim, torch.float32, 0, distribution).isnan()
            assert torch.equal(found, torch.tensor(wrong)[None, :, None].expand_as(found))


def test_what_a_state_must_not_hold_gives_nan(kernels):
    for step in (-1, 2**32):
        assert draw_rows(kernels, torch.tensor([1, step]), INDICES, 65, torch.float32, 0, "normal").isnan().all()
    state = torch.tensor([0, 0, 3, -1, 5])
    found = draw_rows(kernels, state, INDICES, 65, torch.float32, 0, "standard_basis").isnan()
    assert found[1].all() and not found[0].any() and not found[2].any()


def test_the_same_bits_in_any_order_of_threads(kernels):
    state = torch.tensor([1, 2])
    first, *others = [draw_rows(kernels, state, INDICES, 70, torch.float32, 5, "normal", seed=s) for s in (0, 1, 2)]
    assert all(torch.equal(first, other) for other in others)


def test_nothing_to_look_up(kernels):
    none = INDICES[:0]
    assert look_up(kernels, randn(2, ROWS, 4), none).shape == (2, 0, 4)
    assert draw_rows(kernels, torch.tensor([1, 2]), none, 4, torch.float32, 0, "normal").shape == (K, 0, 4)
