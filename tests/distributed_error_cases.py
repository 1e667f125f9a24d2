"""What ranks that disagree or fail are told, as cases for the processes of test_distributed.py."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from distributed_cases import ROWS, data, estimator, net

from frog_cuda.distributed import TangentParallel
from frog_cuda.experiments import models
from frog_cuda.tangents import Guided


def raises(error: type[Exception], match: str, run) -> None:
    with pytest.raises(error, match=match):
        run()


def case_other_arguments():
    rank = dist.get_rank()
    for options, match in (
        ({"k": 5 + (rank == 1)}, "k differs between rank 0 and rank 1: 5 and 6"),
        ({"seed": -rank}, "seed differs between rank 0 and rank 1: 0 and -1"),
        ({"aggregate": "mean" if rank else "sum"}, "aggregate differs between rank 0 and rank 1"),
        ({"tangents": "sphere" if rank else "normal"}, "tangents differs between rank 0 and rank 1"),
        ({"per_sample": rank == 0}, "an option of fg differs between rank 0 and rank 1"),
    ):
        raises(ValueError, match, lambda options=options: TangentParallel(estimator(net(), **options)))
    wide = models.build("fc", (1, 6, 6), 5, width=24 + rank)
    raises(ValueError, "the parameters differs between rank 0 and rank 1", lambda: TangentParallel(estimator(wide)))
    raises(ValueError, "an option of TangentParallel", lambda: TangentParallel(estimator(net()), check_every=rank + 1))


def case_other_seed_or_step_later():
    for key, match in (("seed", "the seed differs among the ranks: from 7 to 8"), ("step", "the step differs")):
        model = net()
        parallel = TangentParallel(estimator(model), check_every=None)
        other = {"seed": 7, "step": 7} | {key: 7 + (dist.get_rank() == 1)}
        raises(ValueError, f"{key} differs between rank 0 and rank 1: 7 and 8", lambda: parallel.load_state_dict(other))  # noqa: B023
        assert parallel.state_dict() == {"seed": 3, "step": 0}
        parallel.fg.load_state_dict(other)
        raises(ValueError, match, lambda: parallel(*data(0)))  # noqa: B023
        assert all(p.grad is None for p in model.parameters())


def case_other_momentum_or_estimates_later():
    """A state of which one rank has another copy is refused by all, and none of them goes on from it."""

    def momentum(state):
        state["momentum"]["second.bias"][3] += 1e-6

    def no_momentum(state):
        del state["momentum"]

    def estimate(state):
        state["previous"][1]["parts"]["second.bias"][3] += 1e-6

    def fewer_estimates(state):
        del state["previous"][1]

    for tangents, change, match in (
        ("normal", momentum, "the momentum differs between rank 0 and rank 1"),
        ("normal", no_momentum, "the momentum differs between rank 0 and rank 1"),
        (Guided(2), estimate, "a previous estimate differs between rank 0 and rank 1"),
        (Guided(2), fewer_estimates, "a previous estimate differs between rank 0 and rank 1"),
    ):
        parallel = TangentParallel(estimator(net(), perturb="weight", tangents=tangents))
        for step in range(2):
            parallel.derivatives(*data(step))
            parallel.update_(0.01, momentum=0.9)
        before = copy.deepcopy(parallel.state_dict())
        other = copy.deepcopy(before)
        if dist.get_rank() == 1:
            change(other)
        raises(ValueError, match, lambda: parallel.load_state_dict(other))  # noqa: B023
        torch.testing.assert_close(parallel.state_dict(), before, rtol=0, atol=0)
        parallel.load_state_dict(before)


def case_other_batches():
    parallel = TangentParallel(estimator(net()))
    raises(ValueError, "the number of rows differs", lambda: parallel(*data(0, ROWS + (dist.get_rank() == 1))))
    raises(ValueError, "the loss is .* on rank 0 but .* on rank 1", lambda: parallel(*data(dist.get_rank())))
    parallel(*data(0))  # and the ranks are together again


def case_one_rank_raises():
    """Its own error there, its number in the others' errors; the next step works."""
    for perturb in ("weight", "activity"):
        model = net()
        parallel = TangentParallel(estimator(model, perturb=perturb))
        x, y = data(0)
        if dist.get_rank() == 1:
            with pytest.raises(FloatingPointError, match="the loss"):
                parallel(x * float("nan"), y)
            with pytest.raises(RuntimeError, match="mat1|shape|size"):
                parallel(x[..., 1:], y)
        else:
            for _ in range(2):
                with pytest.raises(RuntimeError, match="rank 1 raised an error in step 0"):
                    parallel(x, y)
        assert parallel.fg.step == 0 and all(p.grad is None for p in model.parameters())
        parallel(x, y)


def case_changed_parameters():
    model = net()
    parallel = TangentParallel(estimator(model), check_every=2)
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.second.bias[3] += 1e-6
    match = r"at step 0 parameters differ among the ranks: second\.bias on rank 1"
    raises(RuntimeError, match, lambda: parallel(*data(0)))
    raises(RuntimeError, match, parallel.check)


def case_checks_every_so_many_steps():
    model = net()
    parallel = TangentParallel(estimator(model), check_every=2)
    parallel(*data(0))
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.last.bias[0] += 1e-6
    parallel(*data(1))
    raises(RuntimeError, r"at step 2 .* last\.bias on rank 1", lambda: parallel(*data(2)))
