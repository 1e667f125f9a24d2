"""The examples, with small settings, as cases for the processes of test_distributed.py."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import frog_cuda as frog

FOLDER = Path(__file__).parents[1] / "examples"


def losses(folder: Path) -> list[float]:
    return [float.fromhex(line.split()[1]) for line in (folder / "losses.txt").read_text().splitlines()]


def case_training():
    """Four processes, with and without data shards, against one."""
    sys.path.append(str(FOLDER))
    import train_digits

    base = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(base)
    small = ["--steps", "4", "--k", "5", "--batch", "32", "--checkpoint-every", "2", "--width"]

    def train(name: str, *more: str) -> Path:
        options = train_digits.parse(["--folder", str(Path(base[0], name)), *small, *more])
        options.folder.mkdir(exist_ok=True)
        train_digits.train(options)
        dist.barrier()
        return options.folder

    for name, more in (
        ("fc", ["16"]),
        ("weight", ["16", "--perturb", "weight"]),
        ("resnet18", ["4", "--model", "resnet18"]),  # its rows have tangents of their own, which do not go with shards
        ("resnet18-weight", ["4", "--model", "resnet18", "--perturb", "weight"]),
    ):
        several = train(name, *more)
        sharded = train(f"{name}-shards", *more, "--data-shards", "2") if name != "resnet18" else None
        if dist.get_rank() == 0:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(dist, "is_initialized", lambda: False)
                patch.setattr(dist, "barrier", lambda: None)
                alone = train(f"{name}-alone", *more)
            assert len(losses(several)) == 4 and losses(several) == losses(alone)
            if sharded is not None and "resnet18" not in name:  # BatchNorm normalises each shard by itself
                assert losses(sharded) == pytest.approx(losses(alone), rel=1e-3)
        dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(base[0])


def case_pipeline():
    """One step of two stages against a single process, to rounding; then training."""
    sys.path.append(str(FOLDER))
    import pipeline

    rank, k = dist.get_rank(), 7
    parts = pipeline.stages(width=12, seed=3)
    whole = nn.Sequential(*(layer for part in pipeline.stages(width=12, seed=3) for layer in part))
    x, y = torch.randn(10, 64, generator=torch.Generator().manual_seed(0)), torch.arange(10)
    fg = frog.ForwardGradient(whole, nn.CrossEntropyLoss(), k=k, perturb="weight", seed=9)
    offset = sum(p.numel() for p in parts[0].parameters()) if rank else 0
    stage = pipeline.Stage(parts[rank], offset, 12 if rank else None, k=k, seed=9)
    own = [p for layer in list(whole)[4 * rank : 4 * rank + len(parts[rank])] for p in layer.parameters()]
    for number, sizes in enumerate(([10], [4, 4, 2])):
        for p in (*own, *stage.module.parameters()):
            p.grad = None
        expected = fg(x, y)
        loss = stage.step(x.split(sizes) if rank == 0 else None, y.split(sizes) if rank else None, sizes, number)
        assert abs(loss - expected) < 1e-6
        for p, q in zip(stage.module.parameters(), own, strict=True):
            assert (p.grad - q.grad).abs().max() <= 1e-5 * q.grad.abs().max()
    losses = pipeline.main(["--steps", "30", "--k", "32", "--micro-batches", "3"])
    assert losses[-1] < 0.8 * losses[0]


#: by the number of processes that they are for
EXAMPLES = {2: [case_pipeline], 4: [case_training]}
