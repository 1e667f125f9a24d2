"""``python -m frog_cuda lr-search``: learning rates for the experiments, found by trying.

The paper (arXiv 2410.17764, section 4 and appendix) searched log10 of the learning rate in [-6, 0] with an asynchronous
evolutionary algorithm, and a surrogate that aborts what is worse than twice the best. Here Optuna searches the same range,
first at equal distances, then where its Parzen estimator expects to improve; :func:`twice_the_best` aborts in the same way.

The lowest loss is often found just below the rates with which runs diverge, where another seed diverges too. So a rate must
keep its distance to every rate with which a run diverged: :attr:`Search.margin`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import multiprocessing.pool
import os
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import UsageError, require, train
from .datasets import Images
from .options import positive
from .rates import RateTable
from .trainer import Settings, Trainer

__all__ = ["Search", "Training", "add_arguments", "best_rate", "highest", "run", "search", "twice_the_best"]

#: how many trials are placed at equal distances: one in each power of ten of the paper's range
PLACED = 7

#: (step, value so far) -> whether to give up
Report = Callable[[int, float], bool]


class Abort(Exception):
    """A trial that is given up: :data:`Report` said so, or the rate is too close to one that diverged."""


class Diverged(Abort):
    """A trial in which a run diverged."""


@dataclass(frozen=True)
class Training:
    """What is lowered where ``train`` is searched for: the lowest validation loss of a run, mean over ``runs``.

    Arguments:
        runs: settings that differ in their seed; their learning rate is replaced.
    """

    runs: tuple[Settings, ...]

    @property
    def case(self) -> str:
        return self.runs[0].case

    def __call__(self, lr: float, report: Report, data: Images) -> float:
        """Trains all seeds side by side, epoch by epoch.

        Raises:
            Abort: see there.
        """
        trainers = [Trainer(Settings(**{**s.plain(), "lr": lr}), data) for s in self.runs]
        for epoch in itertools.count():
            for trainer in trainers:
                trainer.epoch()
                if trainer.status == "diverged":
                    raise Diverged(trainer.message)
            value = statistics.fmean(t.best_epoch["valid_loss"] for t in trainers)
            if all(t.status is not None for t in trainers):
                return value
            if report(epoch, value):
                raise Abort("worse than twice the best")
        raise AssertionError("unreachable")


@dataclass(frozen=True)
class Search:
    """Where and how long to search.

    Arguments:
        low, high: ends of the range.
        trials: how many rates to try.
        storage: file of all trials, a journal of Optuna.
        seed: of the sampler.
        margin: a rate counts if no trial with less than ``margin`` times that rate diverged.
    """

    low: float
    high: float
    trials: int
    storage: Path
    seed: int = 0
    margin: float = 2.0

    def study(self, objective: Training, process: int = 0) -> Any:
        """The study of a case, new or as it stands.

        Arguments:
            process: see :func:`search`.
        Raises:
            UsageError: it was made with other settings, or the file is no journal.
        """
        (optuna,) = require("optuna")
        optuna.logging.set_verbosity(optuna.logging.ERROR)  # what ends a trial is raised as well
        study = optuna.create_study(
            storage=self._journal(),
            study_name=f"train {objective.case}",
            load_if_exists=True,
            sampler=optuna.samplers.TPESampler(seed=self.seed + process, n_startup_trials=PLACED, constant_liar=True),
            pruner=twice_the_best(),
        )
        mine = {
            "low": self.low,
            "high": self.high,
            "margin": self.margin,
            "runs": [{**s.plain(), "lr": None} for s in objective.runs],
        }
        mine = json.loads(json.dumps(mine))
        theirs = study.user_attrs.get("settings")
        if theirs is None:
            study.set_user_attr("settings", mine)
            count = min(self.trials, PLACED)
            for i in range(count):  # from high to low: what diverges does so at once, and what follows has something to beat
                place = (count - 1 - i) / max(count - 1, 1)
                study.enqueue_trial({"lr": self.low * (self.high / self.low) ** place})
        elif theirs != mine:
            raise UsageError(f"--storage: the search for {objective.case!r} there has other settings; choose another file")
        return study

    def _journal(self) -> Any:
        """A journal, not a database: of SQLite, two processes at times take the same trial, and the second one then fails."""
        (optuna,) = require("optuna")
        journal = optuna.storages.journal
        what = "which is no journal of Optuna, or a damaged one"
        other = UsageError(f"--storage is {str(self.storage)!r}, {what}; choose another file")
        if self.storage.is_file():
            with self.storage.open("rb") as file:
                start = file.readline()
            # Optuna itself takes a file without a whole line for an empty journal, and would append to it
            if start and not (start.startswith(b'{"op_code"') and start.endswith(b"\n")):
                raise other
            _cut_back(self.storage, journal.JournalFileSymlinkLock(str(self.storage)))
        try:
            return optuna.storages.JournalStorage(journal.JournalFileBackend(str(self.storage)))
        except (ValueError, KeyError, IsADirectoryError) as error:
            raise other from error


def _cut_back(path: Path, lock: Any) -> None:
    """Removes the last line of a journal where it was not written whole, as on a full disk: what is appended to such a line is
    lost."""
    lock.acquire()
    try:
        with path.open("rb+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            whole = sum(len(line) for line in file if line.endswith(b"\n"))
            if whole < size:
                file.truncate(whole)
    finally:
        lock.release()


def twice_the_best() -> Any:
    """A pruner of Optuna that gives up a trial whose value is more than twice the lowest one at the same step. It compares with
    trials that came to their end: one that was fast at first and then diverged is no measure."""
    (optuna,) = require("optuna")

    class TwiceTheBest(optuna.pruners.BasePruner):  # type: ignore[name-defined, misc]
        def prune(self, study: Any, trial: Any) -> bool:
            step = trial.last_step
            if step is None:
                return False
            ended = (optuna.trial.TrialState.COMPLETE,)
            others = (t.intermediate_values.get(step, math.inf) for t in study.get_trials(deepcopy=False, states=ended))
            return trial.intermediate_values[step] > 2 * min(others, default=math.inf)

    return TwiceTheBest()


def finished(study: Any) -> int:
    """How many trials ended, aborted ones included."""
    return sum(t.state.name in ("COMPLETE", "PRUNED") for t in study.get_trials(deepcopy=False))


def highest(plan: Search, study: Any) -> float:
    """The highest rate that counts, as far as trials tell: the lowest one that diverged, divided by the margin."""
    trials = study.get_trials(deepcopy=False)
    return min((t.params["lr"] for t in trials if t.user_attrs.get("diverged")), default=math.inf) / plan.margin


def search(
    plan: Search,
    objectives: Sequence[Training],
    data: Images,
    counts: Sequence[int],
    process: int = 0,
    ends: float = math.inf,
) -> None:
    """Tries rates for one case after the other. One that does not count, by :func:`highest`, is passed over.

    Arguments:
        counts: how many trials for each case.
        process: number of this one among those that search at the same time; gives each a sampler of its own.
        ends: no trial begins after this time, in seconds since the epoch.
    """
    optuna, tqdm = require("optuna", "tqdm")
    for objective, count in zip(objectives, counts, strict=True):
        if count == 0 or time.time() >= ends:
            continue
        study = plan.study(objective, process)

        def one(trial: Any, objective: Training = objective, study: Any = study) -> float:
            lr = trial.suggest_float("lr", plan.low, plan.high, log=True)

            def report(step: int, value: float) -> bool:
                trial.report(value, step)
                return trial.should_prune()

            try:
                if lr > highest(plan, study):
                    raise Abort("too close to a rate that diverged")
                return objective(lr, report, data)
            except Abort as why:
                trial.set_user_attr("aborted", str(why))
                trial.set_user_attr("diverged", isinstance(why, Diverged))
                raise optuna.TrialPruned(str(why)) from why

        with tqdm.tqdm(total=count, desc=objective.case, unit="trial", disable=None, position=process) as bar:
            left = None if math.isinf(ends) else ends - time.time()
            study.optimize(one, n_trials=count, timeout=left, callbacks=[lambda study, trial, bar=bar: bar.update()])


def _process(
    plan: Search, objectives: Sequence[Training], args: argparse.Namespace, counts: list[int], ends: float, process: int
) -> None:
    torch.set_num_threads(args.threads or 1)
    search(plan, objectives, train.prepare(args), counts, process, ends)


def best_rate(plan: Search, objective: Training) -> tuple[float, float]:
    """The rate with the lowest loss so far, among those that count by :func:`highest`, and that loss.

    Raises:
        UsageError: every trial was aborted, or no rate counts.
    """
    study = plan.study(objective)
    ended = [t for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE"]
    if not ended:
        raise UsageError(f"{objective.case}: no trial came to its end; try a lower --low or more --trials")
    top = highest(plan, study)
    done = [t for t in ended if t.params["lr"] <= top]
    if not done:
        raise UsageError(
            f"{objective.case}: {plan.margin:g} times {top:.3g} diverged, and no trial with at most {top:.3g} came to its "
            "end; try a lower --low or more --trials"
        )
    best = min(done, key=lambda t: t.value)
    return best.params["lr"], best.value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m frog_cuda lr-search``."""
    train.add_settings(parser)
    add = parser.add_argument
    add("--low", type=train.learning_rate, default=1e-6, help="lowest learning rate (default: %(default)s)")
    add("--high", type=train.learning_rate, default=1.0, help="highest (default: %(default)s)")
    add("--trials", type=positive, default=20, help="rates to try for each case (default: %(default)s)")
    add(
        "--margin",
        type=_margin,
        default=2.0,
        metavar="FACTOR",
        help="keep so far below rates with which a run diverged (default: %(default)s)",
    )
    add("--minutes", type=positive, help="begin no trial after so long; the same command goes on (default: no limit)")
    add("--jobs", type=positive, default=1, help="processes that search at the same time (default: %(default)s)")
    add("--search-seed", type=int, default=0, help="of the choice of rates (default: %(default)s)")
    add("--storage", type=Path, default=Path("lr_search.journal"), help="file of all trials (default: %(default)s)")
    add("--lr-table", type=Path, default=Path("learning_rates.json"), help="where to put rates in (default: %(default)s)")


