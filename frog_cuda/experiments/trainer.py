"""One training run of the paper's experiments (Flügel et al., arXiv 2410.17764, sections 4.4 and 4.5)."""

from __future__ import annotations

import inspect
import math
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import frog_cuda as frog

from . import UsageError
from .datasets import Images, Part
from .digits import batches
from .gradients import Gradient, backprop
from .models import MODELS, build
from .results import check_same

__all__ = ["DIVERGED", "Epoch", "Settings", "Trainer", "evaluate", "simulated"]

#: a validation loss from which a run counts as diverged, that of the authors' code; guessing among 10 classes gives 2.3
DIVERGED = 10.0
EVALUATION_BATCH = 1024

#: of an epoch: number, mean training loss of its steps, validation loss and accuracy after it, median ms of a step
Epoch = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """All that the numbers of a run depend on, besides the data and the versions.

    Arguments:
        dataset: name of :data:`~frog_cuda.experiments.datasets.DATASETS`; here only for the record.
        model, sizes: name and keyword arguments of :func:`~frog_cuda.experiments.models.build`.
        gradient: ``"bp"`` or ``"forward"``.
        k, aggregate, perturb, tangents, per_sample, shared_across_batch, scaling_correction, tangent_dtype: as in
            :class:`frog_cuda.ForwardGradient`; unused with ``"bp"``. Activities are perturbed by the model's groups.
        simulate: directional derivatives from the true gradient by backprop, as in the paper.
        optimizer, options: a class of torch.optim by its name, and its arguments besides the learning rate.
        lr: learning rate, constant.
        batch: samples in a step.
        epochs: at most so many.
        patience: stop after so many epochs without a lower validation loss.
        seed: of weights, order of samples and tangents.
        dtype: ``"float32"`` or ``"float64"``.
    """

    lr: float
    dataset: str = "digits"
    model: str = "fc"
    sizes: dict[str, int] = field(default_factory=dict)
    gradient: str = "forward"
    k: int = 16
    aggregate: str = "orthogonal"
    perturb: str = "activity"
    tangents: str = "normal"
    per_sample: bool = True
    shared_across_batch: bool = True
    scaling_correction: bool = False
    tangent_dtype: str | None = None
    simulate: bool = False
    optimizer: str = "SGD"
    options: dict[str, Any] = field(default_factory=dict)
    batch: int = 64
    epochs: int = 200
    patience: int = 10
    seed: int = 0
    dtype: str = "float32"

    @property
    def label(self) -> str:
        """The model with its sizes: ``"fc width=256"``."""
        return " ".join([self.model, *(f"{name}={size}" for name, size in sorted(self.sizes.items()))])

    @property
    def approach(self) -> str:
        """How the gradient is had, and with which optimizer: ``"bp"``, ``"orthogonal k=16"``, ``"mean k=4 weight Adam"``."""
        words = ["bp"]
        if self.gradient == "forward":
            words = [self.aggregate, f"k={self.k}"]
            words += [self.perturb] * (self.perturb != "activity") + [self.tangents] * (self.tangents != "normal")
            words += ["per-batch"] * (not self.per_sample) + ["own-tangents"] * (not self.shared_across_batch)
            words += ["corrected"] * self.scaling_correction + [self.tangent_dtype or ""] * bool(self.tangent_dtype)
        words += [self.optimizer] * (self.optimizer != "SGD") + [f"{k}={v}" for k, v in self.options.items()]
        return " ".join(words)

    @property
    def case(self) -> str:
        """What a table of learning rates knows the run by. The seed plays no part, nor how derivatives are computed."""
        return f"{self.dataset} {self.label} {self.approach}"

    @property
    def name(self) -> str:
        """A name for files."""
        words = self.case.split() + ["simulated"] * (self.simulate and self.gradient == "forward")
        words += [self.dtype] * (self.dtype != "float32") + [f"seed={self.seed}"]
        return re.sub(r"[^A-Za-z0-9._-]", "", "-".join(words))

    def plain(self) -> dict[str, Any]:
        """As JSON and checkpoints hold it."""
        return asdict(self)


