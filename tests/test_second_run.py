"""The second run of a layer does what the first did, or the estimate is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from backprop import B, C, K, M, assert_is_the_gradient, by_backprop, float64, losses  # noqa: F401
from torch import nn

import frog_cuda as frog
from frog_cuda import rerun


def batch():
    return torch.randn(B, M), torch.randint(0, C, (B,))


class Layers:
    """Of a cache: lists of keys in attributes of objects, as transformers keep them."""

    def __init__(self):
        self.keys = []


class Cache:
    def __init__(self):
        self.layers = [Layers(), Layers()]


class Cached(nn.Linear):
    def forward(self, x, cache, at):
        cache.layers[at].keys.append(x)
        return super().forward(torch.stack(cache.layers[at].keys).mean(0)).tanh()


class WithCache(nn.Module):
    """The second call of a layer finds what the first left in the cache."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.f = Cached(M, M), Cached(M, M), nn.Linear(M, C)

    def forward(self, x):
        cache = Cache()
        x = self.a(x, cache, 0)
        return self.f(self.b(self.a(x, cache, 0), cache, 1))


@pytest.mark.parametrize("options", [{}, {"chunk_size": 40}, {"layers": [["a", "b"], ["f"]]}])
def test_a_cache_that_is_an_argument_is_what_it_was(options):
    model = WithCache()
    if "layers" in options:  # the first call of a is a layer's output, too, but that of a group is the second call's
        model.a.forward = lambda x, cache, at: torch.tanh(F.linear(x, model.a.weight, model.a.bias))
    assert_is_the_gradient(model, *batch(), **options)


