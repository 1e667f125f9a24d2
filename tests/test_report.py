"""The page of the reproduction: what it says comes from the files of results."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from frog_cuda.__main__ import main
from frog_cuda.experiments import UsageError, report
from frog_cuda.experiments.findings import Cell, Findings, Model, Table, read
from frog_cuda.experiments.rates import SET_BY_HAND, RateTable
from frog_cuda.experiments.statements import QUESTIONS, STATEMENTS, Check, reached

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "results" / "paper"
NOTHING = Findings(None, None, None, None, ())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of all commands, of the least size."""
    folder = tmp_path_factory.mktemp("results")
    for command in (
        "approximation --max-k 4 --max-n 8 --seeds 20",
        "functions --max-n 2 --max-steps 20 --seeds 2",
        "angles --angle 15 --angle 90 --samples 5 --seeds 2 --max-steps 5",
        "train --width 8 --epochs 1 --lr 0.1 --gradient bp,forward --k 1,2 --aggregate mean --seeds 0,1",
        "train --width 8 --epochs 1 --lr 0.1 --k 2 --seeds 0",
        "train --width 8 --epochs 1 --lr 0.1 --k 2 --seeds 0 --perturb weight",
    ):
        assert main([*command.split(), "--output", str(folder / command.split()[0])]) == 0
    return folder


def statement(name: str) -> Any:
    (found,) = (s for s in STATEMENTS if s.name == name)
    return found


# ---- checks


def quality(**cosines: list[float]) -> Findings:
    """Cosines by approach for k = 1, 2, 4 in 8 dimensions."""
    rows = [
        {"approach": name, "k": 2**i, "n": 8, "samples": 100, "cosine": c, "cosine_std": 0.1, "cosine_closed_form": c}
        for name, values in cosines.items()
        for i, c in enumerate(values)
    ]
    rows = [{**row, "norm_ratio": row["cosine"] if row["approach"] == "orthogonal" else 2.0} for row in rows]
    return dataclasses.replace(NOTHING, approximation=Table("", {}, {}, True, rows))


def test_approximation() -> None:
    good = quality(mean=[0.2, 0.3, 0.4], orthogonal=[0.2, 0.35, 0.5])
    for name in ("A1", "A2", "A4", "A5", "A6"):
        assert statement(name).check(good).verdict == "holds", name
    assert statement("A3").check(good) is None, "k >= n is not among the results"
    for cosine, verdict in ((1.0, "holds"), (0.999, "does not hold")):
        many = quality(orthogonal=[0.5, cosine, cosine])
        rows = [{**row, "n": 2} for row in many.approximation.rows]  # type: ignore[union-attr]
        many = dataclasses.replace(many, approximation=Table("", {}, {}, True, rows))
        assert statement("A3").check(many).verdict == verdict and statement("A3").check(many).cases == 2
    bad = quality(mean=[0.2, 0.3, 0.25], orthogonal=[0.2, 0.41, 0.24])
    check = statement("A1").check(bad)
    assert (check.held, check.cases) == (2, 4) and check.verdict == "holds in 2 of 4"
    assert check.but == ("mean, n = 8, k = 2 and 4", "orthogonal, n = 8, k = 2 and 4")
    assert statement("A2").check(bad).but == ("n = 8, k = 4",)
    assert statement("A6").check(bad).but == ("n = 8, k = 1 and 2",)
    rows = [{**row, "norm_ratio": 1.5, "cosine_closed_form": row["cosine"] + 0.05} for row in bad.approximation.rows]  # type: ignore[union-attr]
    worse = dataclasses.replace(bad, approximation=Table("", {}, {}, True, rows))
    for name in ("A4", "A5"):  # 4 standard errors are 0.04
        assert statement(name).check(worse).verdict == "does not hold", name


def descent(function: str, n: int, **bests: float) -> list[dict[str, Any]]:
    names = {name: name.replace("_", " ").replace(" k", " k=").replace("one", "k=1") for name in bests}
    return [
        {"function": function, "n": n, "approach": names[name], "seed": 0, "best": best, "ended": "steps"}
        for name, best in bests.items()
    ]


