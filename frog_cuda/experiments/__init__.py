"""What the command line runs: the demo, and the experiments of the paper.

Needs the packages of the extra ``experiments``, the demo those of ``demo``; the library needs neither.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

__all__ = ["MissingPackages", "UsageError", "missing", "require"]

#: module -> distribution, where pip knows it by another name
_DISTRIBUTIONS = {"sklearn": "scikit-learn"}


class MissingPackages(ImportError):
    """Optional packages are not installed; the message names them and the fix."""


class UsageError(ValueError):
    """An option of the command line cannot be met; the message names it."""


def missing(*modules: str) -> list[str]:
    """Which of these modules are not installed, by the name under which pip knows them. Imports nothing.

    >>> missing("torch", "no_such_module.part")
    ['no_such_module']
    """
    packages = dict.fromkeys(module.partition(".")[0] for module in modules)
    return [_DISTRIBUTIONS.get(package, package) for package in packages if find_spec(package) is None]


def require(*modules: str, extra: str = "experiments") -> list[Any]:
    """Imports optional modules.

    Arguments:
        extra: which of the package's extras installs them.
    Raises:
        MissingPackages: one or more are not installed.
    """
    absent = missing(*modules)
    if absent:
        are = "is" if len(absent) == 1 else "are"
        raise MissingPackages(
            f'{", ".join(absent)} {are} not installed; run `pip install --no-build-isolation ".[{extra}]"` in the source folder'
        )
    return [import_module(module) for module in modules]
