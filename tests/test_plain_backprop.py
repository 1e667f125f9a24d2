"""With as many tangents as there are dimensions the estimate is the gradient: held against ``loss.backward()``, for models that
do out of the ordinary things."""

from __future__ import annotations

import contextlib
import copy
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import frog_cuda as frog

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*"),
    pytest.mark.filterwarnings("ignore:activity perturbation. c were not called"),
]

#: samples, features, classes, enough tangents for all of what follows
B, M, C, K = 6, 5, 3, 160


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def losses(output, target):
    return F.cross_entropy(output, target, reduction="none")


def by_backprop(model, x, y, loss_fn=losses):
    state = copy.deepcopy(model.state_dict())
    loss_fn(model(x.clone()), y).mean().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.load_state_dict(state)
    model.zero_grad()
    return found


def assert_is_the_gradient(model, x, y, loss_fn=losses, tolerance=1e-7, **options):
    expected = by_backprop(model, x, y, loss_fn)
    frog.ForwardGradient(model, loss_fn, **{"k": K} | options)(x.clone(), y)
    for name, p in model.named_parameters():
        if expected[name] is None:
            assert p.grad is None or not p.grad.any(), name
            continue
        assert p.grad is not None, name
        error = (p.grad - expected[name]).norm() / expected[name].norm().clamp(min=1e-3)
        assert error < tolerance, (name, error.item())


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


class Bilinear(nn.Module):
    """A layer without a closed form, after something that happens to its input."""

    def __init__(self, happens):
        super().__init__()
        self.a, self.b, self.f = nn.Linear(M, M), nn.Bilinear(M, M, 4), nn.Linear(4, C)
        self.happens, self.state, self.calls = happens, None, 0
        self.register_buffer("moving", torch.ones(()))
        self.generator = torch.Generator().manual_seed(7)

    def forward(self, x):
        self.calls += 1
        if self.happens == "input written":
            x = x.sub_(1).div_(2)
        elif self.happens == "buffer moves":
            self.moving.add_(0.5)
            x = x * self.moving
        elif self.happens == "own generator":
            x = x + torch.rand(x.shape, generator=self.generator)
        elif self.happens == "python's numbers":
            x = x * random.random()
        elif self.happens == "state kept":
            x = x if self.state is None else x + self.state
            self.state = x.detach() * 2
        h = self.a(x).tanh()
        out = self.b(h, x)
        return self.f(out)


@pytest.mark.parametrize("perturb, chunk_size", [("activity", None), ("activity", 40), ("weight", None), ("weight", 40)])
@pytest.mark.parametrize("happens", ["input written", "buffer moves", "own generator", "python's numbers", "state kept"])
def test_passes_that_change_something(happens, perturb, chunk_size):
    """A layer runs again, and so do passes, on what was there at first; state in attributes is the exception for passes."""
    if happens == "state kept" and chunk_size is not None:
        pytest.skip("the model's own business: a pass for each chunk")
    x, y = torch.randn(B, M), torch.randint(0, C, (B,))
    model = Bilinear(happens)
    random.seed(3)
    expected = copy.deepcopy(model)
    losses(expected(x.clone()), y).mean().backward()
    random.seed(3)
    given = x.clone()
    frog.ForwardGradient(model, losses, k=K, perturb=perturb, chunk_size=chunk_size)(given, y)
    for p, q in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(model.moving, expected.moving)
    if chunk_size is None:
        assert model.calls == expected.calls == 1
    written = x.clone().sub_(1).div_(2) if happens == "input written" else x
    assert torch.equal(given, written)


@pytest.mark.parametrize("layers", [None, ["0", "1"], [["0", "1.0"], ["1.2"]]])
def test_running_statistics_move_once_a_step(layers):
    model = nn.Sequential(nn.Linear(M, M), nn.Sequential(nn.Linear(M, M), nn.BatchNorm1d(M), nn.Linear(M, C)))
    expected, x, y = copy.deepcopy(model), torch.randn(B, M), torch.randint(0, C, (B,))
    before = copy.deepcopy(model.state_dict())
    for chunk_size in (None, 2):
        fg = frog.ForwardGradient(model, losses, k=4, layers=layers, per_sample=False, chunk_size=chunk_size)
        frog.simulate(fg, x, y)
        for name, b in model.named_buffers():
            assert torch.equal(b, before[name])
        fg.derivatives(x, y)
        for _ in range(2):
            fg.gradients()
        expected(x)
        for b, other in zip(model.buffers(), expected.buffers()):
            torch.testing.assert_close(b, other)
        before = copy.deepcopy(model.state_dict())


