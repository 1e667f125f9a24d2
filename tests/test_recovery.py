"""A rank that is killed or stops: an error on the others within the timeout; under torchrun, a run that goes on, bit for bit.

FROG_KILLS sets how many ranks of one run are killed, 2 by default.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from runs import SCRIPT, environment, losses, workers
from torch import nn

import frog_cuda as frog
from frog_cuda.distributed import RankLost, TangentParallel

KILLS = int(os.environ.get("FROG_KILLS", "2"))
TIMEOUT = 3.0


class Fatal(nn.Module):
    """Sends its process a signal in a given call."""

    def __init__(self, number: int, call: int) -> None:
        super().__init__()
        self.number, self.left = number, call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)
        return x


def lose_a_rank(rank: int, folder: str, number: int, perturb: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    fatal = Fatal(number, 3) if rank == 1 else nn.Identity()
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), fatal, nn.Linear(9, 3))
    fg = frog.ForwardGradient(model, nn.MSELoss(), k=4, perturb=perturb)
    parallel = TangentParallel(fg, timeout=TIMEOUT)
    Path(folder, f"pid{rank}").write_text(str(os.getpid()))
    began = time.monotonic()
    try:
        for _ in range(5):
            began = time.monotonic()
            parallel(torch.ones(2, 5), torch.zeros(2, 3))
    except RankLost as error:
        Path(folder, "told").write_text(f"{fg.step} {time.monotonic() - began} {error}")
    os._exit(0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_the_others_are_told_within_the_timeout(tmp_path, number):
    context = mp.get_context("spawn")
    ranks = [context.Process(target=lose_a_rank, args=(r, str(tmp_path), int(number), "weight")) for r in range(2)]
    for process in ranks:
        process.start()
    try:
        ranks[0].join(60)
        step, seconds, text = (tmp_path / "told").read_text().split(" ", 2)
        # An allowance for a busy machine; the process group's own timeout would be 30 minutes
        assert int(step) == 2 and float(seconds) < 10 * TIMEOUT
        assert text.startswith(
            "rank 0 had no answer from another of the ranks 0, 1 in step 2, within timeout=3 s; a rank was killed"
        )
    finally:
        for process in ranks:
            process.kill()
            process.join()


def run_with_kills(folder: Path, arguments: list[str], kills: int, chance: random.Random) -> str:
    """Runs the script under torchrun and kills a rank at a random moment, ``kills`` times, each after a step was taken."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--monitor-interval=0.05"]
    command = [*torchrun, f"--max-restarts={kills}", str(SCRIPT), "--folder", str(folder), *arguments]
    output = folder.parent / "output.txt"
    with output.open("w") as file:
        agent = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment())
        try:
            for _ in range(kills):
                taken, deadline = len(losses(folder)), time.monotonic() + 40
                while len(losses(folder)) == taken and agent.poll() is None:
                    assert time.monotonic() < deadline, output.read_text()
                    time.sleep(0.005)
                time.sleep(chance.random() * 0.3)
                alive = workers(folder)
                assert alive, f"the run was over before it was killed {kills} times\n{output.read_text()}"
                os.kill(chance.choice(alive), signal.SIGKILL)
                while set(alive) & set(workers(folder)):  # all of them go before any starts anew
                    time.sleep(0.005)
            assert agent.wait(120) == 0, output.read_text()
        finally:
            agent.kill()
            agent.wait()
    return output.read_text()


def test_a_run_with_killed_ranks_has_the_losses_of_an_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import train_digits

    steps = 60 + 60 * KILLS
    arguments = ["--steps", str(steps), "--width", "24", "--k", "6", "--batch", "32", "--checkpoint-every", "4"]
    text = run_with_kills(tmp_path / "killed", arguments, KILLS, random.Random(os.environ.get("FROG_KILLS_SEED", "0")))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train_digits.main(["--folder", str(tmp_path / "whole"), *arguments])
    torch.set_num_threads(threads)
    expected = losses(tmp_path / "whole")
    assert [step for step, _ in expected] == list(range(steps))
    found = losses(tmp_path / "killed")  # steps after a checkpoint were taken again
    again = len(found) - steps
    print(f"{KILLS} kills; {again} steps were taken again; {text.count('processes, from step')} starts")
    assert text.count("processes, from step") == KILLS + 1
    assert {step for step, _ in found} == set(range(steps)), "lost steps"
    divergent = [(step, loss) for step, loss in found if loss != expected[step][1]]
    assert not divergent
