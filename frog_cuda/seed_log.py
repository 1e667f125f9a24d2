"""A training run as its initial weights and, for each step, a seed and k numbers.

Tangents are a pure function of (seed, step), so an update of any number of parameters is known from k coefficients. Replaying a
log needs neither data nor forward passes; a rank that lags behind, or a new one, needs nothing else to catch up.

A file holds the name and version of the format; the header, JSON on one line; SHA-256 of that line in hexadecimal digits; the
records, 16 + 4 k bytes each. Version 1 had no checksum of the header, so that a changed bit in the list of parameters gave
other weights without a word; its logs are refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import zlib
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from ._checks import check_integer, check_path
from .distributions import Distribution, Guided, LowRank, StandardBasis, Supplied
from .forward_gradient import ForwardGradient
from .sgd import Sgd
from .tangents import Piece, TangentSet, resolve
from .weight import WeightPerturbation, padding_rows

__all__ = ["SeedLog"]

_NAME, _VERSION = b"frog_cuda seed log ", b"2\n"
_BASES = {False: ("normal", "rademacher", "standard_basis"), True: ("normal", "rademacher")}  # by whether there is a rank
_HEAD = struct.Struct("<qII")  # seed, step, CRC-32 of seed, step and coefficients
_KEYED = struct.Struct("<qI")


class Record(NamedTuple):
    """One update: ``p += V c`` with the base tangents of (seed, step); coefficients float32 (k,)."""

    seed: int
    step: int
    coefficients: Tensor


class SeedLog:
    """Writes down every update of a weight-perturbed run: 16 + 4 k bytes a step.

    ``log.update_(lr)`` takes the place of ``fg.update_(lr)``. The coefficients are rounded to float32 before they are applied,
    so that a replay applies the same numbers and gives the same parameters, bit for bit on the same kind of device. Buffers,
    such as running statistics, are not part of the log.

    Arguments:
        path: of the file. A log of the same run that is there is continued, by an ``fg`` of the same seed at a later step than
            the last record's, such as one that was loaded from a checkpoint; whether its parameters are those of that step is
            not checked. The last record may be incomplete, as a killed process leaves it, and is then dropped.
        fg: with ``perturb="weight"`` and tangents that are drawn, not supplied. Its parameters are taken as the initial weights
            of a new log.
        truncate: drop the records from ``fg.step`` on, where a checkpoint lags behind the log and its steps are taken again.
            With ``fg`` at the log's first step, all of them: the log starts anew.
    Raises:
        TypeError: ``path`` is no path, or ``fg`` no ForwardGradient.
        ValueError: activities are perturbed, tangents are supplied or guided, or the file there is no log, is damaged,
            belongs to other parameters, another k or other tangents, or does not end before ``fg.step``; the message says
            which.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/run.seeds"
    >>> model, twin = nn.Linear(4, 3), nn.Linear(4, 3)
    >>> _ = twin.load_state_dict(model.state_dict())
    >>> fg = ForwardGradient(model, nn.MSELoss(), k=2, perturb="weight")
    >>> with SeedLog(path, fg) as log:
    ...     for _ in range(5):
    ...         loss = fg.derivatives(torch.ones(1, 4), torch.zeros(1, 3))
    ...         log.update_(0.1)
    >>> SeedLog.replay(path, twin)
    5
    >>> torch.equal(model.weight, twin.weight)
    True
    """

    def __init__(self, path: str | os.PathLike[str], fg: ForwardGradient, *, truncate: bool = False) -> None:
        path = check_path("path", path)
        if not isinstance(fg, ForwardGradient):
            raise TypeError(
                f"fg is of type {type(fg).__name__}; expected a ForwardGradient, such as the attribute fg of a TangentParallel"
            )
        method = fg._method
        if not isinstance(method, WeightPerturbation):
            raise ValueError("SeedLog: only for perturb='weight'; gradients of perturbed activities are not replayed")
        if isinstance(fg.distribution, Supplied):
            raise ValueError("SeedLog: supplied tangents cannot be replayed from a seed")
        if isinstance(fg.distribution, Guided):
            raise ValueError("SeedLog: the vectors of Guided tangents cannot be replayed from a seed")
        self.fg, self._method, self.path = fg, method, path
        self._names: list[str] | None = None  # of the parameters that take part, once known
        header = {
            "k": fg.k,
            "tangents": _describe(fg.distribution),
            "parameters": [[p.name, list(p.shape), p.offset] for p in method.pieces],
            "total": method.total,
        }
        if self.path.exists() and self.path.stat().st_size > 0:
            found, start = _read_header(self.path)
            for key, value in header.items():
                if found[key] != value:
                    raise ValueError(f"SeedLog: {self.path} was written with other {key}: {found[key]!r}, not {value!r}")
            kept, last = 0, None
            for record in records(self.path):
                if truncate and record.seed == fg.seed and record.step >= fg.step:
                    break
                kept, last = kept + 1, record
            if last is not None:
                _check_continued(self.path, last, kept, fg)
                complete = start + kept * _record_size(fg.k)
                self._file: BinaryIO = self.path.open("r+b")
                self._file.truncate(complete)
                self._file.seek(complete)
                self._names, self._fresh = found["taking_part"], False
                return
        self._header = header | {"initial": checksum(method.parameters)}
        self._file, self._fresh = self.path.open("wb"), True

    def update_(
        self,
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        """``p -= lr * estimate`` in place, written down first.

        Arguments:
            momentum, dampening, weight_decay, nesterov: only their defaults; those of ``fg.update_``, so that one called with
                others in a log's place says so.
        Raises:
            RuntimeError: there was no call yet, or other parameters took part than before.
            ValueError: the aggregation is a custom one, whose result is no combination of tangents, or the step is not plain.
        """
        if not (sgd := Sgd(lr, momentum, dampening, weight_decay, nesterov)).plain:
            raise ValueError(
                f"SeedLog.update_: momentum is {sgd.momentum} and weight_decay is {sgd.weight_decay}; a record is a "
                "combination of one step's tangents, so both must be 0"
            )
        estimate, tangents = self.fg._latest("SeedLog.update_")
        if estimate.base_coefficients is None:
            raise ValueError("SeedLog: a custom aggregation gives no coefficients to write down")
        names = [p.name for p in self._method.used]
        if self._names is not None and names != self._names:
            raise RuntimeError(f"SeedLog: {names} took part, but in the steps before it was {self._names}")
        if self._fresh:
            line = json.dumps(self._header | {"taking_part": names}).encode() + b"\n"
            self._file.write(_NAME + _VERSION + line + _digest(line))
            self._fresh = False
        self._names = names
        c = (-sgd.lr * estimate.base_coefficients).float().cpu()
        self._file.write(_pack(Record(tangents.seed, tangents.step, c)))
        self._file.flush()
        _apply(tangents, self._method.used, self._method.parameters, c)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> SeedLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @staticmethod
    def replay(path: str | os.PathLike[str], model: nn.Module, *, start: int = 0, stop: int | None = None) -> int:
        """Brings a model's parameters from the state before record ``start`` to that before record ``stop``.

        Arguments:
            path: of a log.
            model: with ``start=0``, holding the run's initial weights, which is checked.
            start, stop: numbers of records, 0 <= start <= stop; ``stop=None`` means all that are complete.
        Returns:
            the number of records applied.
        Raises:
            TypeError: an argument is of another type.
            ValueError: the file is no log or is damaged (records before a damaged one were applied), there are no such records,
                or the model's parameters are others or do not hold the initial weights.
        """
        path = check_path("path", path)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is of type {type(model).__name__}; expected a torch.nn.Module")
        header, begin = _read_header(path)
        complete = (path.stat().st_size - begin) // _record_size(header["k"])
        stop = complete if stop is None else check_integer("stop", stop, 0, complete, f"the complete records of {path}")
        start = check_integer("start", start, 0, stop, f"stop={stop}")
        own = dict(model.named_parameters())
        fixed = padding_rows(model)
        pieces = [Piece(name, tuple(shape), offset, fixed.get(name)) for name, shape, offset in header["parameters"]]
        for piece in pieces:
            if piece.name not in own or tuple(own[piece.name].shape) != piece.shape:
                what = tuple(own[piece.name].shape) if piece.name in own else "missing"
                raise ValueError(f"SeedLog: parameter {piece.name} is {what} in the model, but {piece.shape} in {path}")
        parameters: dict[str, Tensor] = {p.name: own[p.name] for p in pieces}
        if start == 0 and checksum(parameters) != header["initial"]:
            raise ValueError(f"SeedLog: the model does not hold the initial weights of {path}")
        distribution, used = _restore(header["tangents"]), [p for p in pieces if p.name in header["taking_part"]]
        device = next(iter(parameters.values())).device
        for record in islice(records(path), start, stop):
            drawn = TangentSet(distribution, header["k"], record.seed, record.step, device, header["total"], pieces)
            _apply(drawn, used, parameters, record.coefficients)
        return stop - start


def records(path: Path) -> Iterator[Record]:
    """The complete records of a log, in order.

    Raises:
        ValueError: a record does not match its checksum. The last one is let go if it is cut short.
    """
    header, start = _read_header(path)
    size = _record_size(header["k"])
    with path.open("rb") as file:
        file.seek(start)
        for i in count():
            raw = file.read(size)
            if len(raw) < size:
                return
            seed, step, crc = _HEAD.unpack_from(raw)
            if zlib.crc32(_KEYED.pack(seed, step) + raw[_HEAD.size :]) != crc:
                raise ValueError(f"SeedLog: {path} is damaged: record {i} does not match its checksum")
            yield Record(seed, step, torch.frombuffer(bytearray(raw[_HEAD.size :]), dtype=torch.float32))


def checksum(parameters: dict[str, Tensor]) -> str:
    """SHA-256 over names and bytes of parameters."""
    digest = hashlib.sha256()
    for name, p in parameters.items():
        digest.update(f"{name} {p.dtype} {tuple(p.shape)}\n".encode())
        digest.update(p.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def _check_continued(path: Path, last: Record, count: int, fg: ForwardGradient) -> None:
    """Raises where a replay of the ``count`` records there and of those to come would not end at the weights of ``fg``."""
    if last.seed == fg.seed and last.step < fg.step:
        return
    raise ValueError(
        f"SeedLog: {path} ends with step {last.step} of seed {last.seed}, but fg is at step {fg.step} of seed {fg.seed}, which "
        "does not come after it. A new run needs another path. To go on from a checkpoint, load it into the model and fg; "
        "where it lags behind the log, truncate=True drops the records of the steps that are taken again; or SeedLog.replay "
        f"brings the parameters to the end of all {count} records, and fg.step = {last.step + 1} goes on from there"
    )


def _apply(tangents: TangentSet, pieces: list[Piece], parameters: dict[str, Tensor], coefficients: Tensor) -> None:
    with torch.no_grad():
        for piece in pieces:
            p = parameters[piece.name]
            tangents.axpy_(p.detach(), piece, coefficients.double().to(p.device), 1.0)
            torch.autograd.graph.increment_version(p)


def _record_size(k: int) -> int:
    return _HEAD.size + 4 * k


def _pack(record: Record) -> bytes:
    values = record.coefficients.numpy().astype("<f4").tobytes()
    keyed = _KEYED.pack(record.seed, record.step)
    return _HEAD.pack(record.seed, record.step, zlib.crc32(keyed + values)) + values


def _digest(line: bytes) -> bytes:
    return hashlib.sha256(line).hexdigest().encode() + b"\n"


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the records begin.

    Raises:
        ValueError: the file is no log, of another version, or damaged; names it.
    """
    with path.open("rb") as file:
        if file.read(len(_NAME)) != _NAME:
            raise ValueError(f"SeedLog: {path} is no seed log")
        version = file.read(len(_VERSION))
        if version != _VERSION:
            found = repr(version.decode("latin-1").rstrip("\n"))
            raise ValueError(
                f"SeedLog: {path} is of version {found} of the format; expected version '2'. Version 1 had no checksum of its "
                "header; what was logged in it is replayed by the version of frog_cuda that wrote it"
            )
        line = file.readline()
        if file.read(len(_digest(b""))) != _digest(line):
            raise ValueError(f"SeedLog: {path} is damaged: its header does not match its checksum")
        try:
            header = json.loads(line.decode())
        except ValueError as error:  # no UTF-8, or no JSON
            raise ValueError(f"SeedLog: {path} is damaged: its header cannot be read ({error})") from None
        if wrong := _wrong(header):
            raise ValueError(f"SeedLog: {path} is damaged: {wrong}")
        return header, file.tell()


