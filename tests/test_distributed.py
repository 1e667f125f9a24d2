"""Tangents in parallel over gloo processes: the bits of a single process, and errors that name who is to blame.

The cases run in processes of their own, all cases of a world size in the same ones; a test looks up what became of its case.
"""

from __future__ import annotations

import functools
import logging
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from example_cases import EXAMPLES
from helpers import relative_error
from ranks import outcomes
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import frog_cuda as frog
from frog_cuda.distributed import TangentParallel
from frog_cuda.distributed.parallel import deal
from frog_cuda.experiments import models
from frog_cuda.tangents import Cone, Guided, LowRank, Piece

ROWS = 8


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return models.build("fc", (1, 6, 6), 5, width=24)


def data(step: int, rows: int = ROWS, shape=(1, 6, 6), classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, *shape, generator=generator)
    return x, torch.randint(0, classes, (rows,), generator=generator)


def double_data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = data(step)
    return x.double(), y


def estimator(model: nn.Module, **options) -> frog.ForwardGradient:
    return frog.ForwardGradient(model, nn.CrossEntropyLoss(reduction="none"), **({"k": 5, "seed": 3} | options))


def train(step, model: nn.Module, batch, steps: int = 3, lr: float = 0.05) -> list[torch.Tensor]:
    """Losses, and in the end parameters and buffers."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    losses = []
    for i in range(steps):
        optimizer.zero_grad()
        losses.append(step(*batch(i)))
        optimizer.step()
    return [*losses, *model.parameters(), *model.buffers()]


def same(make=net, batch=data, combine: str = "auto", steps: int = 3, bound: float = 0.0, **options) -> None:
    alone, model = make(), make(dist.get_rank())  # the ranks start with other weights, and get those of the first one
    fg = estimator(model, **options)
    parallel = TangentParallel(fg, combine=combine, check_every=1)
    found = train(parallel, model, batch, steps)
    expected = train(estimator(alone, **options), alone, batch, steps)
    errors = [relative_error(a, b) for a, b in zip(found, expected, strict=True)]
    assert max(errors) <= bound, f"{errors}"
    parallel.check()


def image_net(name: str, seed: int = 0, **sizes: int) -> nn.Module:
    torch.manual_seed(seed)
    return models.build(name, (3, 16, 16), 10, **sizes)


image_data = functools.partial(data, shape=(3, 16, 16), classes=10)


def case_weight():
    same(perturb="weight")


def case_weight_slices():
    same(perturb="weight", combine="slices")


def case_weight_replay_of_other_tangents():
    for tangents in ("rademacher", "sphere", "orthonormal", "standard_basis", "varying_length"):
        same(perturb="weight", combine="replay", tangents=tangents, steps=2)


def case_weight_slices_of_other_tangents():
    for tangents in ("rademacher", Cone(40)):
        same(perturb="weight", combine="slices", tangents=tangents, aggregate="mean", steps=2)


def case_low_rank_tangents_to_rounding():
    """Their factors are multiplied by the library, whose order of sums depends on how many there are."""
    for combine in ("replay", "slices"):
        same(lambda seed=0: net(seed).double(), double_data, combine, 2, 1e-12, perturb="weight", tangents=LowRank(2))


def case_guided_tangents():
    """The guides, on every rank; the random ones, in slices."""
    same(perturb="weight", k=3, tangents=Guided(2))
    same(perturb="weight", k=1, tangents=Guided(1), combine="slices")


def case_supplied_tangents_and_custom_aggregation():
    n = sum(p.numel() for p in net().parameters())
    tangents = torch.randn(5, n, generator=torch.Generator().manual_seed(1))
    same(perturb="weight", tangents=tangents)
    same(perturb="weight", aggregate=lambda v, d: d @ v)
    same(perturb="activity", aggregate=lambda v, d: d.T @ v)


def case_activity():
    same(perturb="activity")


def case_activity_of_the_batch():
    same(perturb="activity", per_sample=False)
    same(perturb="activity", shared_across_batch=False)
    same(perturb="activity", aggregate="mean", tangents="orthonormal")


def case_fewer_tangents_than_ranks():
    for perturb in ("weight", "activity"):
        same(perturb=perturb, k=1)
        same(perturb=perturb, k=dist.get_world_size() - 1)


def case_chunks():
    same(perturb="weight", k=7, chunk_size=2)
    same(perturb="activity", k=7, chunk_size=2)


def case_resnet():
    """Running statistics too, on ranks with and without tangents of their own."""
    make = functools.partial(image_net, "resnet18", width=8)
    for perturb in ("weight", "activity"):
        same(make, image_data, perturb=perturb, k=3, per_sample=False, steps=2)
        same(make, image_data, perturb=perturb, k=1, per_sample=False, steps=1)


def case_transformer():
    make = functools.partial(image_net, "vit", layers=1, width=32, hidden=32)
    for perturb in ("weight", "activity"):
        same(make, image_data, perturb=perturb, k=6, steps=1)


def case_dropout():
    def make(seed: int = 0) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 20), nn.ReLU(), nn.Dropout(0.5), nn.Linear(20, 5))

    for perturb in ("weight", "activity"):
        alone, model = make(), make()
        torch.manual_seed(5)
        found = train(TangentParallel(estimator(model, perturb=perturb)), model, data)
        torch.manual_seed(5)
        expected = train(estimator(alone, perturb=perturb), alone, data)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def case_update_in_place():
    for combine in ("replay", "slices"):
        alone, model = net(), net()
        parallel = TangentParallel(estimator(model, perturb="weight"), combine=combine)
        single = estimator(alone, perturb="weight")
        for step in range(3):
            for fg in (parallel, single):
                fg.derivatives(*data(step))
                fg.update_(0.01)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))


def case_update_with_momentum():
    """And the momentum is everyone's: any rank's state resumes any other's."""
    options = dict(momentum=0.9, weight_decay=0.01, nesterov=True)
    for combine in ("replay", "slices"):
        alone, model = net(), net()
        parallel = TangentParallel(estimator(model, perturb="weight"), combine=combine)
        single = estimator(alone, perturb="weight")
        for step in range(3):
            for fg in (parallel, single):
                fg.derivatives(*data(step))
                fg.update_(0.01, **options)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))
        found, expected = parallel.state_dict()["momentum"], single.state_dict()["momentum"]
        assert found.keys() == expected.keys() and all(torch.equal(found[n], t) for n, t in expected.items())


