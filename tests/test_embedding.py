"""embedding_jvp against the float64 reference and PyTorch, and in gradients by weight perturbation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from against_func import check, draw
from helpers import assert_close64
from torch import Tensor, nn

import frog_cuda as frog
from frog_cuda import ops, reference
from frog_cuda.dual import DualTensor, SampledTangents
from frog_cuda.tracking import Tracker

CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROWS, DIM, K, FIRST, OFFSET = 37, 65, 3, 2, 1021
STATE = torch.tensor([5, 9])
INDICES = torch.tensor([[3, 0, 36], [3, 3, 12]])
SHAPES = [(), (1,), (7,), (2, 3), (2, 0, 3), (4, 1, 5)]


def state_for(distribution: str, rows: int = ROWS, dim: int = DIM) -> Tensor:
    """Of a standard basis: coordinates inside and outside of what is looked up."""
    coordinates = [0, 1, OFFSET + 3 * dim + 1, OFFSET + 36 * dim, OFFSET + 5 * dim]
    return torch.tensor(coordinates) if distribution == "standard_basis" else STATE


def table(dtype: torch.dtype = torch.float64, rows: int = ROWS, dim: int = DIM) -> Tensor:
    return draw(rows, dim).to(dtype)


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_supplied_tangents(shape, k, index_dtype):
    w, dw = table(), draw(k, ROWS, DIM, seed=1)
    indices = torch.randint(ROWS, shape, generator=torch.Generator().manual_seed(0)).to(index_dtype)
    y, dy = ops.embedding_jvp(indices, w, dw, k=k)
    value, tangents = reference.embedding_jvp(indices, w, dw, k=k)
    assert torch.equal(y, value) and torch.equal(dy, tangents)  # copies are exact
    assert torch.equal(y, F.embedding(indices, w))


@pytest.mark.parametrize("tangent_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "supplied"])
def test_every_pair_of_dtypes(sampled, dtype, tangent_dtype):
    w = table(dtype)
    dw = ops.sample_tangents(STATE, K, w.numel(), offset=OFFSET, first=FIRST, dtype=tangent_dtype).view(K, ROWS, DIM)
    if sampled:
        options = dict(state=STATE, first=FIRST, weight_offset=OFFSET, dtype=tangent_dtype)
        y, dy = ops.embedding_jvp(INDICES, w, k=K, **options)
    else:
        y, dy = ops.embedding_jvp(INDICES, w, dw, k=K)
    assert y.dtype == dtype and dy.dtype == tangent_dtype
    assert torch.equal(y, w[INDICES]) and torch.equal(dy, dw[:, INDICES])


@pytest.mark.parametrize("distribution", ops.DISTRIBUTIONS)
@pytest.mark.parametrize("dim", [1, 7, 64, 65, 300, 2049])
@pytest.mark.parametrize("offset", [0, 1021])
def test_rows_are_those_of_the_whole_table(distribution, dim, offset):
    w, state = table(torch.float32, dim=dim), state_for(distribution, dim=dim)
    options = dict(first=FIRST, distribution=distribution)
    _, dy = ops.embedding_jvp(INDICES, w, state=state, k=K, weight_offset=offset, **options)
    whole = ops.sample_tangents(state, K, w.numel(), offset=offset, **options).view(K, ROWS, dim)
    assert torch.equal(dy, whole[:, INDICES])
    _, exact = reference.embedding_jvp(INDICES, w, state=state, k=K, weight_offset=offset, **options)
    # values are drawn in float32: a few units of its rounding in their polynomials (tests/test_tangents.py holds them to it)
    torch.testing.assert_close(dy.double(), exact, rtol=1e-5, atol=1e-5)


def test_tables_with_strides():
    w, dw = draw(ROWS, 2 * DIM)[:, ::2], draw(DIM, ROWS, K).permute(2, 1, 0)
    rows = draw(ROWS, DIM + 3)[:, 3:]
    for weight, tangents in ((w, dw), (rows, dw), (w, draw(1, ROWS, DIM).expand(K, ROWS, DIM)), (rows, w.expand(K, -1, -1))):
        y, dy = ops.embedding_jvp(INDICES.T, weight, tangents, k=K)
        assert torch.equal(y, weight[INDICES.T]) and torch.equal(dy, tangents[:, INDICES.T])
    _, dy = ops.embedding_jvp(INDICES.T, w, state=STATE, k=K, weight_offset=0)
    assert torch.equal(dy, ops.sample_tangents(STATE, K, w.numel(), dtype=w.dtype).view(K, ROWS, DIM)[:, INDICES.T])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_with_any_number_of_threads(dtype):
    w, indices = table(dtype, 500, 300), torch.randint(500, (70, 30), generator=torch.Generator().manual_seed(0))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.embedding_jvp(indices, w, state=STATE, k=4, weight_offset=7))
    finally:
        torch.set_num_threads(threads)
    for y, dy in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(dy, results[0][1])


BAD = [
    (dict(weight=torch.ones(3, 4, 5)), r"weight has shape \(3, 4, 5\), expected \(rows, dim\)"),
    (dict(weight=torch.ones(3, 5, dtype=torch.int64)), "weight has dtype Long; accepted are float32, float64"),
    (dict(indices=torch.ones(3)), "indices has dtype Float; accepted are int64 and int32"),
    (dict(indices=torch.tensor([[0, 1], [2, 37]])), "indices holds 37 at place 3; weight has 37 rows, so accepted are 0 to 36"),
    (dict(indices=torch.tensor([-1])), "indices holds -1 at place 0; weight has 37 rows"),
    (dict(dweight=torch.ones(3, ROWS, 4)), r"dweight has shape \(3, 37, 4\), expected \(3, 37, 65\)"),
    (dict(dweight=torch.ones(3, ROWS, DIM, dtype=torch.int64)), "dweight has dtype Long"),
    (dict(dweight=None), "dweight and weight_offset are both None; accepted is one of them"),
    (dict(weight_offset=0), "dweight and weight_offset are both given; accepted is one of them"),
    (dict(dtype=torch.float32), "dtype is given beside dweight; accepted with sampled tangents only"),
    (dict(k=0), "k is 0; at least 1 tangent is needed"),
    (dict(dweight=None, weight_offset=0), r"state is None, but sampled tangents need \[seed, step\]"),
    (dict(dweight=None, weight_offset=-1, state=STATE), "weight_offset is -1; it must not be negative"),
    (dict(dweight=None, weight_offset=0, state=STATE, dtype=torch.int64), "dtype is Long; accepted are float32"),
    (dict(dweight=None, weight_offset=0, state=torch.tensor([1, -1])), "step is -1; it must lie in"),
    (dict(dweight=torch.ones(3, ROWS, DIM, device="meta")), "arguments are on cpu and meta; all must be on one device"),
]


@pytest.mark.parametrize("changes, message", BAD, ids=[message[:40] for _, message in BAD])
def test_bad_input(changes, message):
    given = {"indices": INDICES, "weight": torch.ones(ROWS, DIM), "dweight": torch.ones(K, ROWS, DIM), "k": K}
    with pytest.raises(RuntimeError, match=f"embedding_jvp: {message}"):
        ops.embedding_jvp(**(given | changes))


# ---- the rule


@pytest.mark.parametrize("padding_idx", [None, 3, -1])
@pytest.mark.parametrize("indices", [INDICES, INDICES.int(), torch.tensor(4), INDICES[:0]], ids=["2-D", "int32", "0-D", "none"])
def test_rule_is_torch_func(indices, padding_idx):
    """A row that pads moves as every other: padding_idx concerns the gradient of a backward pass alone."""
    check(lambda w: F.embedding(indices, w, padding_idx), draw(37, 5))


def test_rule_raises_as_pytorch():
    w = draw(4, 5)
    for t in (DualTensor(w, draw(2, 4, 5)), sampled(w)):
        with pytest.raises(IndexError, match="index out of range"):
            F.embedding(torch.tensor([4]), t)


def sampled(w: Tensor, k: int = K, **options) -> DualTensor:
    return DualTensor.sampled_from(w, SampledTangents(STATE, k, FIRST, OFFSET, "normal", **options))


def test_rule_with_sampled_tangents():
    w, touched = table(torch.float32), set()
    out = F.embedding(INDICES, sampled(w, touched=touched))
    assert torch.equal(out.tangents, sampled(w).tangents[:, INDICES]) and touched == {OFFSET}
    low = F.embedding(INDICES, sampled(w, dtype=torch.bfloat16))
    assert low.tangents.dtype == torch.bfloat16
    assert torch.equal(low.tangents, sampled(w, dtype=torch.bfloat16).tangents[:, INDICES])


def test_max_norm_renormalises_the_table_as_before():
    """In place and without a part in the derivative, as under torch.func: the rows' tangents stay what they were."""
    w, dw = draw(6, 4), draw(2, 6, 4, seed=1)
    own = w.clone()
    expected = F.embedding(torch.tensor([0, 5]), own, max_norm=0.5)
    dual = DualTensor(w.clone(), dw)
    out = F.embedding(torch.tensor([0, 5]), dual, max_norm=0.5)
    assert_close64(out.primal, expected)
    assert_close64(dual.primal, own)


