"""Backprop and this package's ways of getting one gradient, and for each a check that what was timed is right.

A method is called once per round and leaves its gradient in ``.grad``; ``check()`` repeats one call and compares it with
backprop, in float64 too, so a method cannot be fast and wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from problems import Problem, losses
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import frog_cuda as frog
from frog_cuda.tangents import LowRank

#: Relative error (2-norm) in float64, where a right result shows.
BOUND = 1e-8
#: The same in float32. A directional derivative is a sum over n products of either sign, each rounded to 6e-8, with a result
#: about sqrt(n) times smaller than the sum of their sizes: 6e-8 sqrt(n) is 3e-4 for the largest fully-connected net. There the
#: sums of two libraries fall on different sides of the kink of a ReLU for one activation in half a million, by which a
#: derivative differs by 1e-3 to 4e-3 (medians of nine tangents, k = 1). A wrong result in float64 shows all the same.
BOUND32 = 1e-2
#: In a deep model little is left of what the tangents of every layer contribute, and more activations lie at a kink: up to 5e-2
#: was seen in ResNet18 with k = 1.
BOUND32_DEEP = 0.2
#: bf16 tangents keep 8 bits.
BOUND_BF16 = 0.2


class WrongResult(AssertionError):
    """A timed method does not compute what it claims to."""


class Unsuitable(Exception):
    """The method does not work for this problem; the message is the reason."""


class Method:
    """One way of getting a gradient of ``problem``'s mean loss."""

    name = ""
    #: whether memory grows by k tangents of all parameters
    stores_tangents = False
    #: whether two ways to compute the result in float64 can be compared
    checked_in_float64 = True
    #: whether a draw can be unlucky in float64 too, and the median of five is held to the bound where the first is over it
    unlucky_in_float64 = False
    bound = BOUND
    #: whether it can be timed call by call beside PyTorch; what has threads of its own cannot
    in_turns = True

    def __init__(self, problem: Problem, k: int = 0) -> None:
        self.problem, self.k = problem, k

    def __call__(self) -> None:
        raise NotImplementedError

    def gradients(self) -> dict[str, Tensor]:
        """What the latest call left."""
        return {name: p.grad for name, p in self.problem.parameters.items() if p.grad is not None}

    def check(self) -> float:
        """Repeats the call, also in float64 with at most two tangents; returns the relative error in float32.

        Raises:
            WrongResult: an error is larger than its bound, or NaN.
        """
        bound32 = max(self.bound, BOUND32 if self.problem.name.startswith("fc") else BOUND32_DEEP)
        # a derivative may happen to be next to nothing beside its rounding, but not most of them
        error = self._usual_error(bound32)
        found = [(error, bound32, "float32")]
        if self.checked_in_float64:
            wide = type(self)(self.problem.in_float64(), min(self.k, 2))
            found.append((wide._usual_error(self.bound) if self.unlucky_in_float64 else wide._error(), self.bound, "float64"))
        for off, bound, dtype in found:
            if not off <= bound:
                what = f"{self.name} of {self.problem.name}, k {self.k}, {dtype}"
                raise WrongResult(f"{what}: relative error {off:.3g}, bound {bound}")
        return error

    def _usual_error(self, bound: float) -> float:
        """The error, or the median of five where the first is over the bound; a first NaN stays."""
        error = self._error()
        if error > bound:
            more = (self._error() for _ in range(4))
            error = sorted([error, *(e if e == e else float("inf") for e in more)])[2]
        return error

    def _error(self) -> float:
        raise NotImplementedError


class Backprop(Method):
    name = "backprop"

    def __call__(self) -> None:
        self.problem.model.zero_grad()
        self.evaluate().backward()

    def evaluate(self) -> Tensor:
        return self.problem.loss()

    def _error(self) -> float:
        self()
        return distance(self.gradients(), self.problem.in_float64().true_gradients())


class CheckpointedBackprop(Backprop):
    """``torch.utils.checkpoint`` around every block of the model."""

    name = "checkpointed backprop"

    def evaluate(self) -> Tensor:
        blocks = self.problem.blocks()
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        try:
            return super().evaluate()
        finally:
            for block in blocks:
                del block.forward  # the class's own is found again


class ForwardOnly(Method):
    name = "forward only"

    def __call__(self) -> None:
        self.loss = self.evaluate()

    def evaluate(self) -> Tensor:
        with torch.no_grad():
            return self.problem.loss()

    def _error(self) -> float:
        self()
        return abs(self.loss.item() / self.problem.in_float64().loss().item() - 1)


class ForwardGradient(Method):
    """frog_cuda; subclasses choose what is perturbed and how."""

    options: dict[str, Any] = {}

    def __init__(self, problem: Problem, k: int, aggregate: str = "orthogonal") -> None:
        super().__init__(problem, k)
        self.fg = frog.ForwardGradient(
            problem.model, losses, k=k, seed=1, aggregate=aggregate, **{"per_sample": problem.per_sample, **self.options}
        )

    def __call__(self) -> None:
        self.problem.model.zero_grad()
        self.evaluate()

    def evaluate(self) -> Tensor:
        return self.fg(self.problem.x, self.problem.target)

    def derivatives(self) -> None:
        """The pass up to the coefficients of the projection, without the gradient."""
        self.fg.derivatives(self.problem.x, self.problem.target)

    def update(self) -> None:
        """A step of SGD that leaves no gradient in memory."""
        self.derivatives()
        self.fg.update_(1e-3)

    def _error(self) -> float:
        p = self.problem
        simulated = frog.simulate(self.fg, p.x, p.target)
        self()
        assert self.fg.last is not None
        d = {"d": self.fg.last.directional_derivatives}
        errors = distance(self.gradients(), simulated.gradients), distance(d, {"d": simulated.directional_derivatives})
        return max(errors, key=lambda e: float("inf") if e != e else e)


