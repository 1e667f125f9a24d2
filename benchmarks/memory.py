"""Peak memory of one gradient: by how much the resident set of a fresh process grows while it is computed.

Each case runs in a process of its own, forked from a server that has imported torch and nothing more. There the method first
runs once on a net of width 16 (threads, libraries, code pages), the real net and batch are made, freed memory is returned to
the system, and the high-water mark of the resident set (VmHWM) is reset. Then the method is called once. The result counts all
that the call allocates: activations, tangents, buffers of the libraries and the gradient itself (n x 4 bytes; ``update`` has
none). Linux only.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
WARM_UP_WIDTH = 16
UPDATE = "weight, normal, update_"


def supported() -> bool:
    """Whether this system can reset the high-water mark."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return "VmHWM" in STATUS.read_text()


def peak_growth(method: str, width: int, k: int) -> int:
    """Bytes by which one call of ``method`` raises the peak resident set.

    Raises:
        RuntimeError: the process that measured died.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cases"])
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(send, method, width, k))
    process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"memory of {method}, width {width}, k {k}: the process ended with code {process.exitcode}"
        ) from None
    finally:
        process.join()


def _measure(send: Connection, name: str, width: int, k: int) -> None:
    import torch
    from cases import WeightNormal, by_name, problem

    def prepare(width: int):
        p = problem(width)
        if name != UPDATE:
            return by_name(name)(p, k)
        step = WeightNormal(p, k)

        def update() -> None:
            step.fg.derivatives(p.x, p.target)
            step.fg.update_(1e-3)

        return update

    torch.manual_seed(0)
    prepare(WARM_UP_WIDTH)()
    call = prepare(width)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")
    before = _kilobytes("VmRSS")
    call()
    send.send((_kilobytes("VmHWM") - before) * 1024)


def _kilobytes(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise RuntimeError(f"{STATUS} has no {field}")
