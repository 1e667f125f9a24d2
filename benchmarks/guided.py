"""Guided tangents against random ones at equal wall-clock: the digits network of the demo, and closed-form functions.

    python benchmarks/guided.py [--quick] [--output FOLDER]

Seconds per step are measured first, all methods by turns in one run. Each method then takes as many steps as fit the time that
random tangents take for theirs. Learning rates are the best of a grid, for each method by itself: on a fifth of the training
images that is left out, or from other starting points. The test images have no part in it. Writes guided.json, guided.md and
guided.png.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER.parent), str(FOLDER)]  # frog_cuda as it lies here, installed or not

import torch  # noqa: E402
from report_tables import table  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import frog_cuda as frog  # noqa: E402
from frog_cuda.experiments.demo import BATCH, cosine_to_true_gradient, evaluate, network  # noqa: E402
from frog_cuda.experiments.digits import Digits, batches, load  # noqa: E402
from frog_cuda.experiments.timing import interleaved_medians  # noqa: E402
from frog_cuda.tangents import Guided, Normal  # noqa: E402

CURVE = 24  # points of a curve
DECAY = 0.9  # of momentum: Adam's for the digits, the same for functions


@dataclass(frozen=True)
class Method:
    """k random tangents and the ``previous`` last estimates or momentum."""

    name: str
    previous: int = 0
    momentum: bool = False


METHODS = [
    Method("normal"),
    Method("Guided(1)", previous=1),
    Method("Guided(4)", previous=4),
    Method("Guided(vectors=momentum)", momentum=True),
]


@dataclass
class Curve:
    """What a run gave: after so many seconds a loss; and the mean cosine to the true gradient."""

    seconds: list[float]
    loss: list[float]
    cosine: float


#: takes a learning rate, a seed, a number of steps, and whether the seed is one to choose learning rates with
Train = Callable[[Method, float, int, int, bool], Curve]


@dataclass
class Task:
    name: str
    k: int
    n: int
    rates: Sequence[float]
    steps: int
    train: Train
    #: makes a function that takes one step, for timing
    step: Callable[[Method], Callable[[], object]]
    what: str


# ---- the digits network of the demo


class DigitsStep:
    """One step of Adam with weight-perturbed estimates."""

    def __init__(self, method: Method, k: int, rate: float, seed: int, steps: int) -> None:
        self.model = network(seed)
        optimizer = self.optimizer = torch.optim.Adam(self.model.parameters(), lr=rate, betas=(DECAY, 0.999))
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, rate, total_steps=steps, pct_start=0.1, cycle_momentum=False
        )

        def momentum() -> dict[str, Tensor]:
            named = self.model.named_parameters()
            return {name: optimizer.state[p]["exp_avg"] for name, p in named if p in optimizer.state}

        tangents = Guided(method.previous, vectors=momentum if method.momentum else None) if method != METHODS[0] else Normal()
        self.fg = frog.ForwardGradient(self.model, nn.CrossEntropyLoss(), k=k, perturb="weight", tangents=tangents, seed=seed)

    def estimate(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        self.fg(x, y)

    def update(self) -> None:
        self.optimizer.step()


def digits_task(k: int, steps: int) -> Task:
    digits = load()
    fifth = len(digits.train_x) // 5
    held_out = Digits(digits.train_x[fifth:], digits.train_y[fifth:], digits.train_x[:fifth], digits.train_y[:fifth])

    def train(method: Method, rate: float, seed: int, steps: int, choosing: bool) -> Curve:
        data, order = held_out if choosing else digits, torch.Generator().manual_seed(seed)
        run = DigitsStep(method, k, rate, seed, steps)
        cosines, at, losses, done = [], [], [], 0
        while done < steps:
            for x, y in batches(data.train_x, data.train_y, BATCH, order):
                run.estimate(x, y)
                if done % 10 == 9:
                    cosines.append(cosine_to_true_gradient(run.model, x, y))
                run.update()
                run.schedule.step()
                done += 1
                if done * CURVE // steps > (done - 1) * CURVE // steps:
                    at.append(done)
                    losses.append(evaluate(run.model, data.test_x, data.test_y)[0])
                if done == steps:
                    break
        return Curve([float(a) for a in at], losses, statistics.mean(cosines))

    def step(method: Method) -> Callable[[], object]:
        run = DigitsStep(method, k, 1e-6, 0, 10**6)
        x, y = digits.train_x[:BATCH], digits.train_y[:BATCH]

        def once() -> None:
            run.estimate(x, y)
            run.update()

        for _ in range(8):  # until all vectors are there
            once()
        return once

    n = sum(p.numel() for p in network(0).parameters())
    return Task("digits", k, n, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), steps, train, step, "test loss")


# ---- closed-form functions


def sphere(x: Tensor) -> Tensor:
    return (x**2).sum()


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def styblinski_tang(x: Tensor) -> Tensor:
    """Shifted and scaled by 1 / n: its minimum is 0."""
    return (x**4 - 16 * x**2 + 5 * x).mean() / 2 + 39.16616570377142


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Sequence[float]]] = {
    "sphere": (sphere, (0.05, 0.15, 0.5, 1.0)),
    "rosenbrock": (rosenbrock, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
    "styblinski_tang": (styblinski_tang, (0.06, 0.2, 0.6, 2.0, 6.0)),
}


class FunctionStep:
    """One step of gradient descent; the last estimates are kept here, because a function has no memory."""

    def __init__(self, method: Method, fn: Callable[[Tensor], Tensor], n: int, k: int, rate: float, seed: int) -> None:
        self.fn, self.k, self.rate, self.seed, self.step = fn, k, rate, seed, 0
        self.x = 4 * torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) - 2
        self.kept: list[Tensor] = []
        self.method = method
        self.tangents = Guided(vectors=lambda: torch.stack(self.kept) if self.kept else None)

    def estimate(self) -> Tensor:
        value, self.g = frog.forward_gradient(self.fn, self.x, k=self.k, tangents=self.tangents, seed=self.seed, step=self.step)
        return value

    def update(self) -> None:
        self.step += 1
        self.x = self.x - self.rate * self.g
        if self.method.momentum:
            self.kept = [DECAY * self.kept[0] + (1 - DECAY) * self.g if self.kept else self.g]
        elif self.method.previous:
            self.kept = [self.g, *self.kept][: self.method.previous]


def function_task(name: str, n: int, k: int, steps: int) -> Task:
    fn, rates = FUNCTIONS[name]

    def train(method: Method, rate: float, seed: int, steps: int, choosing: bool) -> Curve:
        run = FunctionStep(method, fn, n, k, rate, seed + 1000 * choosing)
        cosines, at, losses = [], [], []
        for done in range(1, steps + 1):
            run.estimate()
            if done % 10 == 0:
                leaf = run.x.clone().requires_grad_()
                (true,) = torch.autograd.grad(fn(leaf), leaf)
                cosines.append(nn.functional.cosine_similarity(run.g, true, dim=0).item())
            run.update()
            if done * CURVE // steps > (done - 1) * CURVE // steps:
                at.append(done)
                losses.append(fn(run.x).item())
        return Curve([float(a) for a in at], losses, statistics.mean(cosines))

    def step(method: Method) -> Callable[[], object]:
        run = FunctionStep(method, fn, n, k, 0.0, 0)

        def once() -> None:
            run.estimate()
            run.update()

        for _ in range(8):
            once()
        return once

    return Task(name, k, n, rates, steps, train, step, "value")


# ---- the comparison


def compare(task: Task, seeds: int, choosing: int, rounds: int, limit: float) -> dict[str, Any]:
    """Timing, then learning rates, then the runs that are reported."""
    calls = {method.name: task.step(method) for method in METHODS}
    seconds = interleaved_medians(calls, torch.device("cpu"), rounds=rounds, limit=limit, burst=8)
    budget = task.steps * seconds[METHODS[0].name]
    found = []
    for method in METHODS:
        each = seconds[method.name]
        steps = max(CURVE, round(budget / each))
        scores = {rate: mean_loss(task, method, rate, choosing, steps) for rate in task.rates}
        rate = min(scores, key=lambda rate: scores[rate])
        curves = [task.train(method, rate, seed, steps, False) for seed in range(seeds)]
        found.append(
            {
                "method": method.name,
                "ms_per_step": 1e3 * each,
                "steps": steps,
                "rate": rate,
                "scores": {f"{r:g}": s if math.isfinite(s) else None for r, s in scores.items()},
                "cosine": statistics.mean(c.cosine for c in curves),
                "loss": statistics.median(c.loss[-1] for c in curves),
                "lowest": min(c.loss[-1] for c in curves),
                "highest": max(c.loss[-1] for c in curves),
                "seconds": [each * s for s in curves[0].seconds],
                "curve": [statistics.median(values) for values in zip(*(c.loss for c in curves), strict=True)],
            }
        )
        print(f"{task.name}: {method.name}: {found[-1]['loss']:.4g} after {steps} steps, cosine {found[-1]['cosine']:.3f}")
    return {
        "task": task.name,
        "k": task.k,
        "n": task.n,
        "seconds": budget,
        "seeds": seeds,
        "what": task.what,
        "methods": found,
    }


def mean_loss(task: Task, method: Method, rate: float, seeds: int, steps: int) -> float:
    """Infinite where a run diverges."""
    try:
        losses = [task.train(method, rate, 100 + seed, steps, True).loss[-1] for seed in range(seeds)]
    except FloatingPointError:
        return math.inf
    return statistics.mean(losses) if all(map(math.isfinite, losses)) else math.inf


def markdown(machine: str, results: Sequence[dict[str, Any]]) -> str:
    parts = [
        "# Guided tangents at equal wall-clock",
        f"Written by `python benchmarks/guided.py`. {machine}.",
        "Each method takes as many steps as fit the same time, by the medians of one run. Learning rates are the best of a "
        "grid for each method by itself, and not chosen on what is reported. Cosine: to the true gradient, mean over the "
        "steps. Loss: median over the seeds, and their range.",
    ]
    for r in results:
        rows = [
            [
                m["method"],
                f"{m['ms_per_step']:.3f}",
                str(m["steps"]),
                f"{m['rate']:g}",
                f"{m['cosine']:.3f}",
                f"{m['loss']:.4g}",
                f"{m['lowest']:.4g} to {m['highest']:.4g}",
            ]
            for m in r["methods"]
        ]
        head = ["tangents", "ms per step", "steps", "learning rate", "cosine", r["what"], "range"]
        about = f"k = {r['k']}, n = {r['n']}, {r['seeds']} seeds, {r['seconds']:.2f} s each."
        parts += [f"## {r['task']}", about, table(head, rows)]
    return "\n\n".join(parts) + "\n"


def figure(results: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    from frog_cuda.experiments.plots import STYLES

    page = Figure(figsize=(9.6, 2.8), dpi=150, layout="constrained")
    panels = page.subplots(1, len(results), squeeze=False)[0]
    for panel, r in zip(panels, results, strict=True):
        for m, style in zip(r["methods"], STYLES, strict=False):
            panel.plot(m["seconds"], m["curve"], **{**style, "markersize": 3, "markevery": 6, "label": m["method"]})
        panel.set_yscale("log")
        panel.set_title(f"{r['task']}, k = {r['k']}, n = {r['n']}", fontsize=8)
        panel.set_xlabel("seconds", fontsize=8)
        panel.set_ylabel(r["what"], fontsize=8)
        panel.tick_params(labelsize=7, which="both")
    page.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    page.savefig(path, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes: shows that it runs, and no more")
    parser.add_argument("--output", type=Path, default=FOLDER / "results", help="folder of the results")
    options = parser.parse_args()
    began = time.perf_counter()
    tasks = [digits_task(16, 60 if options.quick else 880)]
    tasks += [function_task(name, 64, 4, 60 if options.quick else 600) for name in FUNCTIONS]
    results = []
    for task in tasks:
        task.rates = task.rates[1:3] if options.quick else task.rates
        seeds = 1 if options.quick else 3 if task.name == "digits" else 9
        results.append(compare(task, seeds, 1 if options.quick else 2, 2 if options.quick else 40, 5.0))
    threads = torch.get_num_threads()
    machine = f"{platform.machine()}, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}"
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "guided.json").write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    (options.output / "guided.md").write_text(markdown(machine, results))
    figure(results, options.output / "guided.png")
    print(f"{options.output / 'guided.md'} and two more; took {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
