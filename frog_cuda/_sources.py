"""A fingerprint of csrc/, by which a library built from other sources is noticed. Shared by setup.py and _load.py."""

from __future__ import annotations

import hashlib
from pathlib import Path


def fingerprint(csrc: Path, *, cuda: bool = False) -> str:
    """Sixteen hex digits that change with any name or content of a source file below ``csrc``.

    The libraries that always load are not built from ``csrc/cuda``, which counts only where ``cuda`` is set.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in csrc.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")):
        name = path.relative_to(csrc).as_posix()
        if cuda or not name.startswith("cuda/"):
            content = path.read_bytes()
            digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]
