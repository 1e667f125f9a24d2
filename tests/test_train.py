"""Training runs: what they reach, how they go on after a stop, and what their files hold."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from frog_cuda.__main__ import main
from frog_cuda.experiments import UsageError, checkpoint, datasets
from frog_cuda.experiments import train as command
from frog_cuda.experiments.datasets import Images, Part
from frog_cuda.experiments.rates import RateTable
from frog_cuda.experiments.trainer import DIVERGED, Settings, Trainer, evaluate

ROOT = Path(__file__).parent.parent
FC = Settings(lr=0.1, sizes={"width": 16}, k=4, epochs=3)
VIT = {"layers": 2, "width": 8, "hidden": 8, "heads": 2}


@pytest.fixture(scope="module")
def digits() -> Images:
    return datasets.load("digits")


@pytest.fixture(scope="module")
def few(digits: Images) -> Images:
    """A few of each part, in float64."""
    cut = [Part(p.x[:n], p.y[:n]) for p, n in ((digits.train, 80), (digits.valid, 40), (digits.test, 40))]
    return dataclasses.replace(digits, train=cut[0], valid=cut[1], test=cut[2]).to("cpu", torch.float64)


def run_all(trainer: Trainer) -> Trainer:
    while trainer.status is None:
        assert trainer.epoch()
    return trainer


def same(a: Trainer, b: Trainer) -> bool:
    """Whether two runs hold the same weights and buffers and went the same way, bit for bit."""
    tensors = zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True)
    curves = [[[e[n] for n in ("train_loss", "valid_loss", "valid_accuracy")] for e in t.history] for t in (a, b)]
    return all(torch.equal(x, y) for x, y in tensors) and curves[0] == curves[1] and a.losses == b.losses


# ---- what training does


@pytest.mark.parametrize("gradient", ["bp", "forward"])
def test_digits_are_learned(digits: Images, gradient: str) -> None:
    settings = Settings(lr=0.1 if gradient == "bp" else 0.5, sizes={"width": 64}, gradient=gradient, epochs=12)
    trainer = run_all(Trainer(settings, digits))
    assert trainer.status == "all epochs" and len(trainer.history) == 13
    first, last = trainer.history[0], trainer.history[-1]
    assert first["train_loss"] is None and first["valid_accuracy"] < 0.3  # ten classes, nothing learned
    assert last["valid_accuracy"] > (0.9 if gradient == "bp" else 0.7) and last["train_loss"] < 1.5
    assert trainer.test()[1] > (0.9 if gradient == "bp" else 0.7)


@pytest.mark.parametrize(
    ("model", "sizes"),
    [("fc", {"width": 8}), ("lenet5", {}), ("resnet18", {"width": 2}), ("vit", VIT), ("mixer", {"layers": 1, "width": 8})],
)
@pytest.mark.parametrize("perturb", ["activity", "weight"])
def test_small_images_suit_every_model(few: Images, model: str, sizes: dict[str, int], perturb: str) -> None:
    settings = Settings(lr=1e-3, model=model, sizes=sizes, k=2, perturb=perturb, batch=32, epochs=1, dtype="float64")
    trainer = Trainer(settings, few)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    run_all(trainer)
    assert trainer.status == "all epochs"
    still = {n for n, p in trainer.model.named_parameters() if torch.equal(p, before[n])}
    # A shift of all channels of a position is taken away by layer normalisation: its gradient is 0
    assert still <= ({"layers.0.positions.2.bias"} if model == "mixer" else set())


@pytest.mark.parametrize(
    ("model", "sizes", "perturb", "per_sample"),
    [
        ("fc", {"width": 16}, "activity", True),
        ("fc", {"width": 16}, "weight", True),
        ("vit", VIT, "activity", True),
        ("vit", VIT, "weight", True),
        ("resnet18", {"width": 2}, "activity", False),
    ],
)
def test_simulated_runs_equal_forward_runs(
    few: Images, model: str, sizes: dict[str, int], perturb: str, per_sample: bool
) -> None:
    """100 steps of both ways, of the same seed: the losses differ by rounding alone. A rounding error of one step is carried
    through the others, hence more than the 1e-16 of a single number."""
    epochs = 50 if model in ("fc", "vit") else 5  # 2 steps each
    lr = 0.2 if perturb == "activity" else 0.01
    settings = Settings(
        lr=lr, model=model, sizes=sizes, k=3, perturb=perturb, per_sample=per_sample, batch=40, epochs=epochs, patience=99
    )
    settings = dataclasses.replace(settings, dtype="float64")
    curves: list[list[float]] = []
    for simulate in (False, True):
        trainer = Trainer(dataclasses.replace(settings, simulate=simulate), few)
        losses: list[float] = []
        while trainer.status is None:
            while not trainer.epoch(lambda: True):  # stopped after each step
                losses.append(trainer.losses[-1])
        assert len(losses) == 2 * epochs
        curves.append(losses)
        if model == "resnet18":
            statistics = [b for n, b in trainer.model.named_buffers() if n.endswith("running_mean")]
            curves[-1] += [b.sum().item() for b in statistics]
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=1e-9, atol=1e-12)
    assert curves[0][0] != curves[0][-1]


def test_early_stopping(few: Images) -> None:
    """The best epoch is kept, and training ends ``patience`` epochs after it."""
    trainer = run_all(Trainer(dataclasses.replace(FC, gradient="bp", lr=1.0, epochs=200, patience=3, dtype="float64"), few))
    assert trainer.status == "no improvement"
    best = trainer.best_epoch
    assert 0 < best["epoch"] == trainer.history[-1]["epoch"] - 3
    assert best["valid_loss"] == min(e["valid_loss"] for e in trainer.history)
    now = evaluate(trainer.model, few, few.test)
    tested = trainer.test()
    assert tested != now == evaluate(trainer.model, few, few.test), "test() takes the best weights and leaves the others"
    trainer.model.load_state_dict(trainer.best)
    assert evaluate(trainer.model, few, few.valid) == (best["valid_loss"], best["valid_accuracy"])
    assert evaluate(trainer.model, few, few.test) == tested


def test_evaluate_is_the_mean_over_samples(few: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Trainer(dataclasses.replace(FC, dtype="float64"), few).model
    whole = evaluate(model, few, few.valid)
    output = model(few.normalised(few.valid.x))
    assert whole[0] == pytest.approx(torch.nn.functional.cross_entropy(output, few.valid.y).item(), rel=1e-12)
    assert whole[1] == (output.argmax(1) == few.valid.y).double().mean().item()
    monkeypatch.setattr("frog_cuda.experiments.trainer.EVALUATION_BATCH", 7)
    assert evaluate(model, few, few.valid) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize(("gradient", "lr"), [("bp", 1e6), ("forward", 1e9), ("bp", 1e39)])
def test_divergence(few: Images, gradient: str, lr: float, tmp_path: Path) -> None:
    settings = dataclasses.replace(FC, gradient=gradient, lr=lr, dtype="float64", epochs=9)
    result = command.train(settings, few, tmp_path)
    assert result["status"] == "diverged"
    assert f"in epoch {1}" in result["message"] and f"{lr:g}" in result["message"]
    assert result["best"]["epoch"] == 0 and 0 <= result["test_accuracy"] < 0.5
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "diverged"
    losses = [e["valid_loss"] for e in result["epochs"]]
    assert all(x is None or x >= DIVERGED for x in losses[1:])
    assert command.train(settings, few, tmp_path, resume=True)["written"] == result["written"], "nothing is left to do"


# ---- going on


@pytest.mark.parametrize(
    "settings",
    [
        FC,
        dataclasses.replace(FC, perturb="weight", lr=1e-3, optimizer="Adam"),
        dataclasses.replace(FC, gradient="bp", options={"momentum": 0.9}),
        dataclasses.replace(FC, model="resnet18", sizes={"width": 2}, k=2),
    ],
    ids=lambda s: s.approach,
)
@pytest.mark.parametrize("steps", [1, 17, 20])  # in an epoch, at its end, in the next one; an epoch has 17
def test_resumed_run_repeats_the_uninterrupted_one(digits: Images, settings: Settings, steps: int, tmp_path: Path) -> None:
    settings = dataclasses.replace(settings, epochs=2)
    whole = run_all(Trainer(settings, digits))
    left = steps

    def stop() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    result = command.train(settings, digits, tmp_path, stop=stop)
    assert result["status"] == "unfinished" and result["test_accuracy"] is None
    torch.randn(3)  # global random numbers have no part in it
    went_on = Trainer(settings, digits)
    went_on.load_state_dict(checkpoint.load(tmp_path / "checkpoint.pt"))
    assert not same(went_on, whole) and len(went_on.losses) + 17 * (len(went_on.history) - 1) == steps
    assert same(run_all(went_on), whole)
    result = command.train(settings, digits, tmp_path, resume=True)
    assert result["status"] == "all epochs" and result["test_accuracy"] == whole.test()[1]
    assert [e["train_loss"] for e in result["epochs"]] == [e["train_loss"] for e in whole.history]


def test_more_epochs(few: Images, tmp_path: Path) -> None:
    """A finished run goes on where more epochs are wanted, and is the same as one that had them from the start."""
    short, long = (dataclasses.replace(FC, epochs=n, dtype="float64") for n in (2, 4))
    command.train(short, few, tmp_path / "a")
    result = command.train(long, few, tmp_path / "a", resume=True)
    whole = command.train(long, few, tmp_path / "b")
    assert [e["valid_loss"] for e in result["epochs"]] == [e["valid_loss"] for e in whole["epochs"]]
    assert len(result["epochs"]) == 5
    again = command.train(short, few, tmp_path / "a", resume=True)
    assert again["written"] == result["written"]


def test_resume_refuses_another_run(few: Images, tmp_path: Path) -> None:
    settings = dataclasses.replace(FC, dtype="float64")
    command.train(settings, few, tmp_path)
    other = dataclasses.replace(settings, lr=0.2, epochs=9)
    with pytest.raises(UsageError, match="other settings: lr was 0.1 and is 0.2$"):
        command.train(other, few, tmp_path, resume=True)
    (tmp_path / "result.json").unlink()
    with pytest.raises(UsageError, match="other settings: lr was 0.1 and is 0.2$"):
        command.train(other, few, tmp_path, resume=True)
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(UsageError, match="not the result of a run"):
        command.train(settings, few, tmp_path, resume=True)


@pytest.mark.parametrize("epochs", [2, 4], ids=["unfinished", "more epochs"])
def test_resume_needs_the_checkpoint(few: Images, tmp_path: Path, epochs: int) -> None:
    """A run does not begin anew, and replace what is there, because its checkpoint is gone."""
    settings = dataclasses.replace(FC, epochs=2, dtype="float64")
    command.train(settings, few, tmp_path, stop=lambda: epochs == 2)  # after the first step
    (tmp_path / "checkpoint.pt").unlink()
    before = (tmp_path / "result.json").read_text()
    settings = dataclasses.replace(settings, epochs=epochs)
    with pytest.raises(UsageError, match="but no checkpoint.pt to go on from; remove the folder .* or --overwrite begins all"):
        command.train(settings, few, tmp_path, resume=True)
    assert (tmp_path / "result.json").read_text() == before
    assert command.train(settings, few, tmp_path)["status"] == "all epochs"


def test_what_cannot_go_on_is_said_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = f"train --width 8 --lr 0.1 --gradient bp --output {tmp_path} --epochs".split()
    assert main([*options, "1", "--seeds", "1"]) == 0
    (checkpoint_file,) = tmp_path.rglob("checkpoint.pt")
    checkpoint_file.unlink()
    assert main([*options, "1", "--seeds", "1", "--resume"]) == 0, "nothing is left to do"
    with pytest.raises(SystemExit):
        main([*options, "2", "--seeds", "0,1", "--resume"])
    assert "digits-fc-width8-bp-seed1 holds a run up to epoch 1, but no checkpoint.pt" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 1, "the first run has not begun"


def test_ctrl_c(tmp_path: Path) -> None:
    """A process that is interrupted leaves a checkpoint; its continuation ends as a run that was left alone."""
    options = "train --width 16 --k 2 --lr 0.1 --epochs 400 --patience 400".split()
    arguments = [sys.executable, "-m", "frog_cuda", *options, "--output", str(tmp_path)]
    folder = tmp_path / "digits-fc-width16-orthogonal-k2-seed0"
    process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 60
        while not (folder / "result.json").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Interrupted after epoch" in err and "--resume goes on from there" in err
    state = checkpoint.load(folder / "checkpoint.pt")
    finished = len(state["history"])
    assert 1 <= finished < 400 and state["status"] is None
    data = datasets.load("digits")
    settings = Settings(lr=0.1, sizes={"width": 16}, k=2, epochs=finished, patience=400)
    result = command.train(settings, data, folder, resume=True)
    whole = run_all(Trainer(settings, data))
    assert [e["train_loss"] for e in result["epochs"]] == [e["train_loss"] for e in whole.history]


# ---- checkpoints


def test_checkpoint_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"x": torch.arange(3), "words": ["a", None]})
    real = torch.save

    def crash(state: object, file: Any) -> None:
        real(state, file)
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, {"x": torch.arange(4)})
    assert checkpoint.load(path)["x"].tolist() == [0, 1, 2]


def test_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    sync, move = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("sync"), sync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), move(a, b))[1])
    checkpoint.save(tmp_path / "c.pt", {})
    assert calls == ["sync", "replace", "sync"]
    assert os.listdir(tmp_path) == ["c.pt"]


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("damage", ["cut", "text", "payload", "other", "missing", "tensor"])
def test_damaged_checkpoint(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"x": torch.arange(1000)})
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-700])
    elif damage == "text":
        path.write_text("no checkpoint")
    elif damage == "payload":
        torch.save({"format": checkpoint.FORMAT, "x": Payload()}, path)
    elif damage == "other":
        torch.save([1, 2], path)
    elif damage == "tensor":
        stored = torch.arange(1000).numpy().tobytes()
        path.write_bytes(path.read_bytes().replace(stored, stored[:80] + b"\xff" + stored[81:]))
        assert torch.load(path)["x"][10] == 255, "torch.load does not notice"
    else:
        path.unlink()
    with pytest.raises(UsageError, match="checkpoint"):
        checkpoint.load(path)
    assert not (tmp_path / "ran").exists()


def test_no_bit_changes_what_is_read(tmp_path: Path) -> None:
    """Of every 5th byte: it is noticed, or does not matter."""
    path, state = tmp_path / "checkpoint.pt", {"x": torch.arange(20.0), "words": ["a", None]}
    checkpoint.save(path, state)
    raw, noticed = path.read_bytes(), 0
    for i in range(0, len(raw), 5):
        path.write_bytes(raw[:i] + bytes([raw[i] ^ 1 << i % 8]) + raw[i + 1 :])
        try:
            found = checkpoint.load(path)
        except UsageError:
            noticed += 1
        else:
            assert torch.equal(found["x"], state["x"]) and found["words"] == state["words"]
    assert noticed > 100


# ---- the command


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Several runs of one call, their files, and what a second call does with them."""
    options = "train --width 16 --lr 0.1 --epochs 2 --gradient bp,forward --k 1,4 --seeds 0,1 --tensorboard".split()
    options += ["--output", str(tmp_path)]
    assert main(options) == 0
    out, err = capsys.readouterr()
    assert err == ""
    names = [f"digits-fc-width16-{a}-seed{s}" for a in ("bp", "orthogonal-k1", "orthogonal-k4") for s in (0, 1)]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    for name in names:
        folder = tmp_path / name
        result = json.loads((folder / "result.json").read_text())
        assert result["settings"]["seed"] == int(name[-1]) and result["versions"]["torch"] == torch.__version__
        assert result["samples"] == {"train": 1150, "valid": 287, "test": 360}
        assert result["parameters"] == 64 * 16 + 16 + 16 * 16 + 16 + 16 * 10 + 10
        assert len(result["epochs"]) == 3 and result["ms_per_step"] > 0
        assert result["command"].startswith("python -m frog_cuda train --width 16")
        assert result["best"] in result["epochs"]
        with (folder / "log.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [float(r["valid_loss"]) for r in rows] == [e["valid_loss"] for e in result["epochs"]]
        assert any(p.name.startswith("events.out.tfevents") for p in (folder / "tensorboard").iterdir())
        line = next(r for r in out.splitlines() if r.startswith(f"{result['case']} seed={name[-1]}: all epochs after epoch 2"))
        assert f"accuracy {result['test_accuracy']:.2%}" in line
    runs = {json.loads((tmp_path / n / "result.json").read_text())["epochs"][-1]["valid_loss"] for n in names}
    assert len(runs) == 6, "gradients and seeds make runs of their own"
    with pytest.raises(SystemExit):
        main(options)
    assert "--resume goes on with it, --overwrite begins anew" in capsys.readouterr().err
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("result.json")}
    assert main([*options, "--resume"]) == 0
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("result.json")} == before


