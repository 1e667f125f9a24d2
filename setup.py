"""Builds the compiled parts of frog_cuda and says in one line each what it decided.

Environment:
    FROG_CUDA_BUILD   auto (default), cpu or cuda
    FROG_CUDA_WERROR  1: compiler warnings are errors (what `make lint` uses)
    MAX_JOBS          parallel compilers; default: one per 2 GiB of free memory, at most one per core
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.resolve()
TARGET_TORCH = "0x020b000000000000"  # stable ABI of torch 2.11: the library also loads beside every later torch
BYTES_PER_JOB = 2 << 30


def say(text: str) -> None:
    print(f"frog_cuda: {text}", flush=True)


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
    return False, f"CPU kernels only: {why}"


def free_memory() -> int | None:
    try:
        return int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text()).group(1)) << 10  # type: ignore[union-attr]
    except (OSError, AttributeError):
        return None


def choose_jobs(given: str | None, free: int | None, cores: int) -> int:
    """Parallel compilers: as told, else what free memory and cores allow."""
    if given:
        return int(given)
    return max(1, min(cores, cores if free is None else free // BYTES_PER_JOB))


class Build(cpp_extension.BuildExtension):
    """BuildExtension with torch's headers as system headers, so that the warnings seen are this project's own."""

    def build_extensions(self) -> None:
        system = [path for ext in self.extensions for path in getattr(ext, "system_include_dirs", [])]
        for ext in self.extensions:
            flags = [f"-isystem{path}" for path in dict.fromkeys(system)]
            ext.extra_compile_args = {"cxx": [*ext.extra_compile_args["cxx"], *flags]}
        super().build_extensions()

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # _C registers operators when it is loaded; it is not a Python module


def extensions() -> list[Extension]:
    warnings = ["-Wall", "-Wextra"] + (["-Werror"] if os.environ.get("FROG_CUDA_WERROR") == "1" else [])
    # No -march: csrc/cpu/simd chooses at run time. No contraction: every instruction set must draw the same bits.
    common = ["-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", *warnings]
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("**/*.cpp") if "cuda" not in p.parts[-2:])
    ops = Extension(
        "frog_cuda._C",
        [s for s in sources if s != "csrc/host.cpp"],
        extra_compile_args={"cxx": [*common, f"-DTORCH_TARGET_VERSION={TARGET_TORCH}"]},
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu", "torch"],
        language="c++",
    )
    ops.system_include_dirs = cpp_extension.include_paths()  # type: ignore[attr-defined]
    host = Extension("frog_cuda._host", ["csrc/host.cpp"], extra_compile_args={"cxx": list(common)}, language="c++")
    host.system_include_dirs = [pybind11.get_include()]  # type: ignore[attr-defined]
    return [ops, host]


if __name__ == "__main__":
    os.chdir(ROOT)
    cuda_sources = [str(p) for p in (ROOT / "csrc" / "cuda").glob("*.cu")]
    _, reason = choose_build(os.environ.get("FROG_CUDA_BUILD", "auto"), cuda_sources, nvcc_major(), torch.version.cuda)
    jobs = choose_jobs(os.environ.get("MAX_JOBS"), free_memory(), os.cpu_count() or 1)
    os.environ["MAX_JOBS"] = str(jobs)
    say(f"building {reason}; {jobs} parallel compiler{'s' * (jobs > 1)}; torch {torch.__version__}")
    setup(ext_modules=extensions(), cmdclass={"build_ext": Build.with_options(use_ninja=True)})
