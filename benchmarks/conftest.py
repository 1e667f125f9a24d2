"""Options of the benchmarks, and the two fixtures that time a thing beside what it is compared with."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # frog_cuda as it lies here, installed or not

import torch
from report_tables import circumstances

QUICK_SECONDS, SECONDS = 0.25, 1.5  # spent on one case and on what it is compared with
IDLE_SECONDS = 0.2  # in which threads that wait for work actively give up


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("frog_cuda")
    group.addoption("--models", default="fc256", help="names of models, separated by commas")
    group.addoption("--k", default="1,2,4,16", help="numbers of tangents, separated by commas")
    group.addoption("--lengths", default="512,1024,2048", help="lengths of sequences for attention, separated by commas")
    group.addoption("--quick", action="store_true", help="fewer rounds")
    group.addoption("--rounds", type=int, help="so many rounds of each case, instead of as many as fit its time")
    group.addoption("--deadline", type=float, help="time.time() after which no case begins")
    group.addoption("--records", type=Path, help="file that gets every record as a line of JSON")


def pytest_runtest_setup(item: pytest.Item) -> None:
    deadline = item.config.getoption("--deadline")
    if deadline is not None and time.time() > deadline:
        pytest.skip("no time left")


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


@pytest.fixture(scope="session")
def seconds(request: pytest.FixtureRequest) -> float:
    return QUICK_SECONDS if request.config.getoption("--quick") else SECONDS


@pytest.fixture
def single_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


Compare = Callable[..., None]
Times = Callable[..., dict[str, Any]]
Keep = Callable[..., None]


@pytest.fixture
def keep(request: pytest.FixtureRequest) -> Keep:
    """``keep(**record)``: a line of JSON with what was measured and when; what a process wrote stays if it dies."""
    file = request.config.getoption("--records")

    def write(**record: Any) -> None:
        if file is not None:
            with file.open("a") as lines:
                lines.write(json.dumps({**record, **circumstances()}) + "\n")

    return write


@pytest.fixture
def times(request: pytest.FixtureRequest, benchmark: Any, seconds: float) -> Times:
    """``times(fn, against)``: times both in turns, so that what else the machine does cancels out.

    ``fn`` is what pytest-benchmark reports; ``against`` runs in the set-up of every round. Calls shorter than a millisecond are
    repeated within a round. Returns the median times of one call and the median of the rounds' ratios.

    ``in_turns=False``: first all rounds of one, then all of the other, and the ratio of the medians, for what keeps threads of
    its own that get in the way of PyTorch's.
    """

    def run(fn: Callable[[], Any], against: Callable[[], Any], *, min_rounds: int = 3, in_turns: bool = True) -> dict[str, Any]:
        fixed = request.config.getoption("--rounds")
        inner = [max(1, int(1e-3 / _once(f))) for f in (fn, against)]
        # once more, now that nothing is cold
        cost = sum(_once(f) * n for f, n in zip((fn, against), inner))
        rounds = fixed or min(200, max(min_rounds, int(seconds / cost)))
        others: list[float] = []

        def setup() -> None:
            start = time.perf_counter()
            for _ in range(inner[1]):
                against()
            others.append((time.perf_counter() - start) / inner[1])

        def body() -> None:
            for _ in range(inner[0]):
                fn()

        benchmark.pedantic(body, setup=setup if in_turns else None, rounds=rounds, iterations=1, warmup_rounds=1)
        own = [t / inner[0] for t in benchmark.stats.stats.data]
        if not in_turns:
            time.sleep(IDLE_SECONDS)
            for _ in range(rounds + 1):
                setup()
        others = others[-len(own) :]  # without the warm-up
        ratios = [a / b for a, b in zip(own, others, strict=True)]
        medians = statistics.median(own), statistics.median(others)
        return {
            "time": medians[0],
            "against": medians[1],
            "ratio": statistics.median(ratios) if in_turns else medians[0] / medians[1],
            "rounds": len(own),
        }

    return run


@pytest.fixture
def compare(times: Times, keep: Keep) -> Compare:
    """``compare(fn, against, **extra)``: times both in turns and keeps the record."""

    def run(fn: Callable[[], Any], against: Callable[[], Any], *, min_rounds: int = 3, **extra: Any) -> None:
        keep(**extra, **times(fn, against, min_rounds=min_rounds))

    return run


def _once(fn: Callable[[], Any]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start
