"""The build script, the loader's errors, the choice of vector kernels, and what ends up in the package."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import setuptools
from setuptools.errors import CompileError

import frog_cuda
from frog_cuda import _load
from frog_cuda._sources import fingerprint

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(frog_cuda.__file__).parent


@pytest.fixture(scope="module")
def build():
    """setup.py as a module; importing it builds nothing."""
    spec = importlib.util.spec_from_file_location("frog_cuda_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- decisions


@pytest.mark.parametrize(
    "wanted, sources, nvcc, torch_cuda, cuda, reason",
    [
        ("cpu", ["a.cu"], 13, "13.0", False, "FROG_CUDA_BUILD=cpu"),
        ("auto", [], 13, "13.0", False, "no CUDA kernels"),
        ("auto", ["a.cu"], 13, None, False, "is a CPU build"),
        ("auto", ["a.cu"], None, "13.0", False, "nvcc was not found"),
        ("auto", ["a.cu"], 12, "13.0", False, "nvcc 12 does not match the CUDA 13.0"),
        ("auto", ["a.cu"], 13, "13.0", True, "CPU and CUDA kernels (nvcc 13"),
        ("cuda", ["a.cu"], 13, "13.0", True, "CPU and CUDA kernels (nvcc 13"),
    ],
)
def test_choose_build(build, wanted, sources, nvcc, torch_cuda, cuda, reason):
    decided, why = build.choose_build(wanted, sources, nvcc, torch_cuda)
    assert decided is cuda
    assert reason in why


@pytest.mark.parametrize(
    "sources, nvcc, torch_cuda, reason",
    [
        ([], 13, "13.0", "no CUDA kernels"),
        (["a.cu"], 13, None, "CPU build"),
        (["a.cu"], None, "13.0", "nvcc was not found"),
        (["a.cu"], 12, "13.0", "does not match"),
    ],
)
def test_wanting_cuda_in_vain_is_an_error(build, sources, nvcc, torch_cuda, reason):
    with pytest.raises(SystemExit, match=f"FROG_CUDA_BUILD=cuda cannot be met: .*{reason}"):
        build.choose_build("cuda", sources, nvcc, torch_cuda)


def test_unknown_build_is_an_error(build):
    with pytest.raises(SystemExit, match="FROG_CUDA_BUILD is 'gpu'; accepted are auto, cpu, cuda"):
        build.choose_build("gpu", [], None, None)


@pytest.mark.parametrize(
    "given, free_gib, cores, jobs",
    [("3", 1, 1, 3), (None, 64, 8, 8), (None, 5, 8, 2), (None, 0.5, 8, 1), (None, None, 4, 4), ("", 64, 2, 2)],
)
def test_choose_jobs(build, given, free_gib, cores, jobs):
    free = None if free_gib is None else int(free_gib * 2**30)
    assert build.choose_jobs(given, free, cores) == jobs


@pytest.mark.parametrize("given", ["0", "-1", "two", "1.5"])
def test_bad_max_jobs_is_an_error(build, given):
    with pytest.raises(SystemExit, match="MAX_JOBS is .*accepted is a whole number from 1"):
        build.choose_jobs(given, None, 2)


def test_free_memory_heeds_machine_and_container(build, tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  9000 kB\nMemAvailable:   4000 kB\n")
    assert build.free_memory(meminfo, tmp_path) == 4000 << 10
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert build.free_memory(meminfo, tmp_path) == 4000 << 10
    (tmp_path / "memory.max").write_text("3000\n")
    assert build.free_memory(meminfo, tmp_path) == 2000
    assert build.free_memory(tmp_path / "none", tmp_path / "none") is None


def test_nvcc_major(build, tmp_path, monkeypatch):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build.nvcc_major() is None  # CUDA_HOME has no compiler
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    assert build.nvcc_major() == 13
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(nvcc.parent), prepend=os.pathsep)
    assert build.nvcc_major() == 13
    nvcc.write_text("#!/bin/sh\necho 'something else'\n")
    assert build.nvcc_major() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.nvcc_major() is None


def test_versions_that_cannot_build(build):
    build.check_versions("2.11.0+cpu", "77.0.3")
    build.check_versions("3.0.0a0+git1234", "84.2.1")
    with pytest.raises(SystemExit, match=r"torch is 2\.9\.1; building needs 2\.11 or later: run `pip install"):
        build.check_versions("2.9.1", "77.0.3")
    with pytest.raises(SystemExit, match=r"setuptools is 65\.5\.0; building needs 77\.0 or later"):
        build.check_versions("2.11.0", "65.5.0")


def test_a_missing_compiler_is_named(build, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++ -pipe")
    monkeypatch.setenv("PATH", os.environ["PATH"])  # Build puts its ninja there
    command = build.Build(setuptools.Distribution())
    with pytest.raises(CompileError, match=r"the C\+\+ compiler /nowhere/g\+\+ is not found; install g\+\+"):
        command.build_extensions()


def gencodes(build, given, known):
    return [flag.removeprefix("-gencode=arch=compute_") for flag in build.choose_archs(given, known)]


def test_architectures(build):
    known = [f"compute_{a}" for a in (75, 80, 86, 89, 90, 100, 120)]
    default = ["80,code=sm_80", "86,code=sm_86", "89,code=sm_89", "90,code=sm_90", "100,code=sm_100", "120,code=sm_120"]
    assert gencodes(build, None, known) == gencodes(build, "", known) == [*default, "120,code=compute_120"]
    assert gencodes(build, None, known[:-2]) == default[:4]
    assert gencodes(build, "9.0a 8.0+PTX", known) == ["90a,code=sm_90a", "80,code=sm_80", "80,code=compute_80"]
    with pytest.raises(SystemExit, match="has 'Hopper'; accepted are entries such as 9.0"):
        build.choose_archs("Hopper", known)
    with pytest.raises(SystemExit, match=r"has '9\.1'; this nvcc knows 7\.5, 8\.0, .*, 12\.0"):
        build.choose_archs("9.0;9.1", known)
    with pytest.raises(SystemExit, match="knows none of .*TORCH_CUDA_ARCH_LIST"):
        build.choose_archs(None, ["compute_60"])


def test_toolkit_of_a_script_that_calls_nvcc(build, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho '#$ _HERE_=/opt/toolkit/bin' >&2\n")
    nvcc.chmod(0o755)
    assert build.cuda_home(str(nvcc)) == "/opt/toolkit"
    nvcc.write_text("#!/bin/sh\n")
    assert build.cuda_home(str(nvcc)) == str(tmp_path.parent)


def test_output_keeps_what_compilers_say(build):
    said = ["a.cpp:1:1: warning: unused\n", "FAILED: [code=1] b.o\n", "b.cpp:2:2: error: no\n", "ninja: build stopped.\n"]
    ninja = ["[1/2] c++ -c a.cpp\n", said[0], "[2/2] c++ -c b.cpp\n", said[1], "c++ -c b.cpp\n", said[2], said[3]]
    assert list(build.messages(ninja)) == said
    assert list(build.messages(["ninja: no work to do.\n"])) == []


def test_flags_suit_every_machine(build, monkeypatch):
    monkeypatch.delenv("FROG_CUDA_WERROR", raising=False)
    for extension in build.extensions(cuda=False):
        flags = extension.extra_compile_args["cxx"]
        assert not [flag for flag in flags if flag.startswith(("-march", "-mtune", "-mavx", "-ffast-math", "-Ofast"))]
        assert "-Wall" in flags and "-Werror" not in flags
    monkeypatch.setenv("FROG_CUDA_WERROR", "1")
    assert all("-Werror" in extension.extra_compile_args["cxx"] for extension in build.extensions(cuda=False))


def test_libraries_hold_no_path_of_the_folder_they_were_built_in():
    for library in PACKAGE.glob("*.so"):
        if library.name.startswith("_C_cuda"):
            continue  # -lineinfo, for profilers, names its sources with their whole paths
        assert os.fsencode(ROOT) + b"/csrc" not in library.read_bytes()


def test_every_source_is_compiled_once(build):
    compiled = [source for extension in build.extensions(cuda=False) for source in extension.sources]
    on_disk = [p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.cpp") if "csrc/cuda" not in p.as_posix()]
    assert sorted(compiled) == sorted(on_disk)


def test_every_cuda_source_is_compiled_once(build, monkeypatch):
    monkeypatch.setattr(build, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(build, "cuda_home", lambda nvcc: "/opt/toolkit")
    monkeypatch.setattr(build.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, "compute_80\ncompute_90\n"))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    extensions = {e.name: e for e in build.extensions(cuda=True)}
    library = extensions["frog_cuda._C_cuda"]
    assert sorted(library.sources) == sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc" / "cuda").glob("*.cu"))
    flags = library.extra_compile_args["nvcc"]
    assert "-gencode=arch=compute_90,code=sm_90" in flags and not [f for f in flags if "fast" in f]
    assert any("FROG_CUDA_SOURCES" in flag for flag in extensions["frog_cuda._host"].extra_compile_args["cxx"])


# --- loader


# Imports torch once, then frog_cuda in a fork for each (folder, environment) and prints how that went.
_IMPORTS = """
import json, os, sys, torch
results = []
for folder, environment, code in json.loads(sys.argv[1]):
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.environ.update(environment)
        sys.path.insert(0, folder)
        try:
            scope = {}
            exec(code, scope)
            said = str(scope["said"])
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    results.append((said, os.waitstatus_to_exitcode(os.wait()[1])))
print(json.dumps(results))
"""


def _import_each(cases: list[tuple[Path, dict[str, str], str]], tmp_path: Path) -> list[str]:
    """What each case said; fails where an interpreter died instead of raising."""
    arguments = json.dumps([(str(folder), environment, code) for folder, environment, code in cases])
    environment = {name: value for name, value in os.environ.items() if name != "FROG_CUDA_SIMD"}
    command = [sys.executable, "-c", _IMPORTS, arguments]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout.splitlines()[-1])
    assert [code for _, code in results] == [0] * len(cases), results
    return [said for said, _ in results]


def _copy(to: Path, *, checkout: bool) -> Path:
    """The package as installed, or as it lies in its source folder; returns the package folder."""
    shutil.copytree(PACKAGE, to / "frog_cuda", ignore=shutil.ignore_patterns("__pycache__"))
    if checkout:
        shutil.copytree(ROOT / "csrc", to / "csrc")
        (to / "setup.py").touch()
    return to / "frog_cuda"


def _library(package: Path, name: str) -> Path:
    (path,) = package.glob(f"{name}.*so")
    return path


def test_loader_names_what_is_wrong_and_the_fix(tmp_path):
    expected = {}

    expected["good installed copy"] = r"^loaded$"
    _copy(tmp_path / "good installed copy", checkout=False)

    expected["good checkout"] = r"^loaded$"
    _copy(tmp_path / "good checkout", checkout=True)

    expected["no _C"] = (
        r"^ImportError: frog_cuda: the compiled library _C\S+ is missing from .*; to mend this, install frog_cuda again: `pip"
    )
    _library(_copy(tmp_path / "no _C", checkout=False), "_C").unlink()

    expected["no _host"] = r"^ImportError: .*_host\S+ is missing from .*; to mend this, run `make build`"
    _library(_copy(tmp_path / "no _host", checkout=True), "_host").unlink()

    expected["broken _C"] = (
        r"^ImportError: .*_C\S+ does not load beside torch \S+, which must be 2\.11 or later \(.*\); to mend this,"
    )
    _library(_copy(tmp_path / "broken _C", checkout=False), "_C").write_bytes(b"not a library")

    expected["broken _host"] = r"^ImportError: frog_cuda: _host\S+ does not load \(.*\); to mend this,"
    _library(_copy(tmp_path / "broken _host", checkout=False), "_host").write_bytes(b"not a library")

    expected["other ABI"] = r"^ImportError: .*_C\S+ is stale \(ABI 1, this package needs 2\); to mend this,"
    load = _copy(tmp_path / "other ABI", checkout=False) / "_load.py"
    assert _load.ABI == 1, "the ABI has been raised: raise the numbers in this test too"
    load.write_text(load.read_text().replace("ABI = 1\n", "ABI = 2\n"))

    expected["other sources"] = (
        r"^ImportError: .*_C\S+ is stale: it was built from other sources than those now in .*; to mend this, run `make build`"
    )
    _copy(tmp_path / "other sources", checkout=True)
    with open(tmp_path / "other sources" / "csrc" / "cpu" / "linear.cpp", "a") as source:
        source.write("// changed\n")

    code = "import frog_cuda; said = 'loaded'"
    said = _import_each([(tmp_path / name, {}, code) for name in expected], tmp_path)
    for name, text in zip(expected, said):
        assert re.search(expected[name], text, re.DOTALL), f"{name}: {text}"


def test_fingerprint_sees_names_and_contents(tmp_path):
    (tmp_path / "a.h").write_text("one")
    (tmp_path / "b.cpp").write_text("two")
    seen = {fingerprint(tmp_path)}
    assert fingerprint(tmp_path) in seen
    (tmp_path / "notes.txt").write_text("no source")
    assert fingerprint(tmp_path) in seen
    (tmp_path / "b.cpp").write_text("three")
    seen.add(fingerprint(tmp_path))
    (tmp_path / "b.cpp").rename(tmp_path / "c.cpp")
    seen.add(fingerprint(tmp_path))
    (tmp_path / "c.cpp").unlink()
    seen.add(fingerprint(tmp_path))
    assert len(seen) == 4


# --- vector kernels


def _simd_levels() -> list[str]:
    """What this machine runs, by its own description: Linux on x86 with g++."""
    flags = set(re.findall(r"\w+", re.search(r"flags\s*:(.*)", Path("/proc/cpuinfo").read_text()).group(1)))
    levels = ["baseline"]
    if {"avx2", "fma"} <= flags:
        levels.append("avx2")
        if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
            levels.append("avx512")
    return levels


on_x86_gcc = pytest.mark.skipif(
    not (sys.platform == "linux" and os.uname().machine == "x86_64" and "g++" in str(frog_cuda.build_info()["compiler"])),
    reason="needs Linux, x86_64 and g++",
)

_DRAW = "import frog_cuda as frog; draw = frog.tangents.sample('normal', 3, 1025, seed=7)"


@on_x86_gcc
def test_simd_is_chosen_when_the_library_is_loaded(tmp_path):
    levels = _simd_levels()
    draw = "draw = frog.tangents.sample('normal', 3, 1025, seed=7).double().pow(2).sum().item()"
    said = "said = [frog.build_info()['simd'], draw]"
    cases = [({"FROG_CUDA_SIMD": level}, f"import frog_cuda as frog; {draw}; {said}") for level in levels]
    cases.append(({}, cases[0][1]))
    cases.append(({"FROG_CUDA_SIMD": ""}, cases[0][1]))
    cases.append(({}, f"import os, frog_cuda as frog; os.environ['FROG_CUDA_SIMD'] = 'sse9'; {draw}; {said}"))
    cases.append(({"FROG_CUDA_SIMD": "AVX512"}, "import frog_cuda; said = 'loaded'"))
    *drawn, refused = _import_each([(PACKAGE.parent, *case) for case in cases], tmp_path)
    results = [ast.literal_eval(text) for text in drawn]
    assert [level for level, _ in results] == [*levels, levels[-1], levels[-1], levels[-1]]
    assert len({value for _, value in results}) == 1  # every instruction set draws the same bits
    accepted = ", ".join(levels)
    assert refused == f"ValueError: FROG_CUDA_SIMD is 'AVX512'; this build on this machine accepts {accepted}"


def _vex_users(library: Path) -> dict[str, str]:
    """Demangled function -> first instruction that needs AVX or later."""
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", "--demangle", str(library)], capture_output=True, text=True, check=True
    ).stdout
    users: dict[str, str] = {}
    function = ""
    for line in text.splitlines():
        if start := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            function = start.group(1)
        elif re.match(r"\s*[0-9a-f]+:\s+(v[a-z]|k(mov|or|and|xor|not|shift|test|unpck|add))", line) or re.search(
            r"%[yz]mm", line
        ):
            users.setdefault(function, line)
    return users


@on_x86_gcc
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_wide_instructions_stay_in_their_namespaces():
    """A build made on a machine with AVX-512 must run on one without: only avx2:: and avx512:: may use wider registers."""
    users = _vex_users(_library(PACKAGE, "_C"))
    assert any("frog::avx512::" in function for function in users) and any("frog::avx2::" in function for function in users)
    elsewhere = {f: line for f, line in users.items() if not re.search(r"frog::avx(2|512)(::|_kernels)", f)}
    assert not elsewhere
    assert not any("frog::avx2::" in f and "%zmm" in line for f, line in users.items())
    assert not _vex_users(_library(PACKAGE, "_host"))


# --- what is installed


def test_build_info_tells_what_was_built():
    info = frog_cuda.build_info()
    assert info["version"] == frog_cuda.__version__
    assert info["abi"] == _load.ABI
    assert info["sources"] == fingerprint(ROOT / "csrc")
    assert info["cuda"] is any(PACKAGE.glob("_C_cuda.*"))
    assert {"torch", "built_with_torch", "simd", "compiler", "cplusplus", "threads"} <= set(info)


def test_every_module_is_packaged():
    packages = setuptools.find_packages(str(ROOT), include=["frog_cuda", "frog_cuda.*"])  # as pyproject.toml says
    folders = {p.parent.relative_to(ROOT).as_posix().replace("/", ".") for p in (ROOT / "frog_cuda").rglob("*.py")}
    assert folders == set(packages)
    assert (ROOT / "frog_cuda" / "py.typed").exists()


def test_source_distribution_holds_all_that_a_build_needs(tmp_path):
    folders = ["egg_info", "--egg-base", str(tmp_path)], ["sdist", "--dist-dir", str(tmp_path)]
    command = [sys.executable, "setup.py", "--quiet", *folders[0], *folders[1]]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode == 0, run.stdout
    (archive,) = tmp_path.glob("frog_cuda-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    sources = [p for folder in ("csrc", "frog_cuda", "tests", "benchmarks") for p in (ROOT / folder).rglob("*")]
    needed = {p.relative_to(ROOT).as_posix() for p in sources if p.suffix in (".h", ".cpp", ".cu", ".cuh", ".py")}
    needed |= {
        "setup.py",
        "pyproject.toml",
        "requirements.txt",
        "Makefile",
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "frog_cuda/py.typed",
    }
    assert needed <= names
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0:  # else this is a source distribution itself
        assert set(tracked.stdout.split()) - {".gitignore", "MANIFEST.in"} <= names