def test_several_modules_as_one_layer_run_again_on_what_there_was():
    model = Bilinear("input written")
    assert_is_the_gradient(model, torch.randn(B, M), torch.randint(0, C, (B,)), layers=[["a", "b"], ["f"]])


def test_simulating_and_failing_leave_the_latest_estimate():
    model = nn.Sequential(nn.Linear(M, 4), nn.Tanh(), nn.Linear(4, C))
    x, y = torch.randn(B, M), torch.randint(0, C, (B,))
    for perturb in ("weight", "activity"):
        fg = frog.ForwardGradient(model, losses, k=4, perturb=perturb)
        fg.derivatives(x, y)
        before = fg.gradients()
        frog.simulate(fg, torch.randn(2, M), y[:2])
        for name, g in fg.gradients().items():
            assert torch.equal(g, before[name])
        with pytest.raises(FloatingPointError):
            fg.derivatives(x * float("nan"), y)
        if perturb == "weight":
            assert torch.equal(fg.gradients()["0.weight"], before["0.weight"])
        else:
            with pytest.raises(RuntimeError, match="the call after the latest estimate failed"):
                fg.gradients()


@pytest.mark.parametrize("perturb", ["weight", "activity"])
@pytest.mark.parametrize("how", ["copied", "pickled"])
def test_copies_go_on_by_themselves(perturb, how):
    model = nn.Sequential(nn.Linear(M, 4), nn.Tanh(), nn.Linear(4, C))
    x, y = torch.randn(B, M), torch.randint(0, C, (B,))
    fg = frog.ForwardGradient(model, losses, k=4, perturb=perturb)
    fg(x, y)
    twin = copy.deepcopy(fg) if how == "copied" else pickle.loads(pickle.dumps(fg))
    assert twin.last is None and twin.step == 1 and twin.model is not model
    twin.model.zero_grad(), model.zero_grad()
    twin(x, y), fg(x, y)
    for p, q in zip(model.parameters(), twin.model.parameters()):
        assert torch.equal(p.grad, q.grad)


def test_a_model_that_is_another_one_now():
    x, y = torch.randn(B, M), torch.randint(0, C, (B,))

    def replaced(model):
        model.load_state_dict({n: torch.zeros_like(v) for n, v in model.state_dict().items()}, assign=True)

    def frozen(model):
        model[0].requires_grad_(False)

    def exchanged(model):
        model[2] = nn.Linear(4, C)

    for change, message in (
        (replaced, "0.weight was replaced"),
        (frozen, "requires_grad of 0.weight"),
        (exchanged, "the modules of"),
    ):
        for perturb in ("weight", "activity"):
            model = nn.Sequential(nn.Linear(M, 4), nn.Tanh(), nn.Linear(4, C))
            fg = frog.ForwardGradient(model, losses, k=4, perturb=perturb)
            fg(x, y)
            change(model)
            with pytest.raises(RuntimeError, match=message):
                fg(x, y)
            with pytest.raises(RuntimeError, match=message):
                frog.simulate(fg, x, y)


@pytest.mark.parametrize("perturb", ["weight", "activity"])
def test_modes_of_the_caller(perturb):
    x, y = torch.randn(B, M), torch.randint(0, C, (B,))

    def gradients(mode):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(M, 4), nn.BatchNorm1d(4), nn.Linear(4, C))
        fg = frog.ForwardGradient(model, losses, k=4, perturb=perturb)
        with mode:
            fg(x, y)
            fg(x.clone(), y)  # in inference mode another kind of tensor
        return [p.grad for p in model.parameters()]

    expected = gradients(torch.enable_grad())
    for actual in (gradients(torch.inference_mode()), gradients(torch.no_grad())):
        assert not any(g.is_inference() for g in actual)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected))
    with pytest.warns(UserWarning, match="autocast does not apply"):
        actual = gradients(torch.autocast("cpu", dtype=torch.bfloat16))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


