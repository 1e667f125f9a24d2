"""The benchmarks run, check what they time, and report it; no time is asserted here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def record(method: str, k: int, ratio: float) -> dict:
    return {"table": "gradient", "method": method, "width": 8, "k": k, "n": 100, "time": ratio * 1e-3, "ratio": ratio}


def test_every_way_of_getting_a_gradient_is_right() -> None:
    import cases

    p = cases.problem(16)
    assert cases.Backprop(p).check() < 1e-5
    assert cases.ForwardOnly(p).check() < 1e-5
    for method in (*cases.OURS, *cases.ALTERNATIVES):
        for k in (1, 3):
            assert method(p, k).check() < 1e-4, method.name


@pytest.mark.parametrize("name", ["backprop", "weight, normal", "activity", "vmap(jvp)", "loop of forward_ad"])
def test_a_wrong_gradient_is_noticed(name: str) -> None:
    import cases

    class Wrong(cases.by_name(name)):
        def __call__(self) -> torch.Tensor:
            loss = super().__call__()
            self.problem.model[0].bias.grad.mul_(0.5)
            return loss

    with pytest.raises(cases.WrongResult, match=r"relative error .* bound"):
        Wrong(cases.problem(16), 2).check()


def test_a_missing_gradient_is_noticed() -> None:
    import cases

    assert cases.distance({}, {"w": torch.ones(1)}) != cases.distance({}, {"w": torch.ones(1)})  # NaN


def test_report_computes_ratios_and_holds_figures_against_targets() -> None:
    import report

    records = [record("backprop", 0, 1.0), record("weight, normal", 4, 2.0), record("vmap(jvp)", 4, 9.0)]
    assert report.ratio_to_vmap(records, records[1]) == 4.5
    text = report.gradient_table(records, [{"method": "backprop", "width": 8, "k": 0, "bytes": 3 << 20}], 8)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert [row[:4] for row in rows[2:]] == [
        ["backprop", "", "1", "1.00"],
        ["weight, normal", "4", "2", "2.00"],
        ["vmap(jvp)", "4", "9", "9.00"],
    ]
    assert rows[3][5] == "4.50" and rows[2][6] == "3.0"

    speed = report.Figure("speed", 5, True, lambda r: 4.5)
    cost = report.Figure("cost", 5, False, lambda r: 4.5)
    unknown = report.Figure("unknown", 5, False, lambda r: None)
    assert [f.line(records)["met"] for f in (speed, cost, unknown)] == [False, True, None]
    lines = report.figure_table([f.line(records) for f in (speed, cost, unknown)]).splitlines()
    assert ["missed" in lines[2], "| met" in lines[3], "not measured" in lines[4]] == [True] * 3


def test_one_more_tangent_is_counted_in_forward_passes() -> None:
    import report_models

    def model(method: str, k: int, ratio: float) -> dict:
        part = "derivatives" if k else ""
        return {"table": "model", "model": "net", "method": method, "part": part, "k": k, "time": ratio, "ratio": ratio}

    leaves = "activity, innermost modules"
    records = [model("forward only", 0, 0.25), *(model(leaves, k, ratio) for k, ratio in ((1, 0.5), (4, 1.0), (16, 4.0)))]
    assert report_models.marginal_cost(records, "net", leaves, "derivatives") == pytest.approx(1.0)
    assert report_models.marginal_cost(records[:3], "net", leaves, "derivatives") is None
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in report_models.model_table(records, "net").splitlines()]
    assert [row[2:] for row in rows[2:]] == [["", "250", "0.25", ""], ["1", "500", "0.50", ""], ["4", "1e+03", "1.00", ""],
                                             ["16", "4e+03", "4.00", "1.00"]]  # fmt: skip


def test_attention_is_held_against_the_formula() -> None:
    import report_models

    def bytes_of(name: str, length: int, grown: int) -> dict:
        return {"table": "attention memory", "name": name, "length": length, "k": 4, "bytes": grown}

    records = [
        {"table": "attention", "length": length, "k": 4, "time": time, "against": 1.0, "ratio": time}
        for length, time in ((512, 0.02), (2048, 0.2))
    ]
    records += [bytes_of("attention_jvp", 512, 10 << 20), bytes_of("attention_jvp", 2048, 50 << 20)]
    records.append(bytes_of("unfused formula", 2048, 600 << 20))
    lines = {f["figure"]: f for f in (figure.line(records) for figure in report_models.FIGURES)}
    found = [line for name, line in lines.items() if name.startswith(("attention", "the same"))]
    assert [(round(f["measured"], 6), f["met"]) for f in found] == [(5, True), (12, True), (10, True), (5, False)]
    assert report_models.attention_table(records).splitlines()[-1].split("|")[5].strip() == "5.0"


def test_a_wrong_gradient_of_a_model_is_noticed() -> None:
    import cases
    import model_cases

    problem = model_cases.Problem("tiny-gpt")
    step = problem.forward_gradient(model_cases.LEAVES, 2)
    assert step.check() < 1e-4
    step.fg.accumulate_ = lambda: None  # type: ignore[method-assign]
    with pytest.raises(cases.WrongResult, match="tiny-gpt.*relative error nan"):
        step.check()


def test_shares_add_up() -> None:
    import report

    def part(name: str, ratio: float, against: float) -> dict:
        key = {"table": "share", "method": "weight, normal", "width": 8, "k": 16, "part": name}
        return {**key, "ratio": ratio, "time": ratio * against, "against": against}

    # a pass of 80 ms is 5 % shorter without its Gram matrix, a step takes 100 ms
    (share,) = report.shares([part("gram", 1.05, 0.08), part("projection", 0.01, 0.1), part("combination", 0.2, 0.1)])
    assert share["gram"] == pytest.approx(0.04) and share["total"] == pytest.approx(0.25)


def test_floors_are_those_of_the_matrix_products() -> None:
    import floors

    n, first = floors.parameters(256)
    assert floors.relative("backprop", 256, 0) == 1
    assert floors.relative("forward only", 256, 0) == pytest.approx(n / (3 * n - first))
    assert floors.relative("weight, normal", 256, 4) == pytest.approx((n + 4 * (2 * n - first)) / (3 * n - first))
    assert floors.floor("vmap(jvp)", 256, 4).stored == 5 * 4 * n


def test_the_whole_suite_runs_on_a_tiny_net(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "run.py"), "--quick", "--rounds", "1", "--no-memory"]
    command += ["--models", "tiny-resnet18,tiny-vit,tiny-gpt", "--model-k", "1,2,3", "--lengths", "64"]
    done = subprocess.run(
        [*command, "--widths", "16", "--k", "1,2", "--output", str(tmp_path)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (text,), (data,) = [list(tmp_path.glob(f"*.{kind}")) for kind in ("md", "json")]
    found = json.loads(data.read_text())
    seen = {(r["method"], r["k"]) for r in found["cases"] if r["table"] == "gradient"}
    ours = {(m, k) for m in ("weight, normal", "weight, Rademacher", "activity") for k in (1, 2)}
    assert ours | {("backprop", 0), ("forward only", 0), ("vmap(jvp)", 2), ("loop of forward_ad", 1)} <= seen
    models = {(r["model"], r["method"], r["part"]) for r in found["cases"] if r["table"] == "model" and r["k"] in (0, 3)}
    leaves, groups = "activity, innermost modules", "activity, groups"
    assert {("tiny-resnet18", leaves, "gradient"), ("tiny-vit", groups, "derivatives")} <= models
    assert {("tiny-gpt", "weight, Rademacher", "gradient"), ("tiny-gpt", "forward only", "")} <= models
    operators = {r["op"] for r in found["cases"] if r["table"] == "op"}
    assert {"conv2d, input perturbed", "conv2d, weight perturbed", "linear, both perturbed"} <= operators
    assert {(r["length"], r["k"]) for r in found["cases"] if r["table"] == "attention"} == {(64, 1), (64, 4)}
    assert {f["figure"] for f in found["figures"]} and "## Operators" in text.read_text() and text.read_text() in done.stdout
    for private in (str(Path.home()), str(FOLDER), *map(str, tmp_path.parents[:2])):
        assert private not in text.read_text() + data.read_text()


def measured(call: str) -> int:
    """Bytes that ``call`` of memory.py returns; skips where nothing can be measured."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is measured on Linux only")
    code = f"import memory\nif __name__ == '__main__': print(memory.supported() and memory.{call})"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(FOLDER)!r}, {str(FOLDER.parent)!r}]\n{code}"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() == "False":
        pytest.skip("this system cannot reset the high-water mark of a process")
    return int(done.stdout)


def test_peak_memory_sees_what_a_call_allocates() -> None:
    n = 784 * 512 + 512 * 512 + 512 * 10
    stored = 16 * n * 4
    assert stored < measured("peak_growth('vmap(jvp)', 512, 16)") < 4 * stored  # stored tangents, and temporaries of that size
    scores = 3 * 8 * 512 * 512 * 4  # value and two tangents
    assert scores < measured("attention_growth('unfused formula', 512, 2)") < 8 * scores
    assert 8 * 512 * 64 * 4 * 3 < measured("attention_growth('attention_jvp', 512, 2)") < scores
