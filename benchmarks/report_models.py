"""Tables and figures of whole models and of attention, from the records of bench_models.py and bench_attention.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from attention_cases import OURS, UNFUSED
from model_cases import DERIVATIVES, FORWARD, GRADIENT, GROUPS, LAYERS, LEAVES, WEIGHT
from report_tables import Figure, Record, find, milliseconds, table

_ORDER = [FORWARD, LAYERS, LEAVES, GROUPS, WEIGHT]


def models(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(r["model"] for r in records if r["table"] == "model"))


def marginal_cost(records: Sequence[Record], model: str, method: str, part: str) -> float | None:
    """What one more tangent costs between the smallest k > 1 and the largest, in forward passes; None with fewer than two."""
    mine = sorted((r["k"], r["ratio"]) for r in records if r["table"] == "model" and r["model"] == model
                  and r["method"] == method and r["part"] == part and r["k"] > 1)  # fmt: skip
    plain = find(records, table="model", model=model, method=FORWARD)
    if len(mine) < 2 or plain is None:
        return None
    (k, first), (most, last) = mine[0], mine[-1]
    return (last - first) / (most - k) / plain["ratio"]


def model_table(records: Sequence[Record], model: str) -> str:
    rows = []
    mine = [r for r in records if r["table"] == "model" and r["model"] == model]
    for r in sorted(mine, key=lambda r: (_ORDER.index(r["method"]), r["part"], r["k"])):
        more = marginal_cost(records, model, r["method"], r["part"]) if r["method"] not in (FORWARD, LAYERS) else None
        largest = r["k"] == max(other["k"] for other in mine if other["method"] == r["method"])
        rows.append(
            [
                r["method"],
                r["part"],
                str(r["k"] or ""),
                milliseconds(r["time"]),
                f"{r['ratio']:.2f}",
                f"{more:.2f}" if more is not None and largest else "",
            ]
        )
    return table(["method", "part", "k", "ms", "x backprop", "forward passes for one more tangent"], rows)


def _attention_bytes(records: Sequence[Record], name: str, length: int, k: int) -> int | None:
    r = find(records, table="attention memory", name=name, length=length, k=k)
    return None if r is None else r["bytes"]


def attention_table(records: Sequence[Record]) -> str:
    rows = []
    for r in sorted((r for r in records if r["table"] == "attention"), key=lambda r: (r["k"], r["length"])):
        key = r["length"], r["k"]
        ours, theirs = (_attention_bytes(records, name, *key) for name in (OURS, UNFUSED))
        rows.append(
            [
                str(r["length"]),
                str(r["k"]),
                milliseconds(r["time"]),
                milliseconds(r["against"]),
                f"{1 / r['ratio']:.1f}",
                "" if ours is None else f"{ours / 2**20:.1f}",
                "" if theirs is None else f"{theirs / 2**20:.1f}",
                "" if ours is None or theirs is None else f"{theirs / ours:.1f}",
            ]
        )
    head = ["T", "k", "ms", "unfused, ms", "times faster", "peak MiB", "unfused, peak MiB", "times less"]
    return table(head, rows)


# ---- figures


def _to_backprop(model: str, part: str, k: int) -> Callable[[Sequence[Record]], float | None]:
    def measure(records: Sequence[Record]) -> float | None:
        r = find(records, table="model", model=model, method=LEAVES, part=part, k=k)
        return None if r is None else r["ratio"]

    return measure


def _marginal(model: str) -> Callable[[Sequence[Record]], float | None]:
    return lambda records: marginal_cost(records, model, LEAVES, DERIVATIVES)


def _faster(records: Sequence[Record]) -> float | None:
    r = find(records, table="attention", length=2048, k=4)
    return None if r is None else 1 / r["ratio"]


def _times_less(records: Sequence[Record]) -> float | None:
    ours, theirs = (_attention_bytes(records, name, 2048, 4) for name in (OURS, UNFUSED))
    return None if ours is None or theirs is None else theirs / ours


def _growth_of_time(records: Sequence[Record]) -> float | None:
    short, long = (find(records, table="attention", length=length, k=4) for length in (512, 2048))
    return None if short is None or long is None else long["time"] / short["time"]


def _growth_of_memory(records: Sequence[Record]) -> float | None:
    short, long = (_attention_bytes(records, OURS, length, 4) for length in (512, 2048))
    return None if short is None or long is None else long / short


_TARGETS = [
    ("resnet18", {1: (0.5, 0.85), 4: (1.1, 1.5), 16: (4.0, 4.4)}, 0.9),
    ("vit", {1: (0.75, 1.0), 4: (1.6, 1.9), 16: (5.5, 5.8)}, 1.0),
]
FIGURES = [
    Figure(f"{model}, activity, k = {k}, {part}: x backprop", target, False, _to_backprop(model, part, k))
    for model, targets, _ in _TARGETS
    for k, pair in targets.items()
    for part, target in zip((DERIVATIVES, GRADIENT), pair)
]
FIGURES += [
    Figure(f"{model}, one more tangent: forward passes", target, False, _marginal(model)) for model, _, target in _TARGETS
]
FIGURES += [
    Figure("attention, T = 2048, k = 4: times faster than the unfused formula", 3, True, _faster),
    Figure("attention, T = 2048, k = 4: times less peak memory", 10, True, _times_less),
    # 16 is T^2; a tenth for the spread of two measurements that did not run in turns
    Figure("attention, k = 4, T = 2048 to T = 512: time", 17.6, False, _growth_of_time),
    Figure("the same: peak memory", 4.4, False, _growth_of_memory),
]
