"""Figures, drawn without a display and without touching matplotlib's global state."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import require

if TYPE_CHECKING:
    from .demo import Run
    from .findings import Model
    from .results import Row

__all__ = ["angles_figure", "approximation_figures", "curves_figure", "errors_figure", "functions_figure", "loss_curves"]

#: of files that loss_curves writes
ENDINGS = (".png", ".pdf", ".svg")

# From dark to light, and each with a dash and a marker of its own, so that the lines can be told apart in grey
STYLES: list[dict[str, Any]] = [
    {"color": "#000000", "linestyle": "-", "marker": "", "linewidth": 1.2},
    {"color": "#08519c", "linestyle": "-", "marker": "o", "linewidth": 1.8},
    {"color": "#d95f02", "linestyle": "--", "marker": "s", "linewidth": 1.4},
    {"color": "#8c8c8c", "linestyle": "-.", "marker": "^", "linewidth": 1.4},
]


def loss_curves(runs: Sequence[Run], path: Path) -> None:
    """Training loss and test loss by epoch, one line for each run.

    Arguments:
        path: its ending, one of :data:`ENDINGS`, says what kind of file is written.
    Raises:
        MissingPackages: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    (figures, ticker) = require("matplotlib.figure", "matplotlib.ticker")
    figure = figures.Figure(figsize=(7.2, 3.3), dpi=200, layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    epochs = range(1, len(runs[0].train_loss) + 1)
    for run, style in zip(runs, STYLES, strict=True):
        drawn = {**style, "markersize": 4, "markevery": max(1, len(epochs) // 8), "label": run.method.name}
        panels[0].plot(epochs, run.train_loss, **drawn)
        panels[1].plot(epochs, run.test_loss, **drawn)
    for panel, title, label in zip(panels, ("(a) training", "(b) held-out test images"), ("training loss", "test loss")):
        panel.set_yscale("log")
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("epoch", fontsize=9)
        panel.set_ylabel(label, fontsize=9)
        panel.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        panel.yaxis.set_major_formatter(ticker.LogFormatterSciNotation(labelOnlyBase=True))
        panel.tick_params(labelsize=8)
        panel.grid(True, which="major", linewidth=0.4, color="#d9d9d9")
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, format=path.suffix[1:].lower())


MARKERS = "osD^vP"


def shades(count: int) -> list[str]:
    """So many colours from dark to light. Of cividis, without its light end: the order survives grey and colour blindness."""
    (matplotlib,) = require("matplotlib")
    colours = matplotlib.colormaps["cividis"]
    return [matplotlib.colors.to_hex(colours(0.85 * i / max(1, count - 1))) for i in range(count)]


def plain(panel: Any, title: str, xlabel: str, ylabel: str) -> None:
    """Labels, light grid and no frame: what all panels share."""
    panel.set_title(title, fontsize=9)
    panel.set_xlabel(xlabel, fontsize=9)
    panel.set_ylabel(ylabel, fontsize=9)
    panel.tick_params(labelsize=8)
    panel.grid(True, which="major", linewidth=0.4, color="#d9d9d9")
    panel.spines[["top", "right"]].set_visible(False)


def powers(axis: Any) -> None:
    """Ticks at powers of two, every other one where there are many, written as 2^i."""
    (ticker,) = require("matplotlib.ticker")
    axis.set_major_locator(ticker.LogLocator(base=2, numticks=9))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.LogFormatterMathtext(base=2))


def approximation_figures(table: Sequence[Row], folder: Path) -> list[Path]:
    """``cosine.png`` and ``norm_ratio.png`` from the table of ``approximation``: by dimension, a line for each k, closed forms
    dashed.

    Raises:
        OSError: a file cannot be written.
    """
    ks = sorted({row["k"] for row in table})[::2]
    colours = shades(len(ks))
    drawn = {
        "cosine": ("cosine to the gradient", {"mean": "mean and sum", "mean, normalised": "mean and sum, normalised tangents"}),
        "norm_ratio": ("length / length of the gradient", {}),
    }
    paths = []
    for column, (label, titles) in drawn.items():
        names = [row["approach"] for row in table if row["k"] == ks[0] and row["n"] == table[0]["n"]]
        names = [name for name in names if column != "cosine" or not name.startswith("sum")]
        figure, panels = _panels(len(names))
        for panel, name in zip(panels, names, strict=True):
            for k, colour, marker in zip(ks, colours, itertools.cycle(MARKERS)):
                rows = [row for row in table if row["approach"] == name and row["k"] == k]
                n = [row["n"] for row in rows]
                look = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.2, "label": f"k = {k}"}
                panel.plot(n, [row[column] for row in rows], **look)
                panel.plot(
                    n, [row[f"{column}_closed_form"] for row in rows], **DASHED, label="closed form" if k == ks[-1] else None
                )
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            powers(panel.xaxis)
            plain(panel, titles.get(name, name), "dimensions n", label if panel in panels[::3] else "")
        handles = panels[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper center", ncols=len(ks) + 1, fontsize=8, frameon=False)
        paths.append(folder / f"{column}.png")
        figure.savefig(paths[-1], format="png")
    return paths


#: closed forms, above the lines that they are compared with
DASHED: dict[str, Any] = {"color": "#d62728", "linestyle": (0, (3, 3)), "linewidth": 0.8, "zorder": 5}


#: below this, values of functions are drawn at this height: what float32 leaves of a minimum of 0 has no meaning
FLOOR = 1e-12


def functions_figure(table: Sequence[Row], folder: Path) -> Path:
    """``functions.png`` from the table of ``functions``: best values by dimension, a line for each approach; mean over the
    seeds, bars from the lowest to the highest.

    Raises:
        OSError: the file cannot be written.
    """
    from .descent import FUNCTIONS

    names = list(dict.fromkeys(row["function"] for row in table))
    approaches = list(dict.fromkeys(row["approach"] for row in table))
    looks = approach_looks(approaches)
    figure, panels = _panels(len(names))
    for panel, name in zip(panels, names, strict=True):
        function = FUNCTIONS[name]
        zero = function.minimum == 0
        for approach in approaches:
            rows = [row for row in table if row["function"] == name and row["approach"] == approach and row["best"] is not None]
            n = sorted({row["n"] for row in rows})
            bests = [[_height(row["best"], row["n"], zero) for row in rows if row["n"] == size] for size in n]
            means = [sum(values) / len(values) for values in bests]
            bars = [[m - min(v) for m, v in zip(means, bests)], [max(v) - m for m, v in zip(means, bests)]]
            panel.errorbar(n, means, yerr=bars, elinewidth=0.7, label=approach, **looks[approach])
        panel.set_xscale("log", base=2)
        if zero:
            panel.set_yscale("log")
        else:
            panel.axhline(function.minimum, **DASHED)
        powers(panel.xaxis)
        plain(panel, function.title, "dimensions n", f"best value (at least {FLOOR:.0e})" if zero else "best value / n")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    path = folder / "functions.png"
    figure.savefig(path, format="png")
    return path


def _height(value: float, n: int, zero: bool) -> float:
    return max(value, FLOOR) if zero else value / n


def angles_figure(quality: Sequence[Row], descent: Sequence[Row], minimum: float, folder: Path) -> Path:
    """``angles.png`` from both tables of ``angles``: cosine, length and best value by angle, mean and projection for each k.
    Normal tangents stand at the right.

    Raises:
        OSError: the file cannot be written.
    """
    ks = sorted({row["k"] for row in quality})
    names = [f"{aggregate} k={k}" for k in ks for aggregate in ("mean", "orthogonal")]
    looks = approach_looks(names)
    angles = sorted({row["angle"] for row in quality if row["angle"] is not None})
    places = {None: angles[-1] + 15, **{angle: angle for angle in angles}}
    figure, panels = _panels(3)
    for name in names:
        kind, k = name.split(" k=")
        mine = [row for row in quality if row["approach"] == kind and row["k"] == int(k)]
        runs = [row for row in descent if row["approach"].startswith(name) and row["k"] == int(k) and row["best"] is not None]
        bests: dict[Any, list[float]] = {}
        for row in runs:
            bests.setdefault(row["angle"], []).append(row["best"] / row["n"])
        series = (
            {row["angle"]: row["cosine"] for row in mine},
            {row["angle"]: row["norm_ratio"] for row in mine},
            {angle: sum(values) / len(values) for angle, values in bests.items()},
        )
        for panel, found in zip(panels, series, strict=True):
            cones = [angle for angle in angles if angle in found]
            panel.plot(cones, [found[angle] for angle in cones], **looks[name], label=name)
            if None in found:
                panel.plot([places[None]], [found[None]], **{**looks[name], "linestyle": ""})
    panels[1].set_yscale("log")
    panels[2].axhline(minimum, **DASHED)
    labels = (("cosine", "cosine to the gradient"), ("length", "length / length of the gradient"))
    for panel, (title, label) in zip(panels, (*labels, ("Styblinski-Tang", "best value / n")), strict=True):
        plain(panel, title, "angle to the first tangent, degrees", label)
        panel.set_xticks([*angles, places[None]], [f"{angle:g}" for angle in angles] + ["normal"])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(ks), fontsize=8, frameon=False)
    path = folder / "angles.png"
    figure.savefig(path, format="png")
    return path


