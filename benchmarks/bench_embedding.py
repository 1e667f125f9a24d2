"""Rows of a table with k = 16 tangents of it, beside what PyTorch offers without the fused operator.

Supplied tangents: beside indexing each of the k tables. Sampled ones: beside drawing the k tables whole and indexing them. And
the peak memory of one weight-perturbed gradient of a model with a large table, both ways.
"""

from __future__ import annotations

from collections.abc import Callable

import memory
import pytest
import torch
import torch.nn.functional as F
from conftest import Compare, Keep
from torch import Tensor, nn

import frog_cuda as frog
from frog_cuda.dual import ATEN_RULES, DualTensor, SampledTangents

K = 16
STATE = torch.tensor([3, 5])
WIDTH, ROWS_LOOKED_UP, WHOLE_TABLES = 256, "rows looked up", "whole tables, indexed"
#: (rows, dim), number of indices
SIZES = {
    "tokens, 50257 x 256, 1024 places": ((50257, 256), 1024),
    "tokens, 8000 x 64, 4096 places": ((8000, 64), 4096),
    "positions, 512 x 256, 512 places": ((512, 256), 512),
}


def _indices(rows: int, places: int) -> Tensor:
    """As words are: few of them make up most of a text."""
    uniform = torch.rand(places, generator=torch.Generator().manual_seed(0))
    return (rows**uniform).long().sub_(1).clamp_(0, rows - 1)


@pytest.mark.parametrize("size", SIZES)
def test_supplied_tangents(size: str, compare: Compare) -> None:
    (rows, dim), places = SIZES[size]
    w, dw, indices = torch.randn(rows, dim), torch.randn(K, rows, dim), _indices(rows, places)
    dual = DualTensor(w, dw)

    def against() -> Tensor:
        F.embedding(indices, w)
        return dw[:, indices]

    _compare(compare, lambda: F.embedding(indices, dual), against, size, "supplied")


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("size", SIZES)
def test_sampled_tangents(size: str, distribution: str, compare: Compare) -> None:
    (rows, dim), places = SIZES[size]
    w, indices = torch.randn(rows, dim), _indices(rows, places)
    dual = DualTensor.sampled_from(w, SampledTangents(STATE, K, 0, 0, distribution))

    def against() -> Tensor:
        F.embedding(indices, w)
        return frog.ops.sample_tangents(STATE, K, w.numel(), distribution=distribution).view(K, rows, dim)[:, indices]

    _compare(compare, lambda: F.embedding(indices, dual), against, size, distribution)


@pytest.mark.skipif(not memory.supported(), reason="peak memory is measured on Linux only")
def test_peak_memory_of_a_gradient(keep: Keep) -> None:
    rows = 50257
    tables = K * rows * WIDTH * 4
    grown = {name: memory.embedding_growth(name, rows, K) for name in (ROWS_LOOKED_UP, WHOLE_TABLES)}
    for name, size in grown.items():
        keep(
            table="op memory",
            op="gradient with a table, weight perturbed",
            case=f"{rows} x {WIDTH}, k = {K}",
            name=name,
            bytes=size,
        )
    assert grown[WHOLE_TABLES] > tables > 4 * grown[ROWS_LOOKED_UP]


def prepare(name: str, rows: int, k: int) -> Callable[[], object]:
    """One gradient of a text classifier; the module stays the same whichever rule serves its table."""
    if name == WHOLE_TABLES:
        ATEN_RULES[torch.ops.aten.embedding.default] = _whole_tables
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(rows, WIDTH), nn.Flatten(), nn.Linear(64 * WIDTH, 10))
    fg = frog.ForwardGradient(model, nn.CrossEntropyLoss(), k=k, perturb="weight", aggregate="mean")
    batch = max(1, rows // 6000)  # the warm-up, of few rows, leaves no memory that the measured call could use again
    tokens, target = _indices(rows, batch * 64).view(batch, 64), torch.arange(batch)
    return lambda: fg(tokens, target)


def _whole_tables(func: object, weight: DualTensor, indices: Tensor, *args: object) -> DualTensor:
    return DualTensor(weight.primal[indices], weight.tangents[:, indices])


def _compare(compare: Compare, ours: Callable[[], Tensor], against: Callable[[], Tensor], size: str, tangents: str) -> None:
    compare(
        ours,
        against,
        table="op",
        op=f"embedding, {tangents} tangents",
        against_name=WHOLE_TABLES,
        case=f"{size}, k = {K}",
    )
    assert torch.equal(ours().tangents, against())  # type: ignore[attr-defined]
