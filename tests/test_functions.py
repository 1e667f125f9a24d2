"""Descent on closed-form functions: against the library's own estimates one by one, repeated numbers, and as a command."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch

import frog_cuda as frog
from frog_cuda.__main__ import main
from frog_cuda.experiments import UsageError, functions
from frog_cuda.experiments.descent import FUNCTIONS, Approach, Function, Outcome, Tangents, descend
from frog_cuda.experiments.functions import APPROACHES, best_rates, by_seed, case
from frog_cuda.experiments.rates import SHIPPED, RateTable

F64 = torch.float64
TRUE, MEAN, ORTHOGONAL = Approach(None, 0), Approach("mean", 4), Approach("orthogonal", 4)


def one_by_one(name: str, n: int, approach: Approach, seed: int, rate: float, steps: int, sampler: str) -> list[float]:
    """The values along one run, step by step through the public function."""
    function, generator = FUNCTIONS[name], torch.Generator().manual_seed(seed)
    x, values = function.start(n).double(), []
    for step in range(steps):
        tangents = "normal" if approach.angle is None else frog.tangents.Cone(approach.angle)
        if sampler == "torch":
            tangents = torch.randn(approach.k, n, generator=generator).double()
        value, estimate = frog.forward_gradient(
            lambda x: function.values(x.unsqueeze(0)).squeeze(0),
            x,
            k=approach.k,
            tangents=tangents,
            aggregate=approach.aggregate,
            seed=seed,
            step=step,
        )
        values.append(value.item())
        x = x - rate * estimate
    return [*values, function.values(x.unsqueeze(0)).item()]


@pytest.mark.parametrize("sampler", ["frog", "torch"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_runs_together_are_what_each_is_alone(name: str, sampler: str) -> None:
    runs = [(a, seed, rate) for a in (MEAN, ORTHOGONAL) for seed in (3, 4) for rate in (1e-4, 2e-4)]
    outcomes = descend(FUNCTIONS[name], 6, runs, sampler=sampler, steps=8, dtype=F64)
    for (approach, seed, rate), outcome in zip(runs, outcomes, strict=True):
        values = one_by_one(name, 6, approach, seed, rate, 8, sampler)
        assert outcome.steps == 8 and outcome.ended == "steps"
        assert outcome.last == pytest.approx(values[-1], rel=1e-9) and outcome.best == pytest.approx(min(values), rel=1e-9)


def test_cones_are_those_of_the_library() -> None:
    approach = Approach("mean", 4, 30.0)
    (outcome,) = descend(FUNCTIONS["sphere"], 6, [(approach, 2, 0.1)], steps=5, dtype=F64)
    assert outcome.last == pytest.approx(one_by_one("sphere", 6, approach, 2, 0.1, 5, "frog")[-1], rel=1e-9)
    v = Tangents("torch", [5], 4, 20, F64, angle=30.0).draw([5], 0)[0]
    assert (v[1:] @ v[0] - math.cos(math.radians(30))).abs().max() < 1e-12 and (v.norm(dim=1) - 1).abs().max() < 1e-12


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("approach", [Approach("mean", 1), MEAN, ORTHOGONAL])
def test_forward_equals_simulated(name: str, approach: Approach) -> None:
    """Over a hundred steps, in float64."""
    rate = 1e-4 if name == "rosenbrock" else 0.01
    forward, simulated = (
        descend(FUNCTIONS[name], 8, [(approach, 0, rate)], steps=100, simulate=simulate, dtype=F64)[0]
        for simulate in (False, True)
    )
    assert forward.last == pytest.approx(simulated.last, rel=1e-9) and forward.steps == simulated.steps


def test_true_gradient() -> None:
    (outcome,) = descend(FUNCTIONS["sphere"], 5, [(TRUE, 0, 0.1)], steps=10, dtype=F64)
    assert outcome.last == pytest.approx(5 * 0.8**20, rel=1e-12)
    x = torch.linspace(-1, 1, 7, dtype=F64).unsqueeze(0)
    expected = sum(100 * (x[0, i + 1] - x[0, i] ** 2) ** 2 + (1 - x[0, i]) ** 2 for i in range(6))
    assert FUNCTIONS["rosenbrock"].values(x).item() == pytest.approx(expected.item(), rel=1e-12)
    lowest = FUNCTIONS["styblinski-tang"]
    assert lowest.values(torch.full((1, 3), -2.903534027771177, dtype=F64)).item() == pytest.approx(
        3 * lowest.minimum, rel=1e-12
    )
    starts = {name: f.start(3).tolist() for name, f in FUNCTIONS.items()}
    assert starts == {"sphere": [-1, -1, -1], "rosenbrock": [-1, 0, 0], "styblinski-tang": [0, 0, 0]}


def test_enough_tangents_descend_like_the_true_gradient() -> None:
    (true,) = descend(FUNCTIONS["rosenbrock"], 4, [(TRUE, 0, 0.001)], steps=200, dtype=F64)
    for approach in (Approach("orthogonal", 4), Approach("orthogonal", 9)):
        (outcome,) = descend(FUNCTIONS["rosenbrock"], 4, [(approach, 0, 0.001)], steps=200, dtype=F64)
        assert outcome.last == pytest.approx(true.last, rel=1e-6)


def test_ends() -> None:
    """Each run ends by itself, and the others go on as if it were not there."""
    runs = [(MEAN, 0, 1e6), (MEAN, 1, 0.0), (MEAN, 0, 0.01)]
    diverged, stale, going = descend(FUNCTIONS["styblinski-tang"], 4, runs, steps=70)
    assert diverged.ended == "diverged" and diverged.steps < 10 and not math.isfinite(diverged.last)
    assert math.isfinite(diverged.best)
    assert stale.ended == "no improvement" and stale.steps == 50 and stale.last == stale.best == 0
    assert going == descend(FUNCTIONS["styblinski-tang"], 4, [runs[2]], steps=70)[0] and going.steps == 70
    with pytest.raises(ValueError, match="expected one pair for all"):
        descend(FUNCTIONS["sphere"], 4, [(MEAN, 0, 0.1), (TRUE, 0, 0.1)])


@pytest.mark.parametrize(
    ("name", "n", "approach", "rate", "last"),
    [
        ("sphere", 1024, Approach("orthogonal", 16), 0.4863679205279614, [1.99694e-4, 1.45198e-4]),
        ("sphere", 64, MEAN, 0.0352960753296516, [1.28308e-23, 1.89378e-23]),
        ("styblinski-tang", 256, Approach("mean", 16), 0.0003912735570754, [-9951.93, -9847.15]),
        ("styblinski-tang", 16, Approach("orthogonal", 2), 0.0100295868982821, [-626.659, -612.522]),
    ],
)
def test_runs_of_the_paper(name: str, n: int, approach: Approach, rate: float, last: list[float]) -> None:
    """Where the authors' program ends, run with torch 2.13.0 and the rates that they publish, from seeds 0 and 1."""
    outcomes = descend(FUNCTIONS[name], n, [(approach, seed, rate) for seed in (0, 1)], sampler="torch")
    assert [o.last for o in outcomes] == pytest.approx(last, rel=1e-3)


