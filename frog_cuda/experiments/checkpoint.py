"""Files that are whole or not there: states of a training run, written so that a crash at any time leaves the last one."""

from __future__ import annotations

import pickle
import signal
import threading
import zipfile
import zlib
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, BinaryIO

import torch

from .._files import replacing
from . import UsageError

__all__ = ["FORMAT", "Interruption", "load", "save"]

FORMAT = 1

#: what reading a damaged file, or another one, may raise; zlib and zipfile where bits of the headers changed
READING = (
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    KeyError,
    NotImplementedError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
)


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a state beside ``path``, brings it to the disk, and puts it in the place of the last one.

    Arguments:
        state: tensors, numbers, strings and None, in dicts and lists.
    Raises:
        OSError: it cannot be written; what was at ``path`` is still there.
    """
    with replacing(path, on_disk=True) as file:
        torch.save({"format": FORMAT, **state}, file)


def load(path: Path) -> dict[str, Any]:
    """What :func:`save` wrote; tensors on the CPU. Nothing but tensors and plain values is unpickled.

    Raises:
        UsageError: not readable, damaged, or not such a file.
    """
    try:
        with open(path, "rb") as file:
            _check_sums(file)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except READING as error:
        raise UsageError(f"--resume: checkpoint {path} cannot be read: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise UsageError(f"--resume: {path} is no checkpoint of format {FORMAT}; found {found!r}")
    return state


def _check_sums(file: BinaryIO) -> None:
    """torch.load does not compare the check sums that the zip archive has of each of its files.

    Raises:
        ValueError: one is wrong.
        zipfile.BadZipFile: it is no such archive.
    """
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the check sum of {damaged} in it is wrong")
    file.seek(0)


class Interruption:
    """Takes Ctrl-C and SIGTERM as a request to stop at the next step, so that no update is cut in half.

    A second Ctrl-C interrupts at once. Away from the main thread signals stay as they are.

    Attributes:
        requested: whether to stop.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._request)
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
