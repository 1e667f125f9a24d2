"""A run replayed from seeds and coefficients gives the parameters of the run, bit for bit; damaged logs are named."""

from __future__ import annotations

import copy
import hashlib
import json
import re

import pytest
import torch
from torch import nn

import frog_cuda as frog
from frog_cuda import SeedLog
from frog_cuda.seed_log import records
from frog_cuda.tangents import Cone, LowRank


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3))


def estimator(model: nn.Module, **options) -> frog.ForwardGradient:
    return frog.ForwardGradient(model, nn.MSELoss(), **({"k": 3, "perturb": "weight", "seed": -7} | options))


def run(log: SeedLog, steps: int, lr: float = 0.05, first: int = 0) -> list[dict[str, torch.Tensor]]:
    """The parameters before each step, and after the last."""
    seen = [copy.deepcopy(log.fg.model.state_dict())]
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        log.fg.derivatives(torch.randn(4, 5, generator=generator), torch.randn(4, 3, generator=generator))
        log.update_(lr / (1 + step))
        seen.append(copy.deepcopy(log.fg.model.state_dict()))
    return seen


def equal(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_thousand_steps(tmp_path):
    path, twin = tmp_path / "log", net()
    with SeedLog(path, estimator(net())) as log:
        seen = run(log, 1000)
    assert SeedLog.replay(path, twin) == 1000 and equal(twin, seen[-1])
    header = len(path.read_bytes()) - 1000 * (16 + 4 * 3)
    assert 0 < header < 1000
    assert [r.step for r in records(path)] == list(range(1000))


@pytest.mark.parametrize(
    "tangents", ["normal", "rademacher", "orthonormal", "standard_basis", "varying_length", Cone(30.0), LowRank(1)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_distribution_and_dtype(tmp_path, tangents, dtype):
    path, twin = tmp_path / "log", net().to(dtype)
    with SeedLog(path, estimator(net().to(dtype), tangents=tangents)) as log:
        log.fg.derivatives(torch.ones(2, 5, dtype=dtype), torch.zeros(2, 3, dtype=dtype))
        log.update_(0.1)
        log.fg.derivatives(torch.ones(2, 5, dtype=dtype), torch.zeros(2, 3, dtype=dtype))
        log.update_(0.1)
    assert SeedLog.replay(path, twin) == 2 and equal(twin, log.fg.model.state_dict())


def test_what_lags_behind_catches_up(tmp_path):
    path, twin = tmp_path / "log", net()
    with SeedLog(path, estimator(net())) as log:
        seen = run(log, 10)
        assert SeedLog.replay(path, twin, stop=4) == 4 and equal(twin, seen[4])
        assert SeedLog.replay(path, twin, start=4, stop=7) == 3 and equal(twin, seen[7])
        assert SeedLog.replay(path, twin, start=7) == 3 and equal(twin, seen[10])


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (dict(start=-1), ValueError, r"start is -1; expected an integer in \[0, 3\] \(stop=3\)"),
        (dict(start=4), ValueError, r"start is 4; expected an integer in \[0, 3\]"),
        (dict(start=3, stop=1), ValueError, r"start is 3; expected an integer in \[0, 1\] \(stop=1\)"),
        (dict(start=1.5), TypeError, "start is 1.5 of type float; expected an integer"),
        (dict(start=True), TypeError, "start is True of type bool"),
        (dict(start=None), TypeError, "start is None of type NoneType"),
        (dict(stop=4), ValueError, r"stop is 4; expected an integer in \[0, 3\] \(the complete records of .*log\)"),
        (dict(stop=-1), ValueError, "stop is -1; expected an integer"),
        (dict(stop="x"), TypeError, "stop is 'x' of type str; expected an integer"),
        (dict(stop=2.0), TypeError, "stop is 2.0 of type float"),
    ],
    ids=str,
)
def test_records_that_there_are_not(tmp_path, options, error, said):
    path, twin = tmp_path / "log", net()
    with SeedLog(path, estimator(net())) as log:
        seen = run(log, 3)
    with path.open("ab") as file:
        file.write(b"cut short")
    with pytest.raises(error, match=said):
        SeedLog.replay(path, twin, **options)
    assert equal(twin, seen[0])
    assert SeedLog.replay(path, twin, stop=0) == 0 and SeedLog.replay(path, twin, start=3) == 0 and equal(twin, seen[0])
    assert SeedLog.replay(path, twin, start=torch.arange(1).numpy()[0], stop=3) == 3 and equal(twin, seen[-1])


def test_what_lies_behind_stop_is_not_read(tmp_path):
    path, twin = tmp_path / "log", net()
    with SeedLog(path, estimator(net())) as log:
        seen = run(log, 3)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    assert SeedLog.replay(path, twin, stop=2) == 2 and equal(twin, seen[2])
    with pytest.raises(ValueError, match="record 2 does not match its checksum"):
        SeedLog.replay(path, twin, start=2)


def test_the_update_is_that_of_the_estimate(tmp_path):
    with SeedLog(tmp_path / "log", estimator(net().double())) as log:
        plain = estimator(net().double())
        for fg in (log.fg, plain):
            fg.derivatives(torch.ones(2, 5).double(), torch.zeros(2, 3).double())
        log.update_(0.1)
        plain.update_(0.1)
    for p, q in zip(log.fg.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)  # coefficients have 24 bits


def test_an_interrupted_run_goes_on(tmp_path):
    path, whole = tmp_path / "log", tmp_path / "whole"
    with SeedLog(whole, estimator(net())) as log:
        expected = run(log, 8)
    with SeedLog(path, estimator(net())) as log:
        run(log, 5)
    with path.open("ab") as file:
        file.write(whole.read_bytes()[-11:])  # a record that was cut short
    model = net()
    assert SeedLog.replay(path, model) == 5
    fg = estimator(model)
    fg.load_state_dict({"seed": -7, "step": 5})
    with SeedLog(path, fg) as log:
        run(log, 3, first=5)
    assert equal(model, expected[-1]) and path.read_bytes() == whole.read_bytes()


def test_a_run_that_starts_again_does_not_go_on_in_its_log(tmp_path):
    path, twin = tmp_path / "log", net()
    with SeedLog(path, estimator(net())) as log:
        seen = run(log, 3)
    content = path.read_bytes()
    said = f"{re.escape(str(path))} ends with step 2 of seed -7, but fg is at step 0 of seed -7, which does not come after it"
    with pytest.raises(ValueError, match=said):
        SeedLog(path, estimator(net()))
    other = estimator(net(), seed=1)
    other.step = 3
    for truncate in (False, True):
        with pytest.raises(ValueError, match="ends with step 2 of seed -7, but fg is at step 3 of seed 1"):
            SeedLog(path, other, truncate=truncate)
    assert path.read_bytes() == content
    assert SeedLog.replay(path, twin) == 3 and equal(twin, seen[-1])


@pytest.mark.parametrize("step", range(7))
def test_a_checkpoint_that_lags_behind_the_log(tmp_path, step):
    """Its steps are taken again and written down in the same bits, or the parameters catch up with the log."""
    path = tmp_path / "log"
    with SeedLog(path, estimator(net())) as log:
        seen = run(log, 6)
    content = path.read_bytes()

    def resumed(step: int) -> frog.ForwardGradient:
        fg = estimator(net())
        fg.model.load_state_dict(seen[step])
        fg.load_state_dict({"seed": -7, "step": step})
        return fg

    if step < 6:
        with pytest.raises(ValueError, match=rf"fg is at step {step} .*truncate=True.* all 6 records, and fg.step = 6 goes on"):
            SeedLog(path, resumed(step))
    with SeedLog(path, resumed(step), truncate=True) as log:
        run(log, 6 - step, first=step)
    assert equal(log.fg.model, seen[-1]) and path.read_bytes() == content

    behind = resumed(step)
    assert SeedLog.replay(path, behind.model, start=step) == 6 - step and equal(behind.model, seen[-1])
    behind.step = 6
    with SeedLog(path, behind) as log:
        seen += run(log, 1, first=6)[1:]
    twin = net()
    assert SeedLog.replay(path, twin) == 7 and equal(twin, seen[-1])


def test_a_log_without_a_whole_record_starts_anew(tmp_path):
    path, twin = tmp_path / "log", net()
    with SeedLog(path, estimator(net())) as log:
        run(log, 1)
    path.write_bytes(path.read_bytes()[:-1])
    nn.init.ones_(twin[0].bias)
    with SeedLog(path, estimator(copy.deepcopy(twin))) as log:
        run(log, 2)
    assert SeedLog.replay(path, twin) == 2 and equal(twin, log.fg.model.state_dict())


def test_frozen_parameters_and_those_that_take_no_part(tmp_path):
    def parts() -> nn.Module:
        torch.manual_seed(0)
        model = nn.ModuleDict({"used": nn.Linear(5, 3), "idle": nn.Linear(2, 2), "frozen": nn.Linear(3, 3)})
        model["frozen"].requires_grad_(False)
        model.forward = lambda x: model["frozen"](model["used"](x))
        return model

    path, twin = tmp_path / "log", parts()
    with SeedLog(path, estimator(parts())) as log:
        seen = run(log, 3)
    assert SeedLog.replay(path, twin) == 3 and equal(twin, seen[-1])


def test_bad_use_is_named(tmp_path):
    path = tmp_path / "log"
    with pytest.raises(ValueError, match="SeedLog: only for perturb='weight'"):
        SeedLog(path, frog.ForwardGradient(net(), nn.MSELoss(), k=2))
    with pytest.raises(ValueError, match="supplied tangents cannot be replayed"):
        SeedLog(path, estimator(net(), tangents=lambda k, n, generator: torch.ones(k, n)))
    with (
        SeedLog(path, estimator(net(), aggregate=lambda v, d: d @ v)) as log,
        pytest.raises(ValueError, match="custom aggregation"),
    ):
        run(log, 1)
    with SeedLog(path, estimator(net())) as log, pytest.raises(RuntimeError, match="no gradient was estimated yet"):
        log.update_(0.1)
    with SeedLog(path, estimator(net())) as log:
        run(log, 2)
    with pytest.raises(ValueError, match="was written with other k: 3, not 4"):
        SeedLog(path, estimator(net(), k=4))
    with pytest.raises(ValueError, match="was written with other tangents"):
        SeedLog(path, estimator(net(), tangents="rademacher"))
    with pytest.raises(ValueError, match="parameter 0.weight is \\(6, 5\\) in the model, but \\(9, 5\\)"):
        SeedLog.replay(path, nn.Sequential(nn.Linear(5, 6)))
    with pytest.raises(ValueError, match="parameter 0.weight is missing in the model"):
        SeedLog.replay(path, nn.Linear(5, 9))
    other = net()
    nn.init.zeros_(other[0].weight)
    with pytest.raises(ValueError, match="does not hold the initial weights"):
        SeedLog.replay(path, other)


def test_bad_types_are_named(tmp_path):
    path = tmp_path / "log"
    with pytest.raises(TypeError, match="fg is of type int; expected a ForwardGradient, such as the attribute fg of a Tang"):
        SeedLog(path, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="path is 3 of type int; expected a path"):
        SeedLog(3, estimator(net()))  # type: ignore[arg-type]
    assert not path.exists()
    with SeedLog(str(path), estimator(net())) as log:
        run(log, 1)
    with pytest.raises(TypeError, match="model is of type int; expected a torch.nn.Module"):
        SeedLog.replay(path, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="path is None of type NoneType; expected a path"):
        SeedLog.replay(None, net())  # type: ignore[arg-type]


def test_damage_is_named(tmp_path):
    path = tmp_path / "log"
    with SeedLog(path, estimator(net())) as log:
        run(log, 3)
    sound = path.read_bytes()
    for at, said in (
        (-30, "record 1 does not match its checksum"),
        (3, "is no seed log"),
        (25, "header does not match its check"),
    ):
        damaged = bytearray(sound)
        damaged[at] ^= 0x55
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=said):
            SeedLog.replay(path, net())
    path.write_bytes(sound[:-1])
    assert SeedLog.replay(path, net()) == 2