def test_functions() -> None:
    rows = descent("sphere", 8, true=0.0, one=4.0, mean_k2=3.0, orthogonal_k2=2.0, mean_k4=3.5, orthogonal_k4=1.0)
    rows += descent("sphere", 2, true=0.0, one=0.5, orthogonal_k2=1e-9, mean_k2=1e-12)
    found = dataclasses.replace(NOTHING, functions=Table("", {}, {}, True, rows))
    check = statement("F1").check(found)
    assert check.but == ("Sphere, n = 8, mean k=2 (3) and mean k=4 (3.5)",) and check.cases == 6
    assert statement("F2").check(found).verdict == "holds", "what is at the minimum is not compared"
    assert statement("F2").check(found).cases == 2
    assert statement("F3").check(found).verdict == "holds" and statement("F3").check(found).cases == 1
    rows[-2]["best"] = 0.1
    assert statement("F3").check(found).verdict == "does not hold"
    rows[1]["ended"] = "diverged"
    assert statement("F1").check(found).cases == 4, "a case with a run that diverged is not compared"
    assert reached("styblinski-tang", 64, -39.16616 * 64) and not reached("styblinski-tang", 64, -39.1 * 64)
    falls = descent("sphere", 2, one=0.2) + descent("sphere", 4, one=0.8) + descent("sphere", 8, one=1.2)
    check = statement("F4").check(dataclasses.replace(NOTHING, functions=Table("", {}, {}, True, falls)))
    assert check.held == 1 and check.but == ("Sphere, n = 4 and 8",)


def test_angles() -> None:
    values = {("mean", 15): 0.1, ("mean", 90): 0.2, ("orthogonal", 15): 0.3, ("orthogonal", 90): 0.3}
    rows = [{"approach": a, "k": 4, "angle": angle, "cosine": c} for (a, angle), c in values.items()]
    found = dataclasses.replace(NOTHING, angles=Table("", {}, {}, True, rows))
    assert statement("C1").check(found).verdict == statement("C2").check(found).verdict == "holds"
    rows[0]["cosine"], rows[2]["cosine"] = 0.25, 0.29
    assert statement("C1").check(found).verdict == statement("C2").check(found).verdict == "does not hold"
    fallen = [{"approach": f"mean k=4 angle={a}", "k": 4, "angle": a, "best": b} for a, b in ((15, -10.0), (90, -20.0))]
    lower = dataclasses.replace(NOTHING, descent=Table("", {}, {}, True, fallen))
    assert statement("C2").check(lower).verdict == "holds", "lower values are better"


def network(
    name: str, errors: dict[str, float], status: str = "no improvement", most: int = 200, rates: dict[str, float] | None = None
) -> Model:
    """Two seeds each.

    Arguments:
        most: epochs.
        rates: by case.
    """
    cells = {}
    for approach, error in errors.items():
        epochs = [{"valid_loss": loss} for loss in (3.0, 1.0, 2.0)]
        case = f"digits {name} {approach}"
        settings = {"seed": 0, "lr": (rates or {}).get(case, 0.1), "epochs": most}
        run = {"case": case, "settings": settings, "status": status, "test_accuracy": 1 - error / 100, "epochs": epochs}
        cells[approach] = Cell((run, {**run, "settings": {**settings, "seed": 1}}))
    return Model("digits", name, cells)


