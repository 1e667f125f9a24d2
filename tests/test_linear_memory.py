"""Where the arguments and results of linear_jvp lie in memory."""

from __future__ import annotations

import gc

import pytest
import torch
from helpers import assert_close32
from test_linear import SAMPLED, arguments, check, expected, randn
from torch import Tensor

from frog_cuda import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_non_contiguous_arguments(dtype):
    mix = dict(dx=True, weight="given", bias="given", activity="rows")
    given = arguments(3, (2, 5, 7), 9, dtype, **mix)
    plain = ops.linear_jvp(**given)
    names = [name for name, t in given.items() if isinstance(t, Tensor)]
    for chosen in [[name] for name in names] + [names]:
        for twist in (
            lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
            lambda t: torch.stack([t, t + 1], -1)[..., 0],
            lambda t: t.flip(0).flip(0),
        ):
            twisted = given | {name: twist(given[name]) for name in chosen}
            for actual, wanted in zip(ops.linear_jvp(**twisted), plain):
                torch.testing.assert_close(actual, wanted, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-6)
    expanded = given | dict(dx=given["dx"][:1].expand(3, 2, 5, 7), bias=given["bias"][:1].expand(9))
    check(expanded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_x_and_dx_that_are_neighbours_in_memory(dtype):
    """As linear_jvp leaves y and dy for the next layer, which then multiplies both at once."""
    k, rows, size = 3, 5, 7
    memory = randn(1 + k, rows, size, dtype=dtype)
    for mix in (dict(), SAMPLED, dict(weight="given", bias="given", activity="rows")):
        given = arguments(k, (rows, size), 9, dtype, **mix)
        neighbours = check(given | dict(x=memory[0], dx=memory[1:]))
        apart = ops.linear_jvp(**given | dict(x=memory[0].clone(), dx=memory[1:].clone()))
        for a, b in zip(neighbours, apart):
            torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-6)


def test_arguments_that_start_within_their_storage():
    def inner(t: Tensor) -> Tensor:
        return torch.cat([t[None] + 1, t[None]])[1]

    given = arguments(3, (5, 7), 9, torch.float64, dx=True, weight="given", bias="given", activity="rows")
    moved = {name: inner(value) if isinstance(value, Tensor) else value for name, value in given.items()}
    assert moved["x"].storage_offset() > 0
    check(moved)


def test_a_chain_of_layers_gives_neighbours():
    y, dy, _ = ops.linear_jvp(**arguments(3, (5, 7), 9, torch.float32, **SAMPLED))
    assert y.data_ptr() + y.nbytes == dy.data_ptr()
    given = arguments(3, (5, 9), 4, torch.float32)
    check(given | dict(x=y, dx=dy))


def test_results_share_memory_with_nothing():
    given = arguments(3, (5, 7), 9, torch.float32, dx=True, **SAMPLED)
    kept = {name: t.clone() for name, t in given.items() if isinstance(t, Tensor)}
    y, dy, gram = ops.linear_jvp(**given)
    storages = {t.untyped_storage().data_ptr() for t in given.values() if isinstance(t, Tensor)}
    assert not storages & {t.untyped_storage().data_ptr() for t in (y, dy, gram)}
    assert y._base is None and dy._base is None
    before = dy.clone()
    y.fill_(float("nan"))
    assert torch.equal(dy, before)
    dy.zero_()
    assert y.isnan().all()
    for name, t in kept.items():
        assert torch.equal(given[name], t)


@pytest.mark.parametrize("survivor", [0, 1])
def test_one_result_outlives_the_other(survivor):
    """Both lie in one allocation, which must last as long as either."""
    given = arguments(3, (33, 70), 90, torch.float32, dx=True, **SAMPLED)
    exact = expected(given)[survivor]
    kept = [ops.linear_jvp(**given)[survivor] for _ in range(20)]
    gc.collect()
    for _ in range(20):
        torch.full((4, 33, 90), float("nan"))  # takes what was freed too early
    for t in kept:
        assert_close32(t, exact)
    view = kept.pop()[..., :3]
    del kept
    gc.collect()
    assert_close32(view.contiguous(), exact[..., :3])
