"""CUDA kernels on the host, for tests: ``Kernels("projection").run("cholesky_project", gram, ..., Out(shape, dtype))``."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = Path(os.environ.get("FROG_CUDA_ON_CPU_BUILD") or ROOT / "build" / "cuda_on_cpu")
FLAGS = (
    "-std=c++17 -O1 -g1 -shared -fPIC -Wall -Wextra -Werror -Wno-unknown-pragmas -ffp-contract=off -fvisibility=hidden "
    "-fsanitize=address,undefined -fno-sanitize-recover=all"
).split()

#: bytes of shared memory that a block may have on compute capability 8.6, 8.9 and 12.0, where it is least
SMALLEST_SHARED = 99 * 1024


class Out(NamedTuple):
    """A result: memory filled with NaN, returned after the run. ``skew`` bytes are left before it."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    skew: int = 0


class InOut(NamedTuple):
    """A tensor that the kernel changes, returned after the run."""

    tensor: Tensor


class Skewed(NamedTuple):
    """An input that does not start at a multiple of 16 bytes, but one element after it."""

    tensor: Tensor


class KernelError(AssertionError):
    """What the sanitizers or the emulation say of a kernel."""


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "c++")


_locks: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)


def build_ahead(stems: Iterable[str]) -> None:
    """Begins to compile files of kernels, one on each core, while other tests run."""
    sources = [path for stem in dict.fromkeys(stems) if (path := HERE / f"{stem}.cpp").exists()]

    def work() -> None:
        while sources:
            with contextlib.suppress(KernelError, IndexError):  # the test that needs it says so
                build(sources.pop(0))

    for _ in range(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1):
        threading.Thread(target=work, daemon=True).start()


def build(source: Path) -> Path:
    """The shared library of one file of kernels; compiled where it or what it may include has changed."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with _locks[source], open(BUILD / f"{source.stem}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # against other processes that run tests; the one above is for threads
        return _build(source)


def _build(source: Path) -> Path:
    own = [source, HERE / "cuda_on_cpu.cpp"]
    seen = [*own, *HERE.glob("*.h"), *(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").rglob("*.cuh")]
    command = [*compiler(), *FLAGS]
    digest = hashlib.sha256(" ".join(command).encode())  # without paths: a copy of the sources compiles to the same
    command += [f"-I{HERE}", f"-I{ROOT / 'csrc'}"]
    for path in sorted(seen):
        digest.update(path.name.encode() + path.read_bytes())
    library = BUILD / f"{source.stem}-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        with tempfile.NamedTemporaryFile(dir=BUILD, suffix=".so") as unfinished:
            done = subprocess.run([*command, *map(str, own), "-o", unfinished.name], capture_output=True, text=True)
            if done.returncode != 0:
                raise KernelError(f"{source.name} does not compile for the host:\n{done.stderr}")
            for old in BUILD.glob(f"{source.stem}-*.so"):
                old.unlink()
            shutil.copy(unfinished.name, library)
    return library


def sanitizers() -> str:
    """The runtime that must be loaded before all else."""
    found = subprocess.run([*compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


class Kernels:
    """The kernels that ``tests/cuda_on_cpu/<stem>.cpp`` exports, in a process of their own."""

    def __init__(self, stem: str | Path) -> None:
        self._source = stem if isinstance(stem, Path) else HERE / f"{stem}.cpp"
        self._process: subprocess.Popen[bytes] | None = None
        self._broken: KernelError | None = None  # it did not compile, and will not for the next test
        self._errors: tempfile._TemporaryFileWrapper[bytes] | None = None

    def _start(self) -> subprocess.Popen[bytes]:
        if self._broken is not None:
            raise self._broken
        try:
            library = build(self._source)
        except KernelError as error:
            self._broken = error
            raise
        environment = {
            **os.environ,
            "LD_PRELOAD": sanitizers(),
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:allocator_may_return_null=0",
            "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=0:abort_on_error=1",
        }
        self._errors = tempfile.NamedTemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-S", str(HERE / "worker.py"), str(library)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
        )
        return self._process

    def run(self, name: str, *arguments: object, seed: int = 0, shared: int = SMALLEST_SHARED) -> list[Tensor]:
        """Calls the exported function with tensors, None, integers and floats; returns each Out and InOut in order.

        Arguments:
            seed: of the order in which threads run.
            shared: bytes of shared memory that the device lets a block have.
        Raises:
            KernelError: the kernel broke a rule; the message is that of the sanitizer or of the emulation.
        """
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None and self._errors is not None
        try:
            pickle.dump((name, seed, shared, [_encode(a) for a in arguments]), process.stdin)
            process.stdin.flush()
            results = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            process.wait()
            self._process = None
            raise KernelError(f"{name}:\n{Path(self._errors.name).read_text()[:4000]}") from None
        wanted = [(a.shape, a.dtype) for a in map(_result, arguments) if a is not None]
        return [_decode(raw, shape, dtype) for raw, (shape, dtype) in zip(results, wanted, strict=True)]

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()
            self._process = None


def _result(argument: object) -> Out | Tensor | None:
    return argument.tensor if isinstance(argument, InOut) else argument if isinstance(argument, Out) else None


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def _encode(argument: object) -> tuple[str, object]:
    if argument is None:
        return "none", None
    if isinstance(argument, Out):
        count = 1
        for size in argument.shape:
            count *= size
        return "out", (count * argument.dtype.itemsize, argument.skew)
    if isinstance(argument, InOut):
        return "inout", (_bytes(argument.tensor), 0)
    if isinstance(argument, Skewed):
        return "in", (_bytes(argument.tensor), argument.tensor.dtype.itemsize)
    if isinstance(argument, Tensor):
        return "in", (_bytes(argument), 0)
    if isinstance(argument, (bool, int)):
        return "int", int(argument)
    assert isinstance(argument, float), f"{argument!r} cannot be passed to a kernel"
    return "float", argument


def _decode(raw: bytes, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if not raw:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype).reshape(shape)
