"""Options that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import UsageError

__all__ = ["add_common", "check_common", "positive", "powers_of_two"]

SAMPLERS = ("frog", "torch")


def positive(text: str) -> int:
    """An integer >= 1, for ``type=`` of an option."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer >= 1")
    return value


def add_common(parser: argparse.ArgumentParser, *, seeds: int, output: str) -> None:
    """The options of every experiment of the paper that needs no data.

    Arguments:
        seeds: default of ``--seeds``.
        output: default of ``--output``.
    """
    add = parser.add_argument
    add("--seeds", type=positive, help=f"how many (default: {seeds}, with --quick less)")
    add("--seed", type=int, default=0, help="the first one; the others follow it (default: %(default)s)")
    add(
        "--sampler",
        choices=SAMPLERS,
        default="frog",
        help="where tangents come from: this library's kernels, or torch.randn(k, n) of a torch.Generator with the run's seed "
        "(default: %(default)s)",
    )
    add("--simulate", action="store_true", help="directional derivatives from the true gradient by backprop, as in the paper")
    add("--dtype", choices=("float32", "float64"), default="float32", help="precision (default: %(default)s)")
    add("--output", type=Path, default=Path(output), help="folder for results and figures (default: %(default)s)")
    add("--resume", action="store_true", help="go on with what --output holds; the options must be the same")
    add("--quick", action="store_true", help="a small version, in less than a minute")
    add("--threads", type=positive, help="CPU threads (default: as many as PyTorch takes)")


def check_common(args: argparse.Namespace) -> None:
    """Raises UsageError where a value cannot be used."""
    if not 0 <= args.seed < 2**63 - 2**20:
        raise UsageError(f"--seed is {args.seed}; expected an integer in [0, 2^63 - 2^20)")
    if args.output.exists() and not args.output.is_dir():
        raise UsageError(f"--output is {str(args.output)!r}, which is no folder")


def powers_of_two(top: int) -> list[int]:
    """1, 2, 4, ... up to ``top``.

    >>> powers_of_two(9)
    [1, 2, 4, 8]
    """
    return [1 << i for i in range(top.bit_length())]