class Tied(nn.Module):
    """A language model in small: the table is also the weight of the last layer."""

    def __init__(self, rows: int, dim: int, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, dim)
        self.output = nn.Linear(dim, rows if tied else 3, bias=False)
        if tied:
            self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(torch.tanh(self.embedding(tokens)).mean(1))


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_tied_weights_move_alike_at_both_ends(distribution):
    torch.manual_seed(0)
    model, tokens = Tied(50, 24).double(), torch.tensor([[1, 4, 4], [0, 49, 7]])
    target = torch.tensor([3, 8])
    fg = frog.ForwardGradient(model, nn.CrossEntropyLoss(), k=4, perturb="weight", tangents=distribution, aggregate="mean")
    v = fg.tangent_set(((tokens,), {})).draw(fg._method.pieces[0], torch.float64)
    fg.derivatives(tokens, target)
    moved = fg.last.directional_derivatives
    loss = nn.CrossEntropyLoss()

    def value(w: Tensor) -> Tensor:
        return loss(F.linear(torch.tanh(F.embedding(tokens, w)).mean(1), w), target)

    w = model.embedding.weight.detach()
    exact = torch.stack([torch.func.jvp(value, (w,), (t,))[1] for t in v])
    assert_close64(moved, exact)


@pytest.mark.parametrize("aggregate", ["mean", "orthogonal"])
@pytest.mark.parametrize("tangents", ["normal", "rademacher", frog.tangents.LowRank(2)], ids=str)
def test_a_gradient_stores_no_table_of_tangents(tangents, aggregate):
    """A pass with k = 16 tangents takes less than the memory of one table, where k tables were drawn before."""
    rows, dim, k = 4000, 64, 16
    model, tokens = Tied(rows, dim, tied=False), torch.arange(24).view(2, 12) * 100
    fg = frog.ForwardGradient(model, nn.CrossEntropyLoss(), k=k, perturb="weight", tangents=tangents, aggregate=aggregate)
    with Tracker(CPU) as tracker:
        fg.derivatives(tokens, torch.tensor([0, 2]))
    low_rank = 0 if isinstance(tangents, str) else 2 * k * (rows + dim) * 2 * 4  # drawn factors, and a copy that is split
    assert tracker.peak < rows * dim * 4 + low_rank


def test_coverage_calls_it_fused():
    model = nn.Sequential(frog.nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 2))
    found = frog.coverage(model, torch.tensor([[0, 3, 8]]))
    assert found.rows["0", "aten.embedding", "fused"] == 1
