"""What the reports share: tables, records, and figures to reach."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import problems

Record = dict[str, Any]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up on a terminal; all columns but the first two are numbers."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths))) + " |"

    rule = ["-" * w if i < 2 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(head), line(rule), *(line(row) for row in rows)])


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"


def circumstances() -> Record:
    """When something was measured, and the load of the machine in the minute before (programs that run or wait for a core, the
    measured one included)."""
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M")
    return {"measured": now, "load": round(os.getloadavg()[0], 1)}


def in_order(records: Sequence[Record]) -> list[Record]:
    """By model, in the order in which a whole run measures them; a run in pieces appends what it measures."""
    ranks = {model: rank for rank, model in enumerate(problems.PAPER)}
    return sorted(records, key=lambda r: ranks.get(r.get("model", ""), len(ranks)))


def find(records: Sequence[Record], **wanted: Any) -> Record | None:
    return next((r for r in records if all(r.get(key) == value for key, value in wanted.items())), None)


@dataclass(frozen=True)
class Figure:
    """A number to reach. ``at_least``: larger is better; else at most."""

    text: str
    target: float
    at_least: bool
    measure: Callable[[Sequence[Record]], float | None]

    def line(self, records: Sequence[Record]) -> Record:
        value = self.measure(records)
        met = None if value is None else (value >= self.target if self.at_least else value <= self.target)
        return {"figure": self.text, "target": self.target, "at_least": self.at_least, "measured": value, "met": met}