def test_a_cache_that_is_an_argument_of_the_model():
    """Each chunk's pass, but the last, is given a copy."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.f = Cached(M, M), nn.Linear(M, C)

        def forward(self, x, cache):
            return self.f(self.a(x, cache, 0))

    model, (x, y), cache = Model(), batch(), Cache()
    fg = frog.ForwardGradient(model, losses, k=K, chunk_size=40)
    fg((x, cache), y)
    assert len(cache.layers[0].keys) == 1
    expected = torch.autograd.grad(losses(model(x, Cache()), y).mean(), list(model.parameters()))
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-7, atol=1e-9)


class Keeps(nn.Linear):
    """A layer that keeps something between its calls."""

    how = ""

    def __init__(self, how):
        super().__init__(M, M)
        self.how, self.calls, self.kept = how, 0, []
        self.holder = SimpleNamespace(output=None)  # where no value is put in place of a DualTensor after the pass

    def forward(self, x):
        self.calls += 1
        self.kept.append(x)
        if self.how == "counts":
            x = x * self.calls
        elif self.how == "caches":
            x = torch.stack(self.kept).sum(0)
        elif self.how == "another shape":
            return torch.cat([super().forward(x)] * self.calls, 1)[:, : M + self.calls - 1]
        elif self.how == "another number" and self.calls > 1:
            return super().forward(x), x
        elif self.how == "remembers its output":
            if self.holder.output is None:
                self.holder.output = super().forward(x)
            return self.holder.output
        elif self.how == "raises" and self.calls > 1:
            raise TypeError("once is enough")
        return super().forward(x)


@pytest.mark.parametrize("k", [2, K])
@pytest.mark.parametrize("how", ["counts", "caches", "another shape", "another number", "remembers its output"])
def test_a_layer_that_keeps_state_is_refused(how, k):
    model = nn.Sequential(nn.Linear(M, M), Keeps(how), nn.Tanh(), nn.Linear(M, C))
    fg = frog.ForwardGradient(model, losses, k=k)
    with pytest.raises(RuntimeError, match=r"layers: 1 has no closed-form gradient .* did not do the same .*use_cache=False"):
        fg(*batch())
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_keeps_state_is_refused_where_its_pass_is_repeated():
    model = nn.Sequential(nn.Linear(M, M), Keeps("counts"), nn.Tanh(), nn.Linear(M, C))
    with pytest.raises(RuntimeError, match="layers: 1 has no closed-form gradient"):
        frog.ForwardGradient(model, losses, k=2, layers=[["0", "1"], ["3"]])(*batch())


def test_a_layer_that_raises_in_its_second_run_says_so():
    model = nn.Sequential(nn.Linear(M, M), Keeps("raises"), nn.Linear(M, C))
    with pytest.raises(RuntimeError, match=r"layers: 1 has .* It raised TypeError: once is enough") as caught:
        frog.ForwardGradient(model, losses, k=2)(*batch())
    assert isinstance(caught.value.__cause__, TypeError)


class Written(nn.Linear):
    """What it is given and what it returns are written into, inside and outside."""

    def forward(self, x):
        return super().forward(x.sub_(1).div_(2)).mul_(3)


def test_gradients_can_be_taken_twice():
    model, (x, y) = nn.Sequential(nn.Linear(M, M), Written(M, M), nn.ReLU(inplace=True), nn.Linear(M, C)), batch()
    expected = by_backprop(model, x, y)
    fg = frog.ForwardGradient(model, losses, k=K)
    fg.derivatives(x, y)
    for _ in range(2):
        for name, g in fg.gradients().items():
            torch.testing.assert_close(g, expected[name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_not_taken_for_state(dtype):
    torch.manual_seed(3)
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), nn.Linear(16, C)).to(dtype)
    x, y = torch.randn(B, 7, 16, dtype=dtype), torch.randint(0, C, (B,))
    frog.ForwardGradient(model, lambda out, y: losses(out.float().mean(1), y), k=4, layers=["0", "1"])(x, y)
    assert all(p.grad is not None for p in model.parameters())


def test_marks_tell_values_apart():
    y = torch.randn(6, 5, 4, dtype=torch.float32)
    layer = nn.Identity()

    def alike(other):
        return bool(rerun.same(rerun.mark(y), rerun.mark(other), layer, y.dtype))

    assert alike(y.clone()) and alike(y + 1e-6 * torch.randn_like(y))
    for other in (-y, 1.01 * y, y + 0.05, y.flip(0), y.flip(1), y.flip(2), torch.cat([y[:5], y[4:5]]), y + 0.01 * y.roll(1, 0)):
        assert not alike(other)
    assert bool(rerun.same(*[rerun.mark(torch.full((2,), torch.nan))] * 2, layer, y.dtype))
    assert bool(rerun.same(*[rerun.mark(torch.zeros(0, 3))] * 2, layer, y.dtype))


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_that_renormalise(kind):
    """They write into their own weights as they run; here twice, on other rows."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.f = kind(9, M, max_norm=1.0), nn.Linear(M, C)

        def forward(self, i):
            first, second = (self.e(rows.view(-1, 1)) for rows in (i, i // 2 + 4))
            return self.f((first * second).view(len(i), M))

    torch.manual_seed(2)
    model, i = Model(), torch.tensor([0, 1, 2, 2, 3, 1])
    y = torch.randint(0, C, (B,))
    expected = by_backprop(model, i, y)
    for options in ({}, {"chunk_size": 40}):
        fg = frog.ForwardGradient(model, losses, k=K, **options)
        fg.derivatives(i, y)
        for _ in range(2):
            for name, g in fg.gradients().items():
                torch.testing.assert_close(g, expected[name], rtol=1e-6, atol=1e-9)
    with torch.no_grad():
        model.e.weight.add_(1)
    with pytest.raises(RuntimeError, match="parameters of e were changed after the forward pass"):
        fg.gradients()


def test_hooks_of_all_modules_are_called_once_on_what_a_layer_is_given():
    model, (x, y) = nn.Sequential(nn.Linear(M, M), nn.PReLU(M), nn.Linear(M, C)), batch()
    layer = model[1]
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: (args[0] * 2 - 1,) if module is layer else None
    )
    local = layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    try:
        assert_is_the_gradient(model, x, y)
    finally:
        handle.remove(), local.remove()


@pytest.mark.parametrize("perturb", ["weight", "activity"])
def test_drop_in_layers_without_a_closed_form(perturb):
    """They record nothing for backward, except here."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.f = nn.Linear(M, M), nn.PReLU(M), nn.Bilinear(M, M, C)

        def forward(self, x):
            return self.f(self.b(self.a(x)), x)

    model, (x, y) = Model(), batch()
    expected = by_backprop(model, x, y)
    frog.convert(model)
    fg = frog.ForwardGradient(model, losses, k=K, perturb=perturb)
    simulated = frog.simulate(fg, x, y)
    fg(x, y)
    for name, p in model.named_parameters():
        torch.testing.assert_close(simulated.true_gradients[name], expected[name])
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-6, atol=1e-9)
    assert not model(x).requires_grad


def test_objects_in_snapshots():
    """Cycles, long chains, and what is the same twice; classes that copy themselves are left alone."""
    cache, chain = Cache(), Layers()
    cache.itself, cache.layers[1] = cache, cache.layers[0]
    cache.layers[0].keys.append(torch.ones(2))
    node = chain
    for _ in range(3000):
        node.next = node = Layers()

    class Own(Cache):
        def __copy__(self):
            raise AssertionError

    own, module = Own(), nn.Linear(1, 1)
    copies = rerun.snapshot((cache, {"a": chain}, own, module, "text", None, cache))
    assert copies[0] is copies[6] is copies[0].itself is not cache and copies[2:6] == (own, module, "text", None)
    assert copies[0].layers[0] is copies[0].layers[1] is not cache.layers[0] and type(copies[0]) is Cache
    cache.layers[0].keys[0].add_(1)
    cache.layers[0].keys.append(None)
    assert len(copies[0].layers[0].keys) == 1 and copies[0].layers[0].keys[0].tolist() == [1, 1]
