"""What a model takes: ``input`` as positional and keyword arguments, the same wherever one is given."""

from __future__ import annotations

import types
from collections import OrderedDict, UserDict
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import frog_cuda as frog
from frog_cuda import cuda_graph


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


class Model(nn.Module):
    """Takes two tensors, or a pair of them as one argument."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, a, b=None):
        if b is None:
            assert isinstance(a, Pair)
            a, b = a
        return self.layer(a + 2 * b)


class StandIn:
    """A graph that runs again on the CPU."""

    def capture(self, body):
        self.replay = body


A, B = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
SAME = {
    "tuple": (A, B),
    "dict": {"b": B, "a": A},
    "ordered": OrderedDict(b=B, a=A),
    "user": UserDict(b=B, a=A),  # as transformers.BatchEncoding
    "view": types.MappingProxyType({"b": B, "a": A}),
    "named": Pair(A, B),
    "alone": (Pair(A, B),),
}


def gradients(input, perturb: str, **options) -> list[Tensor]:
    """Of three steps; with graphs the last two are captured ones."""
    torch.manual_seed(0)
    fg = frog.ForwardGradient(Model(), nn.MSELoss(), k=3, perturb=perturb, **options)
    for _ in range(3):
        fg(input, torch.ones(4, 3))
    return [p.grad for p in fg.model.parameters()]


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("perturb", ["weight", "activity"])
@pytest.mark.parametrize("graph", [False, True])
def test_arguments_of_the_model(monkeypatch, name, perturb, graph):
    monkeypatch.setattr(cuda_graph, "Graph", StandIn)
    monkeypatch.setattr(cuda_graph, "check", lambda *arguments: None)
    for found, expected in zip(gradients(SAME[name], perturb, cuda_graph=graph), gradients((A, B), perturb), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", SAME)
def test_in_other_functions(name):
    fg = frog.ForwardGradient(Model(), nn.MSELoss(), k=3)
    found, expected = (frog.simulate(fg, input, torch.ones(4, 3)) for input in (SAME[name], (A, B)))
    assert all(torch.equal(g, expected.gradients[n]) for n, g in found.gradients.items())
    assert frog.coverage(fg.model, SAME[name]).count("fused") == 1


def test_a_packed_sequence_is_one_argument():
    class Packed(Model):
        def forward(self, sequence):
            assert isinstance(sequence, PackedSequence)
            return self.layer(sequence.data)

    packed = pack_sequence([A[0, None], B[:3]], enforce_sorted=False)
    fg = frog.ForwardGradient(Packed(), nn.MSELoss(), k=3, perturb="weight")
    assert fg(packed, torch.ones(4, 3)).isfinite()
