"""Closed-form functions minimised by forward gradients (Flügel et al., arXiv 2410.17764, section 4.2, Fig. 4, appendix C)."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .._files import replace
from . import UsageError, require
from .descent import FUNCTIONS, Approach, Function, Outcome, descend
from .options import add_common, check_common, positive, powers_of_two
from .rates import RateTable
from .results import Results, Row

__all__ = ["APPROACHES", "add_arguments", "best_by_case", "best_rates", "by_seed", "case", "minimise", "run"]

PACKAGES = ("matplotlib.figure", "tqdm")
APPROACHES = (
    Approach(None, 0),
    Approach("mean", 1),
    *(Approach(aggregate, k) for k in (2, 4, 16) for aggregate in ("mean", "orthogonal")),
)
#: of the search for learning rates; no seeds of results
SEARCH_SEEDS = range(1000, 1003)


def case(function: str, n: int, approach: Approach) -> str:
    """By which a table of learning rates knows a run: ``"sphere n=64 orthogonal k=4"``."""
    return f"{function} n={n} {approach.name}"


def together(approaches: Sequence[Approach]) -> list[list[Approach]]:
    """Those that advance in one loop: the same k and angle."""
    kinds = dict.fromkeys((a.k, a.angle) for a in approaches)
    return [[a for a in approaches if (a.k, a.angle) == kind] for kind in kinds]


def minimise(
    function: Function,
    n: int,
    approaches: Sequence[Approach],
    seeds: Sequence[int],
    rate: Callable[[Approach], float],
    **options: Any,
) -> list[Row]:
    """A row for each approach and seed; one for the true gradient, which no seed changes.

    Arguments:
        rate: the learning rate of an approach.
        options: of :func:`frog_cuda.experiments.descent.descend`.
    """
    rows = []
    for group in together(approaches):
        runs = [(a, seed, rate(a)) for a in group for seed in (seeds if a.k else seeds[:1])]
        for (approach, seed, lr), outcome in zip(runs, descend(function, n, runs, **options), strict=True):
            rows.append(_row(function, n, approach, seed, lr, outcome))
    return rows


def _row(function: Function, n: int, approach: Approach, seed: int, rate: float, outcome: Outcome) -> Row:
    return {
        "function": function.name,
        "n": n,
        "approach": approach.name,
        "k": approach.k,
        "seed": seed if approach.k else None,
        "learning_rate": rate,
        "best": outcome.best,
        "last": outcome.last,
        "steps": outcome.steps,
        "ended": outcome.ended,
    }


def best_rates(
    function: Function,
    n: int,
    approaches: Sequence[Approach],
    *,
    seeds: Sequence[int] = SEARCH_SEEDS,
    grid: int = 12,
    **options: Any,
) -> dict[Approach, float]:
    """The learning rate on a grid with which each approach comes lowest: best values, mean over the seeds. One with which a run
    diverges does not count.

    The grid has steps of sqrt(2). It ends above ``function.rate`` for the true gradient and the projection, and for the mean
    above k / (n + k + 1) times that, as the mean is longer by such a factor. Where the best rate stands at an end, the grid
    moves on, twice at most. Where a run has more than 5000 steps, this is done with a fifth of them; all of them are given to
    the rate found and the next four below; where a run diverges with each of these, to the next five.

    Arguments:
        grid: number of rates.
        options: of :func:`frog_cuda.experiments.descent.descend`.
    Raises:
        RuntimeError: runs diverge with every rate.
    """
    steps = options.pop("steps", None) or function.steps
    found: dict[Approach, float] = {}
    for approach in approaches:
        unit = 1 if approach.angle is None else n  # tangents of a cone have length 1
        scale = function.rate * (unit * approach.k / (n + approach.k + 1) if approach.aggregate == "mean" else 1.0)

        def attempt(
            exponents: Sequence[int], steps: int, approach: Approach = approach, scale: float = scale
        ) -> dict[int, float]:
            runs = [(approach, seed, scale * 2 ** (e / 2)) for e in exponents for seed in seeds]
            outcomes = iter(descend(function, n, runs, steps=steps, **options))
            tried = {}
            for e in exponents:
                mine = [next(outcomes) for _ in seeds]
                tried[e] = math.inf if any(o.ended == "diverged" for o in mine) else sum(o.best for o in mine) / len(mine)
            return tried

        long = steps > 5000
        exponents, tried = list(range(3 - grid, 3)), dict[int, float]()
        for _ in range(3):
            tried |= attempt([e for e in exponents if e not in tried], steps // 5 if long else steps)
            best, low, high = _lowest(tried), min(tried), max(tried)
            exponents = [low - i for i in range(6)] if best == low else [high + i for i in range(4)] if best == high else []
            if not exponents:
                break
        if long:
            exponents, tried = [best - i for i in range(5)], {}
            while len(tried) < 15 and not any(math.isfinite(value) for value in tried.values()):
                tried |= attempt([e - len(tried) for e in exponents], steps)
            best = _lowest(tried)
        if not math.isfinite(tried[best]):
            raise RuntimeError(
                f"{case(function.name, n, approach)}: with every rate down to {scale * 2 ** (best / 2):.1e} a run diverges"
            )
        found[approach] = float(f"{scale * 2 ** (best / 2):.4g}")
    return found


def _lowest(tried: dict[int, float]) -> int:
    """Where the value is lowest. Several may be as close to the minimum as numbers can say: the middle one is the safest."""
    lowest = min(tried.values())
    if not math.isfinite(lowest):
        return min(tried)
    equal = sorted(e for e, value in tried.items() if value <= lowest + 1e-6 * abs(lowest))
    return equal[len(equal) // 2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m frog_cuda functions``."""
    add_common(parser, seeds=5, output="results/functions")
    add_descent(parser, steps="1000, Rosenbrock 25000; with --quick a tenth")
    add = parser.add_argument
    add("--function", choices=tuple(FUNCTIONS), action="append", help="only this one; may be given again (default: all)")
    add("--max-n", type=positive, help="dimensions: powers of two up to this (default: 1024, with --quick 64)")


