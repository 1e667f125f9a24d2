"""A fingerprint of csrc/, by which a library built from other sources is noticed. Shared by setup.py and _load.py."""

from __future__ import annotations

import hashlib
from pathlib import Path


def fingerprint(csrc: Path) -> str:
    """Sixteen hex digits that change with any name or content of a source file below ``csrc``."""
    digest = hashlib.sha256()
    for path in sorted(p for p in csrc.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(csrc).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]