def case_a_loss_for_the_batch():
    alone, model = net(), net()
    options = {"k": 5, "seed": 3}
    for perturb in ("weight", "activity"):
        parallel = TangentParallel(frog.ForwardGradient(model, nn.CrossEntropyLoss(), perturb=perturb, **options))
        found = train(parallel, model, data)
        expected = train(frog.ForwardGradient(alone, nn.CrossEntropyLoss(), perturb=perturb, **options), alone, data)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def case_low_precision_tangents():
    same(perturb="weight", tangent_dtype=torch.bfloat16)
    same(perturb="activity", tangent_dtype=torch.bfloat16)


def case_subgroup_and_mesh_of_one_axis():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    groups = [dist.new_group([r]) for r in range(dist.get_world_size())]
    for options in ({"mesh": mesh}, {"group": groups[dist.get_rank()]}):
        alone, model = net(), net()
        found = train(TangentParallel(estimator(model, perturb="weight"), **options), model, data)
        expected = train(estimator(alone, perturb="weight"), alone, data)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def case_resumed():
    """State of one object taken on by another: the same steps as without a break."""
    alone, model = net(), net()
    first = TangentParallel(estimator(model))
    first(*data(0))
    other = TangentParallel(estimator(model, seed=8), check_every=None)
    other.load_state_dict(first.state_dict())
    other(*data(1))
    single = estimator(alone)
    for step in range(2):
        single(*data(step))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), alone.parameters(), strict=True))


# Data shards


