"""One gradient of the paper's nets: frog_cuda and what PyTorch offers, each timed in turns with backprop."""

from __future__ import annotations

import functools

import pytest
import torch
from cases import ALTERNATIVES, OURS, REFERENCES, Activity, Backprop, Method, Problem, WeightNormal, WeightRademacher, problem
from conftest import Compare, numbers

import frog_cuda as frog

SHARE_K = 16


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "width" in metafunc.fixturenames:
        metafunc.parametrize("width", numbers(metafunc.config.getoption("--widths")), ids="w{}".format)
    if "k" in metafunc.fixturenames:
        metafunc.parametrize("k", numbers(metafunc.config.getoption("--k")), ids="k{}".format)


@functools.lru_cache(maxsize=1)
def same_problem(width: int) -> Problem:
    return problem(width)


@pytest.mark.parametrize("method", [Backprop, *REFERENCES], ids=lambda m: m.name)
def test_reference(width: int, method: type[Method], compare: Compare) -> None:
    _run(method(same_problem(width)), compare)


@pytest.mark.parametrize("method", [*OURS, *ALTERNATIVES], ids=lambda m: m.name)
def test_gradient(width: int, k: int, method: type[Method], compare: Compare) -> None:
    _run(method(same_problem(width), k), compare)


def _run(method: Method, compare: Compare) -> None:
    p = method.problem
    compare(method, Backprop(p), table="gradient", method=method.name, width=p.width, k=method.k, n=p.n)
    method.check()


# ---- what Gram matrix, projection and combination cost within a step


@pytest.mark.parametrize("method", [WeightNormal, WeightRademacher], ids=lambda m: m.name)
@pytest.mark.parametrize("part", ["gram", "projection", "combination"])
def test_share_weight(width: int, part: str, method: type[WeightNormal], compare: Compare) -> None:
    """The Gram matrix is formed where tangents are drawn: its cost is what a pass takes longer than one without it."""
    p = same_problem(width)
    step = method(p, SHARE_K)
    extra = {"table": "share", "method": method.name, "width": width, "k": SHARE_K, "part": part}
    if part == "gram":
        without = method(p, SHARE_K, aggregate="mean")
        step(), without()
        compare(lambda: step.fg.derivatives(p.x, p.target), lambda: without.fg.derivatives(p.x, p.target), **extra)
    elif part == "projection":
        step()
        compare(_projection(step), step, **extra)
    else:
        step()

        def combination() -> None:
            p.model.zero_grad()
            step.fg.accumulate_()

        compare(combination, step, **extra)
    step.check()


@pytest.mark.parametrize("part", ["gram", "projection", "combination"])
def test_share_activity(width: int, part: str, compare: Compare) -> None:
    """Combination: C^T V for every layer. The layers' own weight gradients from it are counted as part of the step."""
    p = same_problem(width)
    step = Activity(p, SHARE_K)
    step()
    last = step.fg.last
    assert last is not None and last.coefficients is not None
    c = last.coefficients.float()
    tangents = [torch.randn(SHARE_K, m) for m in (width, width, 10)]
    if part == "gram":
        body = lambda: [frog.ops.gram(v) for v in tangents]  # noqa: E731
    elif part == "projection":
        body = _projection(step)
    else:
        body = lambda: [c.T @ v for v in tangents]  # noqa: E731
    compare(body, step, table="share", method=step.name, width=width, k=SHARE_K, part=part)
    step.check()


def _projection(step: WeightNormal | Activity):
    last = step.fg.last
    assert last is not None
    gram, d = last.gram, last.directional_derivatives.reshape(SHARE_K, -1)
    return lambda: frog.ops.cholesky_project(gram, d)
