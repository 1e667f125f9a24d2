"""Checks of plain arguments, shared by the public functions."""

from __future__ import annotations

import math
import numbers
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

_PACKAGE = os.path.join(os.path.dirname(__file__), "")


def warn(message: str) -> None:
    """Warns at the line outside of this package that led here, however many calls lie between."""
    frame, level = sys._getframe(), 1
    while frame.f_code.co_filename.startswith(_PACKAGE) and frame.f_back is not None:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def flat(tangents: Tensor, leading: int = 1) -> Tensor:
    """Everything but the leading axes as one axis: (k, *shape) -> (k, n), also where shape is () or holds a 0."""
    lead = tangents.shape[:leading]
    return tangents.reshape(*lead, math.prod(tangents.shape[leading:]))


def is_real(value: Any) -> bool:
    """A number that may be NaN or infinite; a bool is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_count(name: str, value: Any) -> int:
    """An integer >= 1."""
    value = _integer(name, value, "an integer >= 1")
    if value < 1:
        raise ValueError(f"{name} is {value}; expected an integer >= 1")
    return value


def check_flag(name: str, value: Any) -> bool:
    """True or False itself: a string such as "no" would pass for true."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}; expected True or False")
    return bool(value)


def check_integer(name: str, value: Any, low: int, high: int, bound: str) -> int:
    """An integer in [low, high]; ``bound`` says in words where ``high`` comes from."""
    expected = f"an integer in [{low}, {high}] ({bound})"
    value = _integer(name, value, expected)
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; expected {expected}")
    return value


def check_seed(value: Any) -> int:
    """Any 64-bit integer, signed or unsigned, as a signed one."""
    value = _integer("seed", value, "a 64-bit integer")
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"seed is {value}; expected a 64-bit integer")
    return value - 2**64 if value >= 2**63 else value


def check_step(value: Any) -> int:
    """An integer in [0, 2^32)."""
    value = _integer("step", value, "an integer in [0, 2^32)")
    if not 0 <= value < 2**32:
        raise ValueError(f"step is {value}; expected an integer in [0, 2^32)")
    return value


def check_path(name: str, value: Any) -> Path:
    """Of a file or a folder, there or not."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}; expected a path, a str or an os.PathLike")
    return Path(value)


def _integer(name: str, value: Any, expected: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}; expected {expected}")
    return int(value)