@pytest.mark.parametrize("perturb", ["weight", "activity"])
def test_mixed_precision_within_a_model(perturb):
    model = nn.Sequential(nn.Linear(M, 8), nn.LayerNorm(8), nn.Linear(8, C)).bfloat16()
    model[1].float()
    fg = frog.ForwardGradient(model, lambda out, y: losses(out.float(), y), k=4, perturb=perturb)
    fg(torch.randn(B, M, dtype=torch.bfloat16), torch.randint(0, C, (B,)))
    assert all(p.grad is not None and p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("perturb", ["weight", "activity"])
@pytest.mark.parametrize("compiled", ["whole", "inner", "in place"])
def test_models_that_were_compiled(perturb, compiled):
    x, y = torch.randn(B, M), torch.randint(0, C, (B,))
    inner = nn.Linear(M, 4)
    model = nn.Sequential(inner, nn.Tanh(), nn.Linear(4, C))
    expected = [g.clone() for g in by_backprop(model, x, y).values()]
    if compiled == "whole":
        model = torch.compile(model, backend="eager")
    elif compiled == "inner":
        model[0] = torch.compile(inner, backend="eager")
    else:
        model.compile(backend="eager")
    with torch.no_grad():
        model(x)
    fg = frog.ForwardGradient(model, losses, k=K, perturb=perturb)
    fg(x, y)
    for p, g in zip(model.parameters(), expected):
        torch.testing.assert_close(p.grad, g, rtol=1e-7, atol=1e-9)
    frog.simulate(fg, x, y)


class Constant(nn.Module):
    """Something within is a constant for the gradient."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = nn.Linear(M, 4), nn.Linear(4, C), how
        self.c = nn.Linear(4, 1)
        self.inner = frog.nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("mean", torch.zeros(4))

    @torch.no_grad()
    def scale(self, h):
        return h.abs().mean(1, keepdim=True) + 0.1

    def forward(self, x):
        h = self.a(x).tanh()
        if self.how == "block":
            with torch.no_grad():
                scale = h.abs().mean(1, keepdim=True) + 0.1
                with torch.enable_grad():
                    h = h * 2
        elif self.how == "layers and jvp":
            with torch.no_grad():
                scale = self.inner(h.abs()).sum(1, keepdim=True).abs() + 1
                value, moved = frog.jvp(torch.sin, (x.sum(1, keepdim=True),), (torch.ones(1, len(x), 1),))
                scale = scale + moved[0] ** 2 + value**2
        elif self.how == "inference":
            with torch.inference_mode():
                scale = h.abs().mean(1, keepdim=True) + 0.1
            scale = scale.clone()
        elif self.how == "as it is":
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.training):
                h = h * 2
            before = torch.is_grad_enabled()
            torch.set_grad_enabled(False)
            scale = h.abs().mean(1, keepdim=True) + 0.1
            torch.set_grad_enabled(before)
        elif self.how == "layer":
            with torch.no_grad():
                scale = self.c(h).abs() + 1
        elif self.how == "decorator":
            scale = self.scale(h)
        elif self.how == "switch":
            with torch.set_grad_enabled(not self.training):
                scale = h.exp().mean(1, keepdim=True)
        elif self.how == "written":
            scale = 1
            with torch.no_grad():
                h.mul_(2)  # its derivative stays as it was
                self.mean.mul_(0.9).add_(0.1 * h.mean(0))
        else:
            scale = torch.utils.checkpoint.checkpoint(self.scale.__wrapped__, self, h, use_reentrant=self.how == "reentrant")
        return self.b(h / scale)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("perturb", ["weight", "activity"])
@pytest.mark.parametrize(
    "how",
    ["block", "inference", "as it is", "layer", "layers and jvp", "decorator", "switch", "written", "reentrant", "checkpoint"],
)
def test_no_grad_within_a_model(how, perturb):
    x, y = torch.randn(B, M), torch.randint(0, C, (B,))
    model = Constant(how)
    methods = [getattr(owner, name) for owner in (torch.no_grad, torch.set_grad_enabled) for name in ("__enter__", "__exit__")]
    if how == "written":  # backprop refuses to differentiate tanh of what was overwritten
        twin = copy.deepcopy(model)
        h = twin.a(x).tanh()
        (losses(twin.b(h + h.detach()), y)).mean().backward()
        frog.ForwardGradient(model, losses, k=K, perturb=perturb)(x, y)
        for p, q in zip(model.parameters(), twin.parameters()):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(model.mean, 0.2 * h.detach().mean(0))
    else:
        assert_is_the_gradient(model, x, y, perturb=perturb)
    now = [getattr(owner, name) for owner in (torch.no_grad, torch.set_grad_enabled) for name in ("__enter__", "__exit__")]
    assert methods == now


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


class Aliased(nn.Module):
    """A module, with a buffer, under two names."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Linear(M, M), nn.BatchNorm1d(M).eval(), nn.Tanh())
        self.b, self.f = self.a, nn.Bilinear(M, M, C)

    def forward(self, x):
        return self.f(self.b(self.a(x)), x)


@pytest.mark.parametrize("perturb, chunk_size", [("activity", None), ("activity", 40), ("weight", None), ("weight", 40)])
def test_a_module_of_two_names(perturb, chunk_size):
    model = Aliased()
    model.a[1].train()
    own = [*model.parameters(), *model.buffers()]
    expected, x, y = copy.deepcopy(model), torch.randn(B, M), torch.randint(0, C, (B,))
    losses(expected(x), y).mean().backward()
    fg = frog.ForwardGradient(model, losses, k=K, perturb=perturb, chunk_size=chunk_size, per_sample=False)
    fg(x, y)
    frog.coverage(model, x)
    assert all(a is b for a, b in zip((*model.parameters(), *model.buffers()), own, strict=True))
    for p, q in zip(model.parameters(), expected.parameters()):
        assert p.grad is not None
        if perturb == "weight":
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9)
    for a, b in zip(model.buffers(), expected.buffers()):
        torch.testing.assert_close(a, b)


