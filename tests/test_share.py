"""Parts of a step give, put together, the bits of the whole."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from helpers import assert_close64
from torch import nn

import frog_cuda as frog
from frog_cuda import activity, segments
from frog_cuda.experiments import models
from frog_cuda.share import from_limbs, limbs

SIZES = {
    "fc": {"width": 96},
    "lenet5": {},
    "resnet18": {"width": 8},
    "vit": {"layers": 1, "width": 32, "hidden": 32},
    "mixer": {"layers": 1, "hidden": 32},
}
METHODS = {
    "weight": dict(perturb="weight"),
    "activity": dict(perturb="activity"),
    "rank 1": dict(perturb="weight", tangents=frog.tangents.LowRank(1)),
    "rank 2": dict(perturb="weight", tangents=frog.tangents.LowRank(2)),
}


@pytest.mark.skipif(frog.build_info()["simd"] == "baseline", reason="the library multiplies, whose bits tell of rows")
@pytest.mark.parametrize("rows", [2, 5, 8])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SIZES)
def test_chunks_change_no_bit(name, method, rows):
    """A Gram matrix summed elsewhere, or a product of fewer rows, would show here."""
    found = []
    for chunk in (None, 1, 3):
        torch.manual_seed(0)
        model = models.build(name, (3, 16, 16), 10, **SIZES[name])
        fg = frog.ForwardGradient(model, nn.CrossEntropyLoss(reduction="none"), k=5, chunk_size=chunk, **METHODS[method])
        loss = fg(torch.randn(rows, 3, 16, 16), torch.arange(rows))
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([loss, fg.last.directional_derivatives, fg.last.gram, fg.last.coefficients, *grads, *model.buffers()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.skipif(frog.build_info()["simd"] == "baseline", reason="the library multiplies, whose bits tell of rows")
def test_shared_tangents_of_wide_layers_change_no_bit():
    """Those of the normalisation go through the last layer as k rows, of which libraries multiply 16 and 4 in another order."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 256), nn.LayerNorm(256), nn.Linear(256, 256))
    x, target, found = torch.randn(8, 48), torch.arange(8), []
    for chunk in (None, 1, 4, 5):
        fg = frog.ForwardGradient(model, nn.CrossEntropyLoss(reduction="none"), k=16, perturb="activity", chunk_size=chunk)
        fg.derivatives(x, target)
        found.append(fg.last.directional_derivatives)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.skipif(frog.build_info()["simd"] == "baseline", reason="the library multiplies, whose bits tell of rows")
@pytest.mark.parametrize("at_once", [0, 1 << 20], ids=["many tangents", "few"])
def test_gram_of_shared_tangents_does_not_tell_of_chunks(at_once, monkeypatch):
    """Of many it is summed layer by layer; of few it is that of one block, drawn ahead from the second step on."""
    for module in (activity, segments):
        monkeypatch.setattr(module, "AT_ONCE", at_once)
    found = []
    for chunk in (None, 1, 3):
        torch.manual_seed(0)
        model = models.build("lenet5", (3, 16, 16), 10)
        fg = frog.ForwardGradient(
            model, nn.CrossEntropyLoss(reduction="none"), k=5, perturb="activity", chunk_size=chunk, seed=3
        )
        x, target, grams = torch.randn(4, 3, 16, 16), torch.arange(4), []
        for _ in range(2):
            fg.derivatives(x, target)
            v = torch.cat([s.tangents[0].flatten(1) for s in fg.last.trace.segments], 1) if chunk is None else None
            grams.append(fg.last.gram)
            if v is not None:
                assert_close64(grams[-1], v.double() @ v.double().T)
        found.append(grams)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_gram_of_fewer_layers_than_were_drawn_ahead():
    class Shorter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(5, 5), nn.Linear(5, 5), True

        def forward(self, x):
            y = self.first(x)
            return self.second(y) if self.last else y

    model = Shorter()
    fg = frog.ForwardGradient(model, nn.CrossEntropyLoss(reduction="none"), k=3, perturb="activity")
    for last in (True, False):
        model.last = last
        fg.derivatives(torch.randn(4, 5), torch.arange(4))
        v = torch.cat([s.tangents[0].flatten(1) for s in fg.last.trace.segments], 1).double()
        assert v.shape == (3, 10 if last else 5)
        assert_close64(fg.last.gram, v @ v.T)


def test_sums_do_not_depend_on_their_order():
    torch.manual_seed(0)
    drawn = [torch.randn(3, 3, dtype=torch.float64) * 10.0**e for e in (-3, 0, 2, 5, 7, 7, 3)]
    parts = [p + p.T for p in drawn]
    total = from_limbs(limbs(parts))
    for cut in range(1, 7):
        assert torch.equal(from_limbs(limbs(parts[cut:]) + limbs(parts[:cut])), total)
    exact = [[sum(Fraction(p[i, j].item()) for p in parts) for j in range(3)] for i in range(3)]
    for i in range(3):
        for j in range(3):
            assert abs(Fraction(total[i, j].item()) - exact[i][j]) <= Fraction(1, 2**58) + abs(exact[i][j]) / 2**52
    reordered = sum(parts[3:], torch.zeros(3, 3, dtype=torch.float64)) + sum(parts[:3], torch.zeros(3, 3, dtype=torch.float64))
    assert not torch.equal(reordered, sum(parts, torch.zeros(3, 3, dtype=torch.float64)))  # plain sums do depend on it


def test_sums_of_large_and_of_negative_numbers():
    parts = [torch.tensor([[v]], dtype=torch.float64) for v in (2.0**50, -0.25, -(2.0**50), 2.0**-40, -1e-20)]
    assert from_limbs(limbs(parts)).item() == -0.25 + 2.0**-40
