"""What the examples say where they are started in a way that does not work, before any process waits for another."""

from __future__ import annotations

import math

import pytest
from example_cases import FOLDER, losses

import frog_cuda as frog


@pytest.fixture(autouse=True)
def by_hand(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--batch 100000", "--batch: 100000 is more than the 1437 images to train on"),
        ("--batch 0", "--batch: '0' is not an integer >= 1"),
        ("--batch 63 --data-shards 2", "--batch: 63 rows do not divide evenly into --data-shards 2"),
        ("--data-shards 0", "--data-shards: '0' is not an integer >= 1"),
        ("--data-shards 3 --batch 63", "--data-shards: 4, the number of processes, is no multiple of 3"),
        ("--checkpoint-every 0", "--checkpoint-every: '0' is not an integer >= 1"),
        ("--steps -1", "--steps: '-1' is not an integer >= 1"),
        ("--k x", "--k: 'x' is not an integer >= 1"),
        ("--width 0", "--width: '0' is not an integer >= 1"),
        ("--lr nan", "--lr: 'nan' is not a finite number > 0"),
        ("--timeout 0", "--timeout: '0' is not a finite number > 0"),
    ],
)
def test_training(tmp_path, monkeypatch, capsys, words, said):
    import train_digits

    monkeypatch.setenv("WORLD_SIZE", "4")
    folder = tmp_path / "run"
    with pytest.raises(SystemExit, match="2"):
        train_digits.main(["--folder", str(folder), *words.split()])
    assert f"error: argument {said}" in capsys.readouterr().err and not folder.exists()


def test_resnet18_does_not_share_its_tangents(tmp_path, monkeypatch, capsys):
    """Batch normalisation would take most of them away."""
    import train_digits

    seen = []
    forward_gradient = frog.ForwardGradient
    monkeypatch.setattr(frog, "ForwardGradient", lambda *a, **options: seen.append(options) or forward_gradient(*a, **options))
    for model in ("resnet18", "fc"):
        train_digits.main(["--folder", str(tmp_path / model), "--model", model, "--width", "2", "--k", "2", "--steps", "1"])
    assert [options["shared_across_batch"] for options in seen] == [False, True]
    assert [options["per_sample"] for options in seen] == [True, True]
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["--folder", str(tmp_path), "--model", "resnet18", "--data-shards", "2"]
    with pytest.raises(SystemExit, match="2"):
        train_digits.main(words)
    assert "leave out --data-shards or take --perturb weight" in capsys.readouterr().err
    assert train_digits.parse([*words, "--perturb", "weight"]).data_shards == 2


def test_resnet18_learns(tmp_path):
    """Losses of 1.9 and 2.1 with seeds 0 and 1; 2.4, above those of a guess, where the batch shares its tangents."""
    import train_digits

    train_digits.main(["--folder", str(tmp_path), "--model", "resnet18", "--steps", "120"])
    assert sum(losses(tmp_path)[-20:]) / 20 < 2.25 < math.log(10)


def test_defaults_go_with_the_model():
    import train_digits

    for model, width, lr in (("fc", 64, 0.003), ("resnet18", 8, 0.001)):
        options = train_digits.parse(["--folder", "f", "--model", model])
        assert (options.width, options.lr) == (width, lr)
        options = train_digits.parse(["--folder", "f", "--model", model, "--width", "3", "--lr", "0.5"])
        assert (options.width, options.lr) == (3, 0.5)


def test_training_in_shards_without_torchrun(tmp_path, capsys):
    """It would take the first shard's rows and leave out the others'."""
    import train_digits

    with pytest.raises(SystemExit, match="2"):
        train_digits.main(["--folder", str(tmp_path), "--data-shards", "2"])
    assert "argument --data-shards: 1, the number of processes, is no multiple of 2" in capsys.readouterr().err


@pytest.mark.parametrize("world", [None, "1", "3"])
def test_a_pipeline_of_another_number_of_processes(monkeypatch, capsys, world):
    import pipeline

    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(SystemExit, match="2"):
        pipeline.main([])
    said = f"the number of processes is {world or 1}; expected 2, one for each stage. Start with torchrun --standalone"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--k", "--steps", "--batch", "--micro-batches", "--width"])
def test_a_pipeline_of_nothing(capsys, option):
    import pipeline

    with pytest.raises(SystemExit, match="2"):
        pipeline.main([option, "0"])
    assert f"argument {option}: '0' is not an integer >= 1" in capsys.readouterr().err
