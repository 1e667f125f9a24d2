"""Medians that can be compared: everything measured in one run, by turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

__all__ = ["interleaved_medians"]


def interleaved_medians(
    calls: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int, limit: float, burst: int = 4
) -> dict[str, float]:
    """Median seconds of each call.

    A round gives each call its turn: once unmeasured, so that its data is in the caches as in a training loop, then ``burst``
    times measured. What slows the machine for a while thus slows all of them. The first round is not counted.

    Arguments:
        calls: by name.
        device: a GPU is waited for before and after each call.
        rounds: at most so many.
        limit: seconds after which no further round starts; one is always counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for turn in range(rounds + 1):
        if turn > 1 and time.perf_counter() - began > limit:
            break
        for name, call in calls.items():
            call()
            for _ in range(burst):
                _wait(device)
                start = time.perf_counter()
                call()
                _wait(device)
                if turn > 0:
                    seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
