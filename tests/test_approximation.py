"""How close estimates come to the gradient, against closed forms, against estimates made one by one, and as a command."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

import frog_cuda as frog
from frog_cuda.__main__ import main
from frog_cuda.experiments import approximation, options, results
from frog_cuda.experiments.approximation import APPROACHES, Quality, closed_form, measure, sampler

F64 = torch.float64


def quality(name: str, ks: list[int], n: int, samples: int, simulate: bool = False) -> dict[str, Quality]:
    return measure(sampler(name, ks[-1], n, 0, F64), ks, n, samples, simulate=simulate)


@pytest.mark.parametrize("name", ["frog", "torch"])
def test_closed_forms_at_64_dimensions(name: str) -> None:
    found = quality(name, [1, 16, 64], 64, 1000)
    assert found["mean"].cosine[:, 1].mean().item() == pytest.approx(0.446, abs=0.01)
    assert found["orthogonal"].cosine[:, 1].mean().item() == pytest.approx(0.495, abs=0.01)
    assert (found["orthogonal"].cosine[:, 2] - 1).abs().max() < 1e-6
    for approach in APPROACHES:
        for i, k in enumerate([1, 16, 64]):
            cosine, ratio = closed_form(approach, k, 64)
            for values, expected in ((found[approach.name].cosine[:, i], cosine), (found[approach.name].ratio[:, i], ratio)):
                error = values.std().item() / len(values) ** 0.5
                # 4 standard errors, and what the ratio of expectations misses: below 4 % at k = 16
                assert values.mean().item() == pytest.approx(expected, abs=4 * error + (0.04 * expected if 1 < k else 1e-9))


@pytest.mark.parametrize("k", [1, 2, 4, 8, 16])
def test_one_draw_serves_all_k(k: int) -> None:
    """Every approach and k against the library's own estimates from the same tangents, one sample at a time."""
    n, ks, samples = 8, [1, 2, 4, 8, 16], 3
    found = quality("frog", ks, n, samples)
    gradient = torch.ones(n, dtype=F64)
    for s in range(samples):
        tangents = frog.tangents.sample("normal", 16, n, seed=s, dtype=F64)[:k]
        for approach in APPROACHES:
            v = tangents / tangents.norm(dim=1, keepdim=True) if approach.normalized else tangents
            _, estimate = frog.forward_gradient(
                torch.sum, torch.zeros(n, dtype=F64), k=k, tangents=v, aggregate=approach.aggregate
            )
            i = ks.index(k)
            cosine = torch.nn.functional.cosine_similarity(estimate, gradient, dim=0)
            assert found[approach.name].cosine[s, i].item() == pytest.approx(cosine.item(), abs=1e-9)
            assert found[approach.name].ratio[s, i].item() == pytest.approx((estimate.norm() / n**0.5).item(), rel=1e-9)


@pytest.mark.parametrize("n", [3, 40])
def test_forward_equals_simulated(n: int) -> None:
    forward, simulated = (quality("frog", [1, 2, 4], n, 5, simulate) for simulate in (False, True))
    for name in forward:
        torch.testing.assert_close(forward[name].cosine, simulated[name].cosine, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(forward[name].ratio, simulated[name].ratio, rtol=1e-10, atol=1e-12)


def test_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quality("torch", [1, 2, 4], 20, 5)
    monkeypatch.setattr(approximation, "ELEMENTS", 2 * 4 * 20)
    parts = quality("torch", [1, 2, 4], 20, 5)
    for name in whole:
        torch.testing.assert_close(whole[name].cosine, parts[name].cosine)
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(sampler("torch", 3, 5, 4, F64)(3, 1)[0], torch.randn(3, 5, generator=generator).double())


def test_dependent_tangents_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="2 samples of 3 tangents in 5 dimensions are linearly dependent"):
        measure(lambda first, count: torch.ones(count, 3, 5, dtype=F64), [3], 5, 2)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "folder"
    given = ["approximation", "--seeds", "20", "--max-k", "4", "--max-n", "64", "--output", str(folder)]
    assert main(given) == 0
    out, err = capsys.readouterr()
    assert err == "", "no progress bar where the output is not a terminal"
    assert str(folder / "cosine.png") in out
    content = json.loads((folder / "approximation.json").read_text())
    assert content["complete"] and content["command"].startswith("python -m frog_cuda approximation --seeds 20")
    assert content["versions"]["torch"] == torch.__version__ and content["settings"]["seeds"] == 20
    assert len(content["rows"]) == 7 * 3 * 5
    with open(folder / "approximation.csv") as file:
        table = list(csv.DictReader(file))
    assert [(r["approach"], int(r["n"]), float(r["cosine"])) for r in table] == [
        (r["approach"], r["n"], r["cosine"]) for r in content["rows"]
    ]
    for name in ("cosine.png", "norm_ratio.png"):
        picture = (folder / name).read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
    assert not list(folder.glob("*.part"))


