"""Checkpoints that a kill at any moment leaves whole, and that say when they are not."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from .._checks import check_count, check_path, check_step
from .._files import replacing

__all__ = ["Checkpoints"]

_MAGIC = b"frog_cuda checkpoint 1\n"
_MORE = "holds more than tensors and plain containers"
_NAME = re.compile(r"step-(\d{10})\.ckpt")


class Checkpoints:
    """Numbered checkpoints in a folder.

    A checkpoint is written beside its place, forced to the disk and then renamed, so that a name never stands for a part of
    it. It carries its SHA-256; one that does not match, such as a truncated one, is passed over and the one before it used, or
    an error raised where there is no other.
    Contents are tensors and plain containers: they are read with ``weights_only=True``, which runs no code from a file.

    One process writes (under :class:`TangentParallel` all hold the same parameters), every one reads.

    Arguments:
        folder: made where it is not there.
        keep: how many of the newest stay; at least 2, so that one is left where the last is damaged.
    Raises:
        TypeError, ValueError: folder is no path, or keep no integer >= 2.

    >>> import tempfile
    >>> checkpoints = Checkpoints(tempfile.mkdtemp())
    >>> checkpoints.load() is None
    True
    >>> for step in range(3):
    ...     _ = checkpoints.save(step, {"weight": torch.full((2,), step), "losses": [0.5] * step})
    >>> checkpoints.load()
    (2, {'weight': tensor([2, 2]), 'losses': [0.5, 0.5]})
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 2) -> None:
        self.folder, self.keep = check_path("folder", folder), check_count("keep", keep)
        if self.keep < 2:
            raise ValueError(f"keep is {keep}; expected an integer >= 2")
        self.folder.mkdir(parents=True, exist_ok=True)

    def save(self, step: int, state: Any) -> Path:
        """Writes ``state`` under the number ``step``; returns where.

        Removes what is too old, and what has a later number: it was damaged, or belongs to steps that are being taken again.

        Raises:
            TypeError: ``state`` holds something else than tensors and plain containers, and could not be written or not be read
                again. Nothing is written or removed then.
        """
        path = self.folder / f"step-{check_step(step):010d}.ckpt"
        buffer = io.BytesIO()
        try:
            torch.save(state, buffer)
        except (AttributeError, TypeError, pickle.PicklingError) as error:  # by what it is that has no pickle
            raise TypeError(f"Checkpoints: state {_MORE} ({error})") from error
        content = buffer.getvalue()
        _read(content, path)
        with replacing(path, on_disk=True) as file:
            file.write(_MAGIC + hashlib.sha256(content).digest() + content)
        earlier = [s for s in self._steps() if s <= step]
        for other in set(self._steps()) - set(earlier[: self.keep]):
            self._path(other).unlink(missing_ok=True)
        return path

    def load(self) -> tuple[int, Any] | None:
        """``(step, state)`` of the newest checkpoint that is whole, tensors on the CPU; None where there is none at all.

        Warns of damaged ones that are passed over.

        Raises:
            ValueError: all that are there are damaged. The run would otherwise begin again without a word.
        """
        damaged: list[str] = []
        for step in self._steps():
            path = self._path(step)
            head, raw = len(_MAGIC) + 32, path.read_bytes()
            content = raw[head:]
            if not raw.startswith(_MAGIC) or hashlib.sha256(content).digest() != raw[len(_MAGIC) : head]:
                damaged.append(f"{path} is damaged ({len(raw)} bytes)")
                continue
            for one in damaged:
                warnings.warn(f"Checkpoints: {one}; {path.name}, an earlier one, is used", stacklevel=2)
            return step, _read(content, path)
        if damaged:
            raise ValueError(
                f"Checkpoints: {', '.join(damaged)}; no other is left. To begin anew, remove them or take another folder"
            )
        return None

    def _steps(self) -> list[int]:
        """Newest first."""
        found = (_NAME.fullmatch(p.name) for p in self.folder.iterdir() if not p.is_dir())
        return sorted((int(m[1]) for m in found if m), reverse=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:010d}.ckpt"


def _read(content: bytes, path: Path) -> Any:
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise TypeError(f"Checkpoints: {path.name} {_MORE} ({error})") from error
