"""Runs of examples/train_digits.py in processes of their own: what they wrote, and who they are."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "train_digits.py"
#: one thread a process; a rank that starts anew must not find the address of a dead one
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def losses(folder: Path) -> list[tuple[int, str]]:
    """Every step that was written down, in this order: some of them again after a restart."""
    path = folder / "losses.txt"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # what has no end yet is not read
    return [(int(step), loss) for step, loss in (line.split() for line in lines)]


def workers(folder: Path) -> list[int]:
    """Processes of the run but the agents that watch over them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # gone meanwhile
            line = path.read_bytes()
            if str(folder).encode() in line and b"torch.distributed.run" not in line:
                found.append(int(path.parent.name))
    return found


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "FROG_KILLS"} | ENVIRONMENT
