"""Training by several processes against a single one, as cases for the processes of test_distributed.py."""

from __future__ import annotations

import functools
import logging
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import relative_error
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import frog_cuda as frog
from frog_cuda import SeedLog
from frog_cuda.distributed import TangentParallel
from frog_cuda.experiments import models
from frog_cuda.tangents import Cone, Guided, LowRank

ROWS = 8


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return models.build("fc", (1, 6, 6), 5, width=24)


def data(step: int, rows: int = ROWS, shape=(1, 6, 6), classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, *shape, generator=generator)
    return x, torch.randint(0, classes, (rows,), generator=generator)


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


def case_low_rank_tangents():
    for rank in (1, 2):
        for combine in ("replay", "slices"):
            same(combine=combine, steps=2, perturb="weight", tangents=LowRank(rank))
    same(functools.partial(image_net, "lenet5"), image_data, steps=1, perturb="weight", tangents=LowRank(1))


def case_few_rows():
    """Libraries multiply fewer than 8 rows in another order."""
    for rows in (1, 3):
        for perturb in ("weight", "activity"):
            same(batch=functools.partial(data, rows=rows), perturb=perturb, steps=2)


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


def case_seed_log():
    """Each rank makes the update of its own log, one of which is kept: the same bits on all, and again in a replay. In float64,
    where an update that is written down has coefficients of fewer bits than another."""
    for combine in ("auto", "slices"):
        model, twin = net().double(), net().double()
        parallel = TangentParallel(estimator(model, perturb="weight"), combine=combine, check_every=1)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "log") if dist.get_rank() == 0 else os.devnull
            with SeedLog(path, parallel.fg) as log:
                for step in range(4):
                    x, y = data(step)
                    parallel.derivatives(x.double(), y)
                    log.update_(0.1)
            parallel.check()
            if dist.get_rank() == 0:
                assert SeedLog.replay(path, twin) == 4
                assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


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
