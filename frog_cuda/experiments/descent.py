"""Gradient descent on closed-form functions by forward gradients, many runs at a time.

What sections 4.2 and 4.3 of Flügel et al., arXiv 2410.17764, do one run after the other: x := x - lr g_hat. Runs with the same
number of tangents advance together. Those with the same seed share their tangents: alone, each would have drawn the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import frog_cuda as frog

from .. import ops
from ..tangents import Cone

__all__ = ["Approach", "Function", "FUNCTIONS", "PATIENCE", "Outcome", "Tangents", "descend"]

#: a run stops after so many steps in a row in none of which the value fell, as in the paper's runs
PATIENCE = 50


@dataclass(frozen=True)
class Function:
    """A function to minimise.

    Arguments:
        values: x (B, n) -> the B values.
        start: n -> where descent begins, (n,).
        steps: at most so many.
        rate: a learning rate in reach of the best one for the true gradient; a search begins there.
        minimum: value of the global minimum, per dimension.
    """

    name: str
    title: str
    values: Callable[[Tensor], Tensor]
    start: Callable[[int], Tensor]
    steps: int
    rate: float
    minimum: float = 0.0


def _rosenbrock(x: Tensor) -> Tensor:
    here, following = x[:, :-1], x[:, 1:]
    return (100 * (following - here**2) ** 2 + (1 - here) ** 2).sum(1)


FUNCTIONS = {
    f.name: f
    for f in (
        Function("sphere", "Sphere", lambda x: (x**2).sum(1), lambda n: -torch.ones(n), 1000, 0.5),
        Function("rosenbrock", "Rosenbrock", _rosenbrock, lambda n: -torch.eye(n)[0], 25000, 0.002),
        Function(
            "styblinski-tang",
            "Styblinski-Tang",
            lambda x: 0.5 * (x**4 - 16 * x**2 + 5 * x).sum(1),
            lambda n: torch.zeros(n),
            1000,
            0.03,
            -39.16616570377142,
        ),
    )
}


@dataclass(frozen=True)
class Approach:
    """A way to a gradient.

    Arguments:
        aggregate: ``"mean"`` or ``"orthogonal"``; None: the true gradient by backprop.
        k: number of tangents; 0 for the true gradient.
        angle: of a cone of unit tangents, in degrees; None: normal tangents.
    """

    aggregate: str | None
    k: int
    angle: float | None = None

    @property
    def name(self) -> str:
        """As tables know it: ``"true"``, ``"k=1"``, ``"mean k=4"``, ``"orthogonal k=16 angle=45"``."""
        if self.aggregate is None:
            return "true"
        name = "k=1" if self.k == 1 else f"{self.aggregate} k={self.k}"
        return name if self.angle is None else f"{name} angle={self.angle:g}"


@dataclass(frozen=True)
class Outcome:
    """Of one run: the best and the last value, the number of steps, and why it ended: ``"steps"``, ``"no improvement"`` (the
    value had not fallen for some steps) or ``"diverged"`` (to NaN or infinity, the last value)."""

    best: float
    last: float
    steps: int
    ended: str


class Tangents:
    """The tangents of some seeds, step by step.

    Arguments:
        sampler: ``"frog"``: those of :func:`frog_cuda.forward_gradient` with the same seed and step; ``"torch"``: in each step
            ``torch.randn(k, n)`` of a ``torch.Generator`` seeded with the seed.
        angle: see :class:`Approach`.
    """

    def __init__(
        self, sampler: str, seeds: Sequence[int], k: int, n: int, dtype: torch.dtype, angle: float | None = None
    ) -> None:
        self.k, self.n, self.dtype = k, n, dtype
        self.cone = None if angle is None else Cone(angle)
        self._generators = {s: torch.Generator().manual_seed(s) for s in seeds} if sampler == "torch" else None

    def draw(self, seeds: Sequence[int], step: int) -> Tensor:
        """``(len(seeds), k, n)``; steps must follow one another."""
        drawn = torch.stack([self._normal(s, step) for s in seeds])
        if self.cone is None:
            return drawn
        wide = drawn.double()
        mixing = self.cone.mixing(wide @ wide.mT, 0, 0)
        return (mixing.mT @ wide).to(self.dtype)

    def _normal(self, seed: int, step: int) -> Tensor:
        if self._generators is not None:
            return torch.randn(self.k, self.n, generator=self._generators[seed]).to(self.dtype)
        return ops.sample_tangents(torch.tensor([seed, step]), self.k, self.n, dtype=self.dtype)


@torch.no_grad()
def descend(
    function: Function,
    n: int,
    runs: Sequence[tuple[Approach, int, float]],
    *,
    sampler: str = "frog",
    steps: int | None = None,
    patience: int = PATIENCE,
    simulate: bool = False,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], object] = lambda steps: None,
) -> list[Outcome]:
    """Minimises a function in n dimensions by several runs at once.

    Arguments:
        runs: approach, seed and learning rate of each. All approaches have the same k and angle.
        sampler: see :class:`Tangents`.
        steps: at most so many; None: what belongs to the function.
        simulate: directional derivatives from the true gradient by backprop.
        progress: is told how many steps were done.
    Returns:
        An :class:`Outcome` for each run.
    Raises:
        ValueError: approaches differ in k or angle.
    """
    kinds = {(approach.k, approach.angle) for approach, _, _ in runs}
    if len(kinds) != 1:
        raise ValueError(f"runs have approaches with {len(kinds)} pairs of k and angle; expected one pair for all")
    ((k, angle),) = kinds
    limit = function.steps if steps is None else steps
    seeds = sorted({seed for _, seed, _ in runs})
    tangents = Tangents(sampler, seeds, k, n, dtype, angle) if k else None
    group = _Group(runs, seeds)
    x = function.start(n).to(dtype).repeat(len(runs), 1)
    best, last = (torch.full((len(runs),), math.inf, dtype=dtype) for _ in range(2))
    stale = torch.zeros(len(runs), dtype=torch.int64)
    outcomes: list[Outcome | None] = [None] * len(runs)
    for step in range(limit + 1):
        v = None if tangents is None or step == limit else tangents.draw(group.seeds, step)
        value, estimate = _estimate(function, x, v, group, simulate)
        improved = value < last
        best, last, stale = (
            torch.minimum(best, torch.where(value.isnan(), best, value)),
            value,
            torch.where(improved, 0, stale + 1),
        )
        finite = value.isfinite()
        going = finite & (stale < patience) if step < limit else torch.zeros_like(finite)
        if not going.all():
            for i in (~going).nonzero().flatten().tolist():
                ended = "diverged" if not finite[i] else "no improvement" if stale[i] >= patience else "steps"
                outcomes[group.numbers[i]] = Outcome(best[i].item(), value[i].item(), step, ended)
            keep = going.nonzero().flatten()
            group = group.only(keep.tolist())
            x, best, last, stale, estimate = (t[keep] for t in (x, best, last, stale, estimate))
            if not len(keep):
                progress(limit - step)
                break
        x = x - group.rates.to(dtype) * estimate
        progress(1)
    return [outcome for outcome in outcomes if outcome is not None]


class _Group:
    """The runs that are still going.

    Attributes:
        numbers: which of all runs they are.
        seeds: theirs, each once, in increasing order.
        owner: for each run the index of its seed in ``seeds``.
        rates: (runs, 1).
        projected: where the approach is the orthogonal projection, bool (runs,).
    """

    def __init__(self, runs: Sequence[tuple[Approach, int, float]], seeds: Sequence[int], numbers: Sequence[int] | None = None):
        self._runs = runs
        self.numbers = list(range(len(runs))) if numbers is None else list(numbers)
        mine = [runs[i] for i in self.numbers]
        present = {seed for _, seed, _ in mine}
        self.seeds = [seed for seed in seeds if seed in present]
        self.owner = torch.tensor([self.seeds.index(seed) for _, seed, _ in mine], dtype=torch.int64)
        self.rates = torch.tensor([rate for _, _, rate in mine], dtype=torch.float64).unsqueeze(1)
        self.projected = torch.tensor([approach.aggregate == "orthogonal" for approach, _, _ in mine], dtype=torch.bool)
        self.projects = bool(self.projected.any())

    def only(self, positions: Sequence[int]) -> _Group:
        return _Group(self._runs, self.seeds, [self.numbers[i] for i in positions])


def _estimate(function: Function, x: Tensor, v: Tensor | None, group: _Group, simulate: bool) -> tuple[Tensor, Tensor]:
    """Values (R,) and estimates of the gradients (R, n) at x (R, n) from tangents v (seeds, k, n); None: the true gradients."""
    if v is None or simulate:
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            value = function.values(leaf)
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
        value = value.detach()
        if v is None:
            return value, gradient
        mine = v[group.owner]  # (R, k, n)
        d = (mine @ gradient.unsqueeze(2)).squeeze(2)  # (R, k)
    else:
        mine = v[group.owner]
        value, derivatives = frog.jvp(function.values, (x,), (mine.transpose(0, 1),))
        d = derivatives.T
    coefficients = d / d.shape[1]
    if group.projects:
        wide = v.double()
        gram = wide @ wide.mT  # one for each seed
        c, _ = ops.cholesky_project(gram[group.owner], d.unsqueeze(2), rtol=1e-13 if d.dtype == torch.float64 else 1e-7)
        coefficients = torch.where(group.projected.unsqueeze(1), c.squeeze(2).to(d.dtype), coefficients)
    return value, (coefficients.unsqueeze(1) @ mine).squeeze(1)