def test_networks() -> None:
    errors = {"bp": 2.0, "mean k=1": 9.0, "mean k=4": 8.0, "orthogonal k=4": 7.0, "mean k=16": 6.0, "orthogonal k=16": 4.5}
    found = dataclasses.replace(NOTHING, models=(network("fc width=256", errors), network("vit width=8", errors)))
    for name in ("N1", "N2", "N3", "L1", "L2", "L3"):
        assert statement(name).check(found).verdict == "holds", name
    assert statement("N4").check(found) is None, "there is one width only"
    worse = {**errors, "mean k=16": 8.5, "orthogonal k=16": 9.0}
    found = dataclasses.replace(NOTHING, models=(network("fc width=256", errors), network("fc width=1024", worse)))
    assert statement("N1").check(found).but == tuple(f"fc width=1024, {a}, k = 4 and 16" for a in ("mean", "orthogonal"))
    assert statement("N2").check(found).but == ("fc width=1024, k = 16",)
    assert statement("N3").check(found).but == ("fc width=1024",)
    assert statement("N4").check(found).but == tuple(f"k = {k}, fc width=256 and fc width=1024" for k in (1, 4))
    assert statement("L1").check(found) is None
    better = dataclasses.replace(NOTHING, models=(network("vit width=8", {**errors, "orthogonal k=16": 1.0}),))
    assert statement("L3").check(better).verdict == "does not hold"


def test_what_is_not_compared_like_for_like() -> None:
    """The verdict says so where networks had other numbers of epochs, or rates that no search gave."""
    few = {"bp": 2.0, "mean k=1": 9.0, "orthogonal k=16": 4.5}
    many = {"bp": 2.0, "mean k=1": 9.5, "orthogonal k=16": 5.0}
    shipped = RateTable.read().rates["train"]

    def check(**options: Any) -> Check:
        models = (network("fc width=1024", few, rates=shipped), network("fc width=4096", many, **options))
        return statement("N4").check(dataclasses.replace(NOTHING, models=models))

    assert check().verdict == "holds" and check().caveat == ""
    for options in ({"most": 100, "status": "all epochs"}, {"rates": shipped}):
        found = check(**options)
        assert found.verdict == "holds, not like for like"
        epochs, cut, by_hand = (100, 4, 0) if "most" in options else (200, 0, 3)
        assert "fc width=1024, at most 200 epochs, which cut off 0 of 4 runs without backprop, and 0 of 3" in found.caveat
        assert f"fc width=4096, at most {epochs} epochs, which cut off {cut} of 4 runs without" in found.caveat
        assert f", and {by_hand} of 3 learning rates set by hand. A part" in found.caveat


def test_rates_set_by_hand_are_of_the_shipped_table() -> None:
    assert set(RateTable.read().rates["train"]) >= SET_BY_HAND
    page = (ROOT / "docs" / "reproduction.md").read_text().partition("Learning rate:")[2].partition("Epochs until")[0]
    rows = {row.split("|")[1].strip(): row.split("|")[2:-1] for row in page.splitlines() if row.startswith("| ")}
    marked = {name: sum("†" in cell for cell in cells) for name, cells in rows.items()}
    assert marked["fc width=256"] == 0 and marked["fc width=1024"] == 1 and marked["fc width=4096"] == 8
    assert marked["lenet5 own-tangents"] == 5 and marked["resnet18 width=8 own-tangents"] == 7
    assert page.count("† Set by hand") == 1


def test_cells() -> None:
    cell = network("fc width=8", {"bp": 2.0}).cells["bp"]
    early = {**cell.runs[0], "status": "diverged", "test_accuracy": None, "epochs": [{"valid_loss": None}]}
    ended = {**cell.runs[0], "status": "diverged", "test_accuracy": 0.9, "epochs": [{"valid_loss": 4.0}] * 2}
    cell = Cell((cell.runs[0], early, ended))
    assert cell.errors == pytest.approx([2.0, 10.0]) and cell.diverged == 2 and cell.error == pytest.approx(6.0)
    assert cell.points == [(pytest.approx(2.0), False), (pytest.approx(10.0), True)]
    assert Cell((cell.runs[0], ended)).curve == [3.5, 2.5, 2.5], "the lowest so far, and a run that ended keeps its own"
    assert Check(0, 2, "").verdict == "does not hold"