def _margin(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number >= 1")
    return value


def run(args: argparse.Namespace) -> None:
    """Searches, prints what was found, and puts it into the table. Trials in ``--storage`` count: a search that was
    interrupted, or is wanted with more trials, goes on.

    Raises:
        MissingPackages: Optuna or what the data needs is not installed.
        UsageError: options or data cannot be used, or a study is of other settings.
    """
    require("optuna")
    if not args.low < args.high:
        raise UsageError(f"--low is {args.low:g} and --high is {args.high:g}; expected a lower and a higher rate")
    if args.lr_table.suffix == ".csv":
        raise UsageError(f"--lr-table is {str(args.lr_table)!r}; expected another ending, as JSON is written")
    cases: dict[str, list[Settings]] = {}
    for settings in train.settings_of(args, lambda case: 1.0):
        cases.setdefault(settings.case, []).append(settings)
    objectives = [Training(tuple(runs)) for runs in cases.values()]
    table = RateTable.read(args.lr_table) if args.lr_table.exists() else RateTable({}, f"--lr-table {str(args.lr_table)!r}")
    for option, path in (("--storage", args.storage), ("--lr-table", args.lr_table)):
        if not path.resolve().parent.is_dir():
            raise UsageError(f"{option} is {str(path)!r}; expected a file in a folder that exists")
    plan = Search(args.low, args.high, args.trials, args.storage.resolve(), args.search_seed, args.margin)
    ends = math.inf if args.minutes is None else time.time() + 60 * args.minutes
    data = train.prepare(args)
    for objective in objectives:
        Trainer(objective.runs[0], data)  # what a model does not accept is said at once
    left = [max(plan.trials - finished(plan.study(objective)), 0) for objective in objectives]
    if args.jobs == 1:
        for objective, count in zip(objectives, left, strict=True):
            search(plan, [objective], data, [count], ends=ends)
            _found(plan, objective, table, args.lr_table)
        return
    shares = [[count // args.jobs + (i < count % args.jobs) for count in left] for i in range(args.jobs)]
    with _pool(args.jobs) as pool:
        pool.starmap(_process, [(plan, objectives, args, counts, ends, i) for i, counts in enumerate(shares)], chunksize=1)
    for objective in objectives:
        _found(plan, objective, table, args.lr_table)


def _pool(jobs: int) -> multiprocessing.pool.Pool:
    """Processes that leave Ctrl-C, which a terminal sends to all, to this one; it ends them then."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # they inherit it
    try:
        return multiprocessing.get_context("spawn").Pool(jobs)
    finally:
        signal.signal(signal.SIGINT, before)


def _found(plan: Search, objective: Training, table: RateTable, path: Path) -> None:
    """Puts a rate into the table, and says so."""
    count = finished(plan.study(objective))
    if count < plan.trials:
        print(f"{objective.case}: {count} of {plan.trials} trials so far", flush=True)
        return
    lr, loss = best_rate(plan, objective)
    lr = float(f"{lr:.3g}")
    table.set("train", objective.case, lr)
    table.write(path)
    edge = " at the end of the range" if not plan.low * 1.01 < lr < plan.high / 1.01 else ""
    print(f"{objective.case}: {lr:g}{edge}, validation loss {loss:.4f}, best of {count} trials", flush=True)
