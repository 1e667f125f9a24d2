"""From the records of the benchmarks to the report of a machine: figures to reach, operators, attention, parts of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import report_models
from report_tables import Figure, Record, find, milliseconds, table

Value = Callable[[Sequence[Record]], float | None]


def op_table(records: Sequence[Record]) -> str:
    rows = []
    for r in records:
        if r["table"] != "op":
            continue
        each = f"{r['time'] / r['elements'] * 1e9:.3f}" if "elements" in r else ""
        rows.append([r["op"], r["case"], r["against_name"], f"{r['time'] * 1e6:.1f}", each, f"{1 / r['ratio']:.1f}"])
    return table(["operator", "case", "against", "us", "ns per element", "times faster"], rows)


def overhead_table(records: Sequence[Record]) -> str:
    """``time``: of a layer on a DualTensor; ``against``: of the operators it calls. Python's part is the difference."""
    rows = [
        [r["op"], str(r["calls"]), *(f"{t * 1e6:.1f}" for t in (r["time"], r["against"], r["time"] - r["against"]))]
        for r in records
        if r["table"] == "overhead"
    ]
    return table(["layer", "operators", "layer, us", "operators, us", "Python, us"], rows)


# ---- Gram, projection and combination within a step


def shares(records: Sequence[Record]) -> list[Record]:
    """One record per method and width: seconds of each part, of the step, and the parts' share of the step."""
    result = []
    parts = [r for r in records if r["table"] == "share"]
    for method, model in dict.fromkeys((r["method"], r["model"]) for r in parts):
        mine = {r["part"]: r for r in parts if (r["method"], r["model"]) == (method, model)}
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
            {"method": method, "model": model, "k": mine["gram"]["k"], "step": step, **share, "total": sum(share.values())}
        )
    return result


def share_table(records: Sequence[Record]) -> str:
    rows = [
        [s["method"], s["model"], milliseconds(s["step"])]
        + [f"{100 * s[part]:.1f} %" for part in ("gram", "projection", "combination", "total")]
        for s in shares(records)
    ]
    return table(["method, k = 16", "model", "step, ms", "Gram", "projection", "combination", "together"], rows)


# ---- figures


def _sampling(distribution: str) -> Callable[..., float | None]:
    def measure(records: Sequence[Record]) -> float | None:
        r = find(records, table="op", op=f"sample {distribution}", case="16 x 16384")
        return None if r is None else 1 / r["ratio"]

    return measure


def _to_backprop(model: str, method: str, k: int, part: str = "gradient") -> Value:
    def measure(records: Sequence[Record]) -> float | None:
        r = find(records, table="gradient", model=model, method=method, k=k, part=part)
        return None if r is None else r.get("ratio")

    return measure


def _faster(model: str, method: str, k: int, than: str) -> Value:
    """Both were timed in turns with backprop."""

    def measure(records: Sequence[Record]) -> float | None:
        ours, theirs = (_to_backprop(model, m, k)(records) for m in (method, than))
        return None if ours is None or theirs is None else theirs / ours

    return measure


def _memory(model: str, method: str, k: int, of: str) -> Value:
    def measure(records: Sequence[Record]) -> float | None:
        ours, theirs = (find(records, table="memory", model=model, method=m, k=j) for m, j in ((method, k), (of, 0)))
        return None if ours is None or theirs is None else ours["bytes"] / theirs["bytes"]

    return measure


def _overhead(records: Sequence[Record]) -> float | None:
    found = [r["time"] - r["against"] for r in records if r["table"] == "overhead"]
    return max(found) * 1e6 if found else None


def _to_products(model: str, method: str, k: int) -> Value:
    """Both were timed in turns with backprop."""

    def measure(records: Sequence[Record]) -> float | None:
        ours, bare = (_to_backprop(model, m, k, p)(records) for m, p in ((method, "gradient"), (f"GEMM, {method}", "")))
        return None if ours is None or bare is None else ours / bare

    return measure


def _share(method: str) -> Value:
    def measure(records: Sequence[Record]) -> float | None:
        s = find(shares(records), method=method, model="fc1024")
        return None if s is None else 100 * s["total"]

    return measure


def _ratios(model: str, method: str, targets: dict[int, float], part: str = "gradient") -> list[Figure]:
    text = f"{model}, {method}{'' if part == 'gradient' else ', ' + part}"
    return [
        Figure(f"{text}, k = {k}: x backprop", most, False, _to_backprop(model, method, k, part)) for k, most in targets.items()
    ]


