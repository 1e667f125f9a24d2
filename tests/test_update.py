"""ForwardGradient.update_ with momentum, weight decay and Nesterov's step, against .grad and torch.optim.SGD."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import assert_close64
from test_forward_gradient import batch, mlp, per_sample
from test_tangents_sgd import NAMES, OPTIONS

import frog_cuda as frog
from frog_cuda import SeedLog
from frog_cuda.sgd import Sgd

K = 3
MOMENTUM = dict(momentum=0.9, weight_decay=0.01, nesterov=True)


def supplied() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(K, *p.shape, generator=generator, dtype=p.dtype) for n, p in mlp().named_parameters()}


TANGENTS = {
    "normal": lambda: "normal",
    "rademacher": lambda: "rademacher",
    "orthonormal": lambda: "orthonormal",
    "standard_basis": lambda: "standard_basis",
    "low rank": lambda: frog.tangents.LowRank(2),
    "guided": lambda: frog.tangents.Guided(previous=2),
    "supplied": supplied,
}
AGGREGATES = {"orthogonal": "orthogonal", "custom": lambda v, d: d @ v / len(v)}


def both(tangents, options, aggregate="orthogonal", steps=4):
    """The parameters of a model moved by update_, and of its twin moved by torch.optim.SGD."""
    models = [mlp(), mlp()]
    fgs = [frog.ForwardGradient(m, per_sample, k=K, perturb="weight", tangents=tangents, aggregate=aggregate) for m in models]
    optimizer = torch.optim.SGD(models[1].parameters(), lr=0.05, **options)
    for step in range(steps):
        data = batch(8 + step)
        fgs[0].derivatives(*data)
        fgs[0].update_(0.05, **options)
        optimizer.zero_grad()
        fgs[1](*data)
        optimizer.step()
    assert all(p.grad is None for p in models[0].parameters())
    return [list(m.parameters()) for m in models], fgs


@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
@pytest.mark.parametrize("tangents", TANGENTS)
def test_equals_torch_optim_sgd(tangents, options):
    (own, torchs), _ = both(TANGENTS[tangents](), options)
    for a, b in zip(own, torchs, strict=True):
        assert_close64(a.detach(), b.detach())


def test_equals_torch_optim_sgd_with_a_custom_aggregation():
    (own, torchs), _ = both("normal", MOMENTUM, AGGREGATES["custom"])
    for a, b in zip(own, torchs, strict=True):
        assert_close64(a.detach(), b.detach())


class WithSpare(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.spare = mlp(), torch.nn.Linear(2, 2).double()

    def forward(self, x):
        return self.net(x)


def test_what_was_not_part_of_the_loss_stays():
    model = WithSpare()
    before = copy.deepcopy(model.spare.state_dict())
    fg = frog.ForwardGradient(model, per_sample, k=2, perturb="weight")
    fg.derivatives(*batch())
    fg.update_(0.1, **MOMENTUM)
    assert all(torch.equal(t, before[n]) for n, t in model.spare.state_dict().items())
    assert set(fg.state_dict()["momentum"]) == {f"net.{n}" for n, _ in model.net.named_parameters()}


@pytest.mark.parametrize("tangents", TANGENTS)
def test_a_resumed_run_repeats_bit_for_bit(tangents):
    def run(steps, fg):
        for _ in range(steps):
            fg.derivatives(*batch())
            fg.update_(0.05, **MOMENTUM)

    def make(model, seed=11):
        return frog.ForwardGradient(model, per_sample, k=K, perturb="weight", tangents=TANGENTS[tangents](), seed=seed)

    whole, half, again = mlp(), mlp(), mlp()
    run(6, make(whole))
    first = make(half)
    run(3, first)
    saved = copy.deepcopy(half.state_dict()), first.state_dict()
    run(1, first)  # what was saved does not change
    again.load_state_dict(saved[0])
    resumed = make(again, seed=5)
    resumed.load_state_dict(saved[1])
    run(3, resumed)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    # and nothing of the momentum is there by chance
    other = make(mlp(), seed=5)
    other.model.load_state_dict(saved[0])
    other.load_state_dict({k: v for k, v in saved[1].items() if k != "momentum"})
    run(3, other)
    assert not any(torch.equal(a, b) for a, b in zip(whole.parameters(), other.model.parameters(), strict=True))


def test_a_state_without_momentum_forgets_it():
    _, (fg, _) = both("normal", MOMENTUM)
    assert set(fg.state_dict()["momentum"]) == {n for n, _ in fg.model.named_parameters()}
    fg.load_state_dict({"seed": 1, "step": 0})
    assert "momentum" not in fg.state_dict()


def test_plain_steps_leave_momentum_alone():
    _, (fg, _) = both("normal", MOMENTUM)
    before = fg.state_dict()["momentum"]
    fg.update_(0.1)
    fg.update_(0.1, weight_decay=0.1)
    assert all(torch.equal(t, before[n]) for n, t in fg.state_dict()["momentum"].items())


@pytest.mark.parametrize(
    "momentum, error, match",
    [
        ([], TypeError, r"state\['momentum'\] is of type list"),
        ({"9.weight": torch.ones(3)}, ValueError, "'9.weight', not perturbed; known are 0.weight"),
        ({"0.weight": torch.ones(3)}, ValueError, r"\['0.weight'\] is \(3,\) torch.float32; expected"),
        ({"0.weight": 3}, ValueError, r"\['0.weight'\] is int; expected"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(momentum, error, match):
    _, (fg, _) = both("normal", MOMENTUM)
    before = fg.state_dict()
    with pytest.raises(error, match=match):
        fg.load_state_dict({"seed": 1, "step": 2, "momentum": momentum})
    after = fg.state_dict()
    assert (after["seed"], after["step"]) == (before["seed"], before["step"])
    assert all(torch.equal(t, after["momentum"][n]) for n, t in before["momentum"].items())
    activity = frog.ForwardGradient(mlp(), per_sample, k=K)
    with pytest.raises(ValueError, match="expected 'seed' and 'step'"):
        activity.load_state_dict({"seed": 1, "step": 2, "momentum": {}})


@pytest.mark.parametrize(
    "options, error, match",
    [
        (dict(lr="0.1"), TypeError, "lr is of type str; expected a number"),
        (dict(lr=math.nan), ValueError, "lr is nan; expected a finite number >= 0"),
        (dict(lr=-0.1), ValueError, "update_: lr is -0.1; expected a finite number >= 0"),
        (dict(momentum=-0.5), ValueError, "momentum is -0.5; expected a finite number >= 0"),
        (dict(momentum=True), TypeError, "momentum is of type bool"),
        (dict(weight_decay=-1), ValueError, "weight_decay is -1; expected a finite number >= 0"),
        (dict(dampening=math.inf), ValueError, "dampening is inf"),
        (dict(nesterov=1), TypeError, "nesterov is of type int; expected a bool"),
        (dict(nesterov=True), ValueError, "nesterov needs momentum > 0 and dampening 0, but momentum is 0.0"),
        (dict(nesterov=True, momentum=0.9, dampening=0.1), ValueError, "dampening is 0.1"),
    ],
)
def test_bad_options(options, error, match):
    fg = frog.ForwardGradient(mlp(), per_sample, k=K, perturb="weight")
    fg.derivatives(*batch())
    with pytest.raises(error, match=match):
        fg.update_(**{"lr": 0.1} | options)
    with pytest.raises(error, match=match):
        Sgd(**{"lr": 0.1} | options)
    assert all(torch.equal(a, b) for a, b in zip(fg.model.parameters(), mlp().parameters(), strict=True))


def test_a_seed_log_takes_plain_steps_only(tmp_path):
    fg = frog.ForwardGradient(mlp(), per_sample, k=K, perturb="weight")
    with SeedLog(tmp_path / "log", fg) as log:
        fg.derivatives(*batch())
        for options in (dict(momentum=0.9), dict(weight_decay=0.1)):
            with pytest.raises(ValueError, match=r"SeedLog.update_: momentum is .* so both must be 0"):
                log.update_(0.1, **options)
        assert all(torch.equal(a, b) for a, b in zip(fg.model.parameters(), mlp().parameters(), strict=True))
        log.update_(0.1)
    twin = mlp()
    assert SeedLog.replay(tmp_path / "log", twin) == 1
    assert all(torch.equal(a, b) for a, b in zip(fg.model.parameters(), twin.parameters(), strict=True))
