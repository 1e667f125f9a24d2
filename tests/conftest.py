"""What pytest prints besides its own summary."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Processes that share the cores (``-n``) take their part of them, rather than all."""
    worker = getattr(config, "workerinput", None)
    if worker is not None:
        threads = max(1, torch.get_num_threads() // worker["workercount"])
        torch.set_num_threads(threads)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # of processes that tests start
        # A pytest that a test starts is no worker: pytest-benchmark would measure nothing there
        for name in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
            del os.environ[name]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``cuda`` run where there is a GPU; FROG_CUDA_NEEDS_GPU=1 makes it an error that there is none."""
    if torch.cuda.is_available():
        return
    if os.environ.get("FROG_CUDA_NEEDS_GPU") == "1":
        raise pytest.UsageError("FROG_CUDA_NEEDS_GPU is 1, but PyTorch finds no GPU")
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if item.get_closest_marker("cuda") is not None:
            item.add_marker(skip)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Kernels that several files of tests will run on the host are compiled while earlier tests run."""
    here = [item.path.stem for item in session.items if item.get_closest_marker("cuda") is None]
    stems = {stem.removeprefix("test_cuda_") for stem in here if stem.startswith("test_cuda_")}
    first = getattr(session.config, "workerinput", {"workerid": "gw0"})["workerid"] == "gw0"
    if first and len(stems) > 1 and not session.config.option.collectonly:
        from cuda_on_cpu.client import build_ahead

        build_ahead(sorted(stems))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many operators of PyTorch's database (tests/test_op_db.py) were compared, and equal."""

    def count(outcome: str, test: str) -> int:
        return sum(f"test_op_db.py::{test}[" in report.nodeid for report in terminalreporter.stats.get(outcome, []))

    for test, text in (
        ("test_equals_forward_mode", "operators equal torch.func.jvp"),
        ("test_without_forward_mode", "operators without PyTorch's forward mode are right, or name themselves in an error"),
    ):
        passed, failed, left_out = (count(outcome, test) for outcome in ("passed", "failed", "xfailed"))
        if passed + failed:
            terminalreporter.write_line(f"op_db: {passed} of {passed + failed} {text}; {left_out} left out, see EXCLUDED")
    if any("test_op_db.py" in report.nodeid for report in terminalreporter.stats.get("skipped", [])):
        terminalreporter.write_line("op_db: not run, because expecttest is missing; make test installs it")
