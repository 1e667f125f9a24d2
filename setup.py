"""Builds the compiled parts of frog_cuda and says in one line what it decided.

Environment:
    FROG_CUDA_BUILD    auto (default), cpu or cuda
    CUDA_HOME          where nvcc is looked for; default: the nvcc on PATH
    TORCH_CUDA_ARCH_LIST  GPU architectures, as "8.0;9.0+PTX"; default: those of DEFAULT_ARCHS that nvcc knows
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
# Messages name the places of errors, which are the same on every machine
SOURCES_FROM_HERE = f"-ffile-prefix-map={ROOT}{os.sep}="
TARGET_TORCH = "0x020b000000000000"  # stable ABI of torch 2.11: the library also loads beside every later torch
BYTES_PER_JOB = 2 << 30
# Ampere to Blackwell; PTX of the newest is compiled by the driver for whatever comes later. An own list, because without a GPU
# and a list in the environment cpp_extension raises an IndexError.
DEFAULT_ARCHS = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"


def check_versions(torch_version: str, setuptools_version: str) -> None:
    """Without build isolation pip does not look at the versions that pyproject.toml asks for."""
    for name, version, least in (("torch", torch_version, (2, 11)), ("setuptools", setuptools_version, (77, 0))):
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < least:
            wanted = ".".join(str(part) for part in least)
            raise SystemExit(f"frog_cuda: {name} is {version}; building needs {wanted} or later: run `{NEEDED}` first")


def find_nvcc() -> str | None:
    """The CUDA compiler in CUDA_HOME or on PATH; None where there is none."""
    home = os.environ.get("CUDA_HOME")
    nvcc = os.path.join(home, "bin", "nvcc") if home else shutil.which("nvcc")
    return nvcc if nvcc and os.path.exists(nvcc) else None


def nvcc_major() -> int | None:
    """Major version of the CUDA compiler; None where there is none."""
    nvcc = find_nvcc()
    if nvcc is None:
        return None
    found = re.search(r"release (\d+)\.", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    return int(found.group(1)) if found else None


def cuda_home(nvcc: str) -> str:
    """The toolkit's folder, asked of nvcc itself: what is on PATH may be a script that calls it."""
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
    here = re.search(r"^#\$ _HERE_=(.+)$", said.stderr + said.stdout, re.MULTILINE)
    return os.path.dirname(here.group(1).strip() if here else os.path.dirname(os.path.realpath(nvcc)))


