"""Weight tangents of low rank: their moments, their exactness in every layer, and that nothing is multiplied out."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_close64, relative_error
from torch import nn

import frog_cuda as frog
from frog_cuda import low_rank, ops
from frog_cuda.dual import DualTensor, SampledTangents, draw
from frog_cuda.low_rank import Drawn, Factors, Layout, factored
from frog_cuda.sgd import Sgd
from frog_cuda.tangents import LowRank, Piece, TangentSet

RANKS = pytest.mark.parametrize("r", [1, 2, 3])
BASES = pytest.mark.parametrize("base", ["normal", "rademacher"])


def tangent_set(shape, k, r, base="normal", seed=3, step=0):
    piece = Piece("w", shape, 64)
    n = math.prod(shape) + 64
    return TangentSet(LowRank(r, base), k, seed, step, torch.device("cpu"), n, [piece]), piece


@RANKS
@BASES
def test_second_moment_is_the_identity(r, base):
    """E[v v^T] = I. Over N draws an entry of the mean of v v^T has the standard deviation sqrt(Var) / sqrt(N), where Var of a
    product of two such elements is at most 9 (normal, r = 1: E a^4 b^4 = 9); 6 of them are allowed."""
    shape, count = (5, 4, 2), 4096
    drawn, piece = tangent_set(shape, count, r, base)
    assert factored(shape, r) == (r * (5 + 8) < 40)
    v = drawn.draw(piece, torch.float64).flatten(1)
    moment = v.T @ v / count
    assert (moment - torch.eye(40, dtype=torch.float64)).abs().max() < 6 * 3 / count**0.5
    assert v.mean(0).abs().max() < 6 / count**0.5


@RANKS
def test_tangents_have_the_rank(r):
    drawn, piece = tangent_set((17, 3, 3, 3), 2, r)
    for v in drawn.draw(piece, torch.float64).flatten(2).flatten(1, 1):
        assert torch.linalg.matrix_rank(v.reshape(17, 27)) == r


@RANKS
@BASES
def test_gram_combine_and_update_from_factors(r, base):
    drawn, piece = tangent_set((33, 7, 3), 5, r, base)
    v = drawn.draw(piece, torch.float64).flatten(1)
    c = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_close64(drawn.gram(piece), v @ v.T)
    assert_close64(drawn.combine(piece, c, torch.float64).flatten(), c @ v)
    start = torch.ones(33, 21, dtype=torch.float64)
    for target in (start.clone().view(33, 7, 3), start.clone().view(33, 3, 7).mT):
        before = target.clone()
        drawn.axpy_(target, piece, c, -0.5)
        assert_close64(target, before - 0.5 * (c @ v).view(33, 7, 3))
    low = drawn.combine(piece, c, torch.bfloat16)
    assert low.dtype == torch.bfloat16 and relative_error(low.double().flatten(), c @ v) < 2**-8


def test_chunks_draw_the_same():
    drawn, piece = tangent_set((33, 21), 5, 2)
    whole = drawn.draw(piece, torch.float32)
    assert torch.equal(torch.cat([drawn.draw(piece, torch.float32, 0, 2), drawn.draw(piece, torch.float32, 2)]), whole)


def test_vectors_and_small_matrices_are_drawn_in_full():
    for shape in ((40,), (), (3, 2), (1, 9)):
        drawn, piece = tangent_set(shape, 3, 2)
        plain = TangentSet(frog.tangents.Normal(), 3, 3, 0, torch.device("cpu"))
        assert torch.equal(drawn.draw(piece, torch.float32), plain.draw(piece, torch.float32))
    assert factored((3, 8), 2) and not factored((3, 6), 2)


@BASES
def test_steps_along_short_pieces_are_those_along_their_gradient(base):
    """To the bit: both are made of the tangents that are kept."""
    drawn, piece = tangent_set((1025,), 5, 2, base)
    c = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    g = drawn.combine(piece, c, torch.float32)
    drawn.axpy_(target := torch.zeros(1025), piece, c, 1.0)
    assert torch.equal(target, g)
    drawn.sgd_(target := torch.zeros(1025), buffer := torch.zeros(1025), True, piece, c, Sgd(0.5, momentum=0.9))
    assert torch.equal(buffer, g) and torch.equal(target, -0.5 * g)


def dense_and_dual(shape, k, r, dtype=torch.float64):
    drawn, piece = tangent_set(shape, k, r)
    weight = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    touched: set[int] = set()
    factors = drawn.factors(piece, dtype)
    dual = DualTensor.sampled_from(weight, Factors(factors.left, factors.right, shape, piece.offset, touched))
    return weight, factors.dense(), dual, touched


LAYERS = {
    "linear": ((33, 21), (4, 21), lambda x, w, b: nn.functional.linear(x, w, b)),
    "linear of sequences": ((33, 21), (2, 3, 21), lambda x, w, b: nn.functional.linear(x, w, b)),
    "linear of one row": ((33, 21), (21,), lambda x, w, b: nn.functional.linear(x, w, b)),
    "empty batch": ((33, 21), (0, 21), lambda x, w, b: nn.functional.linear(x, w, b)),
    "conv1d": ((33, 5, 3), (2, 5, 9), lambda x, w, b: nn.functional.conv1d(x, w, b, padding=1, stride=2)),
    "conv2d": ((33, 3, 3, 3), (2, 3, 7, 6), lambda x, w, b: nn.functional.conv2d(x, w, b, dilation=2)),
    "one place": ((33, 3, 3, 3), (2, 3, 2, 1), lambda x, w, b: nn.functional.conv2d(x, w, b, padding=1, stride=2)),
    "conv3d": ((33, 2, 2, 2, 2), (2, 2, 3, 4, 3), lambda x, w, b: nn.functional.conv3d(x, w, b)),
    "groups": ((33, 4, 3), (2, 12, 9), lambda x, w, b: nn.functional.conv1d(x, w, b, groups=3)),
    "transposed": ((12, 33, 3), (2, 12, 4), lambda x, w, b: nn.functional.conv_transpose1d(x, w, b)),
    "embedding": ((33, 21), None, lambda x, w, b: nn.functional.embedding(torch.tensor([[1, 32, 1]]), w) + b[:21]),
    "matmul": ((21, 33), (4, 21), lambda x, w, b: torch.addmm(b, x, w)),
}


@RANKS
@pytest.mark.parametrize("moving", [False, True], ids=["weight alone", "input and bias too"])
@pytest.mark.parametrize("layer", list(LAYERS))
def test_every_layer_equals_tangents_multiplied_out(layer, r, moving):
    shape, input_shape, call = LAYERS[layer]
    weight, v, dual, touched = dense_and_dual(shape, 3, r)
    generator = torch.Generator().manual_seed(2)
    rand = lambda *s: torch.randn(*s, dtype=torch.float64, generator=generator)  # noqa: E731
    x, b = rand(*(input_shape or (1,))), rand(33)
    dx, db = rand(3, *x.shape), rand(3, 33)
    if moving:
        expected = frog.jvp(call, (x, weight, b), (dx, v, db))
        out = call(DualTensor(x, dx), dual, DualTensor(b, db))
    else:
        expected = frog.jvp(call, (x, weight, b), (None, v, None))
        out = call(x, dual, b)
    assert_close64(out.primal, expected[0])
    assert_close64(out.tangents, expected[1])
    assert touched == {64}


@RANKS
def test_a_convolution_of_what_does_not_move(r):
    """zeros_like of a DualTensor has tangents that are known to be zero."""
    shape, input_shape, call = LAYERS["conv2d"]
    weight, v, dual, _ = dense_and_dual(shape, 3, r)
    x = torch.zeros_like(DualTensor(torch.ones(input_shape).double(), torch.ones(3, *input_shape).double()))
    out = call(x, dual, None)
    expected = frog.jvp(call, (x.primal, weight, None), (None, v, None))
    assert_close64(out.primal, expected[0])
    assert_close64(out.tangents, expected[1])


@pytest.mark.parametrize("tangents", ["normal", LowRank(1)], ids=["normal", "rank 1"])
def test_an_empty_parameter_before_a_matrix(tangents):
    """Both would begin at the same place of the global tangent vector."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(0, 5, bias=False), nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 3)).double()
    fg = frog.ForwardGradient(model, nn.CrossEntropyLoss(), k=4, perturb="weight", tangents=tangents)
    x, target = torch.zeros(6, 0).double(), torch.arange(6) % 3
    simulated = frog.simulate(fg, x, target)
    fg(x, target)
    assert model[0].weight.grad is None  # it took no part
    for name, p in model.named_parameters():
        if p.numel():
            assert_close64(p.grad, simulated.gradients[name])
    fg.update_(0.1)


