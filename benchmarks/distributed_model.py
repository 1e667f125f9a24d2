"""What a step sends and how long it takes: TangentParallel against data-parallel backprop.

    python benchmarks/distributed_model.py
    python benchmarks/distributed_model.py --bandwidth 1.25e9 --flops 5e13 --draws 1e12 --rows 8

A model of times, not a measurement; docs/distributed.md holds it against measured points. In backprop, every rank has ``rows``
rows of its own. TangentParallel has min(k, ranks) slices of tangents and ranks / slices data shards, each of ``rows`` rows. A
sum over W ranks sends 2 (W - 1) / W times its bytes from each rank, in 2 log2 W messages one after the other; a gathering sends
W - 1 times its bytes, in log2 W messages. Sending does not overlap with computing.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """``bandwidth``: bytes a second that a rank sends. ``latency``: seconds a message. ``flops``: a second and rank. ``draws``:
    tangent elements that a rank draws and combines in a second."""

    bandwidth: float = 25e9
    latency: float = 10e-6
    flops: float = 1e14
    draws: float = 1e12


@dataclass(frozen=True)
class Cost:
    """``sent``: bytes by each rank. ``messages``: one after the other. ``computing``: seconds."""

    sent: float
    messages: int
    computing: float

    def seconds(self, machine: Machine) -> float:
        return self.computing + self.sent / machine.bandwidth + self.messages * machine.latency


def rounds(ranks: int) -> int:
    return math.ceil(math.log2(ranks)) if ranks > 1 else 0


def summed(size: float, ranks: int) -> float:
    return 2 * (ranks - 1) / ranks * size


def forward(n: float, rows: int, machine: Machine) -> float:
    """Seconds of a primal pass: two operations a parameter and row."""
    return 2 * n * rows / machine.flops


def replicated(n: float, ranks: int, rows: int, machine: Machine) -> Cost:
    """Backprop takes three passes; the float32 gradient is summed over all ranks."""
    return Cost(summed(4 * n, ranks), 2 * rounds(ranks), 3 * forward(n, rows, machine))


def tangent_parallel(n: float, ranks: int, rows: int, k: int, machine: Machine, passes: float = 2) -> Cost:
    """Weight perturbation with the estimate replayed on every rank. ``passes``: primal passes that a tangent takes, 2 with full
    tangents, 1 with those of low rank."""
    slices = min(k, ranks)
    shards = ranks // slices
    most = math.ceil(k / slices)
    sent = summed(8 * 7, ranks)  # whether all came through
    sent += (slices - 1) * 8 * (1 + most)  # derivatives
    sent += summed(8 * (1 + k), shards)  # their average
    sent += summed(3 * 8 * k * (k + 1) / 2, ranks)  # Gram matrix, each number in three exact parts
    messages = 2 * rounds(ranks) + rounds(slices) + 2 * rounds(shards) + 2 * rounds(ranks)
    drawing = (k * n + k * n / ranks) / machine.draws  # for the estimate, and for the Gram matrix
    return Cost(sent, messages, (1 + passes * most) * forward(n, rows, machine) + drawing)


def size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    for unit, scale in (("us", 1e6), ("ms", 1e3)):
        if seconds * scale < 1000:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds:.3g} s"


def table(k: int, rows: int, machine: Machine) -> str:
    lines = [
        "| parameters | ranks | backprop sends | tangents send | backprop step | sending | tangents step | sending |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for exponent in range(6, 12):
        for ranks in (1, 2, 16, 128, 1024):
            a = replicated(10**exponent, ranks, rows, machine)
            b = tangent_parallel(10**exponent, ranks, rows, k, machine)
            cells = [f"10^{exponent}", str(ranks), size(a.sent), size(b.sent)]
            for cost in (a, b):
                total = cost.seconds(machine)
                cells += [duration(total), f"{100 * (1 - cost.computing / total):.3g} %"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("bandwidth", "latency", "flops", "draws"):
        parser.add_argument(f"--{name}", type=float, default=getattr(Machine, name))
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--rows", type=int, default=32)
    options = parser.parse_args()
    machine = Machine(options.bandwidth, options.latency, options.flops, options.draws)
    print(f"k={options.k}, {options.rows} rows a rank or shard, {machine}\n")
    print(table(options.k, options.rows, machine))


if __name__ == "__main__":
    main()