def choose_archs(given: str | None, known: Iterable[str]) -> list[str]:
    """The flags of nvcc that name the architectures.

    Arguments:
        given: as TORCH_CUDA_ARCH_LIST has it; None or empty: DEFAULT_ARCHS without those that this nvcc does not know.
        known: lines of ``nvcc --list-gpu-arch``, as "compute_90".
    """
    able = {line.strip().removeprefix("compute_") for line in known}
    flags = []
    for entry in re.split(r"[;,\s]+", (given or DEFAULT_ARCHS).strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise SystemExit(f"frog_cuda: TORCH_CUDA_ARCH_LIST has {entry!r}; accepted are entries such as 9.0 and 9.0+PTX")
        if match[1] + match[2] not in able:
            if not given:
                continue
            names = ", ".join(sorted((f"{a[:-1]}.{a[-1]}" for a in able), key=float))
            raise SystemExit(f"frog_cuda: TORCH_CUDA_ARCH_LIST has {entry!r}; this nvcc knows {names}")
        number = match[1] + match[2] + match[3]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    if not flags:
        raise SystemExit(f"frog_cuda: this nvcc knows none of {DEFAULT_ARCHS}; name its architectures in TORCH_CUDA_ARCH_LIST")
    return flags


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


def extensions(cuda: bool) -> list[Extension]:
    """What is to be built: the operators on the CPU, those on CUDA where wanted, and what is no operator."""
    csrc = ROOT / "csrc"
    fingerprint = runpy.run_path(str(ROOT / "frog_cuda" / "_sources.py"))["fingerprint"]
    sources = sorted(p.relative_to(ROOT).as_posix() for p in csrc.rglob("*.cpp") if p.relative_to(csrc).parts[0] != "cuda")
    headers = sorted(p.relative_to(ROOT).as_posix() for p in csrc.rglob("*.h") if p.relative_to(csrc).parts[0] != "cuda")
    warnings = ["-Wall", "-Wextra", *(["-Werror"] if os.environ.get("FROG_CUDA_WERROR") == "1" else [])]
    # No -march: csrc/cpu/simd chooses at run time. No contraction: every instruction set must draw the same bits.
    common = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", SOURCES_FROM_HERE, *warnings]
    # Another torch means other headers, which ninja does not watch: with the version in the command it compiles again.
    common.append(f'-DFROG_BUILT_WITH_TORCH="{torch.__version__}"')

    def system(paths: list[str]) -> list[str]:  # so that the warnings seen are this project's own
        return [f"-isystem{path}" for path in paths]

    target = f"-DTORCH_TARGET_VERSION={TARGET_TORCH}"
    operators = Extension(
        "frog_cuda._C",
        [s for s in sources if s != "csrc/host.cpp"],
        depends=headers,
        extra_compile_args={"cxx": [*common, target, *system(cpp_extension.include_paths())]},
        # A kernel that is declared but not written is an error here, not when the library is loaded.
        extra_link_args=["-Wl,-z,defs"] if sys.platform == "linux" else [],
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu", "torch"],
        language="c++",
    )
    built = [operators]
    vouched = [f'-DFROG_SOURCES="{fingerprint(csrc)}"']
    if cuda:
        built.append(cuda_operators(target))
        vouched.append(f'-DFROG_CUDA_SOURCES="{fingerprint(csrc, cuda=True)}"')
    # After the operators: its fingerprints vouch for them.
    host = Extension(
        "frog_cuda._host",
        ["csrc/host.cpp"],
        depends=headers,
        extra_compile_args={"cxx": [*common, *vouched, *system([pybind11.get_include()])]},
        language="c++",
    )
    return [*built, host]


def cuda_operators(target: str) -> Extension:
    """The CUDA kernels: a library of its own, because it needs libtorch_cuda, which a CPU build of torch lacks."""
    nvcc = find_nvcc()
    assert nvcc is not None, "choose_build looked for it"
    cpp_extension.CUDA_HOME = cuda_home(nvcc)
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    archs = choose_archs(os.environ.get("TORCH_CUDA_ARCH_LIST"), known)
    folder = ROOT / "csrc" / "cuda"
    strict = os.environ.get("FROG_CUDA_WERROR") == "1"
    host_flags = ",".join(["-fvisibility=hidden", SOURCES_FROM_HERE, "-Wall", "-Wextra", *(["-Werror"] if strict else [])])
    # No fast-math: an estimate is only as good as its derivatives. Fused multiply-adds, nvcc's default, only add accuracy;
    # where bits must equal the CPU's (drawn tangents), the kernels say so operation by operation.
    flags = ["-std=c++17", "-O3", "-lineinfo", "-DUSE_CUDA", target, "-Xcompiler", host_flags]
    includes = cpp_extension.include_paths(device_type="cuda")
    return Extension(
        "frog_cuda._C_cuda",
        sorted(p.relative_to(ROOT).as_posix() for p in folder.glob("*.cu")),
        depends=sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh")),
        extra_compile_args={
            "cxx": [],
            "nvcc": [
                *flags,
                *(["-Werror=all-warnings"] if strict else []),
                *archs,
                *(x for i in includes for x in ("-isystem", i)),
            ],
        },
        extra_link_args=["-Wl,-z,defs"] if sys.platform == "linux" else [],
        library_dirs=cpp_extension.library_paths(device_type="cuda"),
        libraries=["torch_cuda", "torch_cpu", "torch", "cudart"],
        language="c++",
    )


if __name__ == "__main__":
    os.chdir(ROOT)
    check_versions(torch.__version__, setuptools.__version__)
    cuda_sources = [str(p) for p in (ROOT / "csrc" / "cuda").glob("*.cu")]
    with_cuda, Build.decision = choose_build(
        os.environ.get("FROG_CUDA_BUILD", "auto"), cuda_sources, nvcc_major(), torch.version.cuda
    )
    setup(ext_modules=extensions(with_cuda), cmdclass={"build_ext": Build})