def test_numbers_of_tangents_that_differ_are_named():
    _, _, dual, _ = dense_and_dual((33, 21), 3, 1)
    with pytest.raises(ValueError, match="linear: tangents disagree in number"):
        nn.functional.linear(DualTensor(torch.ones(2, 21).double(), torch.ones(4, 2, 21).double()), dual)
    with pytest.raises(ValueError, match="linear: tangents disagree in number"):
        nn.functional.linear(torch.ones(2, 21).double(), dual, DualTensor(torch.ones(33).double(), torch.ones(4, 33).double()))


@pytest.mark.parametrize("layer", ["linear", "conv2d"])
@pytest.mark.parametrize("moving", [False, True])
def test_layers_do_not_multiply_out(layer, moving, monkeypatch):
    shape, input_shape, call = LAYERS[layer]
    _, _, dual, _ = dense_and_dual(shape, 3, 2)
    monkeypatch.setattr(low_rank.Factors, "dense", None)
    x = torch.ones(input_shape, dtype=torch.float64)
    call(DualTensor(x, torch.ones(3, *input_shape, dtype=torch.float64)) if moving else x, dual, torch.ones(33).double())


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Flatten(), nn.Linear(288, 20), nn.ReLU(), nn.Linear(20, 4)
    return nn.Sequential(*layers).double()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(5, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.arange(5) % 4


OPTIONS = {"plain": {}, "chunks": {"chunk_size": 2}, "mean": {"aggregate": "mean"}, "custom": {"aggregate": lambda v, d: d @ v}}


@BASES
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_forward_equals_simulated(base, options):
    fg = frog.ForwardGradient(net(), nn.CrossEntropyLoss(), k=5, perturb="weight", tangents=LowRank(2, base), **options)
    simulated = frog.simulate(fg, *data())
    fg(*data())
    assert_close64(fg.last.directional_derivatives, simulated.estimate.directional_derivatives)
    for name, p in fg.model.named_parameters():
        assert_close64(p.grad, simulated.gradients[name])


def test_update_equals_gradient_descent():
    a, b = (frog.ForwardGradient(net(), nn.CrossEntropyLoss(), k=4, perturb="weight", tangents=LowRank(1)) for _ in range(2))
    for _ in range(3):
        a.derivatives(*data())
        a.update_(0.1)
        b.model.zero_grad()
        b(*data())
        with torch.no_grad():
            for p in b.model.parameters():
                p -= 0.1 * p.grad
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert_close64(p.detach(), q.detach())


def test_mean_is_unbiased():
    """The mean over N estimates with k tangents each is within 6 standard deviations of the gradient along a fixed direction:
    the variance of <v, g> <v, u> for unit u is at most 9 |g|^2 (normal, r = 1)."""
    torch.manual_seed(0)
    model = nn.Linear(12, 9, dtype=torch.float64)
    x, target = torch.randn(6, 12, dtype=torch.float64), torch.randn(6, 9, dtype=torch.float64)
    k, count = 64, 64
    fg = frog.ForwardGradient(model, nn.MSELoss(), k=k, perturb="weight", tangents=LowRank(1), aggregate="mean")
    for _ in range(count):
        fg(x, target)
    estimate = model.weight.grad / count
    (true,) = torch.autograd.grad(nn.functional.mse_loss(model(x), target), [model.weight])
    whole = torch.autograd.grad(nn.functional.mse_loss(model(x), target), list(model.parameters()))
    length = sum(g.square().sum() for g in whole) ** 0.5
    assert (estimate - true).abs().max() < 6 * 3 * length / (k * count) ** 0.5
    assert torch.nn.functional.cosine_similarity(estimate.flatten(), true.flatten(), dim=0) > 0.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    found = {}
    for tangent_dtype in (None, dtype):
        options = dict(k=3, perturb="weight", tangents=LowRank(1), tangent_dtype=tangent_dtype)
        fg = frog.ForwardGradient(net().float(), nn.CrossEntropyLoss(), **options)
        x, target = data()
        fg(x.float(), target)
        found[tangent_dtype] = fg.last.directional_derivatives
    # rounding each of the tangents' elements and intermediate results to 8 bits
    assert relative_error(found[dtype], found[None]) < (1e-6 if dtype == torch.float32 else 0.1)


def test_long_pieces_without_factors_are_not_kept(monkeypatch):
    """The estimate is the same, whichever pieces are drawn beforehand."""
    found = []
    for longest in (0, 8, Layout.LONGEST):
        monkeypatch.setattr(Layout, "LONGEST", longest)
        for chunk in (None, 2):
            torch.manual_seed(1)
            model = net()
            options = dict(k=5, perturb="weight", tangents=LowRank(3), chunk_size=chunk, seed=7)
            fg = frog.ForwardGradient(model, nn.CrossEntropyLoss(), **options)
            fg(*data())
            found.append([fg.last.directional_derivatives, fg.last.gram, *(p.grad for p in model.parameters())])
    short = [p for p in model.parameters() if not factored(tuple(p.shape), 3)]
    assert min(p.numel() for p in short) <= 8 < max(p.numel() for p in short)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert_close64(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("r", [1, 3])
def test_estimates_in_one_call_are_those_piece_by_piece(monkeypatch, r, dtype):
    monkeypatch.setattr(Layout, "LONGEST", 30)  # a piece that is drawn anew stands among them
    fg = frog.ForwardGradient(net().to(dtype), nn.CrossEntropyLoss(), k=5, perturb="weight", tangents=LowRank(r), seed=1)
    x, target = data()
    fg.derivatives(x.to(dtype), target)
    pieces, drawn, c = fg._method.pieces, fg._tangents, fg.last.base_coefficients
    calls: list[str] = []
    whole = ops.low_rank_combine
    monkeypatch.setattr(ops, "low_rank_combine", lambda *args: (calls.append("all"), whole(*args))[1])
    together = fg.gradients()
    assert calls == ["all"] * (dtype != torch.bfloat16) and list(together) == [p.name for p in pieces]
    for piece in pieces:
        alone = drawn.combine(piece, c, dtype)
        assert together[piece.name].dtype == dtype and torch.equal(together[piece.name], alone)
    some = pieces[1:]
    assert all(torch.equal(g, together[p.name]) for p, g in drawn.combine_each(some, c, [dtype] * len(some)))
    assert calls == ["all"] * (dtype != torch.bfloat16)


def test_estimates_of_empty_pieces_beside_others():
    """They begin at the same place, with the same shape."""
    pieces = [Piece("a", (0,), 0), Piece("b", (0,), 0), Piece("c", (5, 0), 0), Piece("d", (5, 0), 0), Piece("e", (9, 9), 0)]
    drawn = TangentSet(LowRank(1), 3, 1, 2, torch.device("cpu"), 81, pieces)
    c = torch.randn(3, dtype=torch.float64)
    found = list(drawn.combine_each(pieces, c, [torch.float64] * 5))
    assert [p.name for p, _ in found] == list("abcde") and all(g.shape == p.shape for p, g in found)
    assert torch.equal(found[4][1], drawn.combine(pieces[4], c, torch.float64))


def test_what_is_kept_is_not_written_to():
    drawn, piece = tangent_set((7,), 3, 1)
    kept = drawn.in_full(piece, torch.float64)
    touched: set[int] = set()
    sampled = SampledTangents(drawn.state, 3, 0, piece.offset, "normal", None, touched, stored=kept)
    dual = DualTensor.sampled_from(torch.zeros(7, dtype=torch.float64), sampled)
    before = kept.clone()
    dual.tangents.zero_()
    drawn.draw(piece, torch.float64).zero_()
    assert torch.equal(dual.tangents, before) and touched == {piece.offset}
    assert torch.equal(draw(dual.primal, sampled, 1, 2), before[1:])


def test_parameters_of_several_dtypes_are_drawn_once_a_chunk(monkeypatch):
    model = nn.ModuleList(nn.Linear(9, 9).to(dtype) for dtype in (torch.float32, torch.float64) * 3)
    calls: list[torch.dtype] = []
    sample = ops.sample_blocks
    monkeypatch.setattr(ops, "sample_blocks", lambda *args, **how: (calls.append(how["dtype"]), sample(*args, **how))[1])

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, x):
            for layer in self.layers:
                x = layer(x.to(layer.weight.dtype))
            return x

    options = dict(k=4, perturb="weight", tangents=LowRank(1), aggregate="mean", chunk_size=2)
    frog.ForwardGradient(Net(), nn.MSELoss(), **options).derivatives(torch.randn(3, 9), torch.randn(3, 9).double())
    assert len(calls) == 2 * 2 * 2  # chunks, dtypes, factors and vectors


def test_gram_matrices_of_factors_come_in_parts(monkeypatch):
    model, found = net(), []
    for pairs in (1, Drawn.PAIRS):
        monkeypatch.setattr(Drawn, "PAIRS", pairs)
        fg = frog.ForwardGradient(model, nn.CrossEntropyLoss(), k=4, perturb="weight", tangents=LowRank(2), seed=1)
        fg.derivatives(*data())
        found.append(fg.last.gram)
    assert torch.equal(*found)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="r is 0; expected an integer >= 1"):
        LowRank(0)
    with pytest.raises(ValueError, match="LowRank: base is 'sphere'; accepted are 'normal' and 'rademacher'"):
        LowRank(1, "sphere")
    with pytest.raises(ValueError, match="LowRank is for perturb='weight'"):
        frog.ForwardGradient(net(), nn.CrossEntropyLoss(), k=2, tangents=LowRank(1))
    with pytest.raises(ValueError, match="LowRank: no closed-form length correction"):
        options = dict(perturb="weight", aggregate="mean", scaling_correction=True)
        frog.ForwardGradient(net(), nn.CrossEntropyLoss(), k=2, tangents=LowRank(1), **options)
