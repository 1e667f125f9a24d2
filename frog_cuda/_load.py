"""Loads the compiled libraries and says how to mend a missing or stale one."""

from __future__ import annotations

import os
from pathlib import Path

import torch

#: raised together with FROG_CUDA_ABI in csrc/host.cpp whenever a schema changes, so that a stale library is named as such
ABI = 1
_FIX = "rebuild it with `pip install --no-build-isolation -e .` in the source folder (or `make build`)"


def load() -> None:
    """Loads ``_C`` (schemas and CPU kernels); safe to call twice.

    Raises:
        ImportError: the library is missing, was built from other sources, or does not load beside this torch.
    """
    if hasattr(torch.ops, "frog_cuda") and _loaded:
        return
    path = _find("_C")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(f"frog_cuda: {path.name} does not load beside torch {torch.__version__} ({error}); {_FIX}") from error
    try:
        from . import _host  # type: ignore[attr-defined]
    except ImportError as error:
        raise ImportError(f"frog_cuda: the compiled module _host is missing ({error}); {_FIX}") from error
    if _host.abi() != ABI:
        raise ImportError(f"frog_cuda: the compiled library is stale (ABI {_host.abi()}, this package needs {ABI}); {_FIX}")
    _loaded.append(path)


_loaded: list[Path] = []


def _find(name: str) -> Path:
    folder = Path(__file__).parent
    found = sorted(folder.glob(f"{name}.*so")) + sorted(folder.glob(f"{name}.so"))
    if not found:
        raise ImportError(f"frog_cuda: the compiled library {name} is missing from {os.fspath(folder)}; {_FIX}")
    return found[0]
