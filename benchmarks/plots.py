"""Plots of docs/benchmarks.md: time against k, memory against k, cosine against time; a panel for each model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from report_tables import Record, in_order

#: colours of Okabe and Ito, told apart by the colour-blind; markers and lines tell them apart in print. Solid: this package.
STYLES: dict[str, dict[str, Any]] = {
    "activity": {"color": "#0072B2", "marker": "o"},
    "weight, low rank": {"color": "#D55E00", "marker": "s"},
    "weight, Rademacher": {"color": "#E69F00", "marker": "^"},
    "weight, normal": {"color": "#CC79A7", "marker": "D"},
    "MeZO": {"color": "#009E73", "marker": "v", "linestyle": "--"},
    "vmap(jvp)": {"color": "#56B4E9", "marker": "P", "linestyle": "--"},
    "loop of forward_ad": {"color": "#000000", "marker": "x", "linestyle": ":"},
    "JAX jit, vmap(jvp)": {"color": "#7F7F7F", "marker": "*", "linestyle": "--"},
}
REFERENCE = {"color": "#444444", "linewidth": 1.0}
Draw = Callable[[Any, Sequence[Record], str], None]


def _series(records: Sequence[Record], model: str, value: str, table: str = "gradient") -> dict[str, list[Record]]:
    mine = [r for r in records if r["table"] == table and r["model"] == model and r.get("part", "gradient") == "gradient"]
    return {m: sorted((r for r in mine if r["method"] == m and value in r), key=lambda r: r["k"]) for m in STYLES}


def _line(axes: Any, method: str, x: Sequence[float], y: Sequence[float]) -> None:
    axes.plot(x, y, label=method, markersize=5, linewidth=1.3, **STYLES[method])


def _time(axes: Any, records: Sequence[Record], model: str) -> None:
    for method, found in _series(records, model, "ratio").items():
        if found:
            _line(axes, method, [r["k"] for r in found], [r["ratio"] for r in found])
    axes.axhline(1, linestyle="-", **REFERENCE)
    axes.set(xlabel="k", ylabel="time / backprop")


def _memory(axes: Any, records: Sequence[Record], model: str) -> None:
    mine = {(r["method"], r["k"]): r["bytes"] / 2**20 for r in records if r["table"] == "memory" and r["model"] == model}
    ks = sorted({k for _, k in mine if k})
    for method, found in _series(records, model, "bytes", "memory").items():
        if len(found) == 1 and method in ("MeZO", "loop of forward_ad"):  # the same for every k
            _line(axes, method, ks, [found[0]["bytes"] / 2**20] * len(ks))
        elif found:
            _line(axes, method, [r["k"] for r in found], [r["bytes"] / 2**20 for r in found])
    for method, style in (("backprop", "-"), ("checkpointed backprop", "-.")):
        if (method, 0) in mine:
            axes.axhline(mine[method, 0], linestyle=style, **REFERENCE)
    axes.set(xlabel="k", ylabel="peak memory, MiB")


def _cosine(axes: Any, records: Sequence[Record], model: str) -> None:
    for method, found in _series(records, model, "cosine").items():
        if found := [r for r in found if r["cosine"] > 2 * r.get("cosine_error", 0)]:  # else it may be anything down to 0
            _line(axes, method, [r["ratio"] for r in found], [r["cosine"] for r in found])
    axes.plot([1], [1], marker="o", markersize=8, markerfacecolor="none", linestyle="", **REFERENCE)
    axes.annotate("backprop", (1, 1), textcoords="offset points", xytext=(7, -10), fontsize=8)
    axes.set(xlabel="time / backprop", ylabel="cosine to the gradient")


PLOTS: dict[str, Draw] = {"time": _time, "memory": _memory, "cosine": _cosine}
VALUES = {"time": "ratio", "memory": "bytes", "cosine": "cosine"}
KINDS = {"time": "gradient", "memory": "memory", "cosine": "gradient"}


def write(folder: Path, records: Sequence[Record]) -> list[str]:
    """Writes a PNG for each kind of plot that there are records for; returns the names of the files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    names, records = [], in_order(records)
    for kind, draw in PLOTS.items():
        models = list(
            dict.fromkeys(
                r["model"] for r in records if r["table"] == KINDS[kind] and r["method"] in STYLES and VALUES[kind] in r
            )
        )
        if not models:
            continue
        columns = min(3, len(models))
        rows = -(-len(models) // columns)
        figure, grid = plt.subplots(rows, columns, figsize=(3.4 * columns, 2.8 * rows + 0.8), squeeze=False)
        for axes, model in zip(grid.flat, models):
            draw(axes, records, model)
            axes.set_title(model, fontsize=10)
            axes.set_xscale("log")
            axes.set_yscale("log")
            scales = [axes.yaxis] if kind != "cosine" else [axes.xaxis, axes.yaxis]
            for scale in scales:
                scale.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
                scale.set_major_formatter("{x:g}")
                scale.set_minor_formatter(NullFormatter())
            if kind != "cosine":
                ks = sorted({r["k"] for r in records if r["table"] == KINDS[kind] and r["model"] == model and r["k"]})
                axes.set_xticks(ks, [str(k) for k in ks])
                axes.xaxis.set_minor_locator(NullLocator())
            axes.grid(True, which="major", linewidth=0.4, alpha=0.6)
        for axes in grid.flat[len(models) :]:
            axes.set_visible(False)
        labels = {label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels())}
        figure.legend(
            labels.values(), labels.keys(), loc="lower center", ncol=4 if columns > 1 else 2, fontsize=8, frameon=False
        )
        figure.tight_layout(rect=(0, 0.8 / (2.8 * rows + 0.8), 1, 1))
        names.append(f"benchmarks-{kind}.png")
        figure.savefig(folder / names[-1], dpi=130, metadata={"Software": None})
        plt.close(figure)
    return names
