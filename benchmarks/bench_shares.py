"""What Gram matrix, projection and combination cost within a step of a fully-connected net, and how Gram grows with k."""

from __future__ import annotations

import functools

import floors
import pytest
import torch
from cases import Activity, ForwardGradient, WeightLowRank, WeightNormal, WeightRademacher
from conftest import Compare
from problems import Problem

import frog_cuda as frog

SHARE_K = 16
GRAM_K = (4, 16, 64, 256)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", [n for n in metafunc.config.getoption("--models").split(",") if n.startswith("fc")])


@functools.lru_cache(maxsize=1)
def same_problem(name: str) -> Problem:
    return Problem(name)


@pytest.mark.parametrize("method", [WeightNormal, WeightRademacher, WeightLowRank], ids=lambda m: m.name)
@pytest.mark.parametrize("part", ["gram", "projection", "combination"])
def test_share_weight(name: str, part: str, method: type[ForwardGradient], compare: Compare) -> None:
    """The Gram matrix is formed where tangents are drawn: its cost is what a pass takes longer than one without it."""
    p = same_problem(name)
    step = method(p, SHARE_K)
    extra = {"table": "share", "method": method.name, "model": name, "k": SHARE_K, "part": part}
    if part == "gram":
        without = method(p, SHARE_K, aggregate="mean")
        step(), without()
        compare(step.derivatives, without.derivatives, **extra)
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
def test_share_activity(name: str, part: str, compare: Compare) -> None:
    """Combination: C^T V for every layer. The layers' own weight gradients from it are counted as part of the step."""
    p = same_problem(name)
    step = Activity(p, SHARE_K)
    step()
    last = step.fg.last
    assert last is not None and last.coefficients is not None
    c = last.coefficients.float()
    tangents = [torch.randn(SHARE_K, len(b)) for n, b in p.parameters.items() if n.endswith("bias")]
    if part == "gram":
        body = lambda: [frog.ops.gram(v) for v in tangents]  # noqa: E731
    elif part == "projection":
        body = _projection(step)
    else:
        body = lambda: [c.T @ v for v in tangents]  # noqa: E731
    compare(body, step, table="share", method=step.name, model=name, k=SHARE_K, part=part)
    step.check()


def _projection(step: ForwardGradient):
    last = step.fg.last
    assert last is not None
    gram, d = last.gram, last.directional_derivatives.reshape(SHARE_K, -1)
    return lambda: frog.ops.cholesky_project(gram, d)


@pytest.mark.parametrize("k", GRAM_K, ids="k{}".format)
def test_gram(name: str, k: int, compare: Compare) -> None:
    """Of k drawn normal tangents: a step with the Gram matrix beside one without, the mean."""
    p = same_problem(name)
    step, without = WeightNormal(p, k), WeightNormal(p, k, aggregate="mean")
    pairs = k * (k + 1) * p.n  # multiplications and additions of one triangle
    flops = pairs + floors.floor("weight, normal", floors.products(p), k).flops
    compare(step, without, table="gram", model=name, k=k, n=p.n, floor=pairs / flops)
    step.check()
