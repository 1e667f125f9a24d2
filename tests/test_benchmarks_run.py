"""`make bench` as a user runs it, and the pages that it wrote; no time is asserted here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"


def run(*arguments: str, out: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(FOLDER / "run.py"),
        *arguments,
        "--output",
        str(out / "results"),
        "--docs",
        str(out / "docs"),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def results(out: Path) -> dict:
    (file,) = (out / "results").glob("*.json")
    return json.loads(file.read_text())


def test_the_suite_runs_on_tiny_models_in_pieces(tmp_path: Path) -> None:
    tiny = ["--quick", "--rounds", "1"]
    done = run(*tiny, "--parts", "gradients", "--models", "tiny-vit", "--k", "2", out=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    first = results(tmp_path)["cases"]
    seen = {(r["method"], r["k"]) for r in first if "ratio" in r}
    ours = {(f"weight, {kind}", 2) for kind in ("normal", "Rademacher", "low rank")}
    ours |= {(m, 2) for m in ("activity", "MeZO", "vmap(jvp)", "loop of forward_ad")}
    plain = {("backprop", 0), ("checkpointed backprop", 0), ("forward only", 0)}
    assert ours | plain <= seen
    for r in first:
        if r["part"] == "gradient" and "ratio" in r and r["method"] != "forward only":
            assert r["flops"] > 0 and -1 <= r["cosine"] <= 1.0001 and r["measured"]
            assert r["cosine_error"] >= 0 and r["cosine_samples"] >= 1

    done = run(*tiny, "--parts", "memory,attention", "--models", "tiny-vit", "--k", "2", "--lengths", "64", out=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    both = results(tmp_path)["cases"]
    assert both[: len(first)] == first  # a later piece adds
    assert {(r["length"], r["k"]) for r in both if r["table"] == "attention"} == {(64, 1), (64, 4)}
    text = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "## Where backprop wins" in text and "## tiny-vit" in text and "benchmarks-time.png" in text
    assert (tmp_path / "docs" / "benchmarks-time.png").stat().st_size > 10_000
    private = [str(Path.home()), str(ROOT), *map(str, tmp_path.parents[:2])]
    for file in [*(tmp_path / "results").iterdir(), tmp_path / "docs" / "benchmarks.md"]:
        assert not any(name in file.read_text() for name in private)


def test_no_case_begins_after_the_time_given(tmp_path: Path) -> None:
    done = run("--quick", "--parts", "gradients,memory", "--models", "fc16", "--seconds", "0", out=tmp_path)
    assert done.returncode == 0 and "no time left" in done.stderr, done.stderr[-3000:]
    assert results(tmp_path)["cases"] == []


def test_operators_are_checked_and_kept(tmp_path: Path) -> None:
    done = run("--quick", "--rounds", "1", "--parts", "operators", out=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    operators = {r["op"] for r in results(tmp_path)["cases"] if r["table"] == "op"}
    assert {"conv2d, input perturbed", "conv2d, weight perturbed", "linear, both perturbed"} <= operators
    assert "## Operators" in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--models", "vgg"], "--models: unknown 'vgg'; accepted are fc and a width"),
        (["--parts", "speed"], "--parts: unknown speed; accepted are gradients, memory"),
        (["--k", "0"], "--k: numbers of tangents must be at least 1"),
    ],
)
def test_bad_options_are_named(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import run as command

    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        command.arguments()
    assert message in capsys.readouterr().err


def test_memory_of_a_method_that_does_not_suit_the_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is left out, and what comes after it is measured."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import argparse

    import cases
    import memory
    import run as command

    def grown(name: str, model: str, k: int) -> int:
        if name == "activity, groups":
            raise cases.Unsuitable("each layer of this model is a group")
        return 1

    monkeypatch.setattr(memory, "peak_growth", grown)
    options = argparse.Namespace(models=["tiny-gpt"], k=[1], quick=False, deadline=None)
    names = [r["method"] for r in command.run_memory(options, [])]
    assert "activity, groups" not in names and {"activity", "MeZO"} <= set(names)
    assert "left out, each layer of this model is a group" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured on Linux")
def test_the_process_that_measures_says_what_does_not_suit(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(FOLDER)!r})
import cases, memory
if __name__ == "__main__":
    try:
        memory.peak_growth("activity, groups", "tiny-gpt", 1)
    except cases.Unsuitable as reason:
        print(reason)
"""
    (tmp_path / "measure.py").write_text(code)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "measure.py")],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout == "each layer of this model is a group\n", done.stderr[-2000:]


