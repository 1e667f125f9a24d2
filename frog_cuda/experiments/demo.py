"""The demo: a network that learns handwritten digits without a backward pass, beside one that learns with it."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import build_info
from . import UsageError, require
from .digits import CLASSES, PIXELS, Digits, batches, load
from .gradients import Gradient, backprop, forward, vmap_jvp
from .options import positive
from .timing import interleaved_medians

__all__ = ["Method", "Row", "Run", "add_arguments", "run"]

WIDTH, BATCH = 256, 64
COSINE_EVERY = 10  # steps
ROUNDS, SECONDS = 15, 15.0  # of timing: at most so many rounds of 4 calls each, in about so much time
PACKAGES = ("sklearn.datasets", "sklearn.model_selection", "matplotlib.figure", "tqdm")


@dataclass(frozen=True)
class Method:
    """One way to a gradient.

    Arguments:
        name: as the table and the figure call it.
        lr: the highest learning rate of Adam, see :func:`train`.
        k: number of tangents; None for backprop.
        aggregate: what becomes of their directional derivatives.
    """

    name: str
    lr: float
    k: int | None = None
    aggregate: str = "mean"

    def gradient(self, model: nn.Module, seed: int) -> Gradient:
        return backprop(model) if self.k is None else forward(model, self.k, self.aggregate, seed)


def methods(k: int) -> list[Method]:
    """What the demo compares."""
    # Tried for each: 0.001, 0.003, 0.01, 0.03 (single tangent: 0.0003, 0.001, 0.002, 0.003), four seeds, 40 epochs. Taken: the
    # best mean accuracy on a fifth of the training images that was left out. The test images had no part in it.
    tangents = f"{k} tangent{'s' * (k > 1)}"
    return [
        Method("backprop", 0.01),
        Method(f"FROG: {tangents}, orthogonal", 0.01, k, "orthogonal"),
        Method(f"{tangents}, mean", 0.01, k, "mean"),
        Method("single tangent", 0.001, 1, "mean"),
    ]


@dataclass
class Run:
    """What training with one method gave: per epoch the mean training loss, and loss and accuracy on the test images after it;
    cosines between the gradient that was used and the true one, every 10th step."""

    method: Method
    model: nn.Sequential
    train_loss: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """A line of the table. Times in milliseconds; ``vmap_jvp`` is None where there is nothing to compare with."""

    name: str
    accuracy: float
    loss: float
    milliseconds: float
    to_backprop: float
    to_vmap_jvp: float | None
    cosine: float


def network(seed: int) -> nn.Sequential:
    """64-256-256-10 with ReLU; the same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(PIXELS, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))


def train(method: Method, start: nn.Sequential, digits: Digits, epochs: int, seed: int, progress: Callable[..., Any]) -> Run:
    """Trains a copy of ``start`` with Adam. All methods get the same batches in the same order.

    Arguments:
        progress: makes a progress bar; called as ``tqdm.tqdm`` is.
    """
    model = copy.deepcopy(start)
    gradient, optimizer = method.gradient(model, seed), torch.optim.Adam(model.parameters(), lr=method.lr)
    steps = epochs * (len(digits.train_x) // BATCH)
    # The first tenth warms up, the rest falls to 0 along a cosine
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, method.lr, total_steps=steps, pct_start=0.1, cycle_momentum=False)
    order = torch.Generator().manual_seed(seed)
    run, step = Run(method, model), 0
    bar = progress(total=steps, desc=f"{method.name:<28}", unit="step")
    with bar:
        for _ in range(epochs):
            losses = []
            for x, y in batches(digits.train_x, digits.train_y, BATCH, order):
                optimizer.zero_grad()
                losses.append(gradient(x, y))
                if step % COSINE_EVERY == 0:
                    run.cosines.append(cosine_to_true_gradient(model, x, y))
                optimizer.step()
                schedule.step()
                step += 1
                bar.update()
            run.train_loss.append(torch.stack(losses).mean().item())
            loss, accuracy = evaluate(model, digits.test_x, digits.test_y)
            run.test_loss.append(loss)
            run.test_accuracy.append(accuracy)
            bar.set_postfix_str(f"test accuracy {accuracy:.1%}", refresh=False)
    return run


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy."""
    output = model(x)
    return F.cross_entropy(output, y).item(), (output.argmax(1) == y).double().mean().item()


def cosine_to_true_gradient(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Cosine between what stands in ``.grad`` and the gradient of the same batch by backprop."""
    parameters = list(model.parameters())
    true = torch.cat([g.flatten() for g in torch.autograd.grad(F.cross_entropy(model(x), y), parameters)])
    used = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    return F.cosine_similarity(used, true, dim=0).item()


def time_gradients(runs: list[Run], x: Tensor, y: Tensor, seed: int) -> dict[str, float]:
    """Median seconds for one gradient by each method and, as ``"vmap <name>"``, by its twin in plain PyTorch."""

    def call(gradient: Gradient, model: nn.Module) -> Callable[[], object]:
        def once() -> None:
            model.zero_grad()
            gradient(x, y)

        return once

    calls = {}
    for run in runs:
        method, model = run.method, copy.deepcopy(run.model)
        calls[method.name] = call(method.gradient(model, seed), model)
        if method.k is not None:
            calls[f"vmap {method.name}"] = call(vmap_jvp(model, method.k, method.aggregate), model)
    with torch.random.fork_rng():
        return interleaved_medians(calls, x.device, rounds=ROUNDS, limit=SECONDS)


