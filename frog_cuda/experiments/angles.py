"""Tangents at an angle: cones around the first one (Flügel et al., arXiv 2410.17764, section 4.3 and Fig. 5).

How close the estimates come to the gradient when all tangents make the same angle with the first one, and how well the
Styblinski-Tang function is minimised by them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

import torch

from . import require
from .approximation import APPROACHES, Quality, measure
from .descent import FUNCTIONS, Approach, Tangents
from .functions import add_descent, case, descent_options, descent_settings, minimise, search, steps, together
from .options import add_common, check_common, positive
from .rates import RateTable
from .results import Results, Row

__all__ = ["ANGLES", "add_arguments", "approaches", "approximate", "run"]

PACKAGES = ("matplotlib.figure", "tqdm")
ANGLES = (15, 30, 45, 60, 75, 90)
KS = (4, 16, 64)
N = 64
FUNCTION = FUNCTIONS["styblinski-tang"]


def approaches(ks: Sequence[int], angles: Sequence[float]) -> list[Approach]:
    """Those that minimise: mean and projection for each k and angle, and for each k with normal tangents."""
    return [Approach(a, k, angle) for k in ks for angle in (*angles, None) for a in ("mean", "orthogonal")]


def approximate(k: int, n: int, angle: float | None, samples: int, seed: int, **options: Any) -> dict[str, Quality]:
    """Cosine and ratio of lengths of the estimates from a cone, see :func:`frog_cuda.experiments.approximation.measure`.

    Arguments:
        angle: in degrees; None: normal tangents.
        seed: sample s is drawn with ``seed + s``.
        options: ``sampler``, ``dtype`` and ``simulate``.
    """
    seeds = range(seed, seed + samples)
    tangents = Tangents(options["sampler"], seeds, k, n, options["dtype"], angle)
    return measure(
        lambda first, count: tangents.draw(seeds[first : first + count], 0), [k], n, samples, simulate=options["simulate"]
    )


def _row(k: int, n: int, angle: float | None, approach: str, quality: Quality) -> Row:
    values: Row = {}
    for name, found in (("cosine", quality.cosine), ("norm_ratio", quality.ratio)):
        spread = found.std(correction=min(1, len(found) - 1)).item()
        values |= {name: found.mean().item(), f"{name}_std": spread}
    return {"approach": approach, "k": k, "n": n, "angle": angle, "samples": len(quality.cosine), **values}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m frog_cuda angles``."""
    add_common(parser, seeds=5, output="results/angles")
    add_descent(parser, steps=f"{FUNCTION.steps}, with --quick {FUNCTION.steps // 10}")
    add = parser.add_argument
    add("--samples", type=positive, help="of estimates compared with the gradient (default: 1000, with --quick 200)")
    add(
        "--angle", type=_angle, action="append", help=f"in degrees; may be given again (default: {', '.join(map(str, ANGLES))})"
    )


def _angle(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 90:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer in [1, 90]")
    return int(text)


def run(args: argparse.Namespace) -> None:
    """Measures and minimises; writes ``angles.csv`` and ``.json`` (cosine and length), ``angles_descent.csv`` and ``.json``;
    draws ``angles.png``.

    Raises:
        MissingPackages: matplotlib or tqdm are not installed.
        UsageError: an option cannot be used, a learning rate is missing, or there are results in the output folder already.
    """
    tqdm = require(*PACKAGES)[-1]
    from .plots import angles_figure

    check_common(args)
    torch.set_num_threads(args.threads or 1)
    angles = sorted(set(args.angle or ANGLES))
    chosen = approaches(KS, angles)
    if args.search is not None:
        search("angles", args, [(FUNCTION, N, group) for group in together(chosen)])
        return
    table = RateTable.read(args.lr_table)
    rates = {a: table.rate("angles", case(FUNCTION.name, N, a)) for a in chosen}
    samples, seeds = args.samples or (200 if args.quick else 1000), args.seeds or (2 if args.quick else 5)
    options = {"sampler": args.sampler, "dtype": getattr(torch, args.dtype), "simulate": args.simulate}
    settings = {"k": KS, "n": N, "angles": angles, **descent_settings(args, [FUNCTION])}
    quality, descent = (
        Results(args.output, name, command=args.command_line, settings={**settings, "seeds": count}, resume=args.resume)
        for name, count in (("angles", samples), ("angles_descent", seeds))
    )
    groups = together(chosen)
    with tqdm.tqdm(total=len(groups) * steps(FUNCTION, args), disable=None, unit="step") as bar:
        for group in groups:
            k, angle = group[0].k, group[0].angle
            last = group == groups[-1]
            bar.set_description(f"k = {k}, " + ("normal" if angle is None else f"{angle:g} degrees"))
            if not quality.has(k=k, angle=angle):
                found = approximate(k, N, angle, samples, args.seed, **options)
                quality.add([_row(k, N, angle, a.name, found[a.name]) for a in APPROACHES], complete=last)
            if descent.has(k=k, angle=angle):
                bar.update(steps(FUNCTION, args))
                continue
            mine = range(args.seed, args.seed + seeds)
            rows = minimise(
                FUNCTION, N, group, mine, lambda a: rates[a], progress=bar.update, **descent_options(args, FUNCTION)
            )
            descent.add([{**row, "angle": angle} for row in rows], complete=last)
    figure = angles_figure(quality.rows, descent.rows, FUNCTION.minimum, args.output)
    print(f"{summary(quality.rows, descent.rows)}\n\n{quality.where([figure])} Descent: {descent.path('csv')}.")


def summary(quality: Sequence[Row], descent: Sequence[Row]) -> str:
    """Cosines and best values by angle, one line for each k and aggregation."""
    angles = list(dict.fromkeys(row["angle"] for row in quality))
    lines = [f"{'cosine to the gradient':<36}" + "".join(f"{'normal' if a is None else f'{a:g}':>9}" for a in angles)]
    for k, approach in dict.fromkeys((row["k"], row["approach"]) for row in quality):
        found = {row["angle"]: row["cosine"] for row in quality if row["k"] == k and row["approach"] == approach}
        lines.append(f"k = {k:<4} {approach:<27}" + "".join(f"{found.get(a, math.nan):9.4f}" for a in angles))
    lines.append("best value of Styblinski-Tang, mean over seeds")
    for k, kind in dict.fromkeys((row["k"], row["approach"].split()[0]) for row in descent):
        line = f"k = {k:<4} {kind:<27}"
        for a in angles:
            rows = [row for row in descent if row["k"] == k and row["angle"] == a and row["approach"].startswith(kind)]
            bests = [row["best"] for row in rows if row["best"] is not None]
            line += f"{sum(bests) / len(bests):9.1f}" if bests else f"{'-':>9}"
        lines.append(line)
    return "\n".join(lines)