def test_resumed_run_equals_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["approximation", "--seeds", "5", "--max-k", "2", "--max-n", "8", "--output"]
    assert main([*given, str(tmp_path / "whole")]) == 0

    def stop(draw: object, ks: object, n: int, *rest: object, **options: object) -> dict[str, Quality]:
        if n == 4:
            raise KeyboardInterrupt
        return measure(draw, ks, n, *rest, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(approximation, "measure", stop)
        assert main([*given, str(tmp_path / "parts")]) == 130
    content = json.loads((tmp_path / "parts" / "approximation.json").read_text())
    assert not content["complete"] and {row["n"] for row in content["rows"]} == {1, 2}
    assert main([*given, str(tmp_path / "parts"), "--resume"]) == 0
    whole, parts = ((tmp_path / f / "approximation.csv").read_text() for f in ("whole", "parts"))
    assert whole == parts


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--max-k", "0"], "'0' is not an integer >= 1"),
        (["--max-n", "x"], "'x' is not an integer >= 1"),
        (["--max-n", "4000000"], "--max-n 2097152; expected at most"),
        (["--seed", "-1"], "--seed is -1; expected an integer in"),
        (["--output", __file__], "which is no folder"),
        (["--output", f"{__file__}/inside"], "cannot be made"),
        (["--sampler", "cupy"], "invalid choice: 'cupy'"),
    ],
)
def test_options_that_cannot_be(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["approximation", "--seeds", "2", *given])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_resume_refuses_other_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["approximation", "--max-k", "1", "--max-n", "1", "--output", str(tmp_path), "--resume"]
    assert main([*given, "--seeds", "3"]) == 0
    with pytest.raises(SystemExit):
        main([*given, "--seeds", "4"])
    assert "has other settings: seeds was 3 and is 4" in capsys.readouterr().err
    (tmp_path / "approximation.json").write_text("{}")
    with pytest.raises(SystemExit):
        main([*given, "--seeds", "3"])
    assert "is not a file of results" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given",
    [
        "approximation --seeds 2 --max-k 1 --max-n 1",
        "functions --seeds 1 --function sphere --max-n 1 --max-steps 2",
        "angles --seeds 1 --samples 2 --max-steps 2 --angle 90",
    ],
)
def test_results_are_not_replaced(
    given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that is typed again, or with other options, leaves what is there as it is."""
    monkeypatch.chdir(tmp_path)
    name, folder = given.split()[0], Path("results", given.split()[0])
    assert main(given.split()) == 0

    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.iterdir()}

    before = content()
    for again in (given, f"{given} --seed 7"):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(again.split())
        assert stopped.value.code == 2
        says = f"--output: results/{name}/{name}.json is there already; --resume goes on with it, another --output leaves it"
        assert says in capsys.readouterr().err
        assert content() == before
    assert main([*given.split(), "--resume"]) == 0
    assert {path: text for path, text in content().items() if path.suffix != ".png"} == {
        path: text for path, text in before.items() if path.suffix != ".png"
    }
    assert main([*given.split(), "--seed", "7", "--output", "other"]) == 0
    (folder / f"{name}.json").unlink()
    for flag in ([], ["--resume"]):
        with pytest.raises(SystemExit):
            main([*given.split(), *flag])
        assert f"{name}.csv is there" in capsys.readouterr().err


def test_results_keep_no_number_that_json_cannot_hold(tmp_path: Path) -> None:
    table = results.Results(tmp_path, "x", command="c", settings={"ks": (1, 2)})
    table.add([{"a": float("nan"), "b": float("inf"), "c": 0.5, "d": "text"}])
    assert json.loads((tmp_path / "x.json").read_text())["rows"] == [{"a": None, "b": None, "c": 0.5, "d": "text"}]
    assert (tmp_path / "x.csv").read_text() == "a,b,c,d\n,,0.5,text\n"
    assert results.Results(tmp_path, "x", command="c", settings={"ks": (1, 2)}, resume=True).has(d="text", c=0.5)


def test_powers_of_two() -> None:
    assert (
        options.powers_of_two(1) == [1] and options.powers_of_two(1024)[-1] == 1024 and len(options.powers_of_two(1023)) == 10
    )