def add_descent(parser: argparse.ArgumentParser, *, steps: str) -> None:
    """Options of all commands that descend.

    Arguments:
        steps: default of ``--max-steps``, in words.
    """
    add = parser.add_argument
    add(
        "--lr-table",
        type=Path,
        help="learning rates: JSON as lr-search writes, or CSV as the authors published (default: ours)",
    )
    add("--max-steps", type=positive, help=f"at most so many steps (default: {steps})")
    add("--search", type=Path, metavar="TABLE", help="search learning rates instead, and add them to this JSON file")


def run(args: argparse.Namespace) -> None:
    """Minimises, writes ``functions.csv``, ``.json`` and ``rosenbrock.md``, draws ``functions.png``.

    Raises:
        MissingPackages: matplotlib or tqdm are not installed.
        UsageError: an option cannot be used, a learning rate is missing, or there are results in the output folder already.
    """
    tqdm = require(*PACKAGES)[-1]
    from .plots import functions_figure

    check_common(args)
    torch.set_num_threads(args.threads or 1)  # the tensors are too small to be shared out
    chosen = [FUNCTIONS[name] for name in FUNCTIONS if not args.function or name in args.function]
    ns = powers_of_two(args.max_n or (64 if args.quick else 1024))
    work = {f.name: steps(f, args) * len(together(APPROACHES)) for f in chosen}
    if args.search is not None:
        search("functions", args, [(f, n, APPROACHES) for f in chosen for n in ns])
        return
    table, seeds = RateTable.read(args.lr_table), seeds_of(args, 5)
    rates = {(f.name, n, a): table.rate("functions", case(f.name, n, a)) for f in chosen for n in ns for a in APPROACHES}
    settings = {"functions": [f.name for f in chosen], "n": ns, "seeds": len(seeds), **descent_settings(args, chosen)}
    results = Results(args.output, "functions", command=args.command_line, settings=settings, resume=args.resume)
    pairs = [(f, n) for f in chosen for n in ns]
    with tqdm.tqdm(total=sum(work[f.name] for f, _ in pairs), disable=None, unit="step") as bar:
        for f, n in pairs:
            if results.has(function=f.name, n=n):
                bar.update(work[f.name])
                continue
            bar.set_description(f"{f.title}, n = {n}")

            def rate(a: Approach, name: str = f.name, n: int = n) -> float:
                return rates[name, n, a]

            found = minimise(f, n, APPROACHES, seeds, rate, progress=bar.update, **descent_options(args, f))
            results.add(found, complete=(f, n) == pairs[-1])
    figure = functions_figure(results.rows, args.output)
    text = by_seed([row for row in results.rows if row["function"] == "rosenbrock"])
    if text:
        replace(args.output / "rosenbrock.md", f"# Rosenbrock: best value of each seed\n\n{text}\n")
    print(f"{summary(results.rows)}\n\n{results.where([figure])}")