FIGURES = [
    Figure("sampling normal, 16 x 16384, one thread, times faster than torch.randn", 8, True, _sampling("normal")),
    Figure("sampling Rademacher, 16 x 16384, one thread, times faster than torch.randint", 60, True, _sampling("rademacher")),
    Figure("fc1024, weight, normal, k = 16: times faster than vmap(jvp)", 6, True,
           _faster("fc1024", "weight, normal", 16, "vmap(jvp)")),
    Figure("fc1024, weight, normal, k = 16: times faster than JAX", 10, True,
           _faster("fc1024", "weight, normal", 16, "JAX jit, vmap(jvp)")),
    Figure("fc1024, weight, normal, k = 16: x one library GEMM of the same FLOPs", 1.5, False,
           _to_products("fc1024", "weight, normal", 16)),
    *_ratios("fc1024", "weight, normal", {1: 1.6}),
    *_ratios("fc1024", "activity", {1: 0.9, 4: 1.4, 16: 3}),
    *_ratios("fc256", "activity", {16: 2.2}),
    *_ratios("resnet18", "activity", {1: 0.5, 4: 1.1, 16: 4.0}, "derivatives"),
    *_ratios("resnet18", "activity", {1: 0.85, 4: 1.5, 16: 4.4}),
    *_ratios("vit", "activity", {1: 0.75, 4: 1.6, 16: 5.5}, "derivatives"),
    *_ratios("vit", "activity", {1: 1.0, 4: 1.9, 16: 5.8}),
]  # fmt: skip
for _model in ("fc1024", "resnet18", "vit"):
    FIGURES += _ratios(_model, "weight, low rank", {1: 0.6, 2: 0.85, 4: 1.4})
    FIGURES += _ratios(_model, "weight, low rank, bf16 tangents", {4: 1.0, 16: 3})
    FIGURES += _ratios(_model, "activity, bf16 tangents", {1: 0.8, 4: 1.1, 16: 2.8})
for _model in ("resnet18-128", "gpt256", "gpt1024"):
    for _k, _most in {1: 0.35, 4: 0.8}.items():
        for _method in ("weight, normal, update_", "weight, low rank, update_"):
            _text = f"{_model}, {_method}, k = {_k}: x backprop's peak memory"
            FIGURES.append(Figure(_text, _most, False, _memory(_model, _method, _k, "backprop")))
            if _k == 1:
                _text = f"{_model}, {_method}, k = 1: x checkpointed backprop's peak memory"
                FIGURES.append(Figure(_text, 1, False, _memory(_model, _method, _k, "checkpointed backprop")))
for _method, _most in {"activity": 10, "weight, Rademacher": 10, "weight, low rank": 10, "weight, normal": 30}.items():
    _text = f"Gram + projection + combination, {_method}, fc1024, k = 16: % of the step"
    FIGURES.append(Figure(_text, _most, False, _share(_method)))
FIGURES.append(Figure("Python in a fused layer call, the slowest of those measured: microseconds", 10, False, _overhead))
FIGURES += report_models.FIGURES


def figure_table(lines: Sequence[Record]) -> str:
    rows = []
    for line in lines:
        sign = ">=" if line["at_least"] else "<="
        measured = "" if line["measured"] is None else f"{line['measured']:.2f}"
        met = {True: "met", False: "missed", None: "not measured"}[line["met"]]
        rows.append([line["figure"], met, f"{sign} {line['target']:g}", measured])
    return table(["figure", "", "target", "measured"], rows)


def markdown(machine: Record, records: Sequence[Record]) -> str:
    """The report beside the JSON; gradients of models and the scaling study are on the page of the documentation."""
    lines = [figure.line(records) for figure in FIGURES]
    about = ", ".join(f"{key} {value}" for key, value in machine.items())
    parts = [
        "# Figures, operators and parts of a step",
        f"Written by `python benchmarks/run.py`. {about}.",
        "Times are medians. Each case ran in turns with what it is compared with; ratios are medians over these pairs, so they "
        "bear a little other load on the machine. Every result was checked after it was timed. Gradients of models, memory "
        "and scaling: [docs/benchmarks.md](../../docs/benchmarks.md).",
        "## Figures",
        figure_table(lines),
    ]
    if any(r["table"] == "attention" for r in records):
        parts += ["## Attention, 8 heads of depth 64", report_models.attention_table(records)]
    if shares(records):
        parts += ["## Gram, projection and combination within a step", share_table(records)]
    if any(r["table"] == "overhead" for r in records):
        parts += ["## Python in a fused layer call, k = 4, tiny tensors", overhead_table(records)]
    if any(r["table"] == "op" for r in records):
        parts += ["## Operators", op_table(records)]
    return "\n\n".join(parts) + "\n"