def errors_figure(models: Sequence[Model], path: Path) -> None:
    """Test error of each network by number of tangents: mean over the seeds, and each run. Dashed: backprop. A run that
    diverged is drawn hollow, with its weights of before.

    Raises:
        OSError: the file cannot be written.
    """
    looks = {
        "mean": {"color": "#d95f02", "linestyle": "--", "marker": "s"},
        "orthogonal": {"color": "#08519c", "linestyle": "-", "marker": "o"},
    }
    figure, panels = _panels(len(models))
    handles: dict[str, Any] = {}
    for panel, model in zip(panels, models, strict=True):
        for shift, (aggregate, look) in zip((0.97, 1.03), looks.items()):
            means = [(k, error) for k in model.ks if (error := model.error(aggregate, k)) is not None]
            (handles[aggregate],) = panel.plot(*zip(*means), **look, markersize=6, linewidth=1.5) if means else (None,)
            for k in model.ks:
                cell = model.cells.get(f"{aggregate} k={k}")
                for error, diverged in [] if cell is None else cell.points:
                    point = {"color": look["color"], "marker": look["marker"], "markersize": 3, "alpha": 0.7}
                    panel.plot(k * shift, error, **point, markerfacecolor="none" if diverged else look["color"])
        if model.backprop is not None:
            handles["backprop"] = panel.axhline(model.backprop, **DASHED)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(model.ks, [str(k) for k in model.ks])
        _percents(panel)
        plain(panel, model.name, "tangents k", "test error in percent" if panel in panels[::3] else "")
    found = {name: handle for name, handle in handles.items() if handle is not None}
    figure.legend(found.values(), found, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, format="png")


