"""Comparison of DualTensor with torch.func.jvp, one tangent at a time, or with finite differences; in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from helpers import assert_close64, relative_error
from torch import Tensor
from torch.utils._pytree import tree_flatten

import frog_cuda as frog
from frog_cuda.dual import DualTensor, primal_of, tangents_of


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dual(primal: Tensor, k: int = 3, seed: int = 1) -> DualTensor:
    return DualTensor(primal.clone(), draw(k, *primal.shape, seed=seed))


def expected(fn: Callable[..., Any], primals: list[Tensor], tangents: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Values, and tangents stacked over k, of each tensor that ``fn`` returns; the same random numbers for each tangent."""
    rows = []
    for i in range(tangents[0].shape[0]):
        torch.manual_seed(7)
        rows.append(torch.func.jvp(fn, tuple(p.clone() for p in primals), tuple(t[i].clone() for t in tangents)))
    values = tree_flatten(rows[0][0])[0]
    return values, [torch.stack(column) for column in zip(*(tree_flatten(r[1])[0] for r in rows), strict=True)]


def check(fn: Callable[..., Any], *primals: Tensor, k: int = 3) -> Any:
    """Runs ``fn`` on DualTensors of all ``primals``; compares values and tangents; returns what ``fn`` returned."""
    tangents = [draw(k, *p.shape, seed=100 + i) for i, p in enumerate(primals)]
    values, moved = expected(fn, list(primals), tangents)
    torch.manual_seed(7)
    out = fn(*(DualTensor(_like(p), t.clone()) for p, t in zip(primals, tangents, strict=True)))
    outs = tree_flatten(out)[0]
    assert len(outs) == len(values)
    for o, value, tangent in zip(outs, values, moved, strict=True):
        compare(o, value, tangent)
    return out


def compare(out: Any, value: Tensor, tangent: Tensor) -> None:
    if not value.is_floating_point():
        assert type(out) is Tensor and torch.equal(out, value)
        return
    assert_close64(primal_of(out), value)
    actual = tangents_of(out)
    # A plain result is a statement that its tangents are zero
    assert_close64(torch.zeros_like(tangent) if actual is None else actual, tangent)


def _like(p: Tensor) -> Tensor:
    """A copy with the same strides."""
    return p.clone(memory_format=torch.preserve_format) if p.numel() else p.clone()


def along(*primals: Tensor, k: int = 3) -> tuple[Tensor, ...]:
    """Tangents (k, *shape) for each."""
    return tuple(draw(k, *p.shape, seed=50 + i) for i, p in enumerate(primals))


def check_with_differences(fn: Callable[..., Tensor], *primals: Tensor, step: float = 1e-6, bound: float = 1e-7) -> Tensor:
    """Central differences, whose error is about step^2 and 1e-16 / step, hence the bound. Returns the tangents."""
    tangents = along(*primals)
    value, moved = frog.jvp(fn, primals, tangents)
    assert_close64(value, fn(*primals))
    for i, row in enumerate(moved):
        ahead, behind = (fn(*(p + s * t[i] for p, t in zip(primals, tangents, strict=True))) for s in (step, -step))
        error = relative_error(row, (ahead - behind) / (2 * step))
        assert error < bound, f"tangent {i}: relative error {error:.3g}, bound {bound:.3g}"
    return moved
