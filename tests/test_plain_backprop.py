"""With as many tangents as there are dimensions the estimate is the gradient: held against ``loss.backward()``, for models
that do out of the ordinary things. Layers that run again, modes and constants have files of their own."""

from __future__ import annotations

import copy

import pytest
import torch
from backprop import B, C, K, M, assert_is_the_gradient, by_backprop, float64, losses  # noqa: F401
from torch import nn
from torch.nn.utils import parametrizations, prune

import frog_cuda as frog

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*")


class Recurrent(nn.Module):
    """What is read of a recurrent layer: its output, its final states, or both."""

    def __init__(self, kind, reads, batch_first=True):
        super().__init__()
        self.r, self.f = kind(M, 4, batch_first=batch_first), nn.Linear(4, C)
        self.reads, self.batch_first = reads, batch_first

    def forward(self, x):
        out, h = self.r(x if self.batch_first else x.transpose(0, 1))
        last = out[:, -1] if self.batch_first else out[-1]
        h = h if isinstance(h, torch.Tensor) else h[0] * h[1]
        return self.f({"output": last, "state": h[-1], "both": last + h[-1]}[self.reads])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("reads", ["output", "state", "both"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_recurrent_layers(kind, reads, batch_first):
    x, y = torch.randn(B, 4, M), torch.randint(0, C, (B,))
    assert_is_the_gradient(Recurrent(kind, reads, batch_first), x, y)


class Attending(nn.Module):
    def __init__(self, reads, batch_first):
        super().__init__()
        self.a, self.f = nn.MultiheadAttention(M, 1, batch_first=batch_first), nn.Linear(M, C)
        self.reads, self.batch_first = reads, batch_first

    def forward(self, x):
        given = x if self.batch_first else x.transpose(0, 1)
        out, weights = self.a(given, given, given)
        out = out if self.batch_first else out.transpose(0, 1)
        return self.f(out.sum(1) if self.reads == "output" else (weights @ x).tanh().sum(1))


@pytest.mark.parametrize("reads", ["output", "weights"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention(reads, batch_first):
    assert_is_the_gradient(Attending(reads, batch_first), torch.randn(B, 4, M), torch.randint(0, C, (B,)))


def hooked():
    layer = nn.Linear(M, 4)
    layer.register_forward_hook(lambda module, args, output: output * 3)
    return layer


def pruned():
    layer = nn.Linear(M, 4)
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


def spectral(new):
    layer = nn.Linear(M, 4)
    return (parametrizations.spectral_norm if new else nn.utils.spectral_norm)(layer).eval()


LAYERS = {
    "forward hook": hooked,
    "pruned": pruned,
    "weight norm by hooks": lambda: nn.utils.weight_norm(nn.Linear(M, 4)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(M, 4)),
    "weight norm, as many rows as samples": lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Linear(M, B)), nn.Tanh(), nn.Linear(B, 4)
    ),
    "spectral norm by hooks": lambda: spectral(False),
    "spectral norm": lambda: spectral(True),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(M, 4)),
}


@pytest.mark.parametrize("perturb", ["weight", "activity"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_whose_weight_or_output_is_made_by_others(name, perturb):
    if name == "orthogonal" and perturb == "weight":
        pytest.skip("its Householder products have no forward derivative in PyTorch")
    model = nn.Sequential(LAYERS[name](), nn.Tanh(), nn.Linear(4, C))
    assert_is_the_gradient(model, torch.randn(B, M), torch.randint(0, C, (B,)), perturb=perturb)
    assert not any(type(value) is frog.DualTensor for module in model.modules() for value in vars(module).values())


class Twice(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.f = inner, nn.Linear(M, C)

    def forward(self, x):
        return self.f(self.inner(input=torch.tanh(self.inner(x))))


def test_a_layer_called_by_position_and_by_keyword():
    assert_is_the_gradient(Twice(nn.Linear(M, M)), torch.randn(B, M), torch.randint(0, C, (B,)))


@pytest.mark.parametrize("perturb", ["weight", "activity"])
def test_mixed_precision_within_a_model(perturb):
    model = nn.Sequential(nn.Linear(M, 8), nn.LayerNorm(8), nn.Linear(8, C)).bfloat16()
    model[1].float()
    fg = frog.ForwardGradient(model, lambda out, y: losses(out.float(), y), k=4, perturb=perturb)
    fg(torch.randn(B, M, dtype=torch.bfloat16), torch.randint(0, C, (B,)))
    assert all(p.grad is not None and p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in model.parameters())


def test_a_loss_that_reads_parameters():
    model = nn.Linear(M, C)

    def penalised(output, target):
        return losses(output, target).mean() + 0.5 * layer.weight.pow(2).sum()

    x, y = torch.randn(B, M), torch.randint(0, C, (B,))
    layer = model
    penalised(model(x), y).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    fg = frog.ForwardGradient(model, penalised, k=K, perturb="weight")
    simulated = frog.simulate(fg, x, y)
    fg(x, y)
    torch.testing.assert_close(fg.last.directional_derivatives, simulated.directional_derivatives)
    for p, g in zip(model.parameters(), expected):
        torch.testing.assert_close(p.grad, g, rtol=1e-7, atol=1e-9)


def test_a_loss_with_parameters_of_its_own():
    loss_fn = nn.Sequential(nn.Linear(1, 1))
    with pytest.warns(UserWarning, match="loss_fn: its parameters 0.weight, 0.bias are none of the model's"):
        frog.ForwardGradient(nn.Linear(M, C), loss_fn, k=1)


@pytest.mark.parametrize("perturb", ["weight", "activity"])
def test_lazy_modules_must_have_run(perturb):
    with pytest.raises(ValueError, match="parameter 1.weight is not initialized"):
        frog.ForwardGradient(nn.Sequential(nn.Linear(M, 4), nn.LazyLinear(C)), losses, k=1, perturb=perturb)


class Padded(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.e = nn.Embedding(7, 4, padding_idx=2)
        self.f = nn.Linear(4, 7)
        if tied:
            self.f.weight = self.e.weight

    def forward(self, i):
        return self.f(self.e(i).tanh().mean(1))


@pytest.mark.parametrize("perturb", ["weight", "activity"])
@pytest.mark.parametrize("tied", [False, True])
def test_padding_of_embeddings(tied, perturb):
    model, i, y = Padded(tied), torch.randint(0, 7, (B, 5)), torch.randint(0, 7, (B,))
    i[:, 2:4] = 2
    expected = by_backprop(model, i, y)
    for tangents in ("normal", "rademacher", frog.tangents.LowRank(2)) if perturb == "weight" else ("normal",):
        twin = copy.deepcopy(model)
        fg = frog.ForwardGradient(twin, losses, k=8, perturb=perturb, tangents=tangents)
        simulated = frog.simulate(fg, i, y)
        fg(i, y)
        torch.testing.assert_close(fg.last.directional_derivatives, simulated.directional_derivatives, rtol=1e-5, atol=1e-9)
        assert tied or not twin.e.weight.grad[2].any()
        if perturb == "weight" and not tied:
            before = twin.e.weight.detach().clone()
            for options in (dict(), dict(momentum=0.9)):
                fg.update_(0.1, **options)
            assert torch.equal(twin.e.weight[2], before[2]) and not torch.equal(twin.e.weight[1], before[1])
    if tied and perturb == "activity":
        return  # a weight that two layers own: each layer's tangents see its own use of it
    assert_is_the_gradient(model, i, y, perturb=perturb)
    assert tied or not expected["e.weight"][2].any()


def test_a_seed_log_leaves_padding_alone(tmp_path):
    model = Padded(False)
    start, i, y = copy.deepcopy(model), torch.randint(0, 7, (B, 5)), torch.randint(0, 7, (B,))
    fg = frog.ForwardGradient(model, losses, k=3, perturb="weight")
    with frog.SeedLog(tmp_path / "log", fg) as log:
        for _ in range(3):
            fg.derivatives(i, y)
            log.update_(0.1)
    frog.SeedLog.replay(tmp_path / "log", start)
    assert all(torch.equal(p, q) for p, q in zip(start.parameters(), model.parameters()))
    assert not model.e.weight[2].any()


def test_in_the_forward_mode_of_another():
    """PyTorch counts its levels for all threads. Operators do not mind; what PyTorch has to differentiate names the reason."""
    x, y = torch.randn(B, M), torch.randint(0, C, (B,))
    with torch.autograd.forward_ad.dual_level():
        assert_is_the_gradient(nn.Sequential(nn.Linear(M, 4), nn.GELU(), nn.Linear(4, C)), x, y, perturb="weight")
        fg = frog.ForwardGradient(Recurrent(nn.GRU, "output"), losses, k=2, perturb="weight")
        with pytest.raises(NotImplementedError, match=r"aten.gru.*Nested forward mode AD is not supported"):
            fg(x.unsqueeze(1), y)