def curves_figure(models: Sequence[Model], path: Path) -> None:
    """Lowest validation loss so far by epoch, mean over the seeds; a run that has ended keeps its own.

    Raises:
        OSError: the file cannot be written.
    """
    approaches = list(dict.fromkeys(name for model in models for name in model.cells))
    looks = approach_looks(["true" if name == "bp" else "k=1" if name == "mean k=1" else name for name in approaches])
    figure, panels = _panels(len(models))
    handles: dict[str, Any] = {}
    for panel, model in zip(panels, models, strict=True):
        for name, cell in model.cells.items():
            curve = cell.curve
            title = {"bp": "backprop", "mean k=1": "k=1"}.get(name, name)
            look = looks["true" if name == "bp" else "k=1" if name == "mean k=1" else name]
            (handles[title],) = panel.plot(range(len(curve)), curve, **look, markevery=max(1, len(curve) // 6), label=title)
        panel.set_yscale("log")
        plain(panel, model.name, "epoch", "lowest validation loss so far" if panel in panels[::3] else "")
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, format="png")


def _percents(panel: Any) -> None:
    """Plain numbers on a logarithmic axis: 2, 5, 10, 20, 50."""
    (ticker,) = require("matplotlib.ticker")
    panel.yaxis.set_major_locator(ticker.LogLocator(base=10, subs=(1, 2, 5)))
    panel.yaxis.set_minor_locator(ticker.NullLocator())
    panel.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))


def approach_looks(approaches: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How lines look, by the name of a :class:`frog_cuda.experiments.descent.Approach`: black the true gradient, grey one
    tangent, orange and dashed the mean, blue the projection; darker with k."""
    looks: dict[str, dict[str, Any]] = {}
    blues, oranges = ["#9ecae1", "#4292c6", "#08519c"], ["#fdae6b", "#e6550d", "#8c2d04"]
    ks = sorted({int(name.split("k=")[1].split()[0]) for name in approaches if " k=" in name})
    for name in approaches:
        if " k=" not in name:
            colour, line, marker = ("#000000", "-", "") if name == "true" else ("#8c8c8c", ":", "x")
        else:
            at = ks.index(int(name.split("k=")[1].split()[0]))
            shade = 2 if len(ks) == 1 else round(2 * at / (len(ks) - 1))
            orthogonal = name.startswith("orthogonal")
            colour, line, marker = (blues if orthogonal else oranges)[shade], "-" if orthogonal else "--", MARKERS[at % 6]
        looks[name] = {"color": colour, "linestyle": line, "marker": marker, "markersize": 4, "linewidth": 1.3}
    return looks


def _panels(count: int) -> tuple[Any, list[Any]]:
    """A figure with so many panels, three in a row; what is left over is blank."""
    (figures,) = require("matplotlib.figure")
    rows = -(-count // 3)
    figure = figures.Figure(figsize=(9, 0.4 + 2.9 * rows), dpi=150, layout="constrained")
    panels = list(figure.subplots(rows, 3, squeeze=False).flat)
    for panel in panels[count:]:
        panel.set_axis_off()
    return figure, panels[:count]
