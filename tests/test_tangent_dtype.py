"""benchmarks/tangent_dtype.py on the smallest network, and that it notices wrong estimates."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def test_it_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "tangent_dtype.py"), "--models", "fc32,tiny-lenet5", "--k", "1,3"]
    done = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "tangent_dtype.json").read_text())["records"]
    assert {(r["kind"], r["k"], r["dtype"]) for r in records} == {
        (kind, k, dtype)
        for kind in ("activity", "weight, low rank")
        for k in (1, 3)
        for dtype in ("bfloat16", "float16", "float8")
    }
    errors = {(r["model"], r["kind"], r["k"], r["dtype"]): r["error"] for r in records}
    for (model, kind, k, dtype), error in errors.items():
        if dtype == "float8":  # sizes of a fc32 are multiples of 16, but for the last; those of tiny-lenet5 are not
            other = errors[model, kind, k, "bfloat16"]
            assert error > 1.2 * other if model == "fc32" else error == other
    for r in records:
        assert 0 < r["error"] < 0.05 and 0.99 < r["cosine"] <= 1 + 1e-9
    assert (tmp_path / "tangent_dtype.md").read_text().count("lenet5") == len(records) / 2


def test_a_wrong_estimate_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    from tangent_dtype import wrong

    assert not wrong({"error": 0.02, "cosine": 0.999})
    assert wrong({"error": 1.0, "cosine": 0.999}) and wrong({"error": 0.02, "cosine": 0.1})
    assert wrong({"error": float("nan"), "cosine": 1.0})
