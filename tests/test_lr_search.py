"""The search for learning rates: what it finds, when it gives up, and how it goes on."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from frog_cuda.__main__ import main
from frog_cuda.experiments import UsageError, datasets, lr_search
from frog_cuda.experiments.datasets import Images, Part
from frog_cuda.experiments.lr_search import Abort, Search, Training, best_rate, finished, highest, search, twice_the_best
from frog_cuda.experiments.trainer import Settings, Trainer

optuna = pytest.importorskip("optuna")

SETTINGS = Settings(lr=1.0, sizes={"width": 16}, gradient="bp", epochs=4)
TRAINING = Training((SETTINGS,))


@pytest.fixture(scope="module")
def few() -> Images:
    images = datasets.load("digits")
    return dataclasses.replace(images, train=Part(images.train.x[:320], images.train.y[:320]))


@pytest.fixture
def plan(tmp_path: Path) -> Search:
    return Search(1e-4, 10.0, 9, tmp_path / "search.journal")


def trials(plan: Search, objective: Training = TRAINING) -> list[Any]:
    return plan.study(objective).get_trials()


def run_all(settings: Settings, data: Images) -> float:
    trainer = Trainer(settings, data)
    while trainer.status is None:
        trainer.epoch()
    return math.inf if trainer.status == "diverged" else trainer.best_epoch["valid_loss"]


def test_search_finds_a_good_rate(plan: Search, few: Images) -> None:
    search(plan, [TRAINING], few, [9])
    lr, loss = best_rate(plan, TRAINING)
    assert loss == run_all(dataclasses.replace(SETTINGS, lr=lr), few), "the loss of a run with this rate"
    grid = [run_all(dataclasses.replace(SETTINGS, lr=10.0**e), few) for e in range(-4, 2)]
    assert loss <= 1.05 * min(grid)
    assert plan.low < lr < plan.high
    assert finished(plan.study(TRAINING)) == len(trials(plan)) == 9
    placed = [t.params["lr"] for t in trials(plan)[: lr_search.PLACED]]
    assert placed == pytest.approx([10.0 ** (1 - i * 5 / 6) for i in range(7)])


def test_search_goes_on(plan: Search, few: Images) -> None:
    search(plan, [TRAINING], few, [3])
    first = trials(plan)[:3]
    search(plan, [TRAINING], few, [5], process=1)
    after = trials(plan)
    assert [t.datetime_complete for t in after[:3]] == [t.datetime_complete for t in first]
    assert finished(plan.study(TRAINING)) == 8 and len({t.params["lr"] for t in after if t.state.is_finished()}) == 8
    other = Training((dataclasses.replace(SETTINGS, epochs=5),))
    with pytest.raises(UsageError, match="digits fc width=16 bp' there has other settings"):
        plan.study(other)


def test_mean_over_seeds(few: Images) -> None:
    runs = tuple(dataclasses.replace(SETTINGS, seed=s, lr=0.1) for s in (0, 1))
    seen: list[float] = []

    def report(epoch: int, value: float) -> bool:
        assert epoch == len(seen)
        seen.append(value)
        return False

    value = Training(runs)(0.1, report, few)
    each = [run_all(s, few) for s in runs]
    assert value == pytest.approx(sum(each) / 2, rel=1e-12) and each[0] != each[1]
    assert len(seen) == 4 and seen[-1] > value


def test_abort(few: Images) -> None:
    epochs: list[int] = []

    def second(epoch: int, value: float) -> bool:
        epochs.append(epoch)
        return epoch == 1

    with pytest.raises(Abort, match="twice the best"):
        TRAINING(0.1, second, few)
    assert epochs == [0, 1]
    with pytest.raises(Abort, match="learning rate 1e\\+06"):
        TRAINING(1e6, lambda epoch, value: False, few)


@pytest.mark.parametrize(
    ("value", "others", "gives_up"),
    [(1.9, [1.0, 5.0], False), (2.1, [1.0, 5.0], True), (2.1, [None, 5.0], False), (9.0, [], False), (math.inf, [1.0], True)],
)
def test_twice_the_best(value: float, others: list[float | None], gives_up: bool) -> None:
    """Compared are values of the same step; here the second one."""
    study = optuna.create_study(pruner=twice_the_best())
    for other in others:
        trial = study.ask()
        trial.report(0.01, 0)
        if other is not None:
            trial.report(other, 1)
        study.tell(trial, 0.01)
    fast = study.ask()
    fast.report(1e-3, 1)
    study.tell(fast, state=optuna.trial.TrialState.PRUNED)  # it diverged later, and does not count
    trial = study.ask()
    assert not trial.should_prune(), "nothing was reported"
    trial.report(0.01, 0)
    trial.report(value, 1)
    assert trial.should_prune() == gives_up


def test_nothing_comes_to_its_end(few: Images, tmp_path: Path) -> None:
    plan = Search(1e7, 1e9, 2, tmp_path / "search.journal")
    search(plan, [TRAINING], few, [2])
    assert [t.state.name for t in trials(plan)] == ["PRUNED", "PRUNED"]
    with pytest.raises(UsageError, match="digits fc width=16 bp: no trial came to its end; try a lower --low"):
        best_rate(plan, TRAINING)


def test_rates_close_to_one_that_diverged(plan: Search, few: Images) -> None:
    """They do not count, however low their loss, and are not tried."""
    study = plan.study(TRAINING)

    def add(lr: float, value: float | None) -> None:
        """A trial that ended so; None: it diverged."""
        state = optuna.trial.TrialState.PRUNED if value is None else optuna.trial.TrialState.COMPLETE
        lrs = {"lr": optuna.distributions.FloatDistribution(plan.low, plan.high, log=True)}
        attributes = {"diverged": value is None}
        study.add_trial(
            optuna.trial.create_trial(params={"lr": lr}, distributions=lrs, value=value, state=state, user_attrs=attributes)
        )

    for lr, value in ((0.1, 0.3), (0.3, 0.2), (0.4, 0.1)):
        add(lr, value)
    assert highest(plan, study) == math.inf and best_rate(plan, TRAINING) == (0.4, 0.1)
    add(0.8, None)
    assert highest(plan, study) == 0.4 and best_rate(plan, TRAINING) == (0.4, 0.1)
    add(0.7, None)
    assert highest(plan, study) == 0.35 and best_rate(plan, TRAINING) == (0.3, 0.2)
    add(0.15, None)
    with pytest.raises(UsageError, match="2 times 0.075 diverged, and no trial with at most 0.075 came to its end"):
        best_rate(plan, TRAINING)


def test_search_keeps_its_distance(few: Images, tmp_path: Path) -> None:
    """What follows the first trial, which diverges, is at most a thousandth of it."""
    plan = Search(1.0, 1e6, 4, tmp_path / "search.journal", margin=1e3)
    search(plan, [TRAINING], few, [4])
    first, *others = trials(plan)
    assert first.params["lr"] == pytest.approx(1e6) and first.user_attrs["diverged"]
    near = [t for t in others if t.params["lr"] > 1e3]
    assert [t.params["lr"] for t in near] == pytest.approx([1e4])
    assert near[0].user_attrs == {"aborted": "too close to a rate that diverged", "diverged": False}
    assert not near[0].intermediate_values, "nothing was trained"


def test_time_is_limited(plan: Search, few: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    search(plan, [TRAINING], few, [9], ends=time.time() - 1)
    assert finished(plan.study(TRAINING)) == 0
    monkeypatch.setattr(lr_search, "time", SimpleNamespace(time=lambda: 0.0))  # or setting up could take all the time
    search(plan, [TRAINING], few, [9], ends=1e-3)
    assert finished(plan.study(TRAINING)) == 1, "the trial that has begun comes to its end"


def take(plan: Search, count: int) -> list[int]:
    """Numbers of trials that a process takes from the queue."""
    study = plan.study(TRAINING)
    return [study.ask().number for _ in range(count)]


def test_no_trial_is_taken_twice(tmp_path: Path) -> None:
    plan = Search(1e-4, 10.0, 7, tmp_path / "search.journal")
    study = plan.study(TRAINING)
    for i in range(25):
        study.enqueue_trial({"lr": 1.0 + i})
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        taken = [number for numbers in pool.starmap(take, [(plan, 8)] * 4, chunksize=1) for number in numbers]
    assert sorted(taken) == list(range(32))


@pytest.mark.parametrize("content", [b"SQLite format 3\0", b"lr\n0.5\n", b'{"lr": 0.5}\n', b'{"lr": 0.5}', None])
def test_storage_that_is_something_else(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "other"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(
        UsageError, match=r"--storage is '.*other', which is no journal of Optuna, or a damaged one; choose another file"
    ):
        Search(1e-4, 10.0, 7, path).study(TRAINING)
    assert content is None or path.read_bytes() == content


def test_a_line_that_was_cut_off_is_taken_back(plan: Search) -> None:
    plan.study(TRAINING)
    whole = plan.storage.read_bytes()
    plan.storage.write_bytes(whole + whole.splitlines()[-1][:-9])
    assert len(take(plan, 1)) == 1
    lines = plan.storage.read_bytes()
    assert lines.startswith(whole) and len(lines) > len(whole)
    assert all(json.loads(line) for line in lines.splitlines())
    assert not list(plan.storage.parent.glob("*.lock"))


@pytest.mark.parametrize("jobs", [1, 2])
def test_command(jobs: int, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The table it writes is one that ``train`` reads; what stood in it stays."""
    monkeypatch.chdir(tmp_path)
    Path("rates.json").write_text(json.dumps({"functions": {"sphere": 0.5}, "train": {"other": 0.25}}))
    options = "--width 16 --gradient bp,forward --k 4 --epochs 2".split()
    found = f"lr-search --low 1e-3 --trials 4 --jobs {jobs} --lr-table rates.json".split()
    assert main([*found, *options]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    table = json.loads(Path("rates.json").read_text())
    assert table["functions"] == {"sphere": 0.5} and table["train"].pop("other") == 0.25
    cases = ["digits fc width=16 bp", "digits fc width=16 orthogonal k=4"]
    assert list(table["train"]) == cases and all(1e-3 <= rate <= 1 for rate in table["train"].values())
    for case in cases:
        assert f"{case}: {table['train'][case]:g}" in out
    assert out.count("best of 4 trials") == 2
    assert main([*found, *options]) == 0
    assert capfd.readouterr().out == out, "nothing is left to do"
    assert main(["train", *options, "--lr-table", "rates.json", "--output", "o"]) == 0
    used = {r["case"]: r["settings"]["lr"] for r in map(json.loads, (p.read_text() for p in Path("o").rglob("result.json")))}
    assert used == table["train"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--low 1 --high 1", "--low is 1 and --high is 1; expected a lower and a higher rate"),
        ("--low 0", "--low: '0' is not a number > 0"),
        ("--margin 0.5", "--margin: '0.5' is not a number >= 1"),
        ("--margin far", "--margin: 'far' is not a number >= 1"),
        ("--minutes 0", "--minutes: '0' is not an integer >= 1"),
        ("--trials 0", "--trials: '0' is not an integer >= 1"),
        ("--storage no/such.journal", "--storage is 'no/such.journal'; expected a file in a folder that exists"),
        ("--lr-table no/such.json", "--lr-table is 'no/such.json'; expected a file in a folder that exists"),
        ("--lr-table rates.csv", "--lr-table is 'rates.csv'; expected another ending, as JSON is written"),
        ("--optimizer Newton", "--optimizer is 'Newton'; accepted are"),
    ],
)
def test_wrong_options(
    options: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["lr-search", *options.split()])
    assert says in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))