def steps(function: Function, args: argparse.Namespace) -> int:
    """How many at most."""
    return args.max_steps or (function.steps // 10 if args.quick else function.steps)


def seeds_of(args: argparse.Namespace, default: int) -> list[int]:
    return list(range(args.seed, args.seed + (args.seeds or (2 if args.quick else default))))


def descent_options(args: argparse.Namespace, function: Function) -> dict[str, Any]:
    dtype = getattr(torch, args.dtype)
    return {"sampler": args.sampler, "steps": steps(function, args), "simulate": args.simulate, "dtype": dtype}


def descent_settings(args: argparse.Namespace, functions: Sequence[Function]) -> dict[str, Any]:
    return {
        "seed": args.seed,
        "steps": {f.name: steps(f, args) for f in functions},
        "lr_table": "shipped" if args.lr_table is None else args.lr_table.name,
        "sampler": args.sampler,
        "simulate": args.simulate,
        "dtype": args.dtype,
    }


def search(experiment: str, args: argparse.Namespace, tasks: Sequence[tuple[Function, int, Sequence[Approach]]]) -> None:
    """Searches the rates of all tasks and adds them to the table ``args.search``, which is written after each task.

    Raises:
        UsageError: the table is there but none of learning rates, or cannot be written.
    """
    (tqdm,) = require("tqdm")
    table = RateTable.read(args.search) if args.search.exists() else RateTable({})
    for function, n, approaches in tqdm.tqdm(tasks, disable=None):
        for approach in approaches:
            if args.resume and case(function.name, n, approach) in table.rates.get(experiment, {}):
                continue
            found = best_rates(function, n, [approach], **descent_options(args, function))
            table.set(experiment, case(function.name, n, approach), found[approach])
        try:
            table.write(args.search)
        except OSError as error:
            raise UsageError(f"--search {str(args.search)!r} cannot be written: {error.strerror}") from error
    print(f"Learning rates: {args.search}")


def summary(rows: Sequence[Row]) -> str:
    """Best values, mean over the seeds: functions and approaches down, some dimensions across."""
    ns = sorted({row["n"] for row in rows})
    ns = ns[:: max(1, (len(ns) - 1) // 5)]
    names = dict.fromkeys((row["function"], row["approach"]) for row in rows)
    lines = [f"{'best value, mean over seeds':<36}" + "".join(f"{f'n = {n}':>12}" for n in ns)]
    for function, approach in names:
        line = f"{function:<16} {approach:<19}"
        for n in ns:
            bests = _bests(rows, function=function, approach=approach, n=n)
            line += f"{sum(bests) / len(bests):12.3e}" if bests else f"{'-':>12}"
        lines.append(line)
    return "\n".join(lines)


def best_by_case(rows: Sequence[Row]) -> dict[tuple[str, int, str], float]:
    """Best value, mean over the seeds, by function, n and approach. Left out are cases in which a run diverged."""
    found: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["function"], row["n"], row["approach"]), []).append(row)
    return {
        case: sum(row["best"] for row in mine) / len(mine)
        for case, mine in found.items()
        if all(row["best"] is not None and row["ended"] != "diverged" for row in mine)
    }


def by_seed(rows: Sequence[Row]) -> str:
    """A Markdown table: best value of each seed; empty where there are no rows."""
    if not rows:
        return ""
    seeds = sorted({row["seed"] for row in rows if row["seed"] is not None})
    lines = [
        "| n | gradient | " + " | ".join(f"seed {s}" for s in seeds) + " | mean |",
        "|---:|---|" + "---:|" * (len(seeds) + 1),
    ]
    for n, approach in dict.fromkeys((row["n"], row["approach"]) for row in rows):
        found = {row["seed"]: row["best"] for row in rows if row["n"] == n and row["approach"] == approach}
        cells = [found.get(seed, found.get(None)) for seed in seeds]
        there = [cell for cell in cells if cell is not None]
        mean = sum(there) / len(there) if len(there) == len(cells) else None
        lines.append(f"| {n} | {approach} | " + " | ".join("-" if c is None else f"{c:.2e}" for c in [*cells, mean]) + " |")
    return "\n".join(lines)


def _bests(rows: Sequence[Row], **key: Any) -> list[float]:
    chosen = [row["best"] for row in rows if all(row[name] == value for name, value in key.items())]
    return [best for best in chosen if best is not None]
