"""The results of all experiments as they lie on disk, read for ``report``."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from . import UsageError
from .rates import SET_BY_HAND, RateTable
from .results import Row

__all__ = ["EXPECTED", "Cell", "Findings", "Model", "Table", "key", "read", "versions"]

#: networks of the training experiments, by the beginning of their names
EXPECTED = ("fc width=256", "fc width=1024", "fc width=4096", "lenet5", "resnet18", "vit", "mixer")

#: in the name of networks whose tangents are not shared by the batch
OWN = "own-tangents"

#: what is read of the result of a training run
RUN = ("case", "command", "settings", "versions", "status", "best", "test_loss", "test_accuracy", "epochs", "parameters")


@dataclass(frozen=True)
class Table:
    """What :class:`~frog_cuda.experiments.results.Results` wrote."""

    command: str
    settings: dict[str, Any]
    versions: dict[str, str]
    complete: bool
    rows: list[Row]


@dataclass(frozen=True)
class Cell:
    """The runs of one network with one way to a gradient, which differ in their seed; content of ``result.json``, by seed."""

    runs: tuple[dict[str, Any], ...]

    @property
    def errors(self) -> list[float]:
        """Test error of each run in percent; left out are runs that diverged before their first epoch ended."""
        return [100 - 100 * run["test_accuracy"] for run in self.runs if run["test_accuracy"] is not None]

    @property
    def points(self) -> list[tuple[float, bool]]:
        """The errors, and whether the run diverged."""
        ended = [run["status"] == "diverged" for run in self.runs if run["test_accuracy"] is not None]
        return list(zip(self.errors, ended, strict=True))

    @property
    def curve(self) -> list[float]:
        """Lowest validation loss so far by epoch, mean over the runs; one that has ended keeps its own."""
        lines = []
        for run in self.runs:
            losses = [math.inf if e["valid_loss"] is None else e["valid_loss"] for e in run["epochs"]]
            lines.append(list(itertools.accumulate(losses, min)))
        length = max(map(len, lines))
        return [fmean(line[min(i, len(line) - 1)] for line in lines) for i in range(length)]

    @property
    def error(self) -> float | None:
        return fmean(self.errors) if self.errors else None

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; 0 for one."""
        return stdev(self.errors) if len(self.errors) > 1 else 0.0

    @property
    def diverged(self) -> int:
        return sum(run["status"] == "diverged" for run in self.runs)

    @property
    def unfinished(self) -> int:
        return sum(run["status"] == "unfinished" for run in self.runs)

    @property
    def rates(self) -> list[float]:
        return sorted({run["settings"]["lr"] for run in self.runs})

    @property
    def by_hand(self) -> bool:
        """Whether the rate is one of the package that no search gave; of rates of other tables, nothing is known."""
        shipped = RateTable.read().rates.get("train", {})
        cases = {(run["case"], run["settings"]["lr"]) for run in self.runs}
        return any(case in SET_BY_HAND and shipped.get(case) == rate for case, rate in cases)

    @property
    def cut_off(self) -> int:
        """How many runs ended because all epochs were done."""
        return sum(run["status"] == "all epochs" for run in self.runs)

    @property
    def seeds(self) -> list[int]:
        return [run["settings"]["seed"] for run in self.runs]

    @property
    def epochs(self) -> list[int]:
        """At how many epochs each run ended."""
        return [len(run["epochs"]) - 1 for run in self.runs]


@dataclass(frozen=True)
class Model:
    """All runs of one network on one data set.

    Arguments:
        dataset, name: ``"digits"``, ``"fc width=256"``.
        cells: by the name of the approach: ``"bp"``, ``"mean k=1"``, ``"orthogonal k=16"``.
    """

    dataset: str
    name: str
    cells: dict[str, Cell]

    @property
    def ks(self) -> list[int]:
        """Numbers of tangents, rising."""
        return sorted({int(name.split("k=")[1]) for name in self.cells if "k=" in name})

    def cell(self, aggregate: str, k: int) -> Cell | None:
        """With one tangent that of the mean serves both, as only the length differs."""
        return self.cells.get(f"{aggregate} k={k}") or (self.cells.get("mean k=1") if k == 1 else None)

    def error(self, aggregate: str, k: int) -> float | None:
        """Mean test error in percent."""
        cell = self.cell(aggregate, k)
        return None if cell is None else cell.error

    @property
    def backprop(self) -> float | None:
        cell = self.cells.get("bp")
        return None if cell is None else cell.error


