"""What all commands share: how they end on Ctrl-C, and what they say of options that cannot be met."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from frog_cuda.__main__ import COMMANDS, main
from frog_cuda.experiments import UsageError, lr_search

ROOT = Path(__file__).parent.parent
RESUMED = ("approximation", "angles", "functions", "train")


@pytest.mark.parametrize("name", COMMANDS)
def test_interruption_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, name, dataclasses.replace(COMMANDS[name], run=stop))
    assert main([name]) == 130
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"python -m frog_cuda {name}: interrupted") and err.count("\n") == 1
    assert ("--resume goes on" in err) == (name in RESUMED)


@pytest.mark.parametrize("name", COMMANDS)
def test_an_error_shows_the_usage_of_the_command(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(args: object) -> None:
        raise UsageError("--seed is 7")

    monkeypatch.setitem(COMMANDS, name, dataclasses.replace(COMMANDS[name], run=refuse))
    with pytest.raises(SystemExit) as stopped:
        main([name])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"usage: python -m frog_cuda {name} [-h]")
    assert err.endswith(f"python -m frog_cuda {name}: error: --seed is 7\n")


@pytest.mark.parametrize(
    "command", ["functions --max-n 8", "lr-search --width 64 --trials 99", "lr-search --width 64 --trials 99 --jobs 2"]
)
def test_ctrl_c(command: str, tmp_path: Path) -> None:
    """Of a terminal: every process of the command gets it."""
    began = {"functions": "results/functions/functions.json", "lr-search": "lr_search.journal"}[command.split()[0]]
    process = subprocess.Popen(
        [sys.executable, "-m", "frog_cuda", *command.split()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        until = time.monotonic() + 120
        while not (tmp_path / began).exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(8 if "--jobs" in command else 1)  # until processes of its own have begun to search
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err and f"python -m frog_cuda {command.split()[0]}: interrupted; " in err, err
    assert out == ""


def test_processes_of_a_search_leave_ctrl_c_to_the_first() -> None:
    before = signal.getsignal(signal.SIGINT)
    with lr_search._pool(1) as pool:
        assert pool.apply(signal.getsignal, (signal.SIGINT,)) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) == before


def test_help_of_steps_is_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for name in ("functions", "angles"):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        shown[name] = " ".join(capsys.readouterr().out.split())
    assert "(default: 1000, Rosenbrock 25000; with --quick a tenth)" in shown["functions"]
    assert "(default: 1000, with --quick 100)" in shown["angles"] and "Rosenbrock" not in shown["angles"]


@pytest.mark.parametrize("how", [["-m", "frog_cuda"], ["-mfrog_cuda"], ["-X", "utf8", "-m", "frog_cuda"]])
def test_a_library_that_does_not_load_is_one_line(how: list[str]) -> None:
    environment = os.environ | {"FROG_CUDA_SIMD": "foo"}
    command = [sys.executable, *how, "--help"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("python -m frog_cuda: FROG_CUDA_SIMD is 'foo'; this build on this machine accepts ")
    assert done.stderr.count("\n") == 1


def test_an_import_still_raises() -> None:
    """Of code that another module of the command line runs."""
    environment = os.environ | {"FROG_CUDA_SIMD": "foo"}
    script = "import runpy, sys; sys.argv = ['-m']; import frog_cuda"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("ValueError: FROG_CUDA_SIMD is 'foo'")