def shards(options: dict, mesh: DeviceMesh, combine: str = "auto", rows: int = ROWS) -> None:
    """A mesh against a single process on the whole batch."""
    names = mesh.mesh_dim_names
    here, count = mesh.get_coordinate()[names.index("data")], mesh["data"].size()
    first = int(mesh.mesh.flatten()[0])  # whose parameters all get
    alone, model = net(first).double(), net(dist.get_rank()).double()
    parallel = TangentParallel(estimator(model, **options), mesh=mesh, combine=combine, check_every=1)
    single = estimator(alone, **options)
    for step in range(2):
        x, y = data(step, rows * count)
        x = x.double()
        for p in (*model.parameters(), *alone.parameters()):
            p.grad = None
        loss = parallel(x[here * rows :][:rows], y[here * rows :][:rows])
        expected = single(x, y)
        assert abs(loss - expected) < 1e-12
        for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
            assert (p.grad - q.grad).abs().max() <= 1e-10 * q.grad.abs().max(), f"step {step}, {name}"
    parallel.check()
    grads = torch.cat([p.grad.flatten() for p in model.parameters()])
    every = [torch.empty_like(grads) for _ in range(dist.get_world_size())]
    dist.all_gather(every, grads)
    assert all(torch.equal(every[0], other) for other in every)


def meshes() -> list[DeviceMesh]:
    world, names = dist.get_world_size(), ("data", "tangent")
    found = [init_device_mesh("cpu", (world, 1), mesh_dim_names=names)]
    if world == 4:
        found.append(init_device_mesh("cpu", (2, 2), mesh_dim_names=names))
        found.append(init_device_mesh("cpu", (2, 2), mesh_dim_names=names[::-1]))
        found.append(DeviceMesh("cpu", [[2, 0], [1, 3]], mesh_dim_names=names))
    return found


def case_data_shards_weight():
    for mesh in meshes():
        for combine in ("replay", "slices"):
            shards({"perturb": "weight"}, mesh, combine)
        shards({"perturb": "weight", "aggregate": "mean", "tangents": "rademacher"}, mesh)


def case_data_shards_activity():
    for mesh in meshes():
        shards({"perturb": "activity"}, mesh)
        shards({"perturb": "activity", "per_sample": False}, mesh)
        shards({"perturb": "activity", "per_sample": False, "aggregate": "mean"}, mesh)
        shards({"perturb": "activity", "scaling_correction": True}, mesh)


def case_buffers_of_the_first_shard():
    """What DistributedDataParallel does: each step starts with the first shard's running statistics."""

    def make(seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 5))

    world, rank = dist.get_world_size(), dist.get_rank()
    model, first = make(), make()
    parallel = TangentParallel(
        estimator(model, perturb="weight"), mesh=init_device_mesh("cpu", (world, 1), mesh_dim_names=("data", "tangent"))
    )
    other = estimator(first, perturb="weight")
    for step in range(3):
        x, y = data(step, ROWS * world)
        parallel.derivatives(x[rank * ROWS :][:ROWS], y[rank * ROWS :][:ROWS])
        other.derivatives(x[:ROWS], y[:ROWS])
        seen = [b.clone() for b in first.buffers()]
        if rank == 0:
            assert all(torch.equal(a, b) for a, b in zip(model.buffers(), seen, strict=True))
    before = [b.clone() for b in first.buffers()]
    parallel._share_buffers()
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))


def case_data_shards_refuse():
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("data", "tangent"))
    with pytest.raises(ValueError, match="shared_across_batch=False draws tangents by row"):
        TangentParallel(estimator(net(), shared_across_batch=False), mesh=mesh)
    with pytest.raises(ValueError, match="custom aggregation of activities"):
        TangentParallel(estimator(net(), aggregate=lambda v, d: d.T @ v), mesh=mesh)


# Errors


def raises(error: type[Exception], match: str, run) -> None:
    with pytest.raises(error, match=match):
        run()


def case_other_arguments():
    rank = dist.get_rank()
    for options, match in (
        ({"k": 5 + (rank == 1)}, "k differs between rank 0 and rank 1: 5 and 6"),
        ({"seed": -rank}, "seed differs between rank 0 and rank 1: 0 and -1"),
        ({"aggregate": "mean" if rank else "sum"}, "aggregate differs between rank 0 and rank 1"),
        ({"tangents": "sphere" if rank else "normal"}, "tangents differs between rank 0 and rank 1"),
        ({"per_sample": rank == 0}, "an option of fg differs between rank 0 and rank 1"),
    ):
        raises(ValueError, match, lambda options=options: TangentParallel(estimator(net(), **options)))
    wide = models.build("fc", (1, 6, 6), 5, width=24 + rank)
    raises(ValueError, "the parameters differs between rank 0 and rank 1", lambda: TangentParallel(estimator(wide)))
    raises(ValueError, "an option of TangentParallel", lambda: TangentParallel(estimator(net()), check_every=rank + 1))