class Tree(nn.Module):
    """A layer without a closed form that calls itself."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(M))

    def forward(self, x, n=2):
        y = torch.tanh(x * self.w)
        return y if n == 0 else self(y, n - 1) + x


class Catching(nn.Module):
    """A model that goes on where a layer has raised."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.f = Tree(), Tree(), nn.Linear(M, C)

    def forward(self, x):
        for layer in (self.a, self.b):
            with contextlib.suppress(TypeError):
                layer(x, "not a number")
        return self.f(self.a(self.b(x, 0), 0))


class Moving(nn.Module):
    """A buffer that forward assigns, and one that it registers."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(M, C)
        self.register_buffer("h", torch.zeros(()))

    def forward(self, x):
        y = self.f(x)
        self.h = 0.9 * self.h + 0.1 * y.pow(2).mean()
        if "z" not in self._buffers:
            self.register_buffer("z", torch.ones(()))
        self.z = self.z + 1
        return y * self.z


@pytest.mark.parametrize("chunk_size", [None, 60])
@pytest.mark.parametrize("perturb", ["weight", "activity"])
@pytest.mark.parametrize(
    "model", [lambda: nn.Sequential(Tree(), nn.Linear(M, C)), Catching, Moving], ids=["tree", "catch", "move"]
)
def test_models_that_call_catch_and_assign(model, perturb, chunk_size):
    torch.manual_seed(4)
    model, x, y = model(), torch.randn(B, M), torch.randint(0, C, (B,))
    twin = copy.deepcopy(model)
    fg = frog.ForwardGradient(model, losses, k=K, perturb=perturb, chunk_size=chunk_size)
    for _ in range(2):
        model.zero_grad(), twin.zero_grad()
        losses(twin(x), y).mean().backward()
        fg(x, y)
        for b, other in zip(model.buffers(), twin.buffers(), strict=True):
            assert type(b) is torch.Tensor
            torch.testing.assert_close(b, other.detach())
            other.detach_()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-9)


def test_a_layer_that_calls_itself_beside_several_as_one():
    model = nn.Sequential(Tree(), nn.Linear(M, M), nn.Linear(M, C))
    x, y = torch.randn(B, M), torch.randint(0, C, (B,))
    assert_is_the_gradient(model, x, y, layers=["0", ["1", "2"]])


def test_in_the_forward_mode_of_another():
    """PyTorch counts its levels for all threads."""
    model, x, y = nn.Sequential(nn.Linear(M, 4), nn.GELU(), nn.Linear(4, C)), torch.randn(B, M), torch.randint(0, C, (B,))
    with torch.autograd.forward_ad.dual_level():
        assert_is_the_gradient(model, x, y, perturb="weight")


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
