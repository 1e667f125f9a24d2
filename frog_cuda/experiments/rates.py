"""Tables of learning rates: what ``lr-search`` writes and ``--lr-table`` reads.

A table is JSON, ``{experiment: {case: learning rate}}``. The experiment is the command that uses it, such as ``"functions"``;
the case is a text by which that command knows one of its runs, such as ``"sphere n=64 orthogonal k=4"``. Commands read only
their own part, so one file serves all. The package ships ``learning_rates.json``, searched for this package.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

from .._files import replace
from . import UsageError
from .descent import Approach

__all__ = ["SET_BY_HAND", "SHIPPED", "RateTable"]

#: the table that is used where none is given
SHIPPED = Path(__file__).with_name("learning_rates.json")

_WITHOUT_BACKPROP = ("mean k=1", *(f"{aggregate} k={k}" for k in (2, 4, 16) for aggregate in ("mean", "orthogonal")))
#: cases of ``train`` whose rate in that table no search gave; docs/experiments.md says where they come from
SET_BY_HAND = frozenset(
    [
        *(f"digits fc width=4096 {approach}" for approach in ("bp", *_WITHOUT_BACKPROP)),
        "digits fc width=1024 mean k=16",
        *(
            f"digits lenet5 {approach} own-tangents"
            for approach in _WITHOUT_BACKPROP
            if approach not in ("orthogonal k=4", "mean k=16")
        ),
        *(f"digits resnet18 width=8 {approach} own-tangents" for approach in _WITHOUT_BACKPROP),
    ]
)


class RateTable:
    """Learning rates by experiment and case.

    Arguments:
        rates: ``{experiment: {case: learning rate}}``.
        source: what error messages call it.
    Raises:
        UsageError: something else than finite numbers > 0.
    """

    def __init__(self, rates: Mapping[str, Mapping[str, float]], source: str = "the table of learning rates") -> None:
        self.source = source
        self.rates: dict[str, dict[str, float]] = {}
        for experiment, cases in rates.items():
            if not isinstance(cases, Mapping):
                raise UsageError(f"{source}: {experiment!r} holds a {type(cases).__name__}; expected {{case: learning rate}}")
            for case, rate in cases.items():
                if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not (math.isfinite(rate) and rate > 0):
                    raise UsageError(f"{source}: the rate of {experiment!r}, {case!r} is {rate!r}; expected a number > 0")
            self.rates[experiment] = {case: float(rate) for case, rate in cases.items()}

    @classmethod
    def read(cls, path: Path | None = None) -> RateTable:
        """The table in a file, None: the one that is shipped.

        Arguments:
            path: JSON; a name that ends in ``.csv``: rates of functions and angles, as the paper's authors publish them.

        Raises:
            UsageError: no such file, or not such a table.
        """
        source = SHIPPED if path is None else path
        try:
            content = _from_csv(source) if source.suffix == ".csv" else json.loads(source.read_text())
        except UsageError:
            raise
        except OSError as error:
            raise UsageError(f"--lr-table {str(source)!r} cannot be read: {error.strerror}") from error
        except (ValueError, csv.Error) as error:
            kind = "CSV" if source.suffix == ".csv" else "JSON"
            raise UsageError(f"--lr-table {str(source)!r} is not {kind}: {error}") from error
        if not isinstance(content, dict):
            raise UsageError(
                f"--lr-table {str(source)!r} holds a {type(content).__name__}; expected {{experiment: {{case: rate}}}}"
            )
        return cls(content, f"--lr-table {str(source)!r}")

    def rate(self, experiment: str, case: str) -> float:
        """The learning rate of a case.

        Raises:
            UsageError: the table has none.
        """
        cases = self.rates.get(experiment, {})
        if case not in cases:
            raise UsageError(
                f"{self.source} has no rate for {experiment!r}, {case!r}; it has {len(cases)} cases of {experiment!r}"
            )
        return cases[case]

    def set(self, experiment: str, case: str, rate: float) -> None:
        """Adds or changes a rate."""
        checked = RateTable({experiment: {case: rate}}, self.source)
        self.rates.setdefault(experiment, {}).update(checked.rates[experiment])

    def write(self, path: Path) -> None:
        """Writes the table, sorted, whole or not at all."""
        replace(path, json.dumps(self.rates, indent=1, sort_keys=True) + "\n")


def _from_csv(path: Path) -> dict[str, dict[str, float]]:
    """Columns function, n, gradient_approach (bp, fg-mean or frog), k (empty with bp), lr, and optimizer, which names a cone's
    angle."""
    rates: dict[str, dict[str, float]] = {"functions": {}, "angles": {}}
    with open(path, newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            where = f"--lr-table {str(path)!r}, line {number}"
            try:
                kind, function, n, rate = row["gradient_approach"], row["function"], int(row["n"]), float(row["lr"])
                k = int(float(row["k"] or 0))
            except KeyError as error:
                raise UsageError(f"{where}: no {error} column; expected function, n, gradient_approach, k, lr") from error
            except (TypeError, ValueError) as error:
                raise UsageError(f"{where}: {error}") from error
            if kind not in _KINDS:
                raise UsageError(f"{where}: gradient_approach is {kind!r}; accepted are {', '.join(_KINDS)}")
            angle = re.search(r"specific_angle_(\d+)", row.get("optimizer") or "")
            approach = Approach(_KINDS[kind], k, float(angle[1]) if angle else None)
            rates["angles" if angle else "functions"][f"{function} n={n} {approach.name}"] = rate
    return rates


_KINDS = {"bp": None, "fg-mean": "mean", "frog": "orthogonal"}