def case_other_seed_or_step_later():
    for key, match in (("seed", "the seed differs among the ranks: from 7 to 8"), ("step", "the step differs")):
        model = net()
        parallel = TangentParallel(estimator(model), check_every=None)
        other = {"seed": 7, "step": 7} | {key: 7 + (dist.get_rank() == 1)}
        raises(ValueError, f"{key} differs between rank 0 and rank 1: 7 and 8", lambda: parallel.load_state_dict(other))  # noqa: B023
        assert parallel.state_dict() == {"seed": 3, "step": 0}
        parallel.fg.load_state_dict(other)
        raises(ValueError, match, lambda: parallel(*data(0)))  # noqa: B023
        assert all(p.grad is None for p in model.parameters())


def case_other_batches():
    parallel = TangentParallel(estimator(net()))
    raises(ValueError, "the number of rows differs", lambda: parallel(*data(0, ROWS + (dist.get_rank() == 1))))
    raises(ValueError, "the loss is .* on rank 0 but .* on rank 1", lambda: parallel(*data(dist.get_rank())))
    parallel(*data(0))  # and the ranks are together again


def case_one_rank_raises():
    """Its own error there, its number in the others' errors; the next step works."""
    for perturb in ("weight", "activity"):
        model = net()
        parallel = TangentParallel(estimator(model, perturb=perturb))
        x, y = data(0)
        if dist.get_rank() == 1:
            with pytest.raises(FloatingPointError, match="the loss"):
                parallel(x * float("nan"), y)
            with pytest.raises(RuntimeError, match="mat1|shape|size"):
                parallel(x[..., 1:], y)
        else:
            for _ in range(2):
                with pytest.raises(RuntimeError, match="rank 1 raised an error in step 0"):
                    parallel(x, y)
        assert parallel.fg.step == 0 and all(p.grad is None for p in model.parameters())
        parallel(x, y)


def case_changed_parameters():
    model = net()
    parallel = TangentParallel(estimator(model), check_every=2)
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.second.bias[3] += 1e-6
    match = r"at step 0 parameters differ among the ranks: second\.bias on rank 1"
    raises(RuntimeError, match, lambda: parallel(*data(0)))
    raises(RuntimeError, match, parallel.check)


def case_checks_every_so_many_steps():
    model = net()
    parallel = TangentParallel(estimator(model), check_every=2)
    parallel(*data(0))
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.last.bias[0] += 1e-6
    parallel(*data(1))
    raises(RuntimeError, r"at step 2 .* last\.bias on rank 1", lambda: parallel(*data(2)))


def case_the_rule_is_told_once():
    records: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    logger = logging.getLogger("frog_cuda.distributed")
    logger.addHandler(handler := Handler())
    logger.setLevel(logging.INFO)
    parallel = TangentParallel(estimator(net(), perturb="weight"))
    assert parallel.rule is None
    for step in range(3):
        parallel(*data(step))
    logger.removeHandler(handler)
    assert parallel.rule is not None and parallel.rule.startswith("combine='") and "ms" in parallel.rule
    assert records == ([parallel.rule] if dist.get_rank() == 0 else [])
    rules: list = [None] * dist.get_world_size()
    dist.all_gather_object(rules, parallel.rule)
    assert len(set(rules)) == 1


def case_bytes_of_a_step():
    """By the kernel's count of what this process's connections have sent. More ranks send more; two would show nothing else."""
    if dist.get_world_size() == 2:
        return
    sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
    from sockets import bytes_sent, sent_since

    before = bytes_sent()
    dist.all_reduce(torch.zeros(1 << 18))
    assert 1 << 20 <= sent_since(before) < 1 << 21  # the count sees what is there
    model = image_net("resnet18")
    assert sum(p.numel() for p in model.parameters()) > 11e6
    fg = estimator(model, k=16, perturb="weight", tangents="rademacher")
    parallel = TangentParallel(fg, combine="replay", check_every=None)
    for step in range(2):
        before = bytes_sent()
        parallel.derivatives(*image_data(step, rows=2))
        parallel.update_(0.01)
        dist.barrier()
        assert 16 * 8 < sent_since(before) < 16 * 1024, sent_since(before)


CASES = [case for name, case in sorted(globals().items()) if name.startswith("case_")]


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
