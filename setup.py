"""Builds the compiled parts of frog_cuda and says in one line what it decided.

Environment:
    FROG_CUDA_BUILD    auto (default), cpu or cuda
    FROG_CUDA_WERROR   1: compiler warnings are errors (what `make lint` uses)
    FROG_CUDA_VERBOSE  1: show every compiler command
    MAX_JOBS           parallel compilers; default: one per 2 GiB of free memory, at most one per core
"""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

NEEDED = "pip install 'torch>=2.11' ninja 'pybind11>=2.12' 'setuptools>=77'"
try:
    import pybind11
    import setuptools
    import torch
    from setuptools import Extension, setup
    from setuptools.errors import CompileError
    from torch.utils import cpp_extension
except ImportError as missing:
    raise SystemExit(f"frog_cuda: what building needs is missing ({missing}); run `{NEEDED}` first") from missing

ROOT = Path(__file__).parent.resolve()
TARGET_TORCH = "0x020b000000000000"  # stable ABI of torch 2.11: the library also loads beside every later torch
BYTES_PER_JOB = 2 << 30


def check_versions(torch_version: str, setuptools_version: str) -> None:
    """Without build isolation pip does not look at the versions that pyproject.toml asks for."""
    for name, version, least in (("torch", torch_version, (2, 11)), ("setuptools", setuptools_version, (77, 0))):
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < least:
            wanted = ".".join(str(part) for part in least)
            raise SystemExit(f"frog_cuda: {name} is {version}; building needs {wanted} or later: run `{NEEDED}` first")


