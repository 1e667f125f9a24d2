"""How the cost of a gradient grows with tangents, batch, width, depth and sequence length; scaling.py fits the slopes."""

from __future__ import annotations

import functools

import floors
import pytest
from cases import OURS, Activity, Backprop, ForwardOnly, Method, WeightLowRank, WeightNormal
from conftest import Keep, Times
from problems import Problem
from scaling import AXES, QUICK, problem

CASES = [(axis, value) for axis, values in AXES.items() for value in values]


@functools.lru_cache(maxsize=1)
def same_problem(axis: str, value: int) -> tuple[Problem, floors.Products, int]:
    p, k = problem(axis, value)
    return p, floors.products(p), k


@pytest.mark.parametrize("axis, value", CASES, ids="{}".format)
@pytest.mark.parametrize("method", [Backprop, ForwardOnly, Activity, WeightNormal, WeightLowRank], ids=lambda m: m.name)
def test_scaling(axis: str, value: int, method: type[Method], times: Times, keep: Keep, request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--quick") and value not in QUICK[axis]:
        pytest.skip("not with --quick")
    if method in (Backprop, ForwardOnly) and axis == "k" and value > 1:
        pytest.skip("does not depend on k")
    p, products, k = same_problem(axis, value)
    case = method(p, k) if method in OURS else method(p)
    found = times(case, Backprop(p))
    case.check()
    flops = floors.floor(method.name, products, k).flops
    keep(table="scaling", axis=axis, value=value, method=method.name, k=k, n=p.n, flops=flops, **found)
