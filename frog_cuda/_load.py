"""Loads the compiled libraries and says how to mend a missing or stale one."""

from __future__ import annotations

import importlib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from ._sources import fingerprint

#: raised together with kAbi in csrc/host.cpp whenever a schema changes, so that a stale library is named as such
ABI = 1

_FOLDER = Path(__file__).parent
_loaded = False


def load() -> None:
    """Loads ``_C`` (schemas and CPU kernels); safe to call twice.

    Raises:
        ImportError: a library is missing, stale, or does not load beside this torch; the message names the fix.
        ValueError: the environment variable FROG_CUDA_SIMD names no vector kernels that run here.
    """
    global _loaded
    if _loaded:
        return
    library, host_file = _find("_C"), _find("_host")
    try:
        host = importlib.import_module(f"{__package__}._host")
    except ImportError as error:
        raise _error(f"{host_file.name} does not load ({error})") from error
    if host.abi() != ABI:
        raise _error(f"{library.name} is stale (ABI {host.abi()}, this package needs {ABI})")
    csrc = _csrc()
    if csrc is not None and host.sources() != fingerprint(csrc):
        raise _error(f"{library.name} is stale: it was built from other sources than those now in {csrc}")
    host.simd()
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise _error(
            f"{library.name} does not load beside torch {torch.__version__}, which must be 2.11 or later ({error})"
        ) from error
    _loaded = True


def _find(name: str) -> Path:
    for suffix in EXTENSION_SUFFIXES:
        path = _FOLDER / f"{name}{suffix}"
        if path.exists():
            return path
    raise _error(f"the compiled library {name}{EXTENSION_SUFFIXES[0]} is missing from {_FOLDER}")


def _csrc() -> Path | None:
    """The sources, where this package lies in its source folder; None where it was installed."""
    root = _FOLDER.parent
    return root / "csrc" if (root / "csrc" / "ops.cpp").exists() and (root / "setup.py").exists() else None


def _error(what: str) -> ImportError:
    csrc = _csrc()
    if csrc is None:
        fix = "install frog_cuda again: `pip install --no-build-isolation --force-reinstall --no-deps .` in its source folder"
    else:
        fix = f"run `make build` (or `python setup.py --quiet build_ext --inplace`) in {csrc.parent}"
    return ImportError(f"frog_cuda: {what}; to mend this, {fix}")