def nvcc_major() -> int | None:
    """Major version of the CUDA compiler in CUDA_HOME or on PATH; None where there is none."""
    home = os.environ.get("CUDA_HOME")
    nvcc = os.path.join(home, "bin", "nvcc") if home else shutil.which("nvcc")
    if not nvcc or not os.path.exists(nvcc):
        return None
    found = re.search(r"release (\d+)\.", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    return int(found.group(1)) if found else None


def choose_build(wanted: str, cuda_sources: list[str], nvcc: int | None, torch_cuda: str | None) -> tuple[bool, str]:
    """Whether to build CUDA kernels, and why. Never asks for a GPU: the machine that builds need not be the one that runs."""
    if wanted not in ("auto", "cpu", "cuda"):
        raise SystemExit(f"frog_cuda: FROG_CUDA_BUILD is {wanted!r}; accepted are auto, cpu, cuda")
    if wanted == "cpu":
        return False, "CPU kernels only (FROG_CUDA_BUILD=cpu)"
    if not cuda_sources:
        why = "this version has no CUDA kernels"
    elif torch_cuda is None:
        why = f"torch {torch.__version__} is a CPU build"
    elif nvcc is None:
        why = "nvcc was not found in CUDA_HOME or on PATH"
    elif nvcc != int(torch_cuda.split(".")[0]):
        why = f"nvcc {nvcc} does not match the CUDA {torch_cuda} of torch"
    else:
        return True, f"CPU and CUDA kernels (nvcc {nvcc}, torch CUDA {torch_cuda})"
    if wanted == "cuda":
        raise SystemExit(f"frog_cuda: FROG_CUDA_BUILD=cuda cannot be met: {why}")
    return False, f"CPU kernels only ({why})"


def free_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that compilers can use: what is free, and no more than a container's limit leaves; None where unknown."""
    free = []
    with contextlib.suppress(OSError):
        free += [int(kib) << 10 for kib in re.findall(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())]
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        free.append(int((cgroup / "memory.max").read_text()) - int((cgroup / "memory.current").read_text()))
    return min(free, default=None)


def choose_jobs(given: str | None, free: int | None, cores: int) -> int:
    """Parallel compilers: as told, else what free memory and cores allow."""
    if given:
        if not given.isdigit() or int(given) < 1:
            raise SystemExit(f"frog_cuda: MAX_JOBS is {given!r}; accepted is a whole number from 1")
        return int(given)
    return max(1, cores if free is None else min(cores, free // BYTES_PER_JOB))


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def messages(lines: Iterable[str]) -> Iterator[str]:
    """Drops ninja's command lines, keeps what the compilers say."""
    command_follows = False
    for line in lines:
        if command_follows:
            command_follows = False
        elif not re.match(r"\[\d+/\d+\] |ninja: (no work to do|Entering directory)", line):
            command_follows = line.startswith("FAILED: ")
            yield line


@contextlib.contextmanager
def only_messages() -> Iterator[None]:
    """Within this context, file descriptor 1 (which ninja inherits) shows messages() only."""
    sys.stdout.flush()
    terminal = os.dup(1)
    reader, writer = os.pipe()

    def pump() -> None:
        with os.fdopen(reader, errors="replace") as lines, os.fdopen(terminal, "w", closefd=False) as out:
            for line in messages(lines):
                print(line, end="", file=out, flush=True)

    thread = threading.Thread(target=pump)
    os.dup2(writer, 1)
    os.close(writer)
    thread.start()
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(terminal, 1)
        thread.join()
        os.close(terminal)


class Build(cpp_extension.BuildExtension):
    """BuildExtension that is quiet, counts memory, and finds the ninja that pip installed."""

    decision = ""

    def __init__(self, *args: object, **kwargs: object) -> None:
        with contextlib.suppress(ImportError):
            import ninja

            # The ninja beside this interpreter, even where its environment is not activated. Not sometimes another one:
            # a change of version forgets what has been compiled.
            os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", os.defpath)])
        super().__init__(*args, **kwargs)

    def build_extensions(self) -> None:
        compiler = shlex.split(os.environ.get("CXX") or "c++")[0]
        if shutil.which(compiler) is None:
            raise CompileError(f"frog_cuda: the C++ compiler {compiler} is not found; install g++, or name one in CXX")
        jobs = choose_jobs(os.environ.get("MAX_JOBS"), free_memory(), available_cores())
        os.environ["MAX_JOBS"] = str(jobs)
        print(f"frog_cuda: building {self.decision}; up to {jobs} at a time; torch {torch.__version__}", flush=True)
        try:
            with contextlib.nullcontext() if os.environ.get("FROG_CUDA_VERBOSE") == "1" else only_messages():
                super().build_extensions()
        except RuntimeError as error:
            if not isinstance(error.__cause__, subprocess.CalledProcessError):
                raise
            raise CompileError("frog_cuda does not compile; FROG_CUDA_VERBOSE=1 shows the commands") from error


def extensions() -> list[Extension]:
    csrc = ROOT / "csrc"
    sources = sorted(p.relative_to(ROOT).as_posix() for p in csrc.rglob("*.cpp") if p.relative_to(csrc).parts[0] != "cuda")
    headers = sorted(p.relative_to(ROOT).as_posix() for p in csrc.rglob("*.h"))
    fingerprint = runpy.run_path(str(ROOT / "frog_cuda" / "_sources.py"))["fingerprint"](csrc)
    warnings = ["-Wall", "-Wextra", *(["-Werror"] if os.environ.get("FROG_CUDA_WERROR") == "1" else [])]
    # No -march: csrc/cpu/simd chooses at run time. No contraction: every instruction set must draw the same bits.
    common = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", *warnings]
    # Another torch means other headers, which ninja does not watch: with the version in the command it compiles again.
    common.append(f'-DFROG_BUILT_WITH_TORCH="{torch.__version__}"')

    def system(paths: list[str]) -> list[str]:  # so that the warnings seen are this project's own
        return [f"-isystem{path}" for path in paths]

    operators = Extension(
        "frog_cuda._C",
        [s for s in sources if s != "csrc/host.cpp"],
        depends=headers,
        extra_compile_args={"cxx": [*common, f"-DTORCH_TARGET_VERSION={TARGET_TORCH}", *system(cpp_extension.include_paths())]},
        # A kernel that is declared but not written is an error here, not when the library is loaded.
        extra_link_args=["-Wl,-z,defs"] if sys.platform == "linux" else [],
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu", "torch"],
        language="c++",
    )
    # After the operators: its fingerprint vouches for them.
    host = Extension(
        "frog_cuda._host",
        ["csrc/host.cpp"],
        depends=headers,
        extra_compile_args={"cxx": [*common, f'-DFROG_SOURCES="{fingerprint}"', *system([pybind11.get_include()])]},
        language="c++",
    )
    return [operators, host]


if __name__ == "__main__":
    os.chdir(ROOT)
    check_versions(torch.__version__, setuptools.__version__)
    cuda_sources = [str(p) for p in (ROOT / "csrc" / "cuda").glob("*.cu")]
    _, Build.decision = choose_build(os.environ.get("FROG_CUDA_BUILD", "auto"), cuda_sources, nvcc_major(), torch.version.cuda)
    setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