def test_own_tangents(small: Path, tmp_path: Path) -> None:
    """Their runs are no part of those with shared tangents; backprop stands beside both."""
    results = shutil.copytree(small, tmp_path / "results")

    def names() -> dict[str, list[str]]:
        return {m.name: list(m.cells) for m in read(results).models}

    assert names() == {"fc width=8": ["bp", "mean k=1", "mean k=2", "orthogonal k=2"]}
    for path in (results / "train").glob("*-mean-k2-*/result.json"):
        run = json.loads(path.read_text())
        path.write_text(json.dumps({**run, "case": f"{run['case']} own-tangents"}))
    own = {"fc width=8 own-tangents": ["bp", "mean k=2"]}
    assert names() == {"fc width=8": ["bp", "mean k=1", "orthogonal k=2"], **own}
    for path in (results / "train").glob("*-k*/result.json"):
        if not json.loads(path.read_text())["case"].endswith("own-tangents"):
            path.unlink()
    assert names() == own


# ---- the page


def test_command(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "docs" / "page.md"
    assert main(["report", "--results", str(small), "--output", str(output)]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "page.md" in out
    text = output.read_text()
    drawn = {f"page/{name}.png" for name in ("cosine", "norm_ratio", "functions", "angles", "errors", "curves")}
    assert set(re.findall(r"\]\((page/[^)]+)\)", text)) == drawn
    assert all((output.parent / name).read_bytes().startswith(b"\x89PNG") for name in drawn)
    found = read(small)
    for s in STATEMENTS:
        check = s.check(found)
        assert (
            f"| {s.name} | {s.section} | {s.source} | {s.text} | {'no results' if check is None else check.verdict} |" in text
        )
    # What the files say stands in the tables
    for path in (small / "train").glob("*-bp-*/result.json"):
        assert json.loads(path.read_text())["command"] in text
    runs = [json.loads((small / "train" / f"digits-fc-width8-bp-seed{s}" / "result.json").read_text()) for s in (0, 1)]
    accuracy = 50 * sum(run["test_accuracy"] for run in runs)
    (line,) = (row for row in text.splitlines() if row.startswith("| fc width=8 |") and "±" in row)
    assert f"| {accuracy:.1f} ± " in line and "2 seeds" in line
    rows = json.loads((small / "approximation" / "approximation.json").read_text())["rows"]
    (mean,) = (r for r in rows if (r["approach"], r["k"], r["n"]) == ("mean", 4, 8))
    assert re.search(rf"^\| 4 \| {mean['cosine']:.4f} \|", text, re.MULTILINE)
    assert "weight" not in line, "weight perturbation is no part of these experiments"
    assert "fc width=256, fc width=1024" in text.partition("## What is missing")[2]
    assert "Training on mnist:" in text


@pytest.mark.parametrize("part", ["approximation", "functions", "angles", "train"])
def test_missing_results_are_named(part: str, small: Path, tmp_path: Path) -> None:
    results = shutil.copytree(small, tmp_path / "results")
    shutil.rmtree(results / part)
    assert main(["report", "--results", str(results), "--output", str(tmp_path / "page.md")]) == 0
    text = (tmp_path / "page.md").read_text()
    assert f"**Missing:** no results in `{results}/{part}`" in text
    assert text.count("**Missing:**") == 1
    for name in re.findall(r"\]\((page/[^)]+)\)", text):
        assert (tmp_path / name).exists()


@pytest.mark.parametrize("complete", [[], ["angles"]], ids=["cosines too", "descent only"])
def test_an_interrupted_run_is_shown_as_far_as_it_went(complete: list[str], small: Path, tmp_path: Path) -> None:
    """Results end within the angles of the largest k."""
    results = shutil.copytree(small, tmp_path / "results")
    for name in ("angles", "angles_descent"):
        path = results / "angles" / f"{name}.json"
        content = json.loads(path.read_text())
        assert content["complete"] and {row["k"] for row in content["rows"]} == {4, 16, 64}
        if name not in complete:
            rows = [row for row in content["rows"] if row["k"] < 64 or row["angle"] == 15]
            path.write_text(json.dumps({**content, "complete": False, "rows": rows}))
    assert main(["report", "--results", str(results), "--output", str(tmp_path / "page.md")]) == 0
    section = (tmp_path / "page.md").read_text().partition("## 4.3")[2].partition("## 4.4")[0]
    assert section.count("The run is not complete") == 1
    figure = r"-?\d+"
    cosine = rf"{figure}\.\d{{3}}"
    cut = "-" if not complete else cosine
    for name in ("mean", "orthogonal"):
        assert re.search(rf"^\| {name}, k = 16 (\| {cosine}; {figure} ){{3}}\|$", section, re.MULTILINE)
        assert re.search(rf"^\| {name}, k = 64 \| {cosine}; {figure} (\| {cut}; - ){{2}}\|$", section, re.MULTILINE)


def test_the_workflow_of_the_readme(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands without --output, in an empty folder, and a report of them; other results are left alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "reproduction.md").write_text("shipped")
    shutil.copytree(SHIPPED / "angles", tmp_path / "results" / "paper" / "angles")
    with pytest.raises(SystemExit):
        main(["report"])
    assert "--results is 'results'; expected a folder with results of approximation, functions" in capsys.readouterr().err
    assert main("approximation --max-k 2 --max-n 2 --seeds 3".split()) == 0
    assert main("train --width 8 --epochs 1 --lr 0.1".split()) == 0
    assert main(["report"]) == 0
    assert "Page: results/report.md. Figures: results/report." in capsys.readouterr().out
    text = Path("results/report.md").read_text()
    assert "`python -m frog_cuda report` wrote this page" in text and "python -m frog_cuda train --width 8" in text
    assert "**Missing:** no results in `results/angles`" in text
    assert "`docs/experiments.md`" in text and not re.search(r"\]\(\w+\.md\)", text), "no links to what is not beside the page"
    assert all((tmp_path / "results" / name).exists() for name in re.findall(r"\]\(([^)]+)\)", text))
    assert Path("docs/reproduction.md").read_text() == "shipped"


def test_no_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(SystemExit):
            main(["report", "--results", str(folder), "--output", str(tmp_path / "page.md")])
        assert f"--results is '{folder}'; expected a folder with results of approximation" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    text = report.page(NOTHING, tmp_path, "page", command="report", beside_docs=True)
    assert text.count("**Missing:**") == 4 and text.count(" | no results |") == len(STATEMENTS)


def test_wrong_options(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["report", "--results", str(small), "--output", str(tmp_path / "page")])
    assert "expected a name with an ending, such as page.md" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        main(["report", "--results", str(small), "--output", str(tmp_path / "file" / "page.md")])
    assert "cannot be written: Not a directory" in capsys.readouterr().err
    for name in ("functions/functions.json", "train/run/result.json"):
        path = tmp_path / "results" / name
        path.parent.mkdir(parents=True)
        for content in ("{", "{}", "[]"):
            path.write_text(content)
            with pytest.raises(UsageError, match=f"{name} is not a file of results"):
                read(tmp_path / "results")
        path.unlink()


def test_every_question_has_statements() -> None:
    assert {s.question for s in STATEMENTS} == set(QUESTIONS) == {1, 2, 3, 4}
    assert len({s.name for s in STATEMENTS}) == len(STATEMENTS)


# ---- what is committed


def test_the_committed_page_is_of_the_committed_results() -> None:
    """The command that it and docs/experiments.md name writes it."""
    text = (ROOT / "docs" / "reproduction.md").read_text()
    command = "python -m frog_cuda report --results results/paper --output docs/reproduction.md"
    assert f"    {command}\n" in (ROOT / "docs" / "experiments.md").read_text()
    made = report.page(read(SHIPPED), SHIPPED.relative_to(ROOT), "reproduction", command=command, beside_docs=True)
    assert made == text


def test_committed_runs_are_complete_and_portable() -> None:
    found = read(SHIPPED)
    assert found.models
    for model in found.models:
        for name, cell in model.cells.items():
            assert not cell.unfinished, f"{model.name}, {name}"
            for run in cell.runs:
                assert not re.search(r"(?<!\S)/", run["command"]), run["command"]
    assert not list(SHIPPED.rglob("*.pt"))
