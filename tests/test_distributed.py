"""Tangents in parallel over gloo processes: the bits of a single process, and errors that name who is to blame.

The cases run in processes of their own, all cases of a world size in the same ones; a test looks up what became of its case.
"""

from __future__ import annotations

import functools
import os

import distributed_cases
import distributed_error_cases
import distributed_shard_cases
import pytest
import torch.distributed as dist
from distributed_cases import data, estimator, net, same
from example_cases import EXAMPLES
from ranks import outcomes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from frog_cuda.distributed import TangentParallel
from frog_cuda.distributed.parallel import deal
from frog_cuda.tangents import Piece

CASES = [
    case
    for module in (distributed_cases, distributed_error_cases, distributed_shard_cases)
    for name, case in sorted(vars(module).items())
    if name.startswith("case_")
]


@functools.cache
def ran(world: int) -> dict[str, str]:
    return outcomes(world, [*CASES, *EXAMPLES[world]])


@pytest.mark.parametrize(
    ("world", "case"),
    [(world, case) for world in EXAMPLES for case in (*CASES, *EXAMPLES[world])],
    ids=lambda v: v.__name__.removeprefix("case_") if callable(v) else str(v),
)
def test_processes(world, case):
    assert not (failure := ran(world)[case.__name__]), failure


def one():
    pass


def dies_at_the_end():
    dist.destroy_process_group = lambda: os._exit(3)


def test_a_process_that_dies_after_the_last_case_fails_it():
    assert outcomes(1, [one]) == {"one": ""}
    found = outcomes(1, [one, dies_at_the_end])
    assert found["one"] == "" and "a process ended early: process 0 terminated with exit code 3" in found["dies_at_the_end"]


# In this process


@pytest.fixture
def alone(tmp_path):
    """A group of this process only."""
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_group_of_one(alone):
    same(perturb="weight")
    same(perturb="activity")
    parallel = TangentParallel(estimator(net()))
    parallel(*data(0))
    assert parallel.last is parallel.fg.last is not None


class Borrows(nn.Module):
    """Uses the weights of ``inner`` without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, x):
        return self.last(nn.functional.linear(x, self.inner.weight))


def test_warnings_show_the_line_of_the_call(alone):
    x, y = data(0, shape=(4,))
    with pytest.warns(UserWarning, match="inner were not called") as caught:
        TangentParallel(estimator(Borrows()))(x, y)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="inner were not called") as caught:
        TangentParallel(estimator(Borrows())).derivatives(x, y)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (dict(combine="sum"), ValueError, "combine is 'sum'; accepted are 'auto', 'replay' and 'slices'"),
        (dict(combine="slices"), ValueError, "combine is 'slices'; perturbed activities take"),
        (dict(check_every=0), ValueError, "check_every is 0"),
        (dict(check_every=1.5), TypeError, "check_every is 1.5"),
        (dict(timeout=0), ValueError, "timeout is 0"),
        (dict(timeout="60"), ValueError, "timeout is '60'"),
        (dict(mesh="cpu"), TypeError, "mesh is of type str"),
        (dict(group=3), TypeError, "group is of type int; expected a torch.distributed.ProcessGroup"),
        (dict(group=dist.GroupMember.NON_GROUP_MEMBER), RuntimeError, "this process, rank 0, is not part of the group"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_bad_arguments(alone, options, error, match):
    with pytest.raises(error, match=match):
        TangentParallel(estimator(net()), **options)


def test_bad_meshes(alone):
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "model"))
    with pytest.raises(ValueError, match=r"mesh has axes \('data', 'model'\)"):
        TangentParallel(estimator(net()), mesh=mesh)
    with pytest.raises(ValueError, match="mesh has axes 3"):
        TangentParallel(estimator(net()), mesh=init_device_mesh("cpu", (1, 1, 1)))
    with pytest.raises(ValueError, match="mesh and group were both given"):
        TangentParallel(estimator(net()), mesh=init_device_mesh("cpu", (1,)), group=dist.group.WORLD)


def test_before_there_is_a_group():
    with pytest.raises(RuntimeError, match="there is no process group; start with torchrun"):
        TangentParallel(estimator(net()))
    with pytest.raises(TypeError, match="fg is of type Linear"):
        TangentParallel(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_parts_are_nearly_equal():
    pieces = [Piece(str(i), (n,), 10 * i) for i, n in enumerate((5, 1, 9, 3, 3, 0, 7))]
    parts = deal(pieces, 3)
    assert sorted(p.name for part in parts for p in part) == sorted(p.name for p in pieces)
    assert [sum(p.numel for p in part) for part in parts] == [9, 10, 9]
    assert [len(part) for part in deal(pieces[:2], 4)] == [1, 1, 0, 0]
