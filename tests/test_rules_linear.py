from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from against_func import check, compare, draw, expected
from helpers import assert_close64

import frog_cuda as frog
from frog_cuda import ops
from frog_cuda.dual import DualTensor, SampledTangents, add_activity

K, B, IN, OUT = 3, 7, 33, 5
STATE = torch.tensor([11, 4])


def sampled(p: torch.Tensor, offset: int, grams=None, distribution="normal", state=STATE, k=K, whole=None) -> DualTensor:
    return DualTensor.sampled_from(p, SampledTangents(state, k, 0, offset, distribution, grams, whole=whole))


def stored(p: torch.Tensor, offset: int, distribution="normal", state=STATE) -> torch.Tensor:
    drawn = ops.sample_tangents(state, K, p.numel(), offset=offset, distribution=distribution, dtype=p.dtype)
    return drawn.view(K, *p.shape)


KINDS = ("plain", "dual", "sampled")
COMBINATIONS = [c for c in itertools.product(KINDS[:2], KINDS, (*KINDS, "none")) if set(c) - {"plain", "none"}]


@pytest.mark.parametrize("kinds", COMBINATIONS, ids="-".join)
@pytest.mark.parametrize("shape", [(B, IN), (IN,), (0, IN), (2, 3, IN)], ids=str)
def test_every_mix_of_operands(kinds, shape):
    operands = [draw(*shape, seed=1), draw(OUT, IN, seed=2)]
    if kinds[2] != "none":
        operands.append(draw(OUT, seed=3))
    tangents, arguments = [], []
    for i, (kind, p) in enumerate(zip(kinds, operands, strict=False)):
        offset = (0, 64, 64 + OUT * IN)[i]
        t = {"plain": torch.zeros(K, *p.shape, dtype=p.dtype), "dual": draw(K, *p.shape, seed=9 + i)}.get(kind)
        t = stored(p, offset) if t is None else t
        tangents.append(t)
        arguments.append({"plain": p, "dual": DualTensor(p, t)}.get(kind) if kind != "sampled" else sampled(p, offset))
    (value,), (moved,) = expected(F.linear, operands, tangents)
    compare(F.linear(*arguments), value, moved)


@pytest.mark.parametrize("shape", [(1,), (), (B, 1), (1, OUT), (B, OUT)], ids=str)
def test_a_bias_that_pytorch_stretches(shape):
    x, w, b = draw(B, IN, seed=1), draw(OUT, IN, seed=2), draw(*shape, seed=3)
    check(F.linear, x, w, b)
    check(lambda x: F.linear(x, w, b), x)
    check(lambda b: F.linear(x, w, b), b)
    value, moved = F.linear(x, w, b), F.linear(x, sampled(w, 0)).tangents
    compare(F.linear(x, sampled(w, 0), b), value, moved)
    with pytest.raises(RuntimeError, match="must match|not expandable|shape"):
        F.linear(DualTensor(x, draw(K, B, IN)), w, b.reshape(1, -1).expand(3, -1))


def test_non_contiguous_operands():
    check(F.linear, draw(IN, B).t(), draw(IN, OUT).t(), draw(2 * OUT)[::2])
    check(F.linear, draw(B, IN), draw(OUT, IN), k=1)


@pytest.mark.parametrize("suffix", [(IN,), (B, IN), (2, B, IN), ()], ids=str)
@pytest.mark.parametrize("own", [True, False], ids=["with tangents", "plain"])
def test_pending_activity_goes_through_the_layer(suffix, own):
    x, w, b = draw(2, B, IN), draw(OUT, IN, seed=2), draw(OUT, seed=3)
    v, dx = draw(K, *suffix, seed=4), draw(K, 2, B, IN, seed=5)
    total = v.reshape(K, *(1,) * (3 - len(suffix)), *suffix) + (dx if own else torch.zeros_like(dx))
    (value,), (moved,) = expected(lambda x: F.linear(x, w, b), [x], [total])
    compare(F.linear(add_activity(DualTensor(x, dx) if own else x, v), w, b), value, moved)


def test_gram_matrices_are_left_for_the_estimator():
    x, w, b = draw(B, IN), draw(OUT, IN, seed=2), draw(OUT, seed=3)
    grams: dict = {}
    dw, db = sampled(w, 8, grams), sampled(b, 8 + w.numel(), grams)
    first = F.linear(x, dw, db)
    flat = torch.cat([stored(w, 8).flatten(1), stored(b, 8 + w.numel())], 1)
    assert_close64(grams[8](), flat @ flat.t())
    assert_close64(grams[8 + w.numel()](), torch.zeros(K, K, dtype=torch.float64))
    kept = dict(grams)
    assert_close64(F.linear(x, dw, db).tangents, first.tangents)  # a second use counts nothing twice
    assert all(grams[o] is kept[o] for o in kept) and len(grams) == 2
    alone: dict = {}
    F.linear(x, w, sampled(b, 5, alone))
    assert_close64(alone[5](), stored(b, 5) @ stored(b, 5).t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5), (40, 130), (70, 300)], ids=str)
