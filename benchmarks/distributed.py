"""One process against several, each on a core of its own: the rate of TangentParallel, and what a step sends.

    python benchmarks/distributed.py --processes 2 --batch 32

A single process and all of them take turns in one run; figures are medians over the rounds. DistributedDataParallel shows what
a step of backprop costs on the same connection; each rank has a batch of its own there.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sockets import bytes_sent, sent_since
from torch import Tensor, nn

import frog_cuda as frog
from frog_cuda.distributed import TangentParallel
from frog_cuda.experiments import models

Step = Callable[[], Any]


def seconds(step: Step, together: bool) -> float:
    """Until every rank is done; where not together, the first rank works and the others wait."""
    dist.barrier()
    begin = time.perf_counter()
    if together or dist.get_rank() == 0:
        step()
    dist.barrier()
    return time.perf_counter() - begin


def steps(options: argparse.Namespace) -> dict[str, Step]:
    """What is compared: name -> one step."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(options.batch, 3, 32, 32, generator=generator)
    y = torch.randint(0, 10, (options.batch,), generator=generator)

    def model() -> nn.Module:
        torch.manual_seed(0)
        return models.build(options.model, (3, 32, 32), 10, **({} if options.width is None else {"width": options.width}))

    def estimator(m: nn.Module) -> frog.ForwardGradient:
        loss = nn.CrossEntropyLoss(reduction="none")
        return frog.ForwardGradient(m, loss, k=options.k, perturb=options.perturb, tangents=options.tangents)

    def without_grad(m: nn.Module, step: Callable[[Tensor, Tensor], Any]) -> Step:
        def run() -> None:
            m.zero_grad()
            step(x, y)

        return run

    single, shared, alone, both = model(), model(), model(), model()
    parallel = TangentParallel(estimator(shared), combine=options.combine, check_every=None)
    replicated = nn.parallel.DistributedDataParallel(both)
    criterion = nn.CrossEntropyLoss()
    options.parallel = parallel
    options.parameters = sum(p.numel() for p in single.parameters())
    return {
        "one process": without_grad(single, estimator(single)),
        "TangentParallel": without_grad(shared, parallel),
        "backprop": without_grad(alone, lambda x, y: criterion(alone(x), y).backward()),
        "DistributedDataParallel": without_grad(both, lambda x, y: criterion(replicated(x), y).backward()),
    }


TOGETHER = ("TangentParallel", "DistributedDataParallel")


def rank_main(rank: int, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=options.processes)
    compared = steps(options)
    times: dict[str, list[float]] = {name: [] for name in compared}
    sent: dict[str, int] = {}
    for round in range(options.rounds + 1):
        for name, step in compared.items():
            dist.barrier()
            before = bytes_sent()
            took = seconds(step, name in TOGETHER)
            # the two barriers around a step send some hundred bytes too
            sent[name] = sent_since(before)
            if round > 0:
                times[name].append(took)
    if rank == 0:
        report(options, times, sent)
    dist.destroy_process_group()


def report(options: argparse.Namespace, times: dict[str, list[float]], sent: dict[str, int]) -> None:
    print(
        f"{options.model}, {options.parameters} parameters, 3x32x32, batch {options.batch}, k={options.k}, {options.tangents}, "
        f"perturb={options.perturb}; {options.processes} processes, one core and one thread each; {options.rounds} rounds"
    )
    print(options.parallel.rule)
    for name, values in times.items():
        ratios = [a / b for a, b in zip(times["one process"], values, strict=True)]
        print(
            f"{name:24} {statistics.median(values) * 1e3:9.1f} ms   {statistics.median(ratios):6.2f} x one process   "
            f"{sent[name] if name in TOGETHER else 0:>10} bytes sent by rank 0"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--model", default="resnet18", choices=("resnet18", "fc"))
    parser.add_argument("--width", type=int)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--perturb", default="activity", choices=("activity", "weight"))
    parser.add_argument("--tangents", default="rademacher")
    parser.add_argument("--combine", default="auto", choices=("auto", "replay", "slices"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(rank_main, (options, folder), nprocs=options.processes, start_method="spawn")


if __name__ == "__main__":
    main()