def with_header(sound: bytes, line: bytes) -> bytes:
    """A log with another header, and the checksum of that."""
    name, _, _, records = sound.split(b"\n", 3)
    return b"\n".join((name, line, hashlib.sha256(line + b"\n").hexdigest().encode(), records))


def test_every_bit_of_the_header_counts(tmp_path):
    path = tmp_path / "log"
    fg = frog.ForwardGradient(nn.Linear(2, 1), nn.MSELoss(), k=1, perturb="weight")
    with SeedLog(path, fg) as log:
        start = copy.deepcopy(fg.model)
        log.fg.derivatives(torch.ones(1, 2), torch.zeros(1, 1))
        log.update_(0.1)
    sound = path.read_bytes()
    for bit in range(8 * (len(sound) - (16 + 4))):
        damaged = bytearray(sound)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            SeedLog.replay(path, start)
    path.write_bytes(sound)
    assert SeedLog.replay(path, start) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(k=True), "k is True; expected an integer >= 1"),
        (dict(k=0), "k is 0"),
        (dict(tangents={}), "tangents is {}; expected 'base'"),
        (dict(tangents={"base": "sphere"}), "tangents is {'base': 'sphere'}"),
        (dict(tangents={"base": "standard_basis", "rank": 1}), "tangents is .*'standard_basis', 'rank': 1}"),
        (dict(tangents={"base": "normal", "rank": 1.5}), "the rank of tangents is 1.5"),
        (dict(tangents=["base"]), r"tangents is \['base'\]"),
        (dict(parameters=[]), r"parameters is \[\]"),
        (dict(parameters=[["0.weight", [9, 5]]]), "a parameter is .*; expected name, shape and offset"),
        (dict(parameters=[["0.weight", [9, -5], 0]]), r"parameter 0.weight has shape \[9, -5\]"),
        (dict(parameters=[["0.weight", [9, 5], 1]]), "parameter 0.weight begins at 1; expected 0"),
        (dict(parameters=[["a", [9, 5], 0], ["b", [9], 44]]), "parameter b begins at 44; expected 45"),
        (dict(parameters=[["a", [9, 5], 0], ["a", [9], 45]]), "two parameters have one name"),
        (dict(total=85), "total is 85, but its parameters have 84 elements"),
        (dict(initial=3), "initial is 3"),
        (dict(taking_part=["0.veight"]), r"taking_part is \['0.veight'\]; expected some of the parameters, in their order"),
        (dict(taking_part=["0.bias", "0.weight"]), "taking_part is"),
        (dict(taking_part=3), "taking_part is 3"),
    ],
    ids=str,
)
def test_a_header_that_no_log_has(tmp_path, change, said):
    path = tmp_path / "log"
    with SeedLog(path, estimator(net())) as log:
        run(log, 1)
    sound = path.read_bytes()
    header = json.loads(sound.split(b"\n")[1])
    path.write_bytes(with_header(sound, json.dumps(header | change).encode()))
    for use in (lambda: SeedLog.replay(path, net()), lambda: SeedLog(path, estimator(net()))):
        with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged: {said}"):
            use()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"3", "is of type int; expected an object"),
        (b"null", "is of type NoneType"),
        (b"[]", "is of type list"),
        (b'{"k": 3}', "lacks initial, parameters, taking_part, tangents, total"),
        (b'{"k": "\xff"}', "cannot be read"),
        (b"{", "cannot be read"),
    ],
    ids=str,
)
def test_a_header_of_another_kind(tmp_path, line, said):
    path = tmp_path / "log"
    with SeedLog(path, estimator(net())) as log:
        run(log, 1)
    path.write_bytes(with_header(path.read_bytes(), line))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged: its header {said}"):
        SeedLog.replay(path, net())


def test_logs_of_another_version_are_refused(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"frog_cuda seed log 1\n{}\n")
    for use in (lambda: SeedLog.replay(path, net()), lambda: SeedLog(path, estimator(net()))):
        with pytest.raises(ValueError, match=f"{re.escape(str(path))} is of version '1' of the format; expected version '2'"):
            use()
