"""Comparisons with the bounds this project holds itself to. tests/test_helpers.py shows each of them failing."""

from __future__ import annotations

import torch
from torch import Tensor

#: relative to the largest entry of what is expected, so that entries which cancel to almost zero are not held to more
FLOAT64_BOUND = 1e-10
FLOAT32_BOUND = 1e-5


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference in units of the largest expected entry; NaN in the same places counts as equal."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0:
        return 0.0
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, e = actual.detach().to(wide), expected.detach().to(wide)
    same = (a == e) | (a.isnan() & e.isnan())
    difference = torch.where(same, torch.zeros_like(e), a - e).abs().max().item()
    finite = e[e.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 0.0
    if difference == 0:
        return 0.0
    return difference / scale if scale > 0 else float("inf")


def _assert_within(actual: Tensor, expected: Tensor, bound: float) -> None:
    error = relative_error(actual, expected)
    assert error <= bound, f"relative error {error:.3g}, bound {bound:.3g}"  # also fails for NaN


def assert_close64(actual: Tensor, expected: Tensor, bound: float = FLOAT64_BOUND) -> None:
    """Equal to 1e-10 of the largest entry; both double."""
    assert actual.dtype in (torch.float64, torch.complex128), f"dtype {actual.dtype}, expected a double"
    _assert_within(actual, expected, bound)


def assert_close32(actual: Tensor, exact: Tensor, bound: float = FLOAT32_BOUND) -> None:
    """A float32 result, equal to the float64 one to 1e-5 of the largest entry."""
    assert actual.dtype == torch.float32, f"dtype {actual.dtype}, expected float32"
    assert exact.dtype == torch.float64, f"compare with a float64 result, not {exact.dtype}"
    _assert_within(actual, exact, bound)


def assert_as_good_as_torch(actual: Tensor, torch_own: Tensor, exact: Tensor) -> None:
    """A low-precision result whose error against float64 is at most twice that of PyTorch's own at the same precision.

    One rounding of the result is always granted: where PyTorch happens to be exact, twice its error would be nothing.
    """
    assert actual.dtype == torch_own.dtype, f"dtype {actual.dtype}, expected {torch_own.dtype}"
    rounding = torch.finfo(actual.dtype).eps
    bound = 2 * relative_error(torch_own, exact) + rounding
    _assert_within(actual, exact, bound)
