"""Tangents at an angle: quality of estimates against the library's own, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import frog_cuda as frog
from frog_cuda.__main__ import main
from frog_cuda.experiments.angles import ANGLES, KS, approaches, approximate

F64 = {"dtype": torch.float64, "sampler": "frog", "simulate": False}


@pytest.mark.parametrize("aggregate", ["mean", "sum", "orthogonal"])
def test_estimates_are_those_of_the_library(aggregate: str) -> None:
    found = approximate(4, 10, 30, 3, 5, **F64)[aggregate]
    for s in range(3):
        _, estimate = frog.forward_gradient(
            torch.sum,
            torch.zeros(10, dtype=torch.float64),
            k=4,
            tangents=frog.tangents.Cone(30),
            aggregate=aggregate,
            seed=5 + s,
        )
        cosine = torch.nn.functional.cosine_similarity(estimate, torch.ones(10, dtype=torch.float64), dim=0)
        assert found.cosine[s, 0].item() == pytest.approx(cosine.item(), abs=1e-9)
        assert found.ratio[s, 0].item() == pytest.approx((estimate.norm() / math.sqrt(10)).item(), rel=1e-9)


def test_the_projection_does_not_depend_on_the_angle() -> None:
    """Its span is that of the normal tangents that the cone is made of; the mean narrows with the cone."""
    narrow, wide, normal = (approximate(16, 64, angle, 300, 0, **F64) for angle in (15, 90, None))
    for found in (narrow, wide):
        torch.testing.assert_close(found["orthogonal"].cosine, normal["orthogonal"].cosine, rtol=0, atol=1e-8)
    assert normal["orthogonal"].cosine.mean().item() == pytest.approx(0.495, abs=0.01)
    means = [found["mean"].cosine.mean().item() for found in (narrow, wide, normal)]
    assert means[0] < 0.2 < means[1] and means[1] == pytest.approx(means[2], abs=0.02)


def test_forward_equals_simulated() -> None:
    forward, simulated = (approximate(16, 64, 45, 3, 0, **{**F64, "simulate": simulate}) for simulate in (False, True))
    for name in forward:
        torch.testing.assert_close(forward[name].cosine, simulated[name].cosine, rtol=1e-9, atol=1e-11)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["angles", "--seeds", "1", "--samples", "3", "--max-steps", "5", "--output", str(tmp_path)]
    assert main([*given, "--angle", "15", "--angle", "60"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "angles.png" in out and "normal" in out
    quality, descent = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("angles", "angles_descent"))
    assert quality["complete"] and len(quality["rows"]) == 3 * 3 * 5
    assert descent["complete"] and len(descent["rows"]) == 3 * 3 * 2
    assert {row["angle"] for row in descent["rows"]} == {15, 60, None}
    assert (tmp_path / "angles.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "angles_descent.csv").read_text()
    assert main([*given, "--angle", "60", "--angle", "15", "--resume"]) == 0
    assert (tmp_path / "angles_descent.csv").read_text() == before


def test_options_that_cannot_be(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for angle in ("0", "91", "x", "-5", "12.5"):
        with pytest.raises(SystemExit):
            main(["angles", "--angle", angle, "--output", str(tmp_path / "none")])
        assert "is not an integer in [1, 90]" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["angles", "--angle", "17", "--output", str(tmp_path / "none")])
    assert "has no rate for 'angles', 'styblinski-tang n=64 mean k=4 angle=17'" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_approaches() -> None:
    names = [a.name for a in approaches(KS, ANGLES)]
    assert len(names) == len(set(names)) == 3 * 7 * 2
    assert "orthogonal k=16 angle=45" in names and "mean k=64" in names
