"""What a step of a model does not depend on: modes that the caller is in, and whether the model is still the one it was."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ._checks import warn


class Structure:
    """The modules and parameters of a model as they are now, to notice when others take their place.

    Attributes:
        has_fast_path: whether PyTorch may leave out layers of the model where nothing is recorded.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(name, m, dict(m._modules)) for name, m in model.named_modules()]
        self._parameters = [
            (f"{name}.{own}" if name else own, m._parameters, own, p, p is not None and p.requires_grad)
            for name, m, _ in self._modules
            for own, p in m._parameters.items()
        ]
        self.has_fast_path = any(isinstance(m, nn.TransformerEncoder) for _, m, _ in self._modules)

    def check(self) -> None:
        """
        Raises:
            RuntimeError: a module or a parameter is another one, or ``requires_grad`` has changed.
        """
        for name, module, children in self._modules:
            if module._modules != children:
                raise RuntimeError(
                    f"model: the modules of {name or 'the model'} are others than they were; make a new ForwardGradient"
                )
        for name, owner, own, p, trainable in self._parameters:
            now = owner.get(own)
            if now is not p:
                raise RuntimeError(
                    f"model: parameter {name} was replaced (load_state_dict(assign=True) does that); make a new ForwardGradient"
                )
            if p is not None and p.requires_grad != trainable:
                raise RuntimeError(f"model: requires_grad of {name} has changed; make a new ForwardGradient")


def surroundings(structure: Structure, device: torch.device) -> AbstractContextManager[Any]:
    """Inside, neither ``inference_mode`` nor ``autocast`` is on, and neither what ``torch.compile`` made runs nor the fast path
    of encoders: results are ordinary tensors, in the precision of the parameters, and every hook is called."""
    shared = structure.has_fast_path or _may_be_compiled()
    if not (torch.is_inference_mode_enabled() or torch.is_autocast_enabled(device.type) or shared):
        return nullcontext()
    return _turned_off(device, structure.has_fast_path)


@contextmanager
def _turned_off(device: torch.device, fast_path: bool) -> Iterator[None]:
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch.is_autocast_enabled(device.type):
            warn("autocast does not apply to forward gradients, which keep the precision of the model; see tangent_dtype=")
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if fast_path:
            stack.enter_context(_without_fast_path())
        stack.enter_context(as_written())
        yield


def as_written() -> AbstractContextManager[Any]:
    """Inside, functions and modules run as they were written, not what ``torch.compile`` made of them, which takes no
    DualTensors."""
    return _as_written() if _may_be_compiled() else nullcontext()


def _may_be_compiled() -> bool:
    """What was compiled is not known: it may be any function that the model calls. Before dynamo was imported, nothing was."""
    if torch.compiler.is_compiling() or "torch._dynamo.eval_frame" not in sys.modules:
        return False
    # Within a function that was compiled, whose graph broke here, dynamo lets nobody choose
    return torch._C._dynamo.eval_frame.get_eval_frame_callback() in (None, False)


class _ForAllThreads:
    """A setting of the whole process: the first pass makes it, the last one gives back what was there.

    Arguments:
        make: makes it; returns what gives it back.
    """

    def __init__(self, make: Callable[[], Callable[[], None]]) -> None:
        self._make, self._lock, self._passes = make, threading.Lock(), 0
        self._give_back: Callable[[], None] | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._passes == 0:
                self._give_back = self._make()
            self._passes += 1
        try:
            yield
        finally:
            with self._lock:
                self._passes -= 1
                if self._passes == 0:
                    assert self._give_back is not None
                    self._give_back()


def _force_eager() -> Callable[[], None]:
    stance = torch.compiler.set_stance("force_eager")
    return lambda: stance.__exit__(None, None, None)


def _call_layers() -> Callable[[], None]:
    """The encoder would hand nested tensors to its layers, or have one operator in their place, as nothing is recorded."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    return lambda: torch.backends.mha.set_fastpath_enabled(before)


_as_written, _without_fast_path = _ForAllThreads(_force_eager), _ForAllThreads(_call_layers)
