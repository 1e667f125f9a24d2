"""Runs functions in several processes with a gloo group, and brings back what became of each."""

from __future__ import annotations

import datetime
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Case = Callable[[], None]


def outcomes(world: int, cases: Sequence[Case]) -> dict[str, str]:
    """Runs the cases one after the other in ``world`` processes, up to the first one that fails: ranks that raised may wait for
    others in another place than these wait for them. By name of the case: "", the tracebacks of its ranks, or why it did not
    run. A process that ends early after the last case counts against that one."""
    with tempfile.TemporaryDirectory() as folder:
        end = ""
        try:
            mp.start_processes(_rank, (world, list(cases), folder), nprocs=world, start_method="spawn")
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            end = f"a process ended early: {error}"
        done = {path.stem for path in Path(folder).glob("*.done")}
        texts = {case.__name__: "" if case.__name__ in done else end for case in cases}
        if not any(texts.values()):
            texts[cases[-1].__name__] = end
        for path in sorted(Path(folder).glob("*.failed")):
            texts[path.name.split(".")[0]] += path.read_text()
        return texts


def _rank(rank: int, world: int, cases: list[Case], folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world, timeout=limit)
    for case in cases:
        try:
            case()
        except Exception:
            Path(folder, f"{case.__name__}.{rank}.failed").write_text(f"rank {rank}:\n{traceback.format_exc()}\n")
            raise
        dist.barrier()
        if rank == 0:
            Path(folder, f"{case.__name__}.done").touch()
    dist.destroy_process_group()
