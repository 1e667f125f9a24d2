"""Results of an experiment on disk: one table as CSV and, with all that is needed to repeat it, as JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .._files import replace
from . import UsageError

__all__ = ["Results", "check_same", "plain", "versions", "write"]

Row = dict[str, Any]


class Results:
    """A table that grows, and is on disk as a whole after each addition.

    ``<name>.csv`` has one line for each row. ``<name>.json`` holds ``command``, ``settings``, ``versions``, ``seconds`` (of all
    parts together), ``complete`` and the ``rows``. Floats in rows are rounded to 7 significant digits; those that are NaN or
    infinite are empty in one and null in the other.

    Arguments:
        folder: made where it does not exist.
        name: of the files.
        command: the command line.
        settings: all that the results depend on.
        resume: go on with the files in ``folder``, if there are any.
    Raises:
        UsageError: not ``resume``, but there are such files; ``resume``, but they were made with other settings or cannot be
            read; the folder cannot be made.
    """

    def __init__(self, folder: Path, name: str, *, command: str, settings: Mapping[str, Any], resume: bool = False) -> None:
        self.folder, self.name, self.command = folder, name, command
        self.settings = plain(settings)
        self.rows: list[Row] = []
        self.complete = False
        self._seconds, self._began = 0.0, time.perf_counter()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--output {str(folder)!r} cannot be made: {error.strerror}") from error
        there = [path for path in (self.path("json"), self.path("csv")) if path.exists()]
        if there and not resume:
            raise UsageError(
                f"--output: {there[0]} is there already; --resume goes on with it, another --output leaves it as it is"
            )
        if there == [self.path("csv")]:
            raise UsageError(
                f"--resume: {there[0]} is there without {self.path('json').name}, from which a run goes on; "
                "choose another --output, or remove the file"
            )
        if there:
            self._read()

    def path(self, ending: str) -> Path:
        return self.folder / f"{self.name}.{ending}"

    def _read(self) -> None:
        path = self.path("json")
        try:
            found = json.loads(path.read_text())
            settings, self.rows, self._seconds = dict(found["settings"]), list(found["rows"]), float(found["seconds"])
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"--resume: {path} is not a file of results: {error}") from error
        check_same(str(path), settings, self.settings)

    def has(self, **key: Any) -> bool:
        """Whether there are rows with these values."""
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)

    def add(self, rows: Sequence[Row], *, complete: bool = False) -> None:
        """Appends rows, all with the same columns, and writes both files."""
        self.rows += [{name: _finite(value) for name, value in row.items()} for row in rows]
        self.complete = complete
        content = {
            "experiment": self.name,
            "command": self.command,
            "settings": self.settings,
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "seconds": round(self._seconds + time.perf_counter() - self._began, 1),
            "complete": complete,
        }
        write(self.path("json"), self.path("csv"), content, self.rows)

    def where(self, figures: Sequence[Path]) -> str:
        """A line that says where everything is."""
        return f"Results: {self.path('csv')}, {self.path('json')}. Figures: {', '.join(map(str, figures))}."


def write(json_file: Path, csv_file: Path, head: Mapping[str, Any], rows: Sequence[Row], table: str = "rows") -> None:
    """``head`` and the rows as JSON, the rows alone as CSV; each file whole or not at all."""
    start = json.dumps(head, indent=1)[:-2]
    body = ",\n".join("  " + json.dumps(row, allow_nan=False) for row in rows)  # one row a line, for diffs
    replace(json_file, f'{start},\n "{table}": [\n{body}\n ]\n}}\n')
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace(csv_file, text.getvalue())


def versions() -> dict[str, str]:
    """Of what results depend on."""
    return {"frog_cuda": __version__, "torch": torch.__version__, "python": platform.python_version()}


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As they will be read again: no tuples."""
    found: dict[str, Any] = json.loads(json.dumps(settings))
    return found


def check_same(what: str, theirs: Mapping[str, Any], mine: Mapping[str, Any], *, but: Sequence[str] = ()) -> None:
    """Raises where a run that is to go on began with other settings.

    Arguments:
        what: the thing whose settings are ``theirs``.
        but: names that may differ.
    Raises:
        UsageError: names the settings that differ.
    """
    other = [name for name in {**mine, **theirs} if name not in but and theirs.get(name) != mine.get(name)]
    if other:
        differences = ", ".join(f"{name} was {theirs.get(name)!r} and is {mine.get(name)!r}" for name in other)
        raise UsageError(f"--resume: {what} has other settings: {differences}")


def _finite(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.7g}") if math.isfinite(value) else None