def test_a_case_that_was_left_out_replaces_no_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import argparse

    import run as command

    options = argparse.Namespace(output=tmp_path, fresh=False, report_only=False)
    key = {"table": "gradient", "model": "fc16", "method": "MeZO", "part": "gradient", "k": 1, "n": 1}
    for record, kept in (
        ({**key, "reason": "slow"}, "slow"),
        ({**key, "ratio": 3.0, "time": 1.0}, 3.0),
        ({**key, "reason": "slow"}, 3.0),
        ({**key, "ratio": 2.0, "time": 1.0}, 2.0),
    ):
        command.Results(options).add([record])
        (found,) = results_of(tmp_path)
        assert kept in found.values()
    command.Results(options).unfinished.write_text(json.dumps({**key, "ratio": 1.5, "time": 1.0}) + "\n")
    assert command.Results(options).records[0]["ratio"] == 1.5 and not list(tmp_path.glob("*.unfinished"))


def results_of(folder: Path) -> list[dict]:
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text())["cases"]


def test_the_page_in_docs_is_what_the_results_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import report_docs

    text = (ROOT / "docs" / "benchmarks.md").read_text()
    name = re.search(r"benchmarks/results/([^)/\s]+\.json)\)", text)
    assert name is not None
    found = json.loads((FOLDER / "results" / name[1]).read_text())
    images = re.findall(r"\]\((benchmarks-\w+\.png)\)", text)
    assert images and all((ROOT / "docs" / image).exists() for image in images)
    assert report_docs.page(name[1], found["machine"], found["cases"], images) == text


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
    assert (
        stored < measured("peak_growth('vmap(jvp)', 'fc512', 16)") < 4 * stored
    )  # stored tangents, and temporaries of that size
    scores = 3 * 8 * 512 * 512 * 4  # value and two tangents
    assert scores < measured("attention_growth('unfused formula', 512, 2)") < 8 * scores
    assert 8 * 512 * 64 * 4 * 3 < measured("attention_growth('attention_jvp', 512, 2)") < scores


def test_a_step_without_a_gradient_needs_less_memory() -> None:
    assert measured("peak_growth('weight, low rank, update_', 'fc1024', 2)") < 0.7 * measured(
        "peak_growth('weight, low rank', 'fc1024', 2)"
    )


@pytest.mark.parametrize(
    "about, name",
    [
        ("cpu family\t: 25\nmodel name\t: AMD EPYC\nflags\t\t: avx512_bf16", "AMD EPYC family 25"),
        ("cpu family\t: 25\nmodel name\t: AMD EPYC 9554 64-Core Processor\n", "AMD EPYC 9554 64-Core Processor"),
        ("cpu family\t: 6\nmodel name\t: Intel(R) Xeon(R)\nflags\t\t: avx512_bf16", "Intel(R) Xeon(R) without AMX"),
        ("cpu family\t: 6\nmodel name\t: Intel(R) Xeon(R)\nflags\t\t: avx512_bf16 amx_bf16", "Intel(R) Xeon(R)"),
    ],
)
def test_processors_whose_results_differ_have_names_that_do(monkeypatch, about, name):
    monkeypatch.syspath_prepend(str(FOLDER))
    import run as suite

    monkeypatch.setattr(Path, "read_text", lambda self: about)
    assert suite.cpu_model() == name
