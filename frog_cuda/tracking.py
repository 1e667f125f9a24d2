"""How many bytes of results live at a time while a pass runs, and how many a device has to spare."""

from __future__ import annotations

import contextlib
import re
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .dual import DualTensor

__all__ = ["Tracker", "free_memory"]


class _Block:
    """A stretch of memory that tensors share: it is free when none of them lives."""

    def __init__(self, begin: int, end: int) -> None:
        self.begin, self.end, self.users = begin, end, 0


class Tracker(TorchDispatchMode):
    """Inside, counts the memory that operations make on a device, until it dies: values, tangents, and what the rules and the
    compiled operators make with other operations on their way. Not seen are workspaces that libraries allocate by themselves,
    and what PyTorch's forward mode makes within an operation that has no rule.

    Attributes:
        live, peak: bytes now, and at most so far.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._device = device
        self._known: dict[int, tuple[_Block, weakref.ref[Any]]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = _storages((args, kwargs))
        if any(issubclass(t, DualTensor) for t in types):
            with self:  # what the rules do with plain tensors comes here again
                out = DualTensor.__torch_dispatch__(func, types, args, kwargs)
        elif func.namespace == "frog_cuda":
            with self:  # the kernel itself, so that what it calls comes here, too
                out = func.redispatch(_backend(args, kwargs), *args, **kwargs)
        else:
            out = func(*args, **kwargs)
        found = _storages(out)
        new = [s for key, s in found.items() if key not in given and key not in self._known and s.device == self._device]
        self._add(sorted((s for s in new if s.nbytes()), key=lambda s: s.data_ptr()))
        return out

    def _add(self, storages: list[Any]) -> None:
        last: _Block | None = None
        for storage in storages:
            begin, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
            if any(block.begin <= begin and end <= block.end for block, _ in self._known.values()):
                continue  # a part of a tensor that it keeps alive
            # Value and tangents that a fused operator returns are parts of one block, see csrc/cpu/pool.h
            if last is None or begin != last.end:
                last = _Block(begin, end)
            else:
                last.end = end
            self.live += storage.nbytes()
            self._watch(storage, last)
        self.peak = max(self.peak, self.live)

    def _watch(self, storage: Any, block: _Block) -> None:
        key = id(storage)

        def died(_: object) -> None:
            del self._known[key]
            block.users -= 1
            if block.users == 0:
                self.live -= block.end - block.begin

        block.users += 1
        self._known[key] = block, weakref.ref(storage, died)


def _backend(*tree: Any) -> torch._C.DispatchKeySet:
    """The key of the kernel for these arguments."""
    device = next(t.device for t in tree_leaves(tree) if isinstance(t, Tensor))
    return torch._C.DispatchKeySet(torch._C._dispatch_key_parse(device.type.upper()))


def _storages(tree: Any) -> dict[int, Any]:
    """The storages of all tensors, those of value and tangents apart."""
    leaves: list[Any] = []
    for t in tree_leaves(tree):
        leaves += (t._primal, t._tangents, t._activity) if isinstance(t, DualTensor) else (t,)
    plain = (t for t in leaves if isinstance(t, Tensor) and t.layout is torch.strided)
    return {id(s): s for s in (t.untyped_storage() for t in plain)}


def free_memory(
    device: torch.device, meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Bytes that tensors on ``device`` can still take, and no more than a container's limit leaves; None where unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = []
    with contextlib.suppress(OSError):
        found += [int(kib) << 10 for kib in re.findall(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())]
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        found.append(int((cgroup / "memory.max").read_text()) - int((cgroup / "memory.current").read_text()))
    return min(found, default=None)