def _wrong(header: Any) -> str:
    """What a header that matches its checksum says and no log can say, such as one that another program has written; or ""."""
    if not isinstance(header, dict):
        return f"its header is of type {type(header).__name__}; expected an object"
    missing = {"k", "tangents", "parameters", "total", "initial", "taking_part"} - set(header)
    if missing:
        return f"its header lacks {', '.join(sorted(missing))}"
    if not _is_count(header["k"]) or header["k"] < 1:
        return f"k is {header['k']!r}; expected an integer >= 1"
    tangents = header["tangents"]
    if not isinstance(tangents, dict) or tangents.get("base") not in _BASES["rank" in tangents]:
        return f"tangents is {tangents!r}; expected 'base', one of {', '.join(_BASES[True])}, or standard_basis without 'rank'"
    if "rank" in tangents and (not _is_count(tangents["rank"]) or tangents["rank"] < 1):
        return f"the rank of tangents is {tangents['rank']!r}; expected an integer >= 1"
    parameters, names, offset = header["parameters"], [], 0
    if not isinstance(parameters, list) or not parameters:
        return f"parameters is {parameters!r}; expected a list of some"
    for entry in parameters:
        if not (isinstance(entry, list) and len(entry) == 3 and isinstance(entry[0], str) and isinstance(entry[1], list)):
            return f"a parameter is {entry!r}; expected name, shape and offset"
        name, shape, start = entry
        if not all(map(_is_count, shape)):
            return f"parameter {name} has shape {shape!r}; expected integers >= 0"
        if not _is_count(start) or start != offset:
            return f"parameter {name} begins at {start!r}; expected {offset}, where the one before it ends"
        names.append(name)
        offset += math.prod(shape)
    if len(set(names)) < len(names):
        return "two parameters have one name"
    if not _is_count(header["total"]) or header["total"] != offset:
        return f"total is {header['total']!r}, but its parameters have {offset} elements"
    if not isinstance(header["initial"], str):
        return f"initial is {header['initial']!r}; expected a checksum"
    taking_part = header["taking_part"]
    if not isinstance(taking_part, list) or [name for name in names if name in taking_part] != taking_part:
        return f"taking_part is {taking_part!r}; expected some of the parameters, in their order"
    return ""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _describe(distribution: Distribution) -> dict[str, Any]:
    """What draws the base tangents; how they are mixed is in the coefficients already."""
    if isinstance(distribution, LowRank):
        return {"base": distribution.base, "rank": distribution.r}
    return {"base": distribution.base}


def _restore(description: dict[str, Any]) -> Distribution:
    if "rank" in description:
        return LowRank(description["rank"], description["base"])
    return StandardBasis() if description["base"] == "standard_basis" else resolve(description["base"])
