"""Supplied tangents: a tensor, a mapping or a callable; what they become piece by piece, and what does not fit."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_close64
from torch import Tensor, nn

import frog_cuda as frog
from frog_cuda.tangents import Piece, Supplied, TangentSet, resolve, sample

CPU = torch.device("cpu")
PIECES = [Piece("a", (2, 3), 0), Piece("b", (4,), 6), Piece("c", (), 10)]


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def check_supplied(drawn: TangentSet, v: Tensor) -> None:
    """Pieces of a set are the columns of v (k, 11)."""
    c = torch.linspace(-1, 1, len(v), dtype=torch.float64)
    gram = torch.zeros(len(v), len(v), dtype=torch.float64)
    for piece in PIECES:
        part = v[:, piece.offset : piece.offset + piece.numel]
        stored = drawn.draw(piece, torch.float64)
        assert torch.equal(stored, part.reshape(len(v), *piece.shape))
        assert torch.equal(drawn.draw(piece, torch.float64, 1, 2), stored[1:3])
        combined = drawn.combine(piece, c, torch.float64)
        assert combined.shape == piece.shape
        assert_close64(combined.flatten(), c @ part)
        target = torch.ones(piece.shape, dtype=torch.float64)
        drawn.axpy_(target, piece, c, 2.0)
        assert_close64(target, 1 + 2 * combined)
        gram += drawn.gram(piece)
    assert_close64(gram, v @ v.T)


def supplied(source, k: int = 4, pieces=PIECES, seed: int = 0, step: int = 0) -> TangentSet:
    return TangentSet(resolve(source), k, seed, step, CPU, sum(p.numel for p in pieces), pieces)


def test_supplied_tensor():
    v = random(4, 11)
    check_supplied(supplied(v), v)
    check_supplied(supplied(v.requires_grad_()), v.detach())
    assert not supplied(v).draw(PIECES[0], torch.float64).requires_grad


def test_supplied_mapping():
    v = random(4, 11)
    check_supplied(supplied({"c": v[:, 10], "a": v[:, :6].view(4, 2, 3), "b": v[:, 6:10]}), v)


def test_supplied_callable():
    """Called once a step with k, n and a generator that depends on (seed, step) alone."""
    calls = []

    def make(k: int, n: int, generator: torch.Generator) -> Tensor:
        calls.append((k, n))
        return torch.randn(k, n, dtype=torch.float64, generator=generator)

    drawn = supplied(make)
    assert calls == [(4, 11)]
    v = torch.cat([drawn.draw(p, torch.float64).reshape(4, -1) for p in PIECES], 1)
    check_supplied(drawn, v)
    assert len(calls) == 1
    assert torch.equal(sample(make, 4, 11, dtype=torch.float64), v)
    others = [sample(make, 4, 11, seed=s, step=t, dtype=torch.float64) for s, t in [(0, 0), (0, 1), (1, 0), (-1, 0)]]
    assert torch.equal(others[0], v)
    assert all(not torch.equal(others[a], others[b]) for a in range(4) for b in range(a))


def test_supplied_for_one_piece():
    v = random(4, 6)
    for shape in [(2, 3), (6,), (1, 2, 3)]:
        piece = Piece("x", shape, 0)
        for source in (v, v.view(4, *shape)):
            assert torch.equal(supplied(source, pieces=[piece]).draw(piece, torch.float64), v.view(4, *shape))
    scalar = Piece("x", (), 0)
    for source in (v[:, 0], v[:, :1]):
        assert torch.equal(supplied(source, pieces=[scalar]).draw(scalar, torch.float64), v[:, 0])
    assert torch.equal(sample(v.float(), 4, 6, dtype=torch.float64), v.float().double())


def test_supplied_in_low_precision_is_summed_in_the_parameters():
    v = random(4, 11).bfloat16()
    c = torch.tensor([0.3, -1.7, 0.9, 2.2], dtype=torch.float64)
    exact = c @ v.double()[:, 6:10]
    combined = supplied(v).combine(PIECES[1], c, torch.float32)
    assert combined.dtype == torch.float32
    assert (combined.double() - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("source,error,message", [
    (random(4, 10), ValueError, r"tangents has shape \(4, 10\); expected \(k, \*shape\) = \(4, 11\)"),
    (random(3, 11), ValueError, r"tangents has shape \(3, 11\)"),
    (random(44), ValueError, r"tangents has shape \(44,\)"),
    (torch.ones(4, 11, dtype=torch.int64), TypeError, "tangents has dtype torch.int64; expected a floating point"),
    (torch.ones(4, 11, dtype=torch.complex64), TypeError, "tangents has dtype torch.complex64"),
    (torch.ones(4, 11, device="meta"), ValueError, "tangents is on meta, but what is perturbed is on cpu"),
    ({"a": random(4, 2, 3), "b": random(4, 4)}, ValueError, r"missing \['c'\], not perturbed \[\]"),
    ({"a": random(4, 2, 3), "b": random(4, 4), "c": random(4), "d": random(4)}, ValueError, r"not perturbed \['d'\]"),
    ({"a": random(4, 3, 2), "b": random(4, 4), "c": random(4)}, ValueError, r"tangents\['a'\] has shape .*\(4, 2, 3\)"),
    ({"a": random(4, 2, 3), "b": None, "c": random(4)}, TypeError, r"tangents\['b'\] is of type NoneType; expected a tensor"),
    (lambda k, n, generator: None, TypeError, r"the callable returned a NoneType; expected a tensor \(4, 11\)"),
    (lambda k, n, generator: random(n, k), ValueError, r"from the callable\) has shape \(11, 4\)"),
    (lambda k, n, generator: torch.ones(k, n, dtype=torch.int32), TypeError, "has dtype torch.int32"),
])  # fmt: skip
def test_supplied_that_does_not_fit(source, error, message):
    with pytest.raises(error, match=message):
        supplied(source)


@pytest.mark.parametrize("source", [3, "normal", None, [1.0]])
def test_supplied_from_something_else(source):
    with pytest.raises(TypeError, match=f"Supplied: source is of type {type(source).__name__}; accepted are"):
        Supplied(source)


def test_supplied_has_no_moments():
    with pytest.raises(ValueError, match="second moment of supplied tangents is not known"):
        Supplied(random(2, 3)).second_moment(3)
    with pytest.raises(ValueError, match="no closed-form length correction"):
        Supplied(random(2, 3)).energy(2, 3)


def modified(perturb: str, make, **options) -> tuple[frog.ForwardGradient, Tensor]:
    """An estimator whose supplied tangents are changed in place after its forward pass, and a part of them."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    if perturb == "weight":
        shapes = {name: p.shape for name, p in model.named_parameters()}
    else:
        shapes = {"0": (4,), "2": (2,)}
    v = make({name: random(3, *shape) for name, shape in shapes.items()})
    fg = frog.ForwardGradient(model, nn.MSELoss(), k=3, perturb=perturb, tangents=v, **options)
    fg.derivatives(random(6, 5), random(6, 2))
    return fg, v if isinstance(v, Tensor) else list(v.values())[-1]