@dataclass(frozen=True)
class Findings:
    """Everything that was found; None or empty: no results.

    Arguments:
        approximation, functions, angles, descent: sections 4.1, 4.2, 4.3; ``descent`` is the part of 4.3 that minimises.
        models: sections 4.4 and 4.5, in the order of :data:`EXPECTED`.
    """

    approximation: Table | None
    functions: Table | None
    angles: Table | None
    descent: Table | None
    models: tuple[Model, ...]

    def named(self, beginning: str, dataset: str = "digits") -> list[Model]:
        """Networks whose name begins so; ``"fc width=1024"`` is not meant by ``"fc width=10"``."""
        return [
            m
            for m in self.models
            if m.dataset == dataset and f"{m.name} ".startswith(beginning if beginning[-1] == "=" else f"{beginning} ")
        ]


def read(folder: Path) -> Findings:
    """All results below ``folder``, in the folders ``approximation``, ``functions``, ``angles`` and ``train``.

    Raises:
        UsageError: there is no such folder, there are no results in it, or a file in it is not what it should be.
    """
    runs = sorted((folder / "train").glob("*/result.json"))
    found = Findings(
        approximation=_table(folder / "approximation" / "approximation.json"),
        functions=_table(folder / "functions" / "functions.json"),
        angles=_table(folder / "angles" / "angles.json"),
        descent=_table(folder / "angles" / "angles_descent.json"),
        models=_models(_load(path, lambda run: {name: run[name] for name in RUN}) for path in runs),
    )
    if found == Findings(None, None, None, None, ()):
        raise UsageError(
            f"--results is {str(folder)!r}; expected a folder with results of approximation, functions, angles or train in "
            "folders of these names, which is where the commands put them"
        )
    return found


def _load(path: Path, make: Callable[[dict[str, Any]], Any]) -> Any:
    try:
        return make(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--results: {path} is not a file of results: {error!r}") from error


def _table(path: Path) -> Table | None:
    if not path.exists():
        return None
    return _load(
        path, lambda f: Table(f["command"], dict(f["settings"]), dict(f["versions"]), bool(f["complete"]), list(f["rows"]))
    )


def _models(runs: Iterable[dict[str, Any]]) -> tuple[Model, ...]:
    """Groups runs by data set, network and approach. Networks with tangents drawn for each sample (``--own-tangents``) count
    as networks of their own. Runs with other options than those of the paper's experiments, such as weight perturbation, do
    not belong here."""
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for run in runs:
        settings = run["settings"]
        label = " ".join([settings["model"], *(f"{n}={s}" for n, s in sorted(settings["sizes"].items()))])
        approach = "bp" if settings["gradient"] == "bp" else f"{settings['aggregate']} k={settings['k']}"
        plain = f"{settings['dataset']} {label} {approach}"
        if run["case"] in (plain, f"{plain} {OWN}"):
            name = label if run["case"] == plain else f"{label} {OWN}"
            groups.setdefault((settings["dataset"], name), {}).setdefault(approach, []).append(run)
    for (dataset, name), cells in list(groups.items()):
        shared = (dataset, name.removesuffix(f" {OWN}"))
        if shared != (dataset, name) and "bp" in groups.get(shared, {}):  # to backprop it makes no difference
            cells["bp"] = groups[shared]["bp"]
            if list(groups[shared]) == ["bp"]:
                del groups[shared]
    models = [
        Model(
            dataset,
            label,
            {
                name: Cell(tuple(sorted(found, key=lambda run: run["settings"]["seed"])))
                for name, found in sorted(cells.items(), key=lambda item: key(item[0]))
            },
        )
        for (dataset, label), cells in groups.items()
    ]
    return tuple(sorted(models, key=_place))


def key(approach: str) -> tuple[int, str]:
    """Sorts approaches: backprop first, then by number of tangents."""
    aggregate, _, k = approach.partition(" k=")
    return (int(k) if k else 0, aggregate)


def _place(model: Model) -> tuple[str, int, str]:
    place = [i for i, name in enumerate(EXPECTED) if f"{model.name} ".startswith(f"{name} ")]
    return (model.dataset, place[0] if place else len(EXPECTED), model.name)


def versions(findings: Findings) -> Sequence[str]:
    """Of the library and of PyTorch, by which the results were made."""
    tables = (findings.approximation, findings.functions, findings.angles, findings.descent)
    found = [t.versions for t in tables if t is not None]
    found += [run["versions"] for m in findings.models for cell in m.cells.values() for run in cell.runs]
    return sorted({f"frog_cuda {v.get('frog_cuda', '?')} with PyTorch {v.get('torch', '?')}" for v in found})
