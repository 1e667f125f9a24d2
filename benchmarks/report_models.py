"""What one more tangent costs a model, and the tables and figures of attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from attention_cases import OURS, UNFUSED
from report_tables import Figure, Record, find, milliseconds, table


def marginal_cost(records: Sequence[Record], model: str, method: str, part: str) -> float | None:
    """What one more tangent costs between the smallest k > 1 and the largest, in forward passes; None with fewer than two."""
    mine = sorted((r["k"], r["ratio"]) for r in records if r["table"] == "gradient" and r["model"] == model
                  and r["method"] == method and r["part"] == part and r["k"] > 1 and "ratio" in r)  # fmt: skip
    plain = find(records, table="gradient", model=model, method="forward only")
    if len(mine) < 2 or plain is None:
        return None
    (k, first), (most, last) = mine[0], mine[-1]
    return (last - first) / (most - k) / plain["ratio"]


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
                "" if not ours or theirs is None else f"{theirs / ours:.1f}",  # a small case may take from what is free
            ]
        )
    head = ["T", "k", "ms", "unfused, ms", "times faster", "peak MiB", "unfused, peak MiB", "times less"]
    return table(head, rows)


# ---- figures


def _marginal(model: str) -> Callable[[Sequence[Record]], float | None]:
    return lambda records: marginal_cost(records, model, "activity", "derivatives")


def _faster(records: Sequence[Record]) -> float | None:
    r = find(records, table="attention", length=2048, k=4)
    return None if r is None else 1 / r["ratio"]


def _times_less(records: Sequence[Record]) -> float | None:
    ours, theirs = (_attention_bytes(records, name, 2048, 4) for name in (OURS, UNFUSED))
    return None if not ours or theirs is None else theirs / ours


def _growth_of_time(records: Sequence[Record]) -> float | None:
    short, long = (find(records, table="attention", length=length, k=4) for length in (512, 2048))
    return None if short is None or long is None else long["time"] / short["time"]


def _growth_of_memory(records: Sequence[Record]) -> float | None:
    short, long = (_attention_bytes(records, OURS, length, 4) for length in (512, 2048))
    return None if short is None or long is None else long / short


FIGURES = [
    Figure("resnet18, one more tangent: forward passes", 0.9, False, _marginal("resnet18")),
    Figure("vit, one more tangent: forward passes", 1.0, False, _marginal("vit")),
    Figure("attention, T = 2048, k = 4: times faster than the unfused formula", 3, True, _faster),
    Figure("attention, T = 2048, k = 4: times less peak memory", 10, True, _times_less),
    # 16 is T^2; a tenth for the spread of two measurements that did not run in turns
    Figure("attention, k = 4, T = 2048 to T = 512: time", 17.6, False, _growth_of_time),
    Figure("the same: peak memory", 4.4, False, _growth_of_memory),
]
