from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import frog_cuda as frog
from frog_cuda import dual
from frog_cuda.rules import fallback


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)
        self.scaled, self.shared = Scaled(27, 5), nn.Linear(5, 5)
        self.again = self.shared
        self.shift = nn.Parameter(torch.zeros(5))

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2).flatten(1)
        return self.again(self.shared(self.scaled(x))) + F.mish(self.shift)


X = torch.randn(2, 1, 8, 8)


def test_convert_swaps_in_place_and_shares_everything():
    model = Net()
    seen = []
    model.shared.register_forward_hook(lambda *a: seen.append(1))
    parameters, state = dict(model.named_parameters()), {k: v.clone() for k, v in model.state_dict().items()}
    model.eval()
    want = model(X).detach()
    done = frog.convert(model)
    assert done.swapped == {"conv": "Conv2d", "norm": "BatchNorm2d", "shared": "Linear"}
    assert done.generic == {"": "Net", "scaled": "Scaled"}
    assert type(model.conv) is frog.nn.Conv2d and type(model.scaled) is Scaled and model.again is model.shared
    assert isinstance(model.norm, nn.BatchNorm2d)
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    seen.clear()
    out = model(X)
    assert torch.equal(out, want) and len(seen) == 2
    assert frog.convert(model) == done  # once more changes nothing
    assert "conv     Conv2d       drop-in" in str(done) and "(model)  Net          generic" in str(done)


def test_convert_a_layer_itself_and_refuse_what_is_no_module():
    layer = nn.Linear(3, 2)
    assert frog.convert(layer).swapped == {"": "Linear"} and type(layer) is frog.nn.Linear
    with pytest.raises(TypeError, match="model is of type function"):
        frog.convert(lambda x: x)


@pytest.mark.parametrize("perturb", ["weight", "activity"])
def test_forward_gradients_do_not_change(perturb):
    y = torch.randint(0, 5, (2,))
    found = []
    for convert in (False, True):
        torch.manual_seed(0)
        model = Net()
        if convert:
            frog.convert(model)
        layers = ["conv", "norm", "scaled", "shared"] if perturb == "activity" else None
        fg = frog.ForwardGradient(
            model, lambda o, t: F.cross_entropy(o, t, reduction="none"), k=3, perturb=perturb, layers=layers
        )
        fg(X, y)
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(g, found[1][n]) for n, g in found[0].items())


def test_coverage_tells_how_each_call_is_served():
    model = Net()
    tables = dict(dual.FUNCTION_RULES), dict(dual.ATEN_RULES), fallback.plan, fallback.fallback
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    found = frog.coverage(model, X)
    assert found.rows["conv", "conv2d", "rule"] == 1
    assert found.rows["norm", "batch_norm", "fused"] == 1
    assert found.rows["", "relu", "fused"] == 1
    assert found.rows["", "max_pool2d", "fused"] == 1
    assert found.rows["scaled", "linear", "fused"] == 1
    assert found.rows["shared", "linear", "fused"] == 2
    assert found.rows["", "aten.mish", "fallback"] == 1
    assert found.count("fallback") == 1 and found.count("unsupported") == 0
    assert "(model)  aten.mish" in str(found)
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert tables[2:] == (fallback.plan, fallback.fallback)
    assert tables[0] == dual.FUNCTION_RULES and tables[1] == dual.ATEN_RULES
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_coverage_beside_passes_of_other_threads():
    """Of another model, because torch.func.functional_call changes the one that it is given."""
    model, x, v = nn.Sequential(nn.Linear(3, 4), nn.Mish(), nn.Linear(4, 2)), torch.randn(5, 3), torch.randn(2, 5, 3)
    other = copy.deepcopy(model)
    alone, right = frog.coverage(model, x).rows, frog.jvp(model, (x,), (v,))[1]
    tables = dict(dual.FUNCTION_RULES), dict(dual.ATEN_RULES)
    done = threading.Event()

    def passes():
        while not done.is_set():
            assert torch.equal(frog.jvp(other, (x,), (v,))[1], right)

    with ThreadPoolExecutor(4) as pool:
        busy = [pool.submit(passes) for _ in range(2)]
        found = [c.result().rows for c in [pool.submit(frog.coverage, model, x) for _ in range(8)]]
        done.set()
        for b in busy:
            b.result()
    assert found == [alone] * 8
    assert tables == (dual.FUNCTION_RULES, dual.ATEN_RULES)


def test_coverage_ends_at_what_is_not_supported():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(Unsupported())

        def forward(self, x, scale=1.0):
            return self.inner(x * scale)

    class Unsupported(nn.Module):
        def forward(self, x):
            return torch.special.airy_ai(x)

    found = frog.coverage(Outer(), {"x": torch.randn(3, 2), "scale": 2.0})
    assert list(found.rows)[-1][::2] == ("inner.0", "unsupported")
    assert "special_airy_ai" in list(found.rows)[-1][1]
    assert found.count("unsupported") == 1