# ---- learning rates


def test_search_leaves_out_rates_that_diverge_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The higher the better, as far as a fifth of the steps can tell."""
    limit = 0.4

    def pretended(function: Function, n: int, runs: list[tuple[Approach, int, float]], *, steps: int) -> list[Outcome]:
        ended = ["diverged" if steps > 5000 and rate > limit or rate > 9 else "steps" for _, _, rate in runs]
        return [Outcome(-rate, -rate, steps, end) for (_, _, rate), end in zip(runs, ended)]

    monkeypatch.setattr(functions, "descend", pretended)
    assert best_rates(FUNCTIONS["sphere"], 3, [TRUE], steps=5000)[TRUE] == 8
    assert best_rates(FUNCTIONS["sphere"], 3, [TRUE], steps=5001)[TRUE] == pytest.approx(0.3536, rel=1e-3)
    limit = 0.0
    with pytest.raises(RuntimeError, match="sphere n=3 true: with every rate down to .* a run diverges"):
        best_rates(FUNCTIONS["sphere"], 3, [TRUE], steps=5001)


def test_search_finds_the_best_rate() -> None:
    """Of the sphere under its true gradient: 1/2 ends in one step. The grid has it."""
    assert best_rates(FUNCTIONS["sphere"], 3, [TRUE], steps=2)[TRUE] == 0.5
    approach = Approach("orthogonal", 2)
    assert best_rates(FUNCTIONS["sphere"], 64, [approach], steps=60)[approach] == pytest.approx(0.5, rel=0.5)


def test_search_moves_its_grid() -> None:
    assert best_rates(FUNCTIONS["sphere"], 3, [TRUE], steps=2, grid=1)[TRUE] < 1
    far = FUNCTIONS["sphere"].__class__("s", "S", FUNCTIONS["sphere"].values, FUNCTIONS["sphere"].start, 2, 0.05)
    assert best_rates(far, 3, [TRUE], grid=4)[TRUE] > 0.2


def test_shipped_table_has_every_rate() -> None:
    table = RateTable.read()
    for name in FUNCTIONS:
        for n in (1, 64, 1024):
            for approach in APPROACHES:
                assert 1e-7 < table.rate("functions", case(name, n, approach)) <= 2


def test_tables(tmp_path: Path) -> None:
    table = RateTable({"functions": {"a": 0.1}})
    table.set("train", "b", 1)
    table.write(tmp_path / "t.json")
    again = RateTable.read(tmp_path / "t.json")
    assert again.rates == {"functions": {"a": 0.1}, "train": {"b": 1.0}} and again.rate("train", "b") == 1
    with pytest.raises(UsageError, match=r"t.json' has no rate for 'train', 'c'; it has 1 cases"):
        again.rate("train", "c")
    with pytest.raises(UsageError, match="is 0; expected a number > 0"):
        table.set("train", "b", 0)
    for text, message in [
        ("[1]", "holds a list"),
        ('{"a": 1}', "'a' holds a int"),
        ('{"a": {"b": "x"}}', "is 'x'; expected a number"),
        ('{"a": {"b": NaN}}', "is nan; expected a number"),
        ("{", "is not JSON"),
    ]:
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UsageError, match=message):
            RateTable.read(tmp_path / "bad.json")
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        RateTable.read(tmp_path / "none.json")


def test_tables_of_the_authors(tmp_path: Path) -> None:
    path = tmp_path / "math.csv"
    lines = [
        "function,n,gradient_approach,k,optimizer,lr",
        "sphere,64,bp,,B,0.25",
        "sphere,64,fg-mean,1.0,F,0.125",
        'sphere,64,frog,4.0,"F(k=4)",0.5',
        'styblinski-tang,64,fg-mean,16,"F(k=16,sampler=specific_angle_15)",0.75',
    ]
    path.write_text("\n".join(lines))
    assert RateTable.read(path).rates == {
        "functions": {"sphere n=64 true": 0.25, "sphere n=64 k=1": 0.125, "sphere n=64 orthogonal k=4": 0.5},
        "angles": {"styblinski-tang n=64 mean k=16 angle=15": 0.75},
    }
    for change, message in [
        (("bp", "sgd"), "line 2: gradient_approach is 'sgd'"),
        (("0.25", "?"), "line 2"),
        (("lr", "rate"), "no 'lr' column"),
    ]:
        path.write_text("\n".join(lines[:3]).replace(*change))
        with pytest.raises(UsageError, match=message):
            RateTable.read(path)
    for binary in (b"\x89PNG\r\n\xff", b"function,n\nsphere,\0", b'function,n\n"' + b"x" * 200_000):
        path.write_bytes(binary)
        with pytest.raises(UsageError, match="math.csv'( is not CSV|, line 2)"):
            RateTable.read(path)


# ---- the command


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["functions", "--seeds", "2", "--max-n", "2", "--max-steps", "20", "--output", str(tmp_path / "a")]
    assert main(given) == 0
    out, err = capsys.readouterr()
    assert err == "" and "functions.png" in out
    content = json.loads((tmp_path / "a" / "functions.json").read_text())
    assert content["complete"] and len(content["rows"]) == 3 * 2 * (1 + 7 * 2)
    with open(tmp_path / "a" / "functions.csv") as file:
        assert [float(row["best"]) for row in csv.DictReader(file)] == [row["best"] for row in content["rows"]]
    assert (tmp_path / "a" / "functions.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "a" / "rosenbrock.md").read_text()
    assert "| 2 | orthogonal k=16 |" in page and "| seed 0 | seed 1 | mean |" in page
    # Simulated, in float64, the same runs
    best = {}
    for flag in ("--simulate", "--resume"):
        assert main([*given[:-1], str(tmp_path / flag), "--dtype", "float64", flag]) == 0
        best[flag] = [row["best"] for row in json.loads((tmp_path / flag / "functions.json").read_text())["rows"]]
    assert best["--simulate"] == pytest.approx(best["--resume"], rel=1e-6, abs=1e-20)


def test_other_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A search writes a table that the command takes; a case that is missing is an error before anything runs."""
    path = tmp_path / "rates.json"
    common = ["functions", "--function", "sphere", "--max-n", "2", "--max-steps", "5"]
    assert main([*common, "--search", str(path)]) == 0
    rates = RateTable.read(path).rates["functions"]
    assert set(rates) == {case("sphere", n, a) for n in (1, 2) for a in APPROACHES}
    assert main([*common, "--lr-table", str(path), "--seeds", "1", "--output", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out" / "functions.json").read_text())["rows"]
    assert all(row["learning_rate"] == rates[f"sphere n={row['n']} {row['approach']}"] for row in rows)
    assert not (tmp_path / "out" / "rosenbrock.md").exists()
    with pytest.raises(SystemExit):
        main(["functions", "--max-n", "1", "--lr-table", str(path), "--output", str(tmp_path / "none")])
    assert "has no rate for 'functions', 'rosenbrock n=1 true'" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    with pytest.raises(SystemExit):
        main([*common, "--search", str(tmp_path / "no" / "folder.json")])
    assert "cannot be written: No such file" in capsys.readouterr().err


def test_table_by_seed() -> None:
    assert by_seed([]) == ""
    rows = [{"n": 1, "approach": "true", "seed": None, "best": 0.5}]
    rows += [{"n": 1, "approach": "k=1", "seed": s, "best": b} for s, b in ((0, 1.0), (1, None))]
    assert by_seed(rows).split("\n")[2:] == ["| 1 | true | 5.00e-01 | 5.00e-01 | 5.00e-01 |", "| 1 | k=1 | 1.00e+00 | - | - |"]
    assert functions.summary([{"function": "f", **rows[0]}]).endswith("5.000e-01")


def test_the_table_is_part_of_the_package() -> None:
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert SHIPPED.exists() and f'"experiments/{SHIPPED.name}"' in text
