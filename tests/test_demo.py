"""The command line and its demo, on the real digits."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import frog_cuda
from frog_cuda import experiments
from frog_cuda.__main__ import COMMANDS, main
from frog_cuda.experiments import MissingPackages, UsageError, demo, digits, gradients, missing, plots, require, timing

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data() -> digits.Digits:
    return digits.load()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "ROUNDS", 1)


# ---- the demo


def test_demo(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = tmp_path / "curves.png"
    assert main(["demo", "--epochs", "8", "--output", str(figure)]) == 0
    out, err = capsys.readouterr()
    assert err == "", "no progress bar where the output is not a terminal"
    rows = {m[1].strip(): m[2].split() for m in re.finditer(r"^(.+?)  +(\d+\.\d%.*)$", out, re.MULTILINE)}
    assert list(rows) == ["backprop", "FROG: 16 tangents, orthogonal", "16 tangents, mean", "single tangent"]
    accuracy = {name: float(cells[0].rstrip("%")) for name, cells in rows.items()}
    cosine = {name: float(cells[-1]) for name, cells in rows.items()}
    assert accuracy["backprop"] > 90
    # Chance is 10 %; the whole demo has five times as many epochs.
    assert accuracy["FROG: 16 tangents, orthogonal"] > 60 and accuracy["16 tangents, mean"] > 60
    assert cosine["backprop"] == 1
    assert cosine["FROG: 16 tangents, orthogonal"] > 2 * cosine["single tangent"] > 0
    for name, (_, loss, ms, to_backprop, to_vmap, _) in rows.items():
        assert float(loss) > 0 and float(ms) > 0 and float(to_backprop) > 0
        assert to_vmap == "-" if name == "backprop" else float(to_vmap) > 0
    content = figure.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 20_000
    assert str(figure) in out


def test_the_ending_says_what_kind_of_file_the_figure_is(tmp_path: Path) -> None:
    run = demo.Run(demo.methods(4)[0], demo.network(0), train_loss=[2.0, 1.0], test_loss=[2.0, 1.5])
    for ending, start in ((".png", b"\x89PNG"), (".PNG", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")):
        path = tmp_path / f"curves{ending}"
        plots.loss_curves([run] * len(plots.STYLES), path)
        assert path.read_bytes().startswith(start)


def test_table_shows_what_was_measured() -> None:
    lines = [
        demo.Row("backprop", 0.975, 0.1234, 1.0, 1.0, None, 1.0),
        demo.Row("a long name of a method", 0.5, 12.0, 123.456, 123.46, 0.015, -0.25),
    ]
    head, _, rule, first, second = demo.table(lines).split("\n")
    assert first.split() == ["backprop", "97.5%", "0.123", "1.00", "1.00", "-", "1.000"]
    assert second.split()[-6:] == ["50.0%", "12.000", "123.46", "123.46", "0.01", "-0.250"]
    assert len(first) == len(second) == len(rule) and head.startswith(" ")


def test_training_repeats_itself(data: digits.Digits) -> None:
    """The same seed gives the same run, whatever state the global random numbers are in; another one does not."""

    class Silent:
        def __init__(self, **options: object) -> None: ...
        def __enter__(self) -> Silent:
            return self

        def __exit__(self, *error: object) -> None: ...
        def update(self) -> None: ...
        def set_postfix_str(self, text: str, refresh: bool) -> None: ...

    method = demo.Method("four", 0.01, 4, "orthogonal")
    with torch.random.fork_rng():
        first = demo.train(method, demo.network(3), data, 1, 3, Silent)
        torch.manual_seed(99)
        again = demo.train(method, demo.network(3), data, 1, 3, Silent)
    other = demo.train(method, demo.network(4), data, 1, 4, Silent)
    assert first.train_loss == again.train_loss and first.cosines == again.cosines
    assert first.train_loss != other.train_loss
    for p, q in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q)


# ---- what it stands on


def test_digits(data: digits.Digits) -> None:
    assert data.train_x.shape == (1437, 64) and data.test_x.shape == (360, 64)
    assert data.train_x.dtype == torch.float32 and data.train_y.dtype == torch.int64
    assert data.train_x.min() == -1 and data.train_x.max() == 1
    share = [torch.bincount(y, minlength=10) / len(y) for y in (data.train_y, data.test_y)]
    assert (share[0] - share[1]).abs().max() < 0.003
    # Held out: no image stands in both parts
    seen = {tuple(x) for x in data.train_x.tolist()}
    assert not any(tuple(x) in seen for x in data.test_x.tolist())


def test_batches() -> None:
    x, y = torch.arange(10), torch.arange(10) * 2
    generators = [torch.Generator().manual_seed(s) for s in (1, 1, 2)]
    first, again, other = ([bx.tolist() for bx, _ in digits.batches(x, y, 3, g)] for g in generators)
    assert first == again != other
    assert [len(b) for b in first] == [3, 3, 3] and len({i for b in first for i in b}) == 9
    for bx, by in digits.batches(x, y, 3, generators[0]):
        assert torch.equal(by, bx * 2)


@pytest.mark.parametrize("aggregate", ["orthogonal", "mean"])
@pytest.mark.parametrize("k", [1, 5])
def test_vmap_jvp_estimates_as_the_demo_does(data: digits.Digits, aggregate: str, k: int) -> None:
    """The other side of the ratio is the same estimator: given its tangents, frog_cuda finds the same gradient."""
    model = demo.network(0).double()
    x, y = data.train_x[:32].double(), data.train_y[:32]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        loss = gradients.vmap_jvp(model, k, aggregate)(x, y)
        torch.manual_seed(5)
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
        tangents = {name: torch.randn(k, layer.out_features, dtype=x.dtype) for name, layer in layers.items()}
    assert sum(v.shape[1] for v in tangents.values()) == 522, "activities, not weights"
    theirs = [p.grad for p in model.parameters()]
    model.zero_grad()
    ours = gradients.forward(model, k, aggregate, 0, tangents)
    torch.testing.assert_close(ours(x, y), loss, rtol=1e-12, atol=0)
    for p, g in zip(model.parameters(), theirs, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-8, atol=1e-12)
    gradients.vmap_jvp(model, k, aggregate)(x, y)
    assert not torch.equal(model[0].weight.grad, theirs[0]), "a call adds to .grad, with tangents of its own"


def test_medians_take_turns() -> None:
    made: list[str] = []
    calls = {name: (lambda name=name: made.append(name)) for name in "ab"}
    taken = timing.interleaved_medians(calls, torch.device("cpu"), rounds=2, limit=60, burst=2)
    assert "".join(made) == 3 * "aaabbb"
    assert set(taken) == {"a", "b"} and all(0 < t < 1 for t in taken.values())
    made.clear()
    timing.interleaved_medians(calls, torch.device("cpu"), rounds=50, limit=0, burst=2)
    assert "".join(made) == 2 * "aaabbb", "one round to warm up and one that counts, whatever the limit"


# ---- the command line


def test_no_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


def test_module_runs() -> None:
    found = subprocess.run([sys.executable, "-m", "frog_cuda", "info"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    facts = dict(line.split(maxsplit=1) for line in found.stdout.splitlines())
    assert facts["version"] == frog_cuda.__version__ and facts["torch"] == torch.__version__
    assert facts.keys() >= {"compiler", "cuda", "threads"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fly"], "invalid choice: 'fly'"),
        (["demo", "--k", "0"], "--k: '0' is not an integer >= 1"),
        (["demo", "--epochs", "two"], "--epochs: 'two' is not an integer >= 1"),
        (["demo", "--threads", "-1"], "--threads: '-1' is not an integer >= 1"),
        (["demo", "--seed", "-1"], "--seed is -1; expected an integer in"),
        (["demo", "--device", "tpu"], "--device is 'tpu'; accepted are auto, cpu and cuda"),
        (["demo", "--output", "no/such/folder/x.png"], "expected a file in a folder that exists"),
        (["demo", "--output", "."], "expected a file in a folder that exists"),
        (["demo", "--output", "x.foo"], "--output is 'x.foo'; accepted endings are .png, .pdf, .svg"),
        (["demo", "--output", "x"], "--output is 'x'; accepted endings are .png, .pdf, .svg"),
    ],
)
def test_wrong_options(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert says in err and out == ""


def test_device() -> None:
    choose = demo.choose_device
    assert choose("auto", available=True, built=True) == torch.device("cuda")
    for available, built in ((True, False), (False, True), (False, False)):
        assert choose("auto", available, built) == choose("cpu", available, built) == torch.device("cpu")
    with pytest.raises(UsageError, match="no CUDA kernels"):
        choose("cuda", available=True, built=False)
    with pytest.raises(UsageError, match="no GPU"):
        choose("cuda", available=False, built=True)


@pytest.mark.parametrize(
    ("module", "package"), [("sklearn", "scikit-learn is"), ("matplotlib", "matplotlib is"), ("tqdm", "tqdm is")]
)
def test_missing_package(
    module: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    find = experiments.find_spec
    monkeypatch.setattr(experiments, "find_spec", lambda name: None if name == module else find(name))
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 1
    out, err = capsys.readouterr()
    assert f"{package} not installed" in err and out == ""
    assert 'run `pip install --no-build-isolation ".[demo]"` in the source folder' in err
    assert main(["info"]) == 0
    assert f"missing: {package.split()[0]}" in capsys.readouterr().out


def test_require_names_all_that_is_missing() -> None:
    assert require("math") == [__import__("math")]
    assert missing("no_such.a", "no_such.b", "math") == ["no_such"]
    with pytest.raises(MissingPackages, match="no_such, neither are not installed"):
        require("no_such.a", "math", "neither")