@pytest.mark.parametrize("perturb", ["weight", "activity"])
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("make", [dict, lambda v: torch.cat([t.flatten(1) for t in v.values()], 1)], ids=["dict", "tensor"])
def test_supplied_that_changes_before_the_estimate(perturb, chunk_size, make):
    fg, v = modified(perturb, make, chunk_size=chunk_size)
    expected = fg.gradients()
    fg.accumulate_()
    before = {name: p.grad.clone() for name, p in fg.model.named_parameters()}
    weights = copy.deepcopy(fg.model.state_dict())
    v[0].mul_(2)  # a view of them
    for call in (fg.gradients, fg.accumulate_, *([lambda: fg.update_(0.1)] if perturb == "weight" else [])):
        with pytest.raises(RuntimeError, match="the tangents supplied for .* were modified in place after the forward pass"):
            call()
    for name, p in fg.model.named_parameters():
        assert torch.equal(p.grad, before[name]) and torch.equal(p, weights[name])
    v[0].div_(2)
    fg.derivatives(random(6, 5), random(6, 2))  # reads them as they are now
    assert all(torch.equal(g, expected[name]) for name, g in fg.gradients().items())


def test_supplied_that_changes_after_a_custom_estimate():
    fg, v = modified("weight", dict, aggregate=lambda v, d: d @ v)
    expected = fg.gradients()
    v.zero_()
    assert all(torch.equal(g, expected[name]) for name, g in fg.gradients().items())


@pytest.mark.parametrize("perturb", ["weight", "activity"])
def test_supplied_that_changes_before_the_gram_matrix(perturb):
    fg, v = modified(perturb, dict, aggregate="mean")
    v.zero_()
    with pytest.raises(RuntimeError, match="gram: the tangents supplied for .* were modified in place"):
        fg.last.gram  # noqa: B018


def test_supplied_in_inference_mode():
    """Such tensors have no count of changes."""
    with torch.inference_mode():
        fg, _ = modified("weight", dict)
        assert fg.gradients()