class Activity(ForwardGradient):
    """Outputs of the innermost modules are perturbed; each computes its parameters' gradient from its output's."""

    name = "activity"
    options = {"perturb": "activity", "tangents": "normal"}


class ActivityBf16(Activity):
    name = "activity, bf16 tangents"
    options = {**Activity.options, "tangent_dtype": torch.bfloat16}
    bound = BOUND_BF16


class ActivityGroups(Activity):
    """The paper's groups of modules as layers."""

    name = "activity, groups"

    def __init__(self, problem: Problem, k: int) -> None:
        if problem.blocks() == [problem.model] or not hasattr(problem.model, "groups"):
            raise Unsuitable("each layer of this model is a group")
        self.options = {**Activity.options, "layers": problem.model.groups()}
        super().__init__(problem, k)


class WeightNormal(ForwardGradient):
    name = "weight, normal"
    options = {"perturb": "weight", "tangents": "normal"}
    #: elements of each tangent that a check holds in memory at a time
    SLICE = 1 << 20

    def _error(self) -> float:
        """Against stored tangents, the true gradient, and float64 algebra; nothing of the pass that was timed."""
        step, k = self.fg.step, self.k
        self()
        true, got = self.problem.true_gradients(), self.gradients()
        state = torch.tensor([1, step])

        def tangents(offset: int, numel: int) -> Tensor:
            return frog.ops.sample_tangents(state, k, numel, offset=offset, distribution=self.fg.distribution.base).double()

        gram, d = torch.zeros(k, k, dtype=torch.float64), torch.zeros(k, dtype=torch.float64)
        pieces = []  # (offset in the tangent vector, true gradient, estimate)
        offset = 0
        for name, g in true.items():
            for start in range(0, g.numel(), self.SLICE):
                pieces.append((offset + start, *(t.flatten()[start : start + self.SLICE].double() for t in (g, got[name]))))
            offset += g.numel()
        for at, g, _ in pieces:
            v = tangents(at, g.numel())
            gram += v @ v.T
            d += v @ g
        c = torch.linalg.solve(gram, d)
        off, size = 0.0, 0.0
        for at, _, estimate in pieces:
            expected = c @ tangents(at, estimate.numel())
            off += (estimate - expected).square().sum().item()
            size += expected.square().sum().item()
        return (off / size) ** 0.5


class WeightRademacher(WeightNormal):
    name = "weight, Rademacher"
    options = {"perturb": "weight", "tangents": "rademacher"}


class WeightLowRank(ForwardGradient):
    """Weight tangents of rank one."""

    name = "weight, low rank"
    options = {"perturb": "weight", "tangents": LowRank(1)}
    #: bytes of tangents in full, float64, that a check may hold
    MOST = 2 << 30

    def _error(self) -> float:
        """Many tangents of a large model: those that fit in memory."""
        largest = max(p.numel() for p in self.problem.parameters.values())
        k = max(1, min(self.k, self.MOST // (16 * largest)))
        return super()._error() if k == self.k else type(self)(self.problem, k)._error()


class WeightLowRankBf16(WeightLowRank):
    name = "weight, low rank, bf16 tangents"
    options = {**WeightLowRank.options, "tangent_dtype": torch.bfloat16}
    bound = BOUND_BF16


def distance(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative difference in the 2-norm over all tensors; NaN where a name is missing."""
    if set(actual) != set(expected):
        return float("nan")
    off = sum((actual[name].double() - e.double()).square().sum().item() for name, e in expected.items())
    size = sum(e.double().square().sum().item() for e in expected.values())
    return (off / size) ** 0.5


def cosine(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Cosine of the angle between two gradients."""
    product = sum((actual[name].double() * e.double()).sum().item() for name, e in expected.items())
    sizes = [sum(t.double().square().sum().item() for t in gradient.values()) for gradient in (actual, expected)]
    return product / (sizes[0] * sizes[1]) ** 0.5


def layers_alone(problem: Problem, k: int) -> Callable[[], None]:
    """The convolutions and linear layers of the model, one after the other, on 1 + k times the rows: what the library needs
    for the products alone. The first layer, whose input is not perturbed, gets the rows of the value."""
    calls: list[tuple[Any, Tensor]] = []
    handles = [
        m.register_forward_hook(lambda m, args, out: calls.append((m, args[0])))
        for m in problem.model.modules()
        if isinstance(m, (nn.Conv2d, nn.Linear))
    ]
    with torch.no_grad():
        problem.loss()
    for handle in handles:
        handle.remove()
    inputs = [(m, x if i == 0 else x.repeat(1 + k, *[1] * (x.dim() - 1))) for i, (m, x) in enumerate(calls)]

    def run() -> None:
        with torch.no_grad():
            for m, x in inputs:
                m(x)

    return run


REFERENCES: list[type[Method]] = [Backprop, CheckpointedBackprop, ForwardOnly]
OURS: list[type[ForwardGradient]] = [Activity, WeightNormal, WeightRademacher, WeightLowRank]
MORE: list[type[ForwardGradient]] = [ActivityGroups, ActivityBf16, WeightLowRankBf16]
