"""Loads the compiled libraries and says how to mend a missing or stale one."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from ._sources import fingerprint

#: raised together with kAbi in csrc/host.cpp whenever a schema changes, so that a stale library is named as such
ABI = 1

_FOLDER = Path(__file__).parent
_loaded = False


def load() -> None:
    """:func:`load_libraries`; on the command line, an error ends the process with its message and no traceback.

    ``python -m frog_cuda`` imports the package before any code of ``__main__`` runs that could do so.
    """
    try:
        load_libraries()
    except (ImportError, ValueError) as error:
        if not _on_command_line():
            raise
        sys.exit(f"python -m {__package__}: {error}")


def _on_command_line() -> bool:
    """Whether Python is importing this package for ``python -m frog_cuda``; argv[0] is "-m" only until the module was found."""
    given = sys.orig_argv
    named = f"-m{__package__}" in given or ("-m", __package__) in zip(given, given[1:])
    return sys.argv[:1] == ["-m"] and named


def load_libraries() -> None:
    """Loads ``_C`` (schemas and CPU kernels) and, beside a CUDA build of torch, ``_C_cuda``; safe to call twice.

    Without ``_C_cuda`` every operator raises on CUDA tensors, saying why and how to mend it.

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
    if torch.version.cuda is not None:
        if host.cuda_sources() is None:
            _refuse_cuda("frog_cuda was built without CUDA kernels")
        else:
            _load_cuda(host.cuda_sources(), csrc)
    _loaded = True


def _load_cuda(built_from: str, csrc: Path | None) -> None:
    library = _find("_C_cuda")
    if csrc is not None and built_from != fingerprint(csrc, cuda=True):
        raise _error(f"{library.name} is stale: it was built from other sources than those now in {csrc}")
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise _error(
            f"{library.name} does not load beside torch {torch.__version__} with CUDA {torch.version.cuda} ({error})"
        ) from error


_refusals: list[torch.library.Library] = []  # a registration lasts as long as its Library


def _refuse_cuda(why: str) -> None:
    """Gives every operator a CUDA kernel that raises; PyTorch's own message would not say what to do."""
    library = torch.library.Library("frog_cuda", "IMPL")
    _refusals.append(library)
    fix = "build it with nvcc on PATH and FROG_CUDA_BUILD=cuda, which says what else is missing"
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("frog_cuda::"):

            def refuse(*arguments: object, _name: str = name.removeprefix("frog_cuda::"), **named: object) -> None:
                raise RuntimeError(f"frog_cuda.ops.{_name}: got CUDA tensors, but {why}; {fix}")

            library.impl(name.removeprefix("frog_cuda::"), refuse, "CUDA")


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
