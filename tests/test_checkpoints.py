"""Checkpoints: whole or passed over, never half of one."""

from __future__ import annotations

import os
import threading
import warnings
from pathlib import Path

import pytest
import torch

from frog_cuda.distributed import Checkpoints


def state(step: int) -> dict:
    return {"weight": torch.full((3,), float(step)), "optimizer": {"state": {0: {"step": step}}}, "losses": [0.1] * step}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_the_newest_is_read_and_old_ones_go(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new" / "folder", keep=3)
    assert checkpoints.load() is None
    for step in (0, 5, 7, 20):
        assert checkpoints.save(step, state(step)).exists()
    assert names(checkpoints.folder) == [f"step-{step:010d}.ckpt" for step in (5, 7, 20)]
    step, found = Checkpoints(checkpoints.folder).load()
    assert step == 20 and torch.equal(found["weight"], torch.full((3,), 20.0)) and found["losses"] == [0.1] * 20


@pytest.mark.parametrize("damage", ["truncated", "empty", "a bit", "another file"])
def test_a_damaged_one_is_passed_over(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1))
    path = checkpoints.save(2, state(2))
    raw = bytearray(path.read_bytes())
    if damage == "a bit":
        raw[len(raw) // 2] ^= 1
    path.write_bytes({"truncated": raw[:-7], "empty": b"", "another file": b"PK" + bytes(raw)}.get(damage, bytes(raw)))
    with pytest.warns(UserWarning, match=r"step-0000000002\.ckpt is damaged \(\d+ bytes\); step-0000000001\.ckpt, an"):
        step, found = checkpoints.load()
    assert step == 1 and torch.equal(found["weight"], torch.ones(3))
    checkpoints.save(2, state(2))
    assert checkpoints.load()[0] == 2


def test_every_length_of_a_truncated_one_is_noticed(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(0, {"x": torch.ones(2)})
    raw = path.read_bytes()
    for length in range(0, len(raw), 97):
        path.write_bytes(raw[:length])
        with pytest.raises(ValueError, match="is damaged"):
            checkpoints.load()
    path.write_bytes(raw)
    assert checkpoints.load() is not None


def test_a_run_does_not_begin_anew_where_all_are_damaged(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, state(step)).write_bytes(b"x" * step)
    said = r"step-0000000002\.ckpt is damaged \(2 bytes\), .*step-0000000001\.ckpt is damaged \(1 bytes\); no other is left"
    with warnings.catch_warnings(), pytest.raises(ValueError, match=said):
        warnings.simplefilter("error")  # none says that another one is used
        checkpoints.load()
    for step in (1, 2):
        (tmp_path / f"step-{step:010d}.ckpt").unlink()
    assert checkpoints.load() is None


def test_a_folder_is_no_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    (tmp_path / "step-0000000009.ckpt").mkdir()
    assert checkpoints.load() is None
    for step in (1, 2, 3):
        checkpoints.save(step, state(step))
    assert checkpoints.load()[0] == 3 and (tmp_path / "step-0000000009.ckpt").is_dir()


def test_going_back_removes_what_came_later(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (10, 20, 12):
        checkpoints.save(step, state(step))
    assert names(tmp_path) == ["step-0000000010.ckpt", "step-0000000012.ckpt"]


def test_a_kill_while_writing_leaves_the_one_before(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1))

    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(2, state(2))
    assert checkpoints.load()[0] == 1


class Code:
    def __reduce__(self):
        return os.mkdir, ("made",)


def test_nothing_is_run_from_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints(tmp_path / "c")
    with pytest.raises(TypeError, match="holds more than tensors and plain containers"):
        checkpoints.save(1, {"model": Code()})
    assert not (tmp_path / "made").exists() and names(checkpoints.folder) == []


@pytest.mark.parametrize("value", [lambda: 0, threading.Lock(), torch.nn.Linear(2, 2)], ids=["function", "lock", "module"])
def test_what_is_no_tensor_and_no_container_is_refused(tmp_path, value):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1))
    with pytest.raises(TypeError, match="holds more than tensors and plain containers"):
        checkpoints.save(2, {"model": [value]})
    assert names(tmp_path) == ["step-0000000001.ckpt"]


@pytest.mark.parametrize(("keep", "error"), [(1, ValueError), (0, ValueError), (2.0, TypeError)])
def test_bad_arguments(tmp_path, keep, error):
    with pytest.raises(error, match=f"keep is {keep}"):
        Checkpoints(tmp_path, keep=keep)
    with pytest.raises(TypeError, match="folder is 3 of type int; expected a path"):
        Checkpoints(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="step is -1"):
        Checkpoints(tmp_path).save(-1, {})
