"""Figures, drawn without a display and without touching matplotlib's global state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import require

if TYPE_CHECKING:
    from .demo import Run

__all__ = ["loss_curves"]

# From dark to light, and each with a dash and a marker of its own, so that the lines can be told apart in grey
STYLES: list[dict[str, Any]] = [
    {"color": "#000000", "linestyle": "-", "marker": "", "linewidth": 1.2},
    {"color": "#08519c", "linestyle": "-", "marker": "o", "linewidth": 1.8},
    {"color": "#d95f02", "linestyle": "--", "marker": "s", "linewidth": 1.4},
    {"color": "#8c8c8c", "linestyle": "-.", "marker": "^", "linewidth": 1.4},
]


def loss_curves(runs: Sequence[Run], path: Path) -> None:
    """Training loss and test loss by epoch, one line for each run, as a PNG.

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
    figure.savefig(path, format="png")