class Trainer:
    """A run: model, optimizer, gradient, and how far it has come. What it holds can be saved after any step and continued bit
    for bit, on the same device with the same number of threads.

    Arguments:
        settings: see :class:`Settings`.
        data: on the device to train on, in the dtype of the settings.
    Attributes:
        history: one :data:`Epoch` for each finished epoch; number 0 is before training.
        losses: training losses of the steps of the unfinished epoch.
        status: None while there is something to do; then ``"all epochs"``, ``"no improvement"`` or ``"diverged"``.
        message: why it diverged.
    Raises:
        UsageError: settings that model, optimizer or gradient do not accept.
    """

    def __init__(self, settings: Settings, data: Images) -> None:
        self.settings, self.data = settings, data
        if settings.batch > len(data.train.x):
            raise UsageError(f"--batch is {settings.batch}; {data.name} has {len(data.train.x)} training samples")
        self.model = _model(settings, data)
        self.optimizer = _optimizer(settings, self.model)
        self.forward_gradient: frog.ForwardGradient | None = None
        self.gradient = self._gradient()
        self.history: list[Epoch] = []
        self.losses: list[float] = []
        self.status: str | None = None
        self.message = ""
        self.best: dict[str, Tensor] = {}
        self._order = torch.Generator().manual_seed(settings.seed).get_state()  # as it was before the unfinished epoch

    def _gradient(self) -> Gradient:
        s = self.settings
        if s.gradient == "bp":
            return backprop(self.model)
        try:
            self.forward_gradient = frog.ForwardGradient(
                self.model,
                nn.CrossEntropyLoss(reduction="none"),
                k=s.k,
                perturb=s.perturb,
                layers=self.model.groups() if s.perturb == "activity" else None,
                tangents=s.tangents,
                aggregate=s.aggregate,
                tangent_dtype=None if s.tangent_dtype is None else getattr(torch, s.tangent_dtype),
                per_sample=s.per_sample,
                shared_across_batch=s.shared_across_batch,
                scaling_correction=s.scaling_correction,
                seed=s.seed,
            )
        except (TypeError, ValueError) as error:
            raise UsageError(f"{s.approach}: {error}") from error
        return simulated(self.forward_gradient) if s.simulate else self.forward_gradient

    # ---- training

    def epoch(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Trains until the end of an epoch and evaluates; before the first, evaluates only.

        Arguments:
            stop: asked after each step; True leaves the epoch unfinished, to be continued by the next call.
        Returns:
            whether the epoch is finished.
        """
        if self.status is not None:
            return True
        taken: list[float] = []
        try:
            if self.history and not self._steps(taken, stop):
                return False
        except FloatingPointError as error:
            self._diverged(len(self.history), str(error))
            return True
        loss, accuracy = evaluate(self.model, self.data, self.data.valid)
        done: Epoch = {
            "epoch": len(self.history),
            "train_loss": statistics.fmean(self.losses) if self.losses else None,
            "valid_loss": loss if math.isfinite(loss) else None,
            "valid_accuracy": accuracy,
            "ms_per_step": 1e3 * statistics.median(taken) if taken else None,
        }
        self.history.append(done)
        self.losses = []
        if not loss < DIVERGED:
            self._diverged(done["epoch"], f"the validation loss is {loss:.3g}; {DIVERGED:g} and more counts as diverged")
            return True
        if done is self.best_epoch:
            self.best = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
        self._decide()
        return True

    def _steps(self, taken: list[float], stop: Callable[[], bool]) -> bool:
        """The steps that are left of an epoch; False: was stopped."""
        train, order = self.data.train, torch.Generator()
        order.set_state(self._order)
        self.model.train()
        for i, (x, y) in enumerate(batches(train.x, train.y, self.settings.batch, order)):
            if i < len(self.losses):
                continue
            began = time.perf_counter()
            self.optimizer.zero_grad()
            loss = self.gradient(self.data.normalised(x), y).item()
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss}")
            self.optimizer.step()
            taken.append(time.perf_counter() - began)
            self.losses.append(loss)
            if stop():
                return False
        self._order = order.get_state()
        return True

    def _diverged(self, epoch: int, why: str) -> None:
        self.status, self.message = "diverged", f"in epoch {epoch}, at learning rate {self.settings.lr:g}: {why}"

    def _decide(self) -> None:
        """Whether the run is over."""
        last = len(self.history) - 1
        if last - self.best_epoch["epoch"] >= self.settings.patience:
            self.status = "no improvement"
        elif last >= self.settings.epochs:
            self.status = "all epochs"
        else:
            self.status = None

    @property
    def best_epoch(self) -> Epoch:
        """The finished epoch with the lowest validation loss; of equal ones the first.

        Raises:
            RuntimeError: there is none yet.
        """
        finite = [e for e in self.history if e["valid_loss"] is not None]
        if not finite:
            raise RuntimeError("best_epoch: no epoch is finished")
        return min(finite, key=lambda e: e["valid_loss"])

    def test(self) -> tuple[float, float]:
        """Loss and accuracy on the test part, with the weights of the best epoch; those of the model stay as they are."""
        now = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
        self.model.load_state_dict(self.best)
        try:
            return evaluate(self.model, self.data, self.data.test)
        finally:
            self.model.load_state_dict(now)

    # ---- saving

    def state_dict(self) -> dict[str, Any]:
        """For :func:`~frog_cuda.experiments.checkpoint.save`."""
        return {
            "settings": self.settings.plain(),
            "model": self.model.state_dict(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "gradient": None if self.forward_gradient is None else self.forward_gradient.state_dict(),
            "history": self.history,
            "losses": self.losses,
            "order": self._order,
            "status": self.status,
            "message": self.message,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken. Only the number of epochs may be another.

        Raises:
            UsageError: the state is of a run with other settings, or not complete.
        """
        mine = self.settings.plain()
        try:
            theirs = state["settings"]
            check_same("the checkpoint", theirs, mine, but=["epochs"])
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.forward_gradient is not None:
                self.forward_gradient.load_state_dict(state["gradient"])
            self.best = {name: t.to(self.data.mean.device) for name, t in state["best"].items()}
            self.history, self.losses, self._order = list(state["history"]), list(state["losses"]), state["order"]
            self.status, self.message = state["status"], state["message"]
        except (KeyError, RuntimeError, AttributeError) as error:
            raise UsageError(f"--resume: the checkpoint does not fit: {error}") from error
        if self.status == "all epochs":
            self._decide()


def simulated(fg: frog.ForwardGradient) -> Gradient:
    """What ``fg`` would estimate, from the true gradient by backprop with the same tangents, as the paper's experiments did.

    Counts the steps of ``fg``, so that it draws what ``fg`` would have drawn.
    """

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        found = frog.simulate(fg, x, y)
        if any(True for _ in fg.model.buffers()):
            with torch.no_grad():
                fg.model(x)  # running statistics, which simulate leaves alone
        for name, p in fg.model.named_parameters():
            if name in found.gradients:
                g = found.gradients[name]
                p.grad = g if p.grad is None else p.grad.add_(g)
        fg.step += 1
        return found.loss

    return gradient


@torch.no_grad()
def evaluate(model: nn.Module, data: Images, part: Part) -> tuple[float, float]:
    """Mean loss and accuracy, in evaluation mode."""
    model.eval()
    loss = correct = 0.0
    for x, y in zip(part.x.split(EVALUATION_BATCH), part.y.split(EVALUATION_BATCH)):
        output = model(data.normalised(x))
        loss += F.cross_entropy(output.double(), y, reduction="sum").item()
        correct += (output.argmax(1) == y).sum().item()
    return loss / len(part.y), correct / len(part.y)


def _model(settings: Settings, data: Images) -> Any:
    if settings.model in MODELS:
        accepted = [n for n, p in inspect.signature(MODELS[settings.model]).parameters.items() if p.kind is p.KEYWORD_ONLY]
        for name in settings.sizes:
            if name not in accepted:
                raise UsageError(f"--size is {name!r}; {settings.model} has {', '.join(accepted) or 'no sizes to choose'}")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model = build(settings.model, data.shape, data.classes, **settings.sizes)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"--model {settings.label} for images of {data.shape}: {error}") from error
    return model.to(data.mean.device, data.mean.dtype)


def _optimizer(settings: Settings, model: nn.Module) -> torch.optim.Optimizer:
    classes: dict[str, Any] = {
        name: c
        for name, c in vars(torch.optim).items()
        if isinstance(c, type) and issubclass(c, torch.optim.Optimizer) and c is not torch.optim.Optimizer
    }
    classes.pop("LBFGS", None)  # evaluates the loss several times a step
    if settings.optimizer not in classes:
        raise UsageError(f"--optimizer is {settings.optimizer!r}; accepted are {', '.join(sorted(classes))}")
    try:
        return classes[settings.optimizer](model.parameters(), lr=settings.lr, **settings.options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--optimizer {settings.optimizer} {settings.options}: {error}") from error