def test_tensorboard_shows_the_curves(few: Images, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = command.train(dataclasses.replace(FC, dtype="float64"), few, tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown = [(e.step, e.value) for e in events.Scalars("valid_loss")]
    assert shown == [(e["epoch"], pytest.approx(e["valid_loss"], rel=1e-6)) for e in result["epochs"]]


def test_diverged_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "train --width 16 --lr 1e6 --gradient bp --epochs 2 --checkpoint-every 0 --output".split()
    assert main([*options, str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "diverged after epoch" in out and "at learning rate 1e+06" in out
    assert not list(tmp_path.rglob("*.pt"))


def test_rates_come_from_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "rates.json"
    table.write_text(json.dumps({"train": {"digits fc width=16 bp": 0.125}}))
    options = ["train", "--width", "16", "--epochs", "1", "--lr-table", str(table), "--output", str(tmp_path / "o")]
    assert main([*options, "--gradient", "bp"]) == 0
    assert json.loads(next(tmp_path.rglob("result.json")).read_text())["settings"]["lr"] == 0.125
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(options)
    assert "digits fc width=16 orthogonal k=16" in capsys.readouterr().err


def test_rates_for_the_digits_come_with_the_package(tmp_path: Path) -> None:
    shipped = RateTable.read().rates["train"]
    options = ["train", "--width", "256", "--epochs", "1", "--output", str(tmp_path)]
    assert main([*options, "--gradient", "bp,forward", "--k", "1", "--aggregate", "mean"]) == 0
    assert main([*options, "--k", "2,4,16", "--aggregate", "mean,orthogonal"]) == 0
    used = {r["case"]: r["settings"]["lr"] for r in (json.loads(p.read_text()) for p in tmp_path.rglob("result.json"))}
    assert len(used) == 8 and used == {case: shipped[case] for case in used}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--lr 0", "--lr: '0' is not a number > 0"),
        ("--lr nan", "--lr: 'nan' is not a number > 0"),
        ("--lr 1 --k 4,0", "--k: '0' is not an integer >= 1"),
        ("--lr 1 --k 4,", "--k: '4,' is not a list of values"),
        ("--lr 1 --seeds 0,-1", "--seeds: '0,-1' is not a list of integers in [0, 2^63)"),
        ("--lr 1 --dataset letters", "--dataset: invalid choice: 'letters'"),
        ("--lr 1 --model fc,cnn", "--model: 'cnn' is not accepted; accepted are fc, lenet5"),
        ("--lr 1 --gradient sgd", "--gradient: 'sgd' is not accepted; accepted are bp, forward"),
        ("--lr 1 --perturb loss", "--perturb: 'loss' is not accepted; accepted are activity, weight"),
        ("--lr 1 --aggregate median", "aggregate is 'median'; accepted names are"),
        ("--lr 1 --tangents cauchy", "tangents is 'cauchy'; accepted names are"),
        ("--lr 1 --optimizer Newton", "--optimizer is 'Newton'; accepted are"),
        ("--lr 1 --optimizer LBFGS", "--optimizer is 'LBFGS'; accepted are"),
        ("--lr 1 --optimizer-option speed=9", "speed"),
        ("--lr 1 --optimizer-option momentum=fast", "--optimizer-option: 'fast' is not a number"),
        ("--lr 1 --optimizer-option momentum", "--optimizer-option is 'momentum'; expected NAME=VALUE"),
        ("--lr 1 --model lenet5 --width 3", "--size is 'width'; lenet5 has no sizes to choose"),
        ("--lr 1 --size width=0", "--size width: '0' is not an integer >= 1"),
        ("--lr 1 --model vit --size patch=3", "must be multiples of the patch size 3"),
        ("--lr 1 --batch 5000", "--batch is 5000; digits has 1150 training samples"),
        ("--lr 1 --lr-table x.json", "not allowed with"),
        ("--lr-table no.json", "--lr-table 'no.json' cannot be read"),
        ("--lr 1 --output file", "--output 'file/digits-fc-width1024-orthogonal-k16-seed0' cannot be made"),
    ],
)
def test_wrong_options(
    options: str, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        main(["train", *options.split()])
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert says in err and out == ""
    assert os.listdir() == ["file"]


def test_names_tell_runs_apart() -> None:
    one = Settings(lr=1.0, sizes={"width": 8})
    changes: list[dict[str, Any]] = [
        {"dataset": "mnist"},
        {"model": "lenet5", "sizes": {}},
        {"sizes": {"width": 9}},
        {"gradient": "bp"},
        {"k": 4},
        {"aggregate": "mean"},
        {"perturb": "weight"},
        {"tangents": "rademacher"},
        {"per_sample": False},
        {"shared_across_batch": False},
        {"scaling_correction": True},
        {"tangent_dtype": "bfloat16"},
        {"optimizer": "Adam"},
        {"options": {"momentum": 0.9}},
        {"seed": 1},
        {"simulate": True},
        {"dtype": "float64"},
    ]
    runs = [one, *(dataclasses.replace(one, **c) for c in changes)]
    assert len({r.name for r in runs}) == len(runs)
    assert len({r.case for r in runs}) == len(runs) - 3, "seed, dtype and how derivatives are had share a learning rate"
    assert one.name == "digits-fc-width8-orthogonal-k16-seed0"
    turned = [Settings(lr=1.0, model="vit", sizes=s) for s in ({"width": 8, "layers": 2}, {"layers": 2, "width": 8})]
    assert turned[0].case == turned[1].case == "digits vit layers=2 width=8 orthogonal k=16"