def rows(runs: list[Run], seconds: dict[str, float]) -> list[Row]:
    made = []
    for run in runs:
        name, twin = run.method.name, seconds.get(f"vmap {run.method.name}")
        made.append(
            Row(
                name,
                run.test_accuracy[-1],
                run.test_loss[-1],
                1e3 * seconds[name],
                seconds[name] / seconds["backprop"],
                None if twin is None else seconds[name] / twin,
                sum(run.cosines) / len(run.cosines),
            )
        )
    return made


def table(lines: list[Row]) -> str:
    width = max(len(line.name) for line in lines)
    out = [
        f"{'':<{width}}      test      test    ms per        ratio to         cosine to",
        f"{'':<{width}}  accuracy      loss  gradient  backprop  vmap(jvp)  gradient",
    ]
    out.append("-" * len(out[-1]))
    for r in lines:
        other = "-" if r.to_vmap_jvp is None else f"{r.to_vmap_jvp:.2f}"
        out.append(
            f"{r.name:<{width}}  {r.accuracy:8.1%}  {r.loss:8.3f}  {r.milliseconds:8.2f}  {r.to_backprop:8.2f}  "
            f"{other:>9}  {r.cosine:8.3f}"
        )
    return "\n".join(out)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m frog_cuda demo``."""
    add = parser.add_argument
    add("--epochs", type=positive, default=40, help="passes over the training images (default: %(default)s)")
    add("--k", type=positive, default=16, help="number of tangents (default: %(default)s, what learning rates were tuned for)")
    add("--seed", type=int, default=0, help="of weights, batches and tangents (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu or cuda (default: a GPU, where this build has kernels for it)")
    add("--threads", type=positive, help="CPU threads (default: as many as PyTorch takes)")
    add("--output", type=Path, default=Path("frog_cuda_demo.png"), help="the figure, as PNG, PDF or SVG (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """The whole demo: trains, measures, prints the table, writes the figure.

    Raises:
        MissingPackages: scikit-learn, matplotlib or tqdm are not installed.
        UsageError: the device cannot be used, or the figure cannot be written there or in such a file.
    """
    started = time.perf_counter()
    tqdm = require(*PACKAGES, extra="demo")[-1]
    from .plots import ENDINGS, loss_curves

    device = choose_device(args.device, torch.cuda.is_available(), bool(build_info()["cuda"]))
    if not args.output.resolve().parent.is_dir() or args.output.is_dir():
        raise UsageError(f"--output is {str(args.output)!r}; expected a file in a folder that exists")
    if args.output.suffix.lower() not in ENDINGS:
        raise UsageError(f"--output is {str(args.output)!r}; accepted endings are {', '.join(ENDINGS)}")
    if not 0 <= args.seed < 2**63:
        raise UsageError(f"--seed is {args.seed}; expected an integer in [0, 2^63)")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    digits, start = load(device), network(args.seed).to(device)
    print(
        f"Handwritten digits: {len(digits.train_x)} images to train on, {len(digits.test_x)} held out. "
        f"Network {PIXELS}-{WIDTH}-{WIDTH}-{CLASSES}, ReLU,\n"
        f"{sum(p.numel() for p in start.parameters())} parameters. Four ways to a gradient; same start, same batches of "
        f"{BATCH}, Adam, {args.epochs} epochs, on {_describe(device)}.",
        flush=True,
    )

    def progress(**options: Any) -> Any:
        return tqdm.tqdm(disable=None, **options)  # None: no bar where the output is not a terminal

    runs = [train(method, start, digits, args.epochs, args.seed, progress) for method in methods(args.k)]
    lines = rows(runs, time_gradients(runs, digits.train_x[:BATCH], digits.train_y[:BATCH], args.seed))
    loss_curves(runs, args.output)
    print(f"\n{table(lines)}\n\n{NOTES}\n\nLoss curves: {args.output}. Took {time.perf_counter() - started:.0f} s.")


NOTES = """\
test: on the held-out images, after the last epoch.
ms per gradient: median, all measured by turns after training, on one batch; zeroing .grad included.
vmap(jvp): the time in units of that of the same estimator in plain PyTorch, torch.func.vmap over torch.func.jvp with
tangents of the activities from torch.randn; below 1 means that frog_cuda is faster.
cosine: between the gradient used and the one by backprop on the same batch, mean over every 10th step of training."""


def choose_device(wanted: str, available: bool, built: bool) -> torch.device:
    """The device that ``--device`` means.

    Arguments:
        available: whether PyTorch sees a GPU.
        built: whether this build of frog_cuda has CUDA kernels.
    Raises:
        UsageError: unknown, or there is no such device.
    """
    if wanted == "auto":
        return torch.device("cuda" if available and built else "cpu")
    if wanted not in ("cpu", "cuda"):
        raise UsageError(f"--device is {wanted!r}; accepted are auto, cpu and cuda")
    if wanted == "cuda" and not built:
        raise UsageError("--device is cuda, but this build of frog_cuda has no CUDA kernels; use cpu")
    if wanted == "cuda" and not available:
        raise UsageError("--device is cuda, but PyTorch sees no GPU; use cpu")
    return torch.device(wanted)


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    return f"the CPU, {count} thread{'s' * (count > 1)}"
