"""Forward gradients of ResNet18, a vision transformer and a GPT-like decoder, each timed in turns with backprop."""

from __future__ import annotations

import functools

import pytest
from conftest import Compare, numbers
from model_cases import DERIVATIVES, FORWARD, GRADIENT, GROUPS, LAYERS, LEAVES, WEIGHT, Problem

METHODS = [LEAVES, GROUPS, WEIGHT]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", metafunc.config.getoption("--models").split(","))
    if "k" in metafunc.fixturenames:
        metafunc.parametrize("k", numbers(metafunc.config.getoption("--model-k")), ids="k{}".format)


@functools.lru_cache(maxsize=1)
def same_problem(name: str) -> Problem:
    return Problem(name)


def test_plain(name: str, compare: Compare) -> None:
    """Backprop beside itself would always be 1: only the forward pass is measured."""
    p = same_problem(name)
    compare(p.forward_only, p.backprop, table="model", model=name, method=FORWARD, part="", k=0)


def test_layers_alone(name: str, k: int, compare: Compare) -> None:
    p = same_problem(name)
    compare(p.layers_alone(k), p.backprop, table="model", model=name, method=LAYERS, part="", k=k)


@pytest.mark.parametrize("part", [DERIVATIVES, GRADIENT])
@pytest.mark.parametrize("method", METHODS)
def test_model(name: str, method: str, k: int, part: str, compare: Compare) -> None:
    p = same_problem(name)
    if method not in p.methods():
        pytest.skip(f"{method}: not for {name}")
    step = p.forward_gradient(method, k)
    body = step if part == GRADIENT else step.derivatives
    compare(body, p.backprop, table="model", model=name, method=method, part=part, k=k)
    step.check()
