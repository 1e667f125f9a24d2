"""``python -m frog_cuda train``: networks trained with and without backprop (arXiv 2410.17764, sections 4.4, 4.5)."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import build_info
from . import UsageError, checkpoint, datasets, require
from .datasets import DATASETS, Images
from .demo import choose_device
from .models import MODELS
from .options import positive
from .rates import RateTable
from .results import check_same, plain, versions, write
from .trainer import Settings, Trainer

__all__ = ["add_arguments", "add_settings", "learning_rate", "run", "settings_of", "train"]

FINISHED = ("all epochs", "no improvement", "diverged")
BATCH = {"cifar10": 128, "svhn": 128}  # of the others: 64, as in the authors' experiments
CHECKPOINT = "checkpoint.pt"
INTERRUPTED = 130  # exit status of a process that Ctrl-C ended


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The options that say what to train and how. Where several values are accepted, they are separated by commas."""
    add = parser.add_argument
    add("--dataset", choices=DATASETS, default="digits", help="digits needs no files (default: %(default)s)")
    add("--data-root", type=Path, default=Path("data"), help="folder with the files of torchvision (default: %(default)s)")
    add("--download", action="store_true", help="fetch files that are missing or damaged")
    add("--model", type=_list, default=["fc"], metavar="MODEL,...", help=f"of {', '.join(MODELS)} (default: fc)")
    add("--width", type=positive, help="of hidden layers; short for --size width=N (default for fc: 1024)")
    add("--size", action="append", default=[], metavar="NAME=N", help="another size of the model, such as layers=4 for vit")
    add("--gradient", type=_list, default=["forward"], metavar="bp,forward", help="backprop, or estimates (default: forward)")
    add("--k", type=_positives, default=[16], metavar="K,...", help="number of tangents (default: 16)")
    add("--aggregate", type=_list, default=["orthogonal"], metavar="NAME,...", help="default: orthogonal")
    add("--perturb", type=_list, default=["activity"], metavar="activity,weight", help="default: activity")
    add("--tangents", default="normal", help="distribution (default: %(default)s)")
    add("--per-batch", action="store_true", help="one derivative per tangent for the batch, not for each sample")
    add("--own-tangents", action="store_true", help="tangents of activities drawn for each sample, not shared by the batch")
    dtypes = ("float8_e4m3fn", "bfloat16", "float16", "float32", "float64")
    add("--tangent-dtype", choices=dtypes, help="default: that of the model")
    add("--scaling-correction", action="store_true", help="scale estimates to the expected length of the gradient")
    add("--simulate", action="store_true", help="derivatives from the true gradient by backprop, as in the paper")
    add("--optimizer", default="SGD", help="a class of torch.optim (default: %(default)s)")
    add("--optimizer-option", action="append", default=[], metavar="NAME=VALUE", help="such as momentum=0.9")
    add("--batch", type=positive, help="samples in a step (default: 128 for cifar10 and svhn, otherwise 64)")
    add("--epochs", type=positive, default=200, help="at most (default: %(default)s)")
    add("--patience", type=positive, default=10, help="stop after so many epochs without a lower loss (default: %(default)s)")
    add(
        "--seeds",
        type=_seeds,
        default=[0],
        metavar="SEED,...",
        help="of weights, order, tangents; a run each (default: 0)",
    )
    add("--dtype", choices=("float32", "float64"), default="float32", help="precision (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu or cuda (default: a GPU, where this build has kernels for it)")
    add("--threads", type=positive, help="CPU threads (default: as many as PyTorch takes)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m frog_cuda train``."""
    add_settings(parser)
    add = parser.add_argument
    rates = parser.add_mutually_exclusive_group()
    rates.add_argument("--lr", type=learning_rate, help="learning rate (default: from --lr-table)")
    rates.add_argument("--lr-table", type=Path, help="file that lr-search wrote (default: the one of this package)")
    add("--output", type=Path, default=Path("results/train"), help="a folder for each run is made there (default: %(default)s)")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with runs that are there; finished ones stay as they are")
    again.add_argument("--overwrite", action="store_true", help="begin anew where a run is there")
    add("--checkpoint-every", type=_count, default=1, metavar="EPOCHS", help="0: never (default: %(default)s)")
    add("--tensorboard", action="store_true", help="log for TensorBoard as well, beside log.csv")


def settings_of(args: argparse.Namespace, rate: Callable[[str], float]) -> list[Settings]:
    """All runs that the options ask for.

    Arguments:
        rate: learning rate by :attr:`Settings.case`.
    Raises:
        UsageError: a value is not accepted, or there is no learning rate.
    """
    sizes = {name: _size(name, value) for name, value in map(_pair("--size"), args.size)}
    if args.width is not None:
        sizes["width"] = args.width
    options = {name: _value(value) for name, value in map(_pair("--optimizer-option"), args.optimizer_option)}
    for option, values, accepted in (
        ("--model", args.model, tuple(MODELS)),
        ("--gradient", args.gradient, ("bp", "forward")),
        ("--perturb", args.perturb, ("activity", "weight")),
    ):
        for value in values:
            if value not in accepted:
                raise UsageError(f"{option}: {value!r} is not accepted; accepted are {', '.join(accepted)}")
    found: dict[str, Settings] = {}
    axes = (args.model, args.gradient, args.perturb, args.aggregate, args.k, args.seeds)
    for model, gradient, perturb, aggregate, k, seed in itertools.product(*axes):
        made = Settings(
            lr=1.0,
            dataset=args.dataset,
            model=model,
            sizes={"width": 1024, **sizes} if model == "fc" else sizes,
            gradient=gradient,
            optimizer=args.optimizer,
            options=options,
            batch=args.batch or BATCH.get(args.dataset, 64),
            epochs=args.epochs,
            patience=args.patience,
            seed=seed,
            dtype=args.dtype,
        )
        if gradient == "forward":  # what does not matter to backprop keeps its default
            made = dataclasses.replace(
                made,
                k=k,
                aggregate=aggregate,
                perturb=perturb,
                tangents=args.tangents,
                per_sample=not args.per_batch,
                shared_across_batch=not args.own_tangents,
                scaling_correction=args.scaling_correction,
                tangent_dtype=args.tangent_dtype,
                simulate=args.simulate,
            )
        if made.name not in found:  # one run by backprop, however many k
            found[made.name] = dataclasses.replace(made, lr=rate(made.case))
    return list(found.values())


def prepare(args: argparse.Namespace) -> Images:
    """Loads the data onto the device that the options ask for, and sets the number of threads.

    Raises:
        UsageError, MissingPackages: see :func:`~frog_cuda.experiments.datasets.load`; the device cannot be used.
    """
    device = choose_device(args.device, torch.cuda.is_available(), bool(build_info()["cuda"]))
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    data = datasets.load(args.dataset, args.data_root, download=args.download)
    return data.to(device, getattr(torch, args.dtype))


def run(args: argparse.Namespace) -> int:
    """Trains all that the options ask for, one run after the other.

    Returns:
        exit status: 1 where a run diverged, 130 after Ctrl-C.
    Raises:
        MissingPackages: packages for the data, the progress bar or TensorBoard are not installed.
        UsageError: options or data cannot be used, or a run is in the output folder already.
    """
    tqdm = require("tqdm")[0].tqdm
    if args.tensorboard:
        require("tensorboard")
    table = RateTable.read(args.lr_table) if args.lr is None else None
    wanted = settings_of(args, lambda case: args.lr if table is None else table.rate("train", case))
    for settings in wanted:
        folder = args.output / settings.name
        if not (args.resume or args.overwrite) and (folder / "result.json").exists():
            raise UsageError(f"--output: {folder} holds a run; --resume goes on with it, --overwrite begins anew")
        if args.resume:
            _finished(folder, settings)  # what cannot go on is said before hours of training
    data = prepare(args)
    for settings in wanted:  # what a model or an optimizer does not accept is said before hours of training
        Trainer(settings, data)
    results: list[dict[str, Any]] = []
    with checkpoint.Interruption() as interruption:
        for settings in wanted:
            folder = args.output / settings.name
            result = train(
                settings,
                data,
                folder,
                command=args.command_line,
                resume=args.resume,
                checkpoint_every=args.checkpoint_every,
                tensorboard=args.tensorboard,
                stop=lambda: interruption.requested,
                progress=tqdm,
            )
            results.append(result)
            print(line(settings, result), flush=True)
            if result["status"] not in FINISHED:
                saved = "--resume goes on from there" if args.checkpoint_every else "there is no checkpoint"
                print(f"Interrupted after epoch {len(result['epochs']) - 1}; {saved}.", file=sys.stderr)
                return INTERRUPTED
    print(f"Results: {args.output}/*/result.json and log.csv.")
    return int(any(r["status"] == "diverged" for r in results))


def train(
    settings: Settings,
    data: Images,
    folder: Path,
    *,
    command: str = "",
    resume: bool = False,
    checkpoint_every: int = 1,
    tensorboard: bool = False,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """One run, with its files in ``folder``: result.json, log.csv, checkpoint.pt, and what TensorBoard reads.

    Arguments:
        resume: go on with what is in ``folder``; otherwise it is replaced.
        stop: asked after each step; True saves a checkpoint and returns.
        progress: makes a progress bar; called as ``tqdm.tqdm`` is.
    Returns:
        the content of result.json.
    Raises:
        UsageError: settings are not accepted, or what is to be resumed is of other settings, damaged or not all there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {str(folder)!r} cannot be made: {error.strerror}") from error
    saved = folder / CHECKPOINT
    if resume:
        finished = _finished(folder, settings)
        if finished is not None:
            return finished
    trainer = Trainer(settings, data)
    if resume and saved.exists():
        trainer.load_state_dict(checkpoint.load(saved))
    elif not resume:
        saved.unlink(missing_ok=True)  # or a later --resume would go on with the run that is replaced

    def save() -> None:
        if checkpoint_every:
            checkpoint.save(saved, trainer.state_dict())

    writer = _tensorboard(folder, len(trainer.history)) if tensorboard else None
    bar = None if progress is None else progress(total=settings.epochs, desc=settings.name, unit="epoch", disable=None)
    try:
        while trainer.status is None:
            if not trainer.epoch(stop):
                save()
                break
            done = trainer.history[-1]
            if bar is not None:
                bar.n = done["epoch"]
                bar.set_postfix_str(f"validation accuracy {done['valid_accuracy']:.2%}")
            if writer is not None:
                for name, value in done.items():
                    if name != "epoch" and value is not None:
                        writer.add_scalar(name, value, done["epoch"])
            if trainer.status is not None or (checkpoint_every and done["epoch"] % checkpoint_every == 0):
                save()
            result = _write(folder, trainer, command)
        result = _write(folder, trainer, command)
    finally:
        if bar is not None:
            bar.close()
        if writer is not None:
            writer.close()
    return result


def _write(folder: Path, trainer: Trainer, command: str) -> dict[str, Any]:
    """result.json and log.csv, of all epochs so far."""
    steady = [e["ms_per_step"] for e in trainer.history if e["ms_per_step"] is not None and e["epoch"] > 1]
    over = trainer.status is not None and bool(trainer.best)
    test_loss, test_accuracy = trainer.test() if over else (None, None)
    device = trainer.data.mean.device
    result = {
        "experiment": "train",
        "command": command,
        "case": trainer.settings.case,
        "settings": plain(trainer.settings.plain()),
        "versions": versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "samples": {part: len(getattr(trainer.data, part).x) for part in ("train", "valid", "test")},
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "status": trainer.status or "unfinished",
        "message": trainer.message,
        "best": trainer.best_epoch if trainer.best else None,
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
        "ms_per_step": statistics.median(steady) if steady else None,
    }
    write(folder / "result.json", folder / "log.csv", result, trainer.history, "epochs")
    return {**result, "epochs": list(trainer.history)}


def _finished(folder: Path, settings: Settings) -> dict[str, Any] | None:
    """The result there, if nothing is left to do for these settings.

    Raises:
        UsageError: it is of other settings, or there is something left to do and no checkpoint to go on from.
    """
    path = folder / "result.json"
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
        theirs, status, epochs = dict(result["settings"]), result["status"], len(result["epochs"]) - 1
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--resume: {path} is not the result of a run: {error!r}") from error
    check_same(str(path), theirs, plain(settings.plain()), but=["epochs"])
    if status in FINISHED and (status != "all epochs" or settings.epochs <= epochs):
        return result
    if not (folder / CHECKPOINT).exists():
        raise UsageError(
            f"--resume: {folder} holds a run up to epoch {epochs}, but no {CHECKPOINT} to go on from; "
            "remove the folder to begin this run anew, or --overwrite begins all anew"
        )
    return None


def _tensorboard(folder: Path, epoch: int) -> Any:
    # Imported late: it takes seconds, and the package is optional
    return require("torch.utils.tensorboard")[0].SummaryWriter(str(folder / "tensorboard"), purge_step=epoch or None)


def line(settings: Settings, result: dict[str, Any]) -> str:
    """A run on one line."""
    text = f"{settings.case} seed={settings.seed}: {result['status']} after epoch {len(result['epochs']) - 1}"
    if result["message"]:
        text += f" ({result['message']})"
    best = result["best"]
    if best is not None:
        text += f"; epoch {best['epoch']} has the lowest validation loss, {best['valid_loss']:.4f}"
    if result["test_accuracy"] is not None:
        text += f"; with its weights test loss {result['test_loss']:.4f}, accuracy {result['test_accuracy']:.2%}"
    return text + (f"; {result['ms_per_step']:.2f} ms a step" if result["ms_per_step"] is not None else "")


# ---- values of options


def _list(text: str) -> list[str]:
    found = [word.strip() for word in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of values separated by commas")
    return list(dict.fromkeys(found))


def _positives(text: str) -> list[int]:
    return [positive(word) for word in _list(text)]


def _seeds(text: str) -> list[int]:
    words: Sequence[str] = _list(text)
    if not all(w.isascii() and w.isdigit() and int(w) < 2**63 for w in words):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of integers in [0, 2^63), separated by commas")
    return [int(w) for w in words]


def _count(text: str) -> int:
    return 0 if text == "0" else positive(text)


def learning_rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number > 0")
    return value


def _pair(option: str) -> Callable[[str], tuple[str, str]]:
    def split(text: str) -> tuple[str, str]:
        name, sign, value = text.partition("=")
        if not (name.isidentifier() and sign and value):
            raise UsageError(f"{option} is {text!r}; expected NAME=VALUE")
        return name, value

    return split


def _size(name: str, text: str) -> int:
    try:
        return positive(text)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"--size {name}: {error}") from error


def _value(text: str) -> Any:
    """A Python literal, with ``true`` and ``false`` as well; tuples become lists, as JSON keeps them."""
    words = {"true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        raise UsageError(f"--optimizer-option: {text!r} is not a number, true, false or a tuple of numbers") from error
    return list(value) if isinstance(value, tuple) else value
