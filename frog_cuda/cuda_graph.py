"""One whole step as a CUDA graph: forward pass with tangents, projection and gradients, launched by a single call.

A step of a small net is hundreds of kernels of a few microseconds; launching them one by one takes longer than running them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ._deferred import Condition, deferred
from .tangents import Distribution, Guided, StandardBasis, Supplied, VaryingLength
from .weight import inputs_of

if TYPE_CHECKING:
    from .forward_gradient import ForwardGradient

#: more than any step has
_MOST_CONDITIONS = 16


class Graph:
    """A CUDA graph of what a function launches."""

    def capture(self, body: Callable[[], None]) -> None:
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._graph):
                body()
        except NotImplementedError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                "cuda_graph: the step cannot be captured, most often because the model or the loss reads a value from the "
                f"device (.item(), a condition on a tensor); use cuda_graph=False ({error})"
            ) from error

    def replay(self) -> None:
        self._graph.replay()


def check(distribution: Distribution, device: torch.device, k: int, chunk_size: int | str | None) -> None:
    """Raises where a step cannot be a graph."""
    if device.type != "cuda":
        raise ValueError(f"cuda_graph: the model's parameters are on {device}; a CUDA graph needs them on a GPU")
    if isinstance(distribution, Guided):
        raise ValueError("cuda_graph: Guided tangents hold other vectors in every step; a graph would keep the first ones")
    if isinstance(distribution, (StandardBasis, Supplied, VaryingLength)):
        raise ValueError(
            f"cuda_graph: {type(distribution).__name__} tangents are made anew on the CPU in every step; accepted are normal, "
            "rademacher, sphere, orthonormal and Cone"
        )
    if isinstance(chunk_size, str) or (chunk_size is not None and chunk_size < k):
        raise ValueError(f"cuda_graph: chunk_size is {chunk_size!r} with k = {k}; a graph holds one pass, so chunk_size=None")


class GraphedSteps:
    """Steps of a :class:`~frog_cuda.ForwardGradient` as CUDA graphs, one for each shape of input and target.

    The first step with a shape runs as ever, which also readies the libraries; the second is captured. A graph reads copies of
    input and target, and adds to ``.grad`` tensors of its own, which become the parameters'.
    """

    def __init__(self, owner: ForwardGradient) -> None:
        self._owner = owner
        self._steps: dict[Hashable, Captured | None] = {}

    def __call__(self, input: Any, target: Any) -> Tensor | None:
        """The loss, or None where this step is to run as ever."""
        leaves, spec = tree_flatten((inputs_of(input), target))
        model = self._owner.model
        key = (
            spec,
            *((t.shape, t.dtype, t.device) if isinstance(t, Tensor) else _hashable(t) for t in leaves),
            tuple(m.training for m in model.modules()),
            tuple(p.data_ptr() for p in model.parameters()),
        )
        if key not in self._steps:
            self._steps[key] = None
            return None
        step, last = self._steps[key], self._owner.last
        if step is None:
            if last is None or (last.trace is not None and not last.trace.segments):
                return None  # no step has succeeded since: what a graph needs to know is not there
            step = self._steps[key] = Captured(self._owner, leaves, spec)
        return step(leaves)


class Captured:
    """One graph and the memory it reads and writes."""

    def __init__(self, owner: ForwardGradient, leaves: list[Any], spec: Any) -> None:
        assert owner.last is not None, "a step has run before"
        self._owner = owner
        self._leaves = [t.clone() if isinstance(t, Tensor) else t for t in leaves]
        self.inputs, self.target = tree_unflatten(self._leaves, spec)
        self.tangents = owner.tangent_set(self.inputs)
        self.gradients = {name: torch.zeros_like(owner._method.parameters[name]) for name in owner.gradients()}
        self.loss = torch.empty_like(owner.last.loss)
        self.passed = torch.ones(_MOST_CONDITIONS, dtype=torch.bool, device=self.loss.device)
        self.conditions: list[Condition] = []
        #: (seed, step) that the graph would draw next by itself
        self._next: tuple[int, int] | None = None
        self._graph = Graph()
        self._graph.capture(self._body)

    def _body(self) -> None:
        """All that the graph does."""
        self.tangents.state[1].add_(1)
        with deferred() as conditions, torch.no_grad():
            estimate = self._owner._estimate(self.tangents, self.inputs, self.target)
            found = self._owner._gradients_of(self.tangents, estimate, self.inputs)
            if set(found) != set(self.gradients) or len(conditions) > _MOST_CONDITIONS:
                raise RuntimeError("cuda_graph: the model took another way than in the step before; use cuda_graph=False")
            passed = torch.stack([c.passed for c in conditions])
            sound = passed.all()
            for name, gradient in found.items():
                # Chosen, not multiplied: 0 times infinity would be NaN.
                self.gradients[name].add_(torch.where(sound, gradient, 0))
            self.loss.copy_(estimate.loss)
            self.passed[: len(conditions)].copy_(passed)
        self.conditions, self.estimate = conditions, estimate
        if estimate.trace is not None:
            estimate.trace.lasting = True

    def __call__(self, leaves: list[Any]) -> Tensor:
        owner = self._owner
        for own, given in zip(self._leaves, leaves, strict=True):
            if isinstance(own, Tensor):
                own.copy_(given)
        if self._next != (owner.seed, owner.step):
            self.tangents.state.copy_(torch.tensor([owner.seed, owner.step - 1]))
        before: dict[str, Tensor | None] = {}
        for name, gradient in self.gradients.items():
            p = owner._method.parameters[name]
            before[name] = p.grad
            if p.grad is None:
                gradient.zero_()
            elif p.grad is not gradient:
                gradient.copy_(p.grad)
            p.grad = gradient
        self._graph.replay()
        self._next = None
        for condition, passed in zip(self.conditions, self.passed.tolist(), strict=False):
            if not passed:
                for name, grad in before.items():
                    owner._method.parameters[name].grad = grad
                raise condition.error()
        self._next = owner.seed, owner.step + 1
        owner._took(self.tangents, self.inputs, self.estimate)
        return self.loss.clone()


def _hashable(leaf: Any) -> Hashable:
    try:
        hash(leaf)
    except TypeError:
        raise TypeError(
            f"cuda_graph: input or target holds a {type(leaf).__name__}; expected tensors and plain values"
        ) from None
    return leaf
