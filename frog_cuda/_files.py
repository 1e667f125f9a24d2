"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["replace", "replacing"]


@contextmanager
def replacing(path: Path, *, on_disk: bool = False) -> Iterator[BinaryIO]:
    """A file to write. At the end it takes the place of ``path``; where an error ends the block, what was there stays.

    Arguments:
        on_disk: the file, and then its name, are brought to the disk, to outlive a power failure; takes milliseconds.
    """
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        yield file
        if on_disk:
            file.flush()
            os.fsync(file.fileno())
    os.replace(part, path)
    if on_disk:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def replace(path: Path, text: str) -> None:
    """Writes a text whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())
