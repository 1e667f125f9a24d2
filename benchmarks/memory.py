"""Peak memory of one gradient, or of one call of attention: by how much the resident set of a fresh process grows meanwhile.

Each case runs in a process of its own, forked from a server that has imported torch and nothing more. There the method first
runs once on a tiny model, or a short sequence (threads, libraries, code pages), the real net and batch are made, freed
memory is returned to the system, and the high-water mark of the resident set (VmHWM) is reset. Then the method is called once.
The result counts all that the call allocates: activations, tangents, buffers of the libraries and the result itself, such as
the gradient (n x 4 bytes; ``update`` has none). Linux only.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
WARM_UP_LENGTH, WARM_UP_ROWS = 64, 64
UPDATE = ", update_"


def supported() -> bool:
    """Whether this system can reset the high-water mark."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return "VmHWM" in STATUS.read_text()


def peak_growth(method: str, model: str, k: int) -> int:
    """Bytes by which one gradient by ``method`` raises the peak resident set; with ", update_" behind its name, one step of SGD
    that keeps no gradient.

    Raises:
        cases.Unsuitable: the method is not for this model.
        RuntimeError: the process that measured died.
    """
    from problems import tiny

    return _in_a_process(f"{method}, {model}, k {k}", _gradient, (method, model, k), tiny(model))


def attention_growth(name: str, length: int, k: int) -> int:
    """The same for one call of attention with k tangents."""
    return _in_a_process(f"{name}, length {length}, k {k}", _attention, (name, length, k), WARM_UP_LENGTH)


def embedding_growth(name: str, rows: int, k: int) -> int:
    """The same for one weight-perturbed gradient of a model with a table of ``rows`` rows."""
    return _in_a_process(f"{name}, {rows} rows, k {k}", _embedding, (name, rows, k), WARM_UP_ROWS)


Prepare = Callable[[str, Any, int], Callable[[], object]]


def _in_a_process(what: str, prepare: Prepare, arguments: tuple[str, Any, int], small: Any) -> int:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["alternatives"])
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(send, prepare, arguments, small))
    process.start()
    send.close()
    try:
        found = receive.recv()
        if isinstance(found, str):
            from cases import Unsuitable

            raise Unsuitable(found)
        return found
    except EOFError:
        process.join()
        raise RuntimeError(f"memory of {what}: the process ended with code {process.exitcode}") from None
    finally:
        process.join()


def _gradient(name: str, model: str, k: int) -> Callable[[], object]:
    from alternatives import by_name
    from problems import Problem

    method = by_name(name.removesuffix(UPDATE))
    step = method(Problem(model), k) if k else method(Problem(model))
    return step.update if name.endswith(UPDATE) else step  # type: ignore[attr-defined]


def _attention(name: str, length: int, k: int) -> Callable[[], object]:
    from attention_cases import prepare

    return prepare(name, length, k)


def _embedding(name: str, rows: int, k: int) -> Callable[[], object]:
    from bench_embedding import prepare

    return prepare(name, rows, k)


def _measure(send: Connection, prepare: Prepare, arguments: tuple[str, Any, int], small: Any) -> None:
    import torch
    from cases import Unsuitable

    name, size, k = arguments
    torch.manual_seed(0)
    try:
        prepare(name, small, k)()
        call = prepare(name, size, k)
    except Unsuitable as reason:
        send.send(str(reason))
        return
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")
    before = _kilobytes("VmRSS")
    result = call()
    send.send((_kilobytes("VmHWM") - before) * 1024)
    del result  # held until here, so that it counts


def _kilobytes(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise RuntimeError(f"{STATUS} has no {field}")
