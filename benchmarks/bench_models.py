"""One gradient of each model by each method, timed in turns with backprop: time, FLOPs and cosine to the true gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import floors
import pytest
import torch
from alternatives import ALTERNATIVES, COMPILED, JaxGrad
from cases import (
    MORE,
    OURS,
    REFERENCES,
    Activity,
    Backprop,
    ForwardGradient,
    ForwardOnly,
    Method,
    Unsuitable,
    WeightNormal,
    cosine,
    layers_alone,
)
from conftest import Keep, Times, numbers
from problems import Problem

#: seconds that one call may take, and bytes that tangents may take
MOST_SECONDS, MOST_SECONDS_QUICK, MOST_BYTES = 15.0, 2.0, 1 << 30
#: calls whose cosine is averaged, and seconds for them
SAMPLES, SAMPLE_SECONDS, SAMPLE_SECONDS_QUICK = (2, 32), 2.0, 0.3
COMPILED_K = 4

methods = functools.partial(pytest.mark.parametrize, "method", ids=lambda m: m.name)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", metafunc.config.getoption("--models").split(","))
    if "k" in metafunc.fixturenames:
        metafunc.parametrize("k", sorted(numbers(metafunc.config.getoption("--k"))), ids="k{}".format)


@functools.lru_cache(maxsize=1)
def same_problem(name: str) -> Problem:
    return Problem(name)


@functools.lru_cache(maxsize=1)
def same_products(name: str) -> floors.Products:
    return floors.products(same_problem(name))


Measure = Callable[..., None]


@pytest.fixture
def measure(request: pytest.FixtureRequest, times: Times, keep: Keep) -> Measure:
    quick = request.config.getoption("--quick")
    most = MOST_SECONDS_QUICK if quick else MOST_SECONDS
    latest: dict[Any, tuple[int, float]] = request.config.stash.setdefault(LATEST, {})

    def run(name: str, kind: type[Method], k: int = 0) -> None:
        problem = same_problem(name)
        record = {"table": "gradient", "model": name, "method": kind.name, "part": "gradient", "k": k, "n": problem.n}
        known_k, known = latest.get((name, kind.name), (0, 0.0))
        predicted = known * k / known_k if known_k else 0.0
        reason = None
        if kind.stores_tangents and 4 * k * problem.n > MOST_BYTES:
            reason = f"k tangents would take {4 * k * problem.n / 2**30:.1f} GiB"
        elif predicted > most:
            reason = f"a call would take about {predicted:.0f} s"
        method = None
        try:
            if reason is None:
                method = kind(problem, k) if k else kind(problem)
                method()
        except Exception as error:
            # Of what is not this package's own, a reason is a result; everything of ours must work as it is
            if not isinstance(error, Unsuitable) and issubclass(kind, ForwardGradient) and kind not in COMPILED:
                raise
            reason = f"{type(error).__name__}: {str(error).strip() or repr(error)}".splitlines()[0][:200]
            reason = str(error) if isinstance(error, Unsuitable) else reason
        if reason is not None:
            keep(**record, reason=reason)
            pytest.skip(reason)
        assert method is not None
        found = times(method, Backprop(problem), in_turns=kind.in_turns) | {"in_turns": kind.in_turns}
        if k:
            latest[name, kind.name] = k, found["time"]
        if kind is not ForwardOnly:
            seconds = SAMPLE_SECONDS_QUICK if quick else SAMPLE_SECONDS
            found |= closeness(method, min(SAMPLES[1], max(SAMPLES[0], int(seconds / found["time"]))) if k else 1)
        closed = isinstance(method, ForwardGradient) or kind.name.startswith(("JAX", "torch.compile"))
        plain = kind.name.removeprefix("torch.compile, ")
        flops = floors.floor(plain, same_products(name), k).flops if closed else floors.counted(method)
        found |= {"flops": flops, "flops_from": "closed form" if closed else "torch.utils.flop_counter"}
        found["error"] = method.check()
        if hasattr(method, "derivative_error"):
            found["derivative_error"] = method.derivative_error
        keep(**record, **found)
        problem.restore()

    return run


LATEST = pytest.StashKey[dict[Any, tuple[int, float]]]()


def closeness(method: Method, samples: int) -> dict[str, Any]:
    """Mean cosine to the true gradient over calls that draw other tangents each, and its standard error."""
    true, seen = method.problem.true_gradients(), []
    for _ in range(samples):
        method()
        seen.append(cosine(method.gradients(), true))
    mean = sum(seen) / samples
    spread = (sum((c - mean) ** 2 for c in seen) / max(1, samples - 1) / samples) ** 0.5
    return {"cosine": mean, "cosine_error": spread, "cosine_samples": samples}


@methods([*REFERENCES, JaxGrad])
def test_reference(name: str, method: type[Method], measure: Measure) -> None:
    measure(name, method)


@methods([*OURS, *ALTERNATIVES])
def test_gradient(name: str, method: type[Method], k: int, measure: Measure) -> None:
    measure(name, method, k)


@methods(MORE)
def test_more(name: str, method: type[Method], k: int, measure: Measure, request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--quick"):
        pytest.skip("not with --quick")
    measure(name, method, k)


@pytest.fixture
def part(request: pytest.FixtureRequest, times: Times, keep: Keep) -> Callable[..., None]:
    def run(name: str, make: Callable[[Problem], Callable[[], Any]], **record: Any) -> None:
        if request.config.getoption("--quick") and name.startswith("fc"):
            pytest.skip("not with --quick")
        problem = same_problem(name)
        keep(table="gradient", model=name, n=problem.n, **record, **times(make(problem), Backprop(problem)))

    return run


def test_derivatives(name: str, k: int, part: Callable[..., None]) -> None:
    """Activity perturbation up to the coefficients, without the layers' own weight gradients."""
    part(name, lambda p: Activity(p, k).derivatives, method=Activity.name, part="derivatives", k=k)


def test_layers_alone(name: str, k: int, part: Callable[..., None]) -> None:
    part(name, lambda p: layers_alone(p, k), method="layers alone", part="", k=k)


def test_one_product(name: str, k: int, part: Callable[..., None]) -> None:
    """A square matrix product by the library with as many FLOPs as weight perturbation."""
    if not name.startswith("fc"):
        pytest.skip("other models' products are not one shape")
    side = round((floors.floor(WeightNormal.name, same_products(name), k).flops / 2) ** (1 / 3))
    a, b = torch.randn(2, side, side)
    part(name, lambda p: lambda: torch.mm(a, b), method=f"GEMM, {WeightNormal.name}", part="", k=k)


@methods(COMPILED)
def test_compiled(name: str, method: type[Method], measure: Measure) -> None:
    """Only with --compile: minutes. What torch.compile cannot do is kept with its reason."""
    measure(name, method, 0 if issubclass(method, Backprop) else COMPILED_K)
