"""The command line: ``python -m frog_cuda COMMAND``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import __version__, build_info
from .experiments import MissingPackages, UsageError, angles, approximation, demo, functions, lr_search, missing, report, train


@dataclass(frozen=True)
class Command:
    """One subcommand: its line in the help, its options, what it does, and how it goes on after an interruption."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]
    again: str = ""


def _info(args: argparse.Namespace) -> None:
    absent = missing("sklearn", "matplotlib", "tqdm")
    facts = {**build_info(), "packages for demo": f"missing: {', '.join(absent)}" if absent else "present"}
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


_RESUME = "--resume goes on from there"

COMMANDS = {
    "demo": Command("train a network on handwritten digits with and without backprop", demo.add_arguments, demo.run),
    "approximation": Command(
        "how close estimates come to the gradient, by number of tangents and dimensions (section 4.1 of the paper)",
        approximation.add_arguments,
        approximation.run,
        _RESUME,
    ),
    "angles": Command(
        "estimates from tangents at an angle, and descent by them (section 4.3)", angles.add_arguments, angles.run, _RESUME
    ),
    "functions": Command(
        "minimise closed-form functions by forward gradients (section 4.2)", functions.add_arguments, functions.run, _RESUME
    ),
    "train": Command(
        "train networks on images with and without backprop (sections 4.4 and 4.5 of the paper)",
        train.add_arguments,
        train.run,
        "--resume goes on from the last checkpoint",
    ),
    "lr-search": Command(
        "find learning rates, and write the table that train reads",
        lr_search.add_arguments,
        lr_search.run,
        "the same command goes on",
    ),
    "report": Command(
        "write a page with figures of all results, beside what the paper says of them", report.add_arguments, report.run
    ),
    "info": Command("versions, compiler and kernels of this installation", lambda parser: None, _info),
}


def parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """That of the whole command line, and those of the commands."""
    top = argparse.ArgumentParser(
        prog="python -m frog_cuda",
        description="Multi-tangent forward gradients for PyTorch.",
        epilog="Options of a command: python -m frog_cuda COMMAND --help",
    )
    top.add_argument("--version", action="version", version=f"frog_cuda {__version__}")
    choices = top.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    subs = {}
    for name, command in COMMANDS.items():
        sub = subs[name] = choices.add_parser(
            name, help=command.help, description=command.help[0].upper() + command.help[1:] + "."
        )
        command.add_arguments(sub)
    return top, subs


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status, 130 where Ctrl-C ended it.

    Arguments:
        arguments: what follows ``python -m frog_cuda``; None takes them from ``sys.argv``.
    Raises:
        SystemExit: status 2, an option is not accepted.
    """
    top, subs = parsers()
    args = top.parse_args(arguments)
    args.command_line = shlex.join(["python", "-m", "frog_cuda", *(sys.argv[1:] if arguments is None else arguments)])
    if args.command is None:
        top.print_help()
        return 0
    command = COMMANDS[args.command]
    try:
        return command.run(args) or 0
    except UsageError as error:
        subs[args.command].error(str(error))
    except MissingPackages as error:
        print(f"python -m frog_cuda {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        how = f"; {command.again}" if command.again else ""
        print(f"python -m frog_cuda {args.command}: interrupted{how}", file=sys.stderr)
        return train.INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
