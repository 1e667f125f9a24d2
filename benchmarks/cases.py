"""The nets, every way of getting one gradient, and for each a check that what was timed is right.

A method is called once per round and leaves its gradient in ``.grad``; ``check()`` repeats one call and compares it with
backprop, so a method cannot be fast and wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap

import frog_cuda as frog

BATCH = 64
INPUTS, CLASSES = 784, 10

#: Relative error (2-norm) of a right result in float32. A directional derivative is a sum over n products of either sign, each
#: rounded to 6e-8, with a result about sqrt(n) times smaller than the sum of their sizes: 6e-8 sqrt(n) is 3e-4 for the largest
#: net. A wrong result (a forgotten layer, another tangent) is off by 0.1 and more.
BOUND = 1e-3


class WrongResult(AssertionError):
    """A timed method does not compute what it claims to."""


@dataclass(eq=False)
class Problem:
    """A 784-w-w-10 ReLU net and a batch. MNIST's shapes; the values do not matter for time."""

    width: int
    model: nn.Sequential
    x: Tensor
    target: Tensor

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters()}

    @property
    def n(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def problem(width: int) -> Problem:
    generator = torch.Generator().manual_seed(width)
    model = nn.Sequential(nn.Linear(INPUTS, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES))
    with torch.no_grad():
        for p in model.parameters():
            fan_in = p.shape[1] if p.dim() == 2 else width
            p.copy_(torch.randn(p.shape, generator=generator) / fan_in**0.5)
    x = torch.rand(BATCH, INPUTS, generator=generator)
    return Problem(width, model, x, torch.randint(0, CLASSES, (BATCH,), generator=generator))


def losses(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")


class Method:
    """One way of getting a gradient of ``problem``'s mean loss."""

    name = ""

    def __init__(self, problem: Problem, k: int = 0) -> None:
        self.problem, self.k = problem, k

    def __call__(self) -> Tensor:
        raise NotImplementedError

    def check(self) -> float:
        """Repeats the call; returns the relative error of the result.

        Raises:
            WrongResult: it is larger than BOUND, or NaN.
        """
        error = self._error()
        if not error <= BOUND:
            raise WrongResult(f"{self.name}, width {self.problem.width}, k {self.k}: relative error {error:.3g}, bound {BOUND}")
        return error

    def _error(self) -> float:
        raise NotImplementedError

    def _gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.problem.model.named_parameters() if p.grad is not None}

    def _true_gradients(self) -> dict[str, Tensor]:
        p = self.problem
        found = torch.autograd.grad(losses(p.model(p.x), p.target).mean(), list(p.model.parameters()))
        return dict(zip(p.parameters, found, strict=True))


class Backprop(Method):
    name = "backprop"

    def __call__(self) -> Tensor:
        p = self.problem
        p.model.zero_grad()
        loss = F.cross_entropy(p.model(p.x), p.target)
        loss.backward()
        return loss

    def _error(self) -> float:
        self()
        p = self.problem
        wide = {name: q.double().requires_grad_() for name, q in p.parameters.items()}
        loss = F.cross_entropy(functional_call(p.model, wide, p.x.double()), p.target)
        exact = dict(zip(wide, torch.autograd.grad(loss, list(wide.values())), strict=True))
        return distance(self._gradients(), exact)


class ForwardOnly(Method):
    name = "forward only"

    def __call__(self) -> Tensor:
        p = self.problem
        with torch.no_grad():
            return F.cross_entropy(p.model(p.x), p.target)

    def _error(self) -> float:
        p = self.problem
        wide = {name: q.double() for name, q in p.parameters.items()}
        exact = F.cross_entropy(functional_call(p.model, wide, p.x.double()), p.target)
        return abs(self().item() / exact.item() - 1)


class ForwardGradient(Method):
    """frog_cuda; subclasses choose what is perturbed and how."""

    options: dict[str, str] = {}

    def __init__(self, problem: Problem, k: int, aggregate: str = "orthogonal") -> None:
        super().__init__(problem, k)
        self.fg = frog.ForwardGradient(problem.model, losses, k=k, seed=1, aggregate=aggregate, **self.options)

    def __call__(self) -> Tensor:
        p = self.problem
        p.model.zero_grad()
        return self.fg(p.x, p.target)


class _Weight(ForwardGradient):
    #: elements of each tangent that a check holds in memory at a time
    SLICE = 1 << 20

    def _error(self) -> float:
        """Against stored tangents, the true gradient, and float64 algebra; nothing of the pass that was timed."""
        step, k = self.fg.step, self.k
        self()
        true, got = self._true_gradients(), self._gradients()
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


class WeightNormal(_Weight):
    name = "weight, normal"
    options = {"perturb": "weight", "tangents": "normal"}


class WeightRademacher(_Weight):
    name = "weight, Rademacher"
    options = {"perturb": "weight", "tangents": "rademacher"}


class Activity(ForwardGradient):
    name = "activity"
    options = {"perturb": "activity", "tangents": "normal"}

    def _error(self) -> float:
        p = self.problem
        expected = frog.simulate(self.fg, p.x, p.target).gradients
        self()
        return distance(self._gradients(), expected)


class VmapJvp(Method):
    """What PyTorch offers: ``vmap(jvp)`` over stored normal tangents of every parameter, mean aggregation."""

    name = "vmap(jvp)"

    def __call__(self) -> Tensor:
        p, k = self.problem, self.k
        parameters = p.parameters
        with torch.no_grad():
            tangents = {name: torch.randn(k, *q.shape) for name, q in parameters.items()}

            def loss(values: dict[str, Tensor]) -> Tensor:
                return F.cross_entropy(functional_call(p.model, values, p.x), p.target)

            value, self.derivatives = vmap(lambda v: jvp(loss, (parameters,), (v,)))(tangents)
            for name, q in p.model.named_parameters():
                q.grad = ((self.derivatives / k) @ tangents[name].flatten(1)).view_as(q)
        return value[0]

    def _error(self) -> float:
        seed = 4
        torch.manual_seed(seed)
        self()
        true, got = self._true_gradients(), self._gradients()
        torch.manual_seed(seed)
        d = torch.zeros(self.k, dtype=torch.float64)
        error = 0.0
        for name, g in true.items():
            v = torch.randn(self.k, *g.shape)
            d += (v.flatten(1) @ g.flatten()).double()
            expected = (self.derivatives / self.k) @ v.flatten(1)
            error = max(error, distance({name: got[name].flatten()}, {name: expected}))
        return max(error, distance({"d": self.derivatives}, {"d": d}))


class ForwardAdLoop(Method):
    """k passes of ``torch.autograd.forward_ad``, one stored tangent at a time, mean aggregation."""

    name = "loop of forward_ad"

    def __call__(self) -> Tensor:
        p = self.problem
        p.model.zero_grad()
        self.derivatives = torch.zeros(self.k)
        parameters = p.parameters
        with torch.no_grad():
            for i in range(self.k):
                tangents = {name: torch.randn_like(q) for name, q in parameters.items()}
                with forward_ad.dual_level():
                    duals = {name: forward_ad.make_dual(q, tangents[name]) for name, q in parameters.items()}
                    value, d = forward_ad.unpack_dual(F.cross_entropy(functional_call(p.model, duals, p.x), p.target))
                self.derivatives[i] = d
                for name, q in p.model.named_parameters():
                    share = tangents[name].mul_(d / self.k)
                    q.grad = share if q.grad is None else q.grad.add_(share)
        return value

    def _error(self) -> float:
        seed = 4
        torch.manual_seed(seed)
        self()
        true, got = self._true_gradients(), self._gradients()
        torch.manual_seed(seed)
        d = torch.zeros(self.k, dtype=torch.float64)
        expected = {name: torch.zeros_like(g) for name, g in true.items()}
        for i in range(self.k):
            for name, g in true.items():
                v = torch.randn_like(g)
                d[i] += (v.flatten() @ g.flatten()).item()
                expected[name].add_(v, alpha=self.derivatives[i].item() / self.k)
        return max(distance({"d": self.derivatives}, {"d": d}), distance(got, expected))


def distance(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative difference in the 2-norm over all tensors; NaN where a name is missing."""
    if set(actual) != set(expected):
        return float("nan")
    off = sum((actual[name].double() - e.double()).square().sum().item() for name, e in expected.items())
    size = sum(e.double().square().sum().item() for e in expected.values())
    return (off / size) ** 0.5


REFERENCES: list[type[Method]] = [ForwardOnly]
OURS: list[type[ForwardGradient]] = [WeightNormal, WeightRademacher, Activity]
ALTERNATIVES: list[type[Method]] = [VmapJvp, ForwardAdLoop]


def by_name(name: str) -> type[Method]:
    return next(m for m in [Backprop, *REFERENCES, *OURS, *ALTERNATIVES] if m.name == name)