def test_gram_matrix_of_a_whole_set_from_a_part_of_it(shape, dtype):
    out, columns = shape
    x, w, b = (t.to(dtype) for t in (draw(B, columns), draw(out, columns, seed=2), draw(out, seed=3)))
    found: list[dict] = [{}, {}]
    for grams, k, whole in zip(found, (5, 2), (None, 5), strict=True):
        F.linear(x, sampled(w, 8, grams, k=k, whole=whole), sampled(b, 8 + w.numel(), grams, k=k, whole=whole))
    assert set(found[0]) == set(found[1])
    for offset in found[0]:
        assert found[1][offset]().shape == (5, 5)
        assert torch.equal(found[0][offset](), found[1][offset]())


def test_a_tied_bias_is_counted_once():
    x, b = draw(B, OUT), draw(OUT, seed=3)
    grams: dict = {}
    bias = sampled(b, 0, grams)
    F.linear(x, draw(OUT, OUT), bias)
    weight = sampled(draw(OUT, OUT, seed=5), 40, grams)
    F.linear(x, weight, bias)
    assert set(grams) == {0}  # the second weight is left to tangent_gram


def test_a_bias_from_another_set_of_tangents():
    x, w, b = draw(B, IN), draw(OUT, IN, seed=2), draw(OUT, seed=3)
    other = torch.tensor([5, 6])
    out = F.linear(x, sampled(w, 0), sampled(b, 0, state=other))
    (value,), (moved,) = expected(lambda w, b: F.linear(x, w, b), [w, b], [stored(w, 0), stored(b, 0, state=other)])
    compare(out, value, moved)


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_other_operations_draw_the_same_tangents(distribution):
    w = draw(OUT, IN)
    tangents = stored(w, 3, distribution)
    dual = sampled(w, 3, distribution=distribution)
    assert torch.equal(dual.tangents, tangents) and dual._tangents is None
    assert torch.equal((dual * 2).tangents, tangents * 2)
    assert torch.equal(dual.t().tangents, tangents.transpose(1, 2))
    x = draw(B, IN)
    assert_close64((x @ dual.t()).tangents, F.linear(x, dual).tangents)
    assert dual.sampled is not None


def test_writing_into_sampled_parameters():
    dual = sampled(draw(OUT, IN), 0)
    with pytest.raises(RuntimeError, match="in-place operation on a view of a parameter whose tangents are drawn"):
        dual[0].mul_(2)
    before = dual.tangents
    dual.mul_(2)
    assert dual.sampled is None and torch.equal(dual.tangents, before * 2)


def test_parameters_that_require_grad_record_nothing():
    w = torch.nn.Parameter(draw(OUT, IN))
    x = DualTensor(draw(B, IN), draw(K, B, IN))
    for y in (F.linear(x, w), x @ w.t(), (x * w.sum()).amax(1), F.layer_norm(x, (IN,), w[0])):
        assert not y.requires_grad and not y.tangents.requires_grad and not y.primal.requires_grad


def test_errors_name_the_problem():
    with pytest.raises(ValueError, match=r"linear.*k = 3.*k = 2"):
        F.linear(DualTensor(draw(B, IN), draw(3, B, IN)), DualTensor(draw(OUT, IN), draw(2, OUT, IN)))
    with pytest.raises(ValueError, match=r"linear.*k = 3.*k = 2"):
        F.linear(DualTensor(draw(B, IN), draw(3, B, IN)), draw(OUT, IN), DualTensor(draw(OUT), draw(2, OUT)))
    with pytest.raises(RuntimeError):
        F.linear(DualTensor(draw(B, IN), draw(3, B, IN)), draw(OUT, IN + 1))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_low_precision_survives_a_layer_whose_input_does_not_move(low):
    x, w, b = (torch.randn(*shape) for shape in ((B, IN), (OUT, IN), (OUT,)))
    vw, vb = torch.randn(K, OUT, IN).to(low), torch.randn(K, OUT).to(low)
    exact = vw.float() @ x.T
    for out, wanted in (
        (F.linear(add_activity(x, torch.randn(K, IN).to(low)), w, b), None),
        (F.linear(x, DualTensor(w, vw), b), exact.transpose(1, 2)),
        (F.linear(x, w, DualTensor(b, vb)), vb.float()[:, None].expand(K, B, OUT)),
    ):
        assert out.dtype == torch.float32 and out.tangents.dtype == low
        if wanted is not None:
            torch.testing.assert_close(out.tangents.float(), wanted, rtol=2**-7, atol=1e-5)
    assert F.linear(add_activity(x, torch.randn(K, IN)), w, b).tangents.dtype == torch.float32


@pytest.mark.parametrize("names", [["0.bias"], ["0.weight"], ["0.bias", "2.bias"]], ids=str)
def test_a_layer_of_which_one_parameter_moves_in_passes_of_part_of_the_tangents(names):
    grads = []
    for chunk_size in (None, 2):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
        options = dict(k=3, perturb="weight", layers=names, chunk_size=chunk_size)
        estimator = frog.ForwardGradient(model, lambda out, target: (out - target).square().mean(1), **options)
        estimator(torch.ones(2, 5), torch.zeros(2, 3))
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert set(grads[0]) == set(grads[1]) == set(names)
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in names)
