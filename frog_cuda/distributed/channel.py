"""Collective operations among some of the processes, with a timeout of their own and errors that say what happened."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Channel", "RankLost", "pack", "unpack_"]


class RankLost(RuntimeError):
    """Another process did not answer: it was killed, has stopped, or runs other code."""


class Channel:
    """A process group made of ``ranks``, for this package alone, so that its timeout is known.

    Arguments:
        ranks: ranks of the default group, this process among them. All of them make the channel at the same time. The first
            one is the one that broadcasts; gathered tensors are in the order of their numbers, as torch.distributed has it.
        device: of the tensors that users hand in; a copy travels where the backend needs it elsewhere.
        timeout: seconds that a collective operation may take.
    """

    def __init__(self, ranks: Sequence[int], device: torch.device, timeout: float) -> None:
        self.ranks, self.timeout, self._source = sorted(ranks), timeout, ranks[0]
        self.size, self.rank = len(self.ranks), self.ranks.index(dist.get_rank())
        self._device = torch.device("cpu")
        self._group: dist.ProcessGroup | None = None
        if self.size > 1:
            with self._answering("joining the group"):
                limit = timedelta(seconds=timeout)
                self._group = dist.new_group(self.ranks, timeout=limit, use_local_synchronization=True)
            if "nccl" in dist.get_backend(self._group):
                self._device = device

    def sum(self, values: Tensor, what: str) -> Tensor:
        """The sum over all ranks, the same bits on each."""
        return self._reduced(values, dist.ReduceOp.SUM, what)

    def max(self, values: Tensor, what: str) -> Tensor:
        """The largest of all ranks, element by element."""
        return self._reduced(values, dist.ReduceOp.MAX, what)

    def _reduced(self, values: Tensor, how: dist.ReduceOp.RedOpType, what: str) -> Tensor:
        if self.size == 1:
            return values
        travelling = values.to(self._device, copy=True)
        with self._answering(what):
            dist.all_reduce(travelling, how, self._group)
        return travelling.to(values.device)

    def gather(self, values: Tensor, what: str) -> Tensor:
        """The tensors of all ranks, of one shape: (size, *shape)."""
        if self.size == 1:
            return values.unsqueeze(0)
        travelling = values.to(self._device).contiguous()
        found = [torch.empty_like(travelling) for _ in self.ranks]
        with self._answering(what):
            dist.all_gather(found, travelling, self._group)
        return torch.stack(found).to(values.device)

    def broadcast_(self, tensor: Tensor, what: str) -> None:
        """Overwrites ``tensor`` with that of the first rank."""
        if self.size == 1:
            return
        travelling = tensor.to(self._device, copy=True).contiguous()
        with self._answering(what):
            dist.broadcast(travelling, self._source, self._group)
        if dist.get_rank() != self._source:
            tensor.copy_(travelling)

    @contextmanager
    def _answering(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RankLost(
                f"rank {self.ranks[self.rank]} had no answer from another of the ranks {_named(self.ranks)} in {what}, within "
                f"timeout={self.timeout:g} s; a rank was killed, has stopped, or runs other code ({error})"
            ) from error


def _named(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks)) if len(ranks) <= 8 else f"{ranks[0]}, {ranks[1]}, ... {ranks[-1]}"


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of tensors of any dtype, one after the other: uint8 (n,)."""
    return (
        torch.cat([t.detach().reshape(-1).view(torch.uint8) for t in tensors]) if tensors else torch.empty(0, dtype=torch.uint8)
    )


def unpack_(packed: Tensor, tensors: Sequence[Tensor]) -> None:
    """Overwrites tensors with what :func:`pack` made of others of their shapes; more bytes may follow."""
    start = 0
    for t in tensors:
        size = t.numel() * t.element_size()
        # A copy, because a view as another dtype needs aligned memory
        t.copy_(packed[start : start + size].clone().view(t.dtype).view(t.shape))
        start += size
