"""Modes of the caller, models that were compiled or are others now, and what copies and failures leave."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from backprop import B, C, K, M, by_backprop, float64, losses  # noqa: F401
from torch import nn

import frog_cuda as frog


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
    x, y = torch.randn(B, M, dtype=torch.float32), torch.randint(0, C, (B,))  # autocast leaves float64 alone

    def gradients(mode):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(M, 4), nn.BatchNorm1d(4), nn.Linear(4, C)).float()
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


@pytest.mark.parametrize("perturb", ["weight", "activity"])
@pytest.mark.parametrize("compiled", ["a function", "forward", "the loss"])
def test_functions_that_were_compiled(perturb, compiled):
    class Model(nn.Sequential):
        bend = staticmethod(torch.sin)

        def forward(self, x):
            return self[1](self.bend(self[0](x)))

    x, y = torch.randn(B, M), torch.randint(0, C, (B,))
    model, loss_fn = Model(nn.Linear(M, 4), nn.Linear(4, C)), losses
    expected = [g.clone() for g in by_backprop(model, x, y).values()]
    if compiled == "a function":
        model.bend = torch.compile(torch.sin, backend="eager")
    elif compiled == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        loss_fn = torch.compile(losses, backend="eager")
    fg = frog.ForwardGradient(model, loss_fn, k=K, perturb=perturb)
    for _ in range(3):  # dynamo does one thing at the first call and others later
        model.zero_grad()
        fg(x, y)
        for p, g in zip(model.parameters(), expected):
            torch.testing.assert_close(p.grad, g, rtol=1e-7, atol=1e-9)
        with torch.no_grad():
            loss_fn(model(x), y)
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_jvp_of_what_was_compiled():
    fn = torch.compile(lambda x: torch.sin(x) * 3, backend="eager")
    x = torch.randn(M)
    for _ in range(3):
        _, moved = frog.jvp(fn, (x,), (torch.eye(M),))
        torch.testing.assert_close(moved, torch.diag(3 * x.cos()))
        _, estimate = frog.forward_gradient(lambda x: fn(x).sum(), x, k=M)
        torch.testing.assert_close(estimate, 3 * x.cos())
        fn(x)


def test_threads_leave_compilation_as_it_was():
    compiled = torch.compile(torch.sin, backend="eager")
    compiled(torch.ones(2))
    entered, left = threading.Barrier(2), threading.Event()

    def slow(x):
        entered.wait()
        left.wait(60)
        return compiled(x)

    def quick(x):
        entered.wait()
        return compiled(x)

    def first():
        frog.jvp(slow, (torch.ones(2),), (torch.ones(1, 2),))

    thread = threading.Thread(target=first)
    thread.start()
    frog.jvp(quick, (torch.ones(2),), (torch.ones(1, 2),))
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    left.set()
    thread.join()
    assert torch._dynamo.eval_frame._stance.stance == "default"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("perturb", ["weight", "activity"])
def test_encoder_whose_fast_path_takes_nested_tensors(perturb):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
            self.encoder, self.last = nn.TransformerEncoder(layer, 2), nn.Linear(4, C)

        def forward(self, x):
            padding = torch.arange(3) >= torch.tensor([3, 2, 1, 3, 2])[: len(x), None]
            h = self.encoder(x, src_key_padding_mask=padding)
            return self.last(h.masked_fill(padding.unsqueeze(2), 0).sum(1))

    x, y = torch.randn(3, 3, 4), torch.randint(0, C, (3,))
    model = Model().eval()
    fg = frog.ForwardGradient(model, losses, k=K, perturb=perturb)
    simulated = frog.simulate(fg, x, y)
    fg(x, y)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, simulated.gradients[name], rtol=1e-7, atol=1e-9)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("perturb", ["weight", "activity"])
def test_what_modules_keep_holds_no_tangents_of_a_pass(perturb):
    class Keeping(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(M, 4), nn.Linear(4, C))
            self.seen, self.by_name, self.nested = [], {}, ()
            self.seen.append(self.seen)  # holds itself

        def forward(self, x):
            h = self[0](x).tanh()
            self.last, self.by_name["h"], self.nested = h, h * 2, (1, [h.sum(), {"h": h}], None)
            self.seen.append(h)
            return self[1](h)

    x, y = torch.randn(B, M), torch.randint(0, C, (B,))
    model = Keeping()
    frog.ForwardGradient(model, losses, k=2, perturb=perturb)(x, y)
    h = torch.tanh(x @ model[0].weight.T + model[0].bias).detach()
    kept = [model.last, model.seen[1], model.by_name["h"] / 2, model.nested[1][1]["h"]]
    for value in (*kept, model.nested[1][0]):
        assert type(value) is torch.Tensor
    for value in kept:
        torch.testing.assert_close(value, h)
    copy.deepcopy(model)
    torch.save(model.nested, io.BytesIO())
