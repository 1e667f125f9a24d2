"""What `make` does again and what it does not, on a project of the same shape whose pip and compiler only write a log."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")

# Stands for python, both the one that makes .venv and the one inside; $VERSION is the version it claims to have.
_PYTHON = """#!/bin/sh
case "$*" in
"-m venv --clear "*) rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python"; echo venv >>log ;;
"-m pip --version") exit 0 ;;
"-m pip install"*) echo pip >>log; test ! -e no-network ;;
"setup.py"*)
    echo "build$FROG_CUDA_WERROR" >>log
    test ! -e does-not-compile || exit 1
    mkdir -p build/lint
    case "$*" in *--inplace*) touch frog_cuda/_C.x.so frog_cuda/_host.x.so ;; esac ;;
"-m pytest"*) echo pytest >>log ;;
"-m frog_cuda demo") echo demo >>log ;;
"-m ruff"* | "-m mypy" | "-c import clang_format"*) echo lint >>log ;;
"-c import sys; sys.exit"*) test "VERSION" != 2.7 ;;
"-c import sys; print"*) echo VERSION ;;
*) echo "unexpected: $*" >>log; exit 1 ;;
esac
"""


class Project:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("csrc/cpu", "frog_cuda", "bin"):
            (folder / name).mkdir(parents=True)
        shutil.copy(ROOT / "Makefile", folder)
        for name in ("requirements.txt", "setup.py", "frog_cuda/_sources.py", "csrc/a.h", "csrc/cpu/b.cpp"):
            (folder / name).touch()
        for name, version in (("python3", "3.11"), ("python3.12", "3.12"), ("python2", "2.7")):
            (folder / "bin" / name).write_text(_PYTHON.replace("VERSION", version))
            (folder / "bin" / name).chmod(0o755)

    def make(self, *arguments: str, fails: bool = False, **environment: str) -> list[str]:
        """Runs make and returns what it did."""
        log = self.folder / "log"
        log.write_text("")
        kept = {
            k: v for k, v in os.environ.items() if k not in ("PYTHON", "FROG_CUDA_WERROR", "MAKEFLAGS", "MAKELEVEL", "ARGS")
        }
        path = os.pathsep.join([str(self.folder / "bin"), os.environ["PATH"]])
        run = subprocess.run(
            ["make", *arguments], cwd=self.folder, env={**kept, "PATH": path, **environment}, capture_output=True, text=True
        )
        assert (run.returncode != 0) is fails, run.stdout + run.stderr
        self.said = run.stdout + run.stderr
        return log.read_text().split()

    def later(self) -> None:
        """Lets ten seconds pass: everything there is gets that much older."""
        for path in self.folder.rglob("*"):
            if not path.is_symlink():
                os.utime(path, (path.stat().st_atime - 10, path.stat().st_mtime - 10))


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def test_set_up_happens_once(project):
    assert project.make("test") == ["venv", "pip", "build", "pytest"]
    assert project.make("test") == ["pytest"]
    assert project.make("demo") == ["demo"]
    assert project.make("build") == []


@pytest.mark.parametrize("changed", ["csrc/a.h", "csrc/cpu/b.cpp", "csrc/cpu/new.cpp", "setup.py", "frog_cuda/_sources.py"])
def test_a_changed_source_is_built(project, changed):
    project.make("build")
    project.later()
    (project.folder / changed).touch()
    assert project.make("build") == ["build"]
    assert project.make("build") == []


def test_a_removed_source_is_noticed(project):
    project.make("build")
    project.later()
    (project.folder / "csrc" / "cpu" / "b.cpp").unlink()
    assert project.make("build") == ["build"]
    assert project.make("build") == []


def test_changed_requirements_are_installed_and_built_with(project):
    project.make("build")
    project.later()
    (project.folder / "requirements.txt").touch()
    assert project.make("build") == ["pip", "build"]
    assert project.make("build") == []


@pytest.mark.parametrize("library", ["_C.x.so", "_host.x.so"])
def test_a_deleted_library_is_built(project, library):
    project.make("build")
    (project.folder / "frog_cuda" / library).unlink()
    assert project.make("build") == ["build"]
    assert project.make("build") == []


def test_a_failed_step_is_done_again(project):
    (project.folder / "no-network").touch()
    assert project.make("test", fails=True) == ["venv", "pip"]
    (project.folder / "no-network").unlink()
    (project.folder / "does-not-compile").touch()
    assert project.make("test", fails=True) == ["pip", "build"]
    assert project.make("test", fails=True) == ["build"]
    (project.folder / "does-not-compile").unlink()
    assert project.make("test") == ["build", "pytest"]


def test_a_half_made_environment_is_made_again(project):
    python = project.folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to("gone")
    assert project.make("build") == ["venv", "pip", "build"]
    shutil.rmtree(project.folder / ".venv")
    assert project.make("build") == ["venv", "pip", "build"]


def test_interpreter_can_be_chosen(project):
    assert project.make("build", "PYTHON=python3.12") == ["venv", "pip", "build"]
    assert project.make("build", PYTHON="python3.12") == []
    assert project.make("build") == []  # the environment stays what it is
    assert project.make("build", "PYTHON=python3", fails=True) == []
    assert ".venv has Python 3.12, not 3.11: remove .venv to have it made again" in project.said
    shutil.rmtree(project.folder / ".venv")
    assert project.make("build", "PYTHON=python3") == ["venv", "pip", "build"]


def test_an_old_interpreter_is_an_error(project):
    assert project.make("build", "PYTHON=python2", fails=True) == []
    assert "python2 is not Python 3.10 or later" in project.said


def test_lint_compiles_apart_or_shares_the_strict_build(project):
    project.make("build")
    assert project.make("lint") == ["lint"] * 4 + ["build1"]
    assert project.make("lint") == ["lint"] * 4
    assert project.make("build") == []
    assert project.make("lint", FROG_CUDA_WERROR="1") == ["lint"] * 4 + ["build1"]
    assert project.make("test", FROG_CUDA_WERROR="1") == ["pytest"]


def test_clean_keeps_the_environment(project):
    project.make("build")
    assert project.make("clean") == []
    assert not list((project.folder / "frog_cuda").glob("*.so"))
    assert project.make("build") == ["build"]


def test_help_lists_the_targets(project):
    project.make()
    for target in ("demo", "test", "lint", "build", "bench", "clean"):
        assert f"make {target} " in project.said
