"""Steps of SGD along replayed tangents: the options, and the momentum that lasts from step to step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._checks import is_real

__all__ = ["Momentum", "Sgd"]


@dataclass(frozen=True)
class Sgd:
    """The options of :class:`torch.optim.SGD`, checked as it checks them.

    Raises:
        TypeError: an option is no number, or nesterov no bool.
        ValueError: one is not finite, one other than dampening is negative, or nesterov lacks momentum or has dampening.
    """

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        for name in ("lr", "momentum", "dampening", "weight_decay"):
            value = getattr(self, name)
            if not is_real(value):
                raise TypeError(f"update_: {name} is of type {type(value).__name__}; expected a number")
            least = -math.inf if name == "dampening" else 0
            if not math.isfinite(value) or value < least:
                raise ValueError(f"update_: {name} is {value}; expected a finite number{'' if least else ' >= 0'}")
            object.__setattr__(self, name, float(value))
        if not isinstance(self.nesterov, bool):
            raise TypeError(f"update_: nesterov is of type {type(self.nesterov).__name__}; expected a bool")
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(
                f"update_: nesterov needs momentum > 0 and dampening 0, but momentum is {self.momentum} and dampening is "
                f"{self.dampening}"
            )

    @property
    def plain(self) -> bool:
        """``p -= lr * g`` and nothing else."""
        return self.momentum == 0 and self.weight_decay == 0

    def step_(self, p: Tensor, g: Tensor, buffer: Tensor | None, fresh: bool) -> None:
        """One step along a gradient that is there. g is like p and may be overwritten; buffer is None without momentum."""
        if self.weight_decay != 0:
            g = g.add_(p, alpha=self.weight_decay)
        if buffer is not None:
            if fresh:
                buffer.copy_(g)
            else:
                buffer.mul_(self.momentum).add_(g, alpha=1 - self.dampening)
            g = g.add_(buffer, alpha=self.momentum) if self.nesterov else buffer
        p.sub_(g, alpha=self.lr)


class Momentum:
    """The momentum buffers of :meth:`frog_cuda.ForwardGradient.update_`: one like each parameter that was moved with momentum.

    Arguments:
        parameters: those that are perturbed, by name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self.buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, sgd: Sgd) -> tuple[Tensor | None, bool]:
        """The buffer that a step needs, and whether it is fresh: holds nothing yet, and is not kept before :meth:`keep`."""
        if sgd.momentum == 0:
            return None, False
        if name in self.buffers:
            return self.buffers[name], False
        return torch.empty_like(self._parameters[name], requires_grad=False, memory_format=torch.contiguous_format), True

    def keep(self, name: str, buffer: Tensor | None) -> None:
        if buffer is not None:
            self.buffers[name] = buffer

    def state(self) -> dict[str, Tensor]:
        """Copies of the buffers, for :meth:`load`."""
        return {name: buffer.clone() for name, buffer in self.buffers.items()}

    def read(self, state: Any) -> dict[str, Tensor]:
        """Copies of the buffers of a state, on the parameters' device.

        Raises:
            TypeError, ValueError: of another form, or for other parameters.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"load_state_dict: state['momentum'] is of type {type(state).__name__}; expected a mapping")
        found = {}
        for name, buffer in state.items():
            p = self._parameters.get(name)
            if p is None:
                known = ", ".join(self._parameters)
                raise ValueError(f"load_state_dict: state['momentum'] has {name!r}, not perturbed; known are {known}")
            if not isinstance(buffer, Tensor) or buffer.shape != p.shape or buffer.dtype != p.dtype:
                what = f"{tuple(buffer.shape)} {buffer.dtype}" if isinstance(buffer, Tensor) else type(buffer).__name__
                raise ValueError(f"load_state_dict: state['momentum'][{name!r}] is {what}; expected {tuple(p.shape)} {p.dtype}")
            found[name] = buffer.detach().to(p.device, copy=True).contiguous()
        return found
