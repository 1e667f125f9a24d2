"""``chunk_size="auto"``: as many tangents in a pass as fit a number of bytes.

What a pass needs is close to ``a + b c`` for c tangents, but not always: operators may work otherwise on few tangents. So a
line through what was measured with 1 and with 2 tangents gives a number to try next, and only a number that was measured to fit
is taken.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from ._checks import check_count, warn
from .activity import ActivityPerturbation
from .functional import RandomNumbers
from .tracking import Tracker, free_memory

if TYPE_CHECKING:
    from .weight import Step, WeightPerturbation

__all__ = ["ChunkSizes", "check_chunk_size", "largest"]

_log = logging.getLogger("frog_cuda")

#: passes after those with 1 and with 2 tangents, at most
_TRIALS = 6
#: a trial has at most so many times the tangents that were seen to fit, so that no trial needs much more than the budget
_STRIDE = 4


def check_chunk_size(chunk_size: Any, memory_budget: Any) -> tuple[int | str | None, ChunkSizes]:
    """``chunk_size``, and what chooses where it is ``"auto"``.

    Raises:
        TypeError, ValueError: one is not accepted.
    """
    if memory_budget is not None:
        memory_budget = check_count("memory_budget", memory_budget)
    if isinstance(chunk_size, str):
        if chunk_size != "auto":
            raise ValueError(f"chunk_size is {chunk_size!r}; expected an integer >= 1, 'auto' or None")
    elif memory_budget is not None:
        raise ValueError(f"memory_budget is {memory_budget} with chunk_size={chunk_size!r}; it needs chunk_size='auto'")
    elif chunk_size is not None:
        chunk_size = check_count("chunk_size", chunk_size)
    return chunk_size, ChunkSizes(memory_budget)


class ChunkSizes:
    """Chunks that were chosen, by the shapes of what a step gets.

    Arguments:
        budget: in bytes; None means half of what the device has free at the time.
    """

    def __init__(self, budget: int | None) -> None:
        self.budget = budget
        self._chosen: dict[Hashable, int] = {}

    def choose(
        self,
        method: WeightPerturbation | ActivityPerturbation,
        step: Step,
    ) -> int:
        """How many tangents go into a pass.

        Warns:
            UserWarning: a single one needs more than the budget.
        Raises:
            what the model or the loss raises.
            RuntimeError: there is no budget, and what is free is not known.
        """
        key = _key(method.model, step)
        if key not in self._chosen:

            def needs(count: int) -> int:
                return _needs(count, method, step)

            most = max(step.tangents.drawn, len(step.tangents.guides))
            self._chosen[key] = self._choose(needs, most, method.device)
        return self._chosen[key]

    def _choose(self, needs: Callable[[int], int], most: int, device: torch.device) -> int:
        budget = self.budget
        if budget is None:
            free = free_memory(device)
            if free is None:
                raise RuntimeError("chunk_size='auto': what memory is free is not known here; give memory_budget=, in bytes")
            budget = free // 2
        size, need = largest(needs, budget, most)
        if need > budget:
            warn(
                f"chunk_size='auto': a pass with one tangent needs {need} bytes, more than the budget of {budget}; going on "
                "with chunk_size 1"
            )
        _log.info("chunk_size='auto': %d of %d tangents in a pass, which needs %d of %d bytes", size, most, need, budget)
        return size


def largest(needs: Callable[[int], int], budget: int, most: int) -> tuple[int, int]:
    """The largest number of tangents found to fit, and what it needs; 1 where nothing does.

    Arguments:
        needs: bytes for a number of tangents; called with 1, 2 and what follows from a line through the two numbers nearest to
            the budget.
        most: no larger number is wanted.
    """
    measured = {1: needs(1)}
    if most > 1 and measured[1] <= budget:
        measured[2] = needs(2)
    for _ in range(_TRIALS):
        fitting = [c for c in measured if measured[c] <= budget]
        if not fitting:
            return 1, measured[1]
        low = max(fitting)
        high = min((c for c in measured if c > low), default=most + 1)
        if high - low <= 1:
            break
        at, other = (low, high) if high in measured else (low, max(c for c in measured if c != low))
        slope = (measured[at] - measured[other]) / (at - other)
        guess = low + math.floor((budget - measured[low]) / slope) if slope > 0 else most
        guess = max(low + 1, min(guess, high - 1, _STRIDE * low))
        measured[guess] = needs(guess)
    best = max(c for c in measured if measured[c] <= budget)
    return best, measured[best]


def _needs(count: int, method: WeightPerturbation | ActivityPerturbation, step: Step) -> int:
    """Bytes at most while a step runs with ``count`` tangents in a pass: one pass of each kind is run and watched."""
    worst, tangents = 0, step.tangents
    for begin, end in ((0, tangents.drawn), (tangents.drawn, tangents.k)):
        chunk = range(begin, min(begin + count, end))
        if not chunk:
            continue
        with RandomNumbers(method.parameters.values(), method.model.modules()).replayed(), Tracker(method.device) as tracker:
            kept, _alive = method.probe(step, chunk)
        # Kept tangents of the other passes lie beside; for the Gram matrix of all layers, all are put together in a copy
        others = (tangents.k - len(chunk)) * kept
        worst = max(worst, tracker.peak + others, tracker.live + others + tangents.k * kept)
    return worst


def _key(model: torch.nn.Module, step: Step) -> Hashable:
    leaves, spec = tree_flatten((step.inputs, step.target))
    return (
        repr(spec),
        *((t.shape, t.dtype, t.device) if isinstance(t, Tensor) else repr(t) for t in leaves),
        tuple(m.training for m in model.modules()),
        step.tangents.drawn,
        len(step.tangents.guides),
    )
