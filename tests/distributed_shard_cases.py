"""Data shards against a single process on the whole batch, as cases for the processes of test_distributed.py."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from distributed_cases import ROWS, data, estimator, net
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from frog_cuda.distributed import TangentParallel


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
