"""From the records of the benchmarks to tables: ratios to backprop, memory, operators, and the figures to reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import floors
import report_models
from report_tables import Figure, Record, find, milliseconds, table

METHODS = [
    "backprop",
    "forward only",
    "activity",
    "weight, Rademacher",
    "weight, normal",
    "vmap(jvp)",
    "loop of forward_ad",
]


def ratio_to_vmap(records: Sequence[Record], record: Record) -> float | None:
    """How many times faster than vmap(jvp) at the same width and k; both were timed in turns with backprop."""
    other = find(records, table="gradient", method="vmap(jvp)", width=record["width"], k=record["k"])
    return None if other is None else other["ratio"] / record["ratio"]


def gradient_table(records: Sequence[Record], memory: Sequence[Record], width: int) -> str:
    rows = []
    mine = [r for r in records if r["table"] == "gradient" and r["width"] == width]
    for record in sorted(mine, key=lambda r: (METHODS.index(r["method"]), r["k"])):
        method, k = record["method"], record["k"]
        faster = ratio_to_vmap(records, record) if k else None
        grown = find(memory, method=method, width=width, k=k)
        rows.append(
            [
                method,
                str(k or ""),
                milliseconds(record["time"]),
                f"{record['ratio']:.2f}",
                f"{floors.relative(method, width, k):.2f}",
                "" if faster is None else f"{faster:.2f}",
                "" if grown is None else f"{grown['bytes'] / 2**20:.1f}",
            ]
        )
    head = ["method", "k", "ms", "x backprop", "FLOPs x backprop", "times faster than vmap(jvp)", "peak MiB"]
    return table(head, rows)


def op_table(records: Sequence[Record]) -> str:
    rows = []
    for r in records:
        if r["table"] != "op":
            continue
        each = f"{r['time'] / r['elements'] * 1e9:.3f}" if "elements" in r else ""
        rows.append([r["op"], r["case"], r["against_name"], f"{r['time'] * 1e6:.1f}", each, f"{1 / r['ratio']:.1f}"])
    return table(["operator", "case", "against", "us", "ns per element", "times faster"], rows)


# ---- Gram, projection and combination within a step


def shares(records: Sequence[Record]) -> list[Record]:
    """One record per method and width: seconds of each part, of the step, and the parts' share of the step."""
    result = []
    parts = [r for r in records if r["table"] == "share"]
    for method, width in dict.fromkeys((r["method"], r["width"]) for r in parts):
        mine = {r["part"]: r for r in parts if (r["method"], r["width"]) == (method, width)}
        if set(mine) != {"gram", "projection", "combination"}:
            continue
        # A share from each part's own run, where part and step alternated; the Gram matrix of drawn tangents is a difference.
        step = mine["combination"]["against"]
        share = {part: mine[part]["ratio"] for part in ("projection", "combination")}
        if method == "activity":
            share["gram"] = mine["gram"]["ratio"]
        else:
            share["gram"] = max(0.0, (mine["gram"]["ratio"] - 1) * mine["gram"]["against"] / step)
        result.append(
            {"method": method, "width": width, "k": mine["gram"]["k"], "step": step, **share, "total": sum(share.values())}
        )
    return result


def share_table(records: Sequence[Record]) -> str:
    rows = [
        [s["method"], str(s["width"]), milliseconds(s["step"])]
        + [f"{100 * s[part]:.1f} %" for part in ("gram", "projection", "combination", "total")]
        for s in shares(records)
    ]
    return table(["method, k = 16", "width", "step, ms", "Gram", "projection", "combination", "together"], rows)


# ---- memory that does not grow with the parameters


def memory_table(memory: Sequence[Record]) -> str:
    rows = []
    for m in memory:
        stored = 4 * m["k"] * m["n"]
        share = f"{100 * m['bytes'] / stored:.1f} %" if m["k"] else ""
        rows.append(
            [
                m["method"],
                str(m["width"]),
                str(m["k"] or ""),
                f"{m['bytes'] / 2**20:.1f}",
                f"{4 * m['n'] / 2**20:.1f}",
                f"{stored / 2**20:.1f}" if m["k"] else "",
                share,
            ]
        )
    head = ["method", "width", "k", "peak MiB", "one gradient, MiB", "k stored tangents, MiB", "peak / stored"]
    return table(head, rows)


# ---- figures


