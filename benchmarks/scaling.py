"""The scaling study: along each axis the other sizes stay as they are; a straight line is fitted, and held against the floor's.

Cost against k is a line, whose slope is what one more tangent costs, in forward passes. Against the other sizes it is a power,
whose exponent is a slope between logarithms. The floor is the same fit to the floating point operations of the same cases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from problems import GPT, Problem
from report_tables import Record, find, table
from torch import nn

#: what each axis is along, and what stays
AXES: dict[str, tuple[int, ...]] = {
    "k": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "batch": (16, 32, 64, 128, 256),
    "width": (256, 512, 1024, 2048),
    "depth": (2, 4, 8, 16),
    "length": (64, 128, 256, 512),
}
QUICK = {
    "k": (1, 4, 16, 64, 256),
    "batch": (16, 64, 256),
    "width": (256, 512, 1024),
    "depth": (2, 4, 8),
    "length": (64, 128, 256),
}
WIDTH, BATCH, HIDDEN, K = 512, 64, 2, 4
NOTES = {
    "k": f"fully-connected, width {WIDTH}, {HIDDEN} hidden layers, batch {BATCH}",
    "batch": f"the same, k = {K}",
    "width": f"the same, batch {BATCH}, k = {K}",
    "depth": f"hidden layers of width {WIDTH}, batch {BATCH}, k = {K}",
    "length": f"decoder with 2 layers of width 128, one sequence, k = {K}",
}
METHODS = ["backprop", "forward only", "activity", "weight, normal", "weight, low rank"]


def problem(axis: str, value: int) -> tuple[Problem, int]:
    """The model and batch at one value of one axis, and the number of tangents."""
    sizes = {"k": K, "batch": BATCH, "width": WIDTH, "depth": HIDDEN, "length": 0, axis: value}

    def make() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
        if axis == "length":
            model = GPT(value, layers=2)
            tokens = torch.randint(0, model.embedding.num_embeddings, (1, value + 1))
            return model, tokens[:, :-1], tokens[:, 1:]
        widths = [784, *[sizes["width"]] * sizes["depth"]]
        layers = [m for pair in zip(widths, widths[1:]) for m in (nn.Linear(*pair), nn.ReLU())]
        net = nn.Sequential(*layers, nn.Linear(sizes["width"], 10))
        return net, torch.randn(sizes["batch"], 784), torch.randint(0, 10, (sizes["batch"],))

    return Problem(f"fc-{axis}-{value}" if axis != "length" else f"gpt-{value}", make), sizes["k"]


def slope(points: Sequence[tuple[float, float]], *, relative: bool = False) -> float:
    """Of the straight line with the least sum of squared errors, absolute or relative to y."""
    x, y = np.array(points, dtype=float).T
    return float(np.polyfit(x, y, 1, w=1 / y if relative else None)[0])


def fits(records: Sequence[Record]) -> list[Record]:
    """For each axis and method: measured slope and that of the floor. Along k, times are taken in backprops of the same run and
    slopes in forward passes; the line is fitted to relative errors, or the largest k would decide alone."""
    result = []
    mine = [r for r in records if r["table"] == "scaling"]
    plain = find(mine, axis="k", method="forward only")
    for axis in AXES:
        for method in METHODS:
            cases = sorted((r for r in mine if (r["axis"], r["method"]) == (axis, method)), key=lambda r: r["value"])
            if len(cases) < 3 or (axis == "k" and plain is None):
                continue
            found = {"axis": axis, "method": method, "values": [r["value"] for r in cases]}
            if axis == "k":
                assert plain is not None
                found["slope"] = slope([(r["k"], r["ratio"] / plain["ratio"]) for r in cases], relative=True)
                found["floor"] = slope([(r["k"], r["flops"] / plain["flops"]) for r in cases], relative=True)
            else:
                found["slope"] = slope([(math.log(r["value"]), math.log(r["time"])) for r in cases])
                found["floor"] = slope([(math.log(r["value"]), math.log(r["flops"])) for r in cases])
            result.append(found)
    return result


def fit_table(records: Sequence[Record]) -> str:
    rows = []
    for f in fits(records):
        what = "forward passes a tangent" if f["axis"] == "k" else "exponent"
        span = f"{f['values'][0]} to {f['values'][-1]}"
        rows.append([f["axis"], f["method"], span, what, f"{f['slope']:.2f}", f"{f['floor']:.2f}"])
    return table(["axis", "method", "values", "slope", "measured", "floor (FLOPs)"], rows)


def gram_table(records: Sequence[Record]) -> str:
    """``ratio``: a step with the Gram matrix to one without."""
    rows = [
        [
            r["model"],
            str(r["k"]),
            f"{r['k'] ** 2 * r['n']:.2e}",
            f"{100 * (1 - 1 / r['ratio']):.1f} %",
            f"{100 * r['floor']:.1f} %",
        ]
        for r in sorted((r for r in records if r["table"] == "gram"), key=lambda r: (r["model"], r["k"]))
    ]
    return table(["model", "k", "k^2 n", "share of the step's time", "share of its FLOPs"], rows)