def _sampling(distribution: str) -> Callable[..., float | None]:
    def measure(records: Sequence[Record]) -> float | None:
        r = find(records, table="op", op=f"sample {distribution}", case="16 x 16384")
        return None if r is None else 1 / r["ratio"]

    return measure


def _to_backprop(method: str, width: int, k: int) -> Callable[..., float | None]:
    def measure(records: Sequence[Record]) -> float | None:
        r = find(records, table="gradient", method=method, width=width, k=k)
        return None if r is None else r["ratio"]

    return measure


def _to_vmap(method: str, width: int, k: int) -> Callable[..., float | None]:
    def measure(records: Sequence[Record]) -> float | None:
        r = find(records, table="gradient", method=method, width=width, k=k)
        return None if r is None else ratio_to_vmap(records, r)

    return measure


def _share(method: str) -> Callable[..., float | None]:
    def measure(records: Sequence[Record]) -> float | None:
        s = find(shares(records), method=method, width=1024)
        return None if s is None else 100 * s["total"]

    return measure


FIGURES = [
    Figure("sampling normal, 16 x 16384, one thread, times faster than torch.randn", 8, True, _sampling("normal")),
    Figure("sampling Rademacher, 16 x 16384, one thread, times faster than torch.randint", 60, True, _sampling("rademacher")),
    Figure("weight, normal, w = 1024, k = 16: times faster than vmap(jvp)", 5, True, _to_vmap("weight, normal", 1024, 16)),
    Figure("weight, normal, w = 1024, k = 1: x backprop", 1.6, False, _to_backprop("weight, normal", 1024, 1)),
    Figure("activity, w = 1024, k = 1: x backprop", 0.9, False, _to_backprop("activity", 1024, 1)),
    Figure("activity, w = 1024, k = 4: x backprop", 1.4, False, _to_backprop("activity", 1024, 4)),
    Figure("activity, w = 1024, k = 16: x backprop", 3, False, _to_backprop("activity", 1024, 16)),
    Figure("activity, w = 256, k = 16: x backprop", 2.2, False, _to_backprop("activity", 256, 16)),
    Figure("Gram + projection + combination, activity, w = 1024, k = 16: % of the step", 10, False, _share("activity")),
    Figure("the same, weight, Rademacher", 10, False, _share("weight, Rademacher")),
    Figure("the same, weight, normal", 10, False, _share("weight, normal")),
    *report_models.FIGURES,
]


def figure_table(lines: Sequence[Record]) -> str:
    rows = []
    for line in lines:
        sign = ">=" if line["at_least"] else "<="
        measured = "" if line["measured"] is None else f"{line['measured']:.2f}"
        met = {True: "met", False: "missed", None: "not measured"}[line["met"]]
        rows.append([line["figure"], met, f"{sign} {line['target']:g}", measured])
    return table(["figure", "", "target", "measured"], rows)


def markdown(machine: Record, records: Sequence[Record], memory: Sequence[Record]) -> str:
    """The whole report."""
    lines = [figure.line(records) for figure in FIGURES]
    about = ", ".join(f"{key} {value}" for key, value in machine.items())
    parts = [
        "# Benchmarks",
        f"Written by `python benchmarks/run.py`. {about}.",
        "Times are medians. Each case ran in turns with what it is compared with; ratios are medians over these pairs, so they "
        "hold while other programs use the machine. Every result was checked after it was timed. Nets: 784-w-w-10 with ReLU, "
        "batch 64, float32. Peak memory: by how much one call raises the resident set of a fresh process (`memory.py`).",
        "## Figures",
        figure_table(lines),
    ]
    for width in dict.fromkeys(r["width"] for r in records if r["table"] == "gradient"):
        parts += [f"## One gradient, w = {width}", gradient_table(records, memory, width)]
    for model in report_models.models(records):
        parts += [f"## {model}", report_models.model_table(records, model)]
    if any(r["table"] == "attention" for r in records):
        parts += ["## Attention, 8 heads of depth 64", report_models.attention_table(records)]
    if shares(records):
        parts += ["## Gram, projection and combination within a step", share_table(records)]
    if memory:
        parts += [
            "## Peak memory beside stored tangents",
            memory_table(memory),
        ]
    if any(r["table"] == "op" for r in records):
        parts += ["## Operators", op_table(records)]
    return "\n\n".join(parts) + "\n"
