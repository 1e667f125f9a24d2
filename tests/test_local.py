"""Closed-form layer-local gradients against autograd, which shares no code with them."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close64
from torch import nn

import frog_cuda as frog
from frog_cuda import local

B, K = 7, 3
#: layer and shape of its input
LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (B, 5)),
    "linear, sequence": (lambda: nn.Linear(5, 4, bias=False), (B, 3, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (B, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, dilation=2, groups=2), (B, 4, 7, 6)),
    "conv2d, same": (lambda: nn.Conv2d(3, 4, (4, 3), padding="same"), (B, 3, 7, 6)),
    "conv2d, valid": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), (B, 3, 7, 6)),
    "conv2d, reflect": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (B, 3, 7, 6)),
    "conv2d, circular": (lambda: nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="circular", stride=2), (B, 3, 7, 6)),
    "conv2d, one place": (lambda: nn.Conv2d(3, 4, 3, padding=1), (B, 3, 1, 1)),
    "conv2d, one place, strided": (lambda: nn.Conv2d(3, 4, 3, padding=1, stride=2), (B, 3, 2, 2)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (B, 2, 3, 4, 3)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2, output_padding=1), (B, 3, 5)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), (B, 4, 4, 3)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2, dilation=2), (B, 2, 3, 2, 3)),
    "layer norm": (lambda: nn.LayerNorm((3, 5), eps=0.1), (B, 2, 3, 5)),
    "rms norm": (lambda: nn.RMSNorm(5), (B, 3, 5)),
    "group norm": (lambda: nn.GroupNorm(2, 6), (B, 6, 4)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(5), (B, 5)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(3), (B, 3, 4, 2)),
    "batch norm 3d": (lambda: nn.BatchNorm3d(2), (B, 2, 3, 2, 2)),
    "batch norm, evaluation": (lambda: nn.BatchNorm2d(3).eval(), (B, 3, 4, 2)),
}


@pytest.mark.parametrize("shared", [False, True], ids=["gradient of every row", "k shared tangents"])
@pytest.mark.parametrize("name", LAYERS)
def test_against_autograd(name, shared):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make().double()
    if hasattr(layer, "running_mean"):
        layer.running_mean.normal_()
    x = torch.randn(shape, dtype=torch.float64)
    y = layer(x)
    if shared:
        weights, v = torch.randn(K, B, dtype=torch.float64), torch.randn(K, *y.shape[1:], dtype=torch.float64)
        g = torch.einsum("kb,k...->b...", weights, v)
    else:
        weights, g = None, torch.randn_like(y)
        v = g
    y.backward(g)
    with torch.no_grad():
        found = list(local.local_gradient(layer, local.local_rule(layer), x, v, weights))
    assert [id(p) for p, _ in found] == [id(p) for p in layer.parameters()]
    for p, own in found:
        assert_close64(own, p.grad)


def test_every_rule_is_tested_and_frozen_parameters_are_left_out():
    assert {type(make()) for make, _ in LAYERS.values()} == {t for t in local._RULES if t.__module__.startswith("torch")}
    layer = nn.Linear(3, 2)
    layer.weight.requires_grad_(False)
    found = list(local.local_gradient(layer, local.local_rule(layer), torch.ones(4, 3), torch.ones(4, 2)))
    assert [p is layer.bias for p, _ in found] == [True]


def test_a_subclass_has_no_rule():
    class Scaled(nn.Linear):
        pass

    assert local.local_rule(Scaled(2, 2)) is None


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("x_dtype, w_dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_mixed_precision_is_computed_in_the_wider_one(x_dtype, w_dtype, shared):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, 5, generator=generator).to(x_dtype)
    g = torch.randn(K if shared else B, 4, generator=generator).to(x_dtype)
    weights = torch.randn(K, B, generator=generator).to(x_dtype) if shared else None
    layer, wide = nn.Linear(5, 4).to(w_dtype), nn.Linear(5, 4)
    rule = local.local_rule(layer)
    found = dict(local.local_gradient(layer, rule, x, g, weights))
    exact = dict(local.local_gradient(wide, rule, x.float(), g.float(), None if weights is None else weights.float()))
    for p, q in ((layer.weight, wide.weight), (layer.bias, wide.bias)):
        assert found[p].dtype == w_dtype and torch.equal(found[p], exact[q].to(w_dtype))


class Alone(nn.Module):
    """A layer whose input has no axis for the batch; the loss is a scalar."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x).square().sum().tanh()


NO_BATCH = {
    "linear": (lambda: nn.Linear(5, 4), (5,)),
    "layer norm": (lambda: nn.LayerNorm(5), (5,)),
    "layer norm, two axes": (lambda: nn.LayerNorm((4, 5)), (4, 5)),
    "rms norm": (lambda: nn.RMSNorm(5), (5,)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (3, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2), (4, 4, 3)),
    "conv2d, circular": (lambda: nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="circular"), (3, 4, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 3, 3, 3)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 3, 2)),
}


@pytest.mark.parametrize("name", NO_BATCH)
def test_layers_without_a_batch(name):
    make, shape = NO_BATCH[name]
    torch.manual_seed(0)
    model, x = Alone(make().double()), torch.randn(shape, dtype=torch.float64)
    y = model.layer(x)
    for shared, k in ((True, 1), (True, 3), (False, 3), (False, y.numel())):
        fg = frog.ForwardGradient(model, lambda out, _: out, k=k, shared_across_batch=shared)
        model.zero_grad()
        fg(x, None)
        # The estimate for the layer's output, by autograd from there on
        v = fg._tangents.draw(fg.last.trace.segments[0].piece, torch.float64)
        g = torch.einsum("k,k...->...", fg.last.coefficients, v).expand_as(y)
        expected = torch.autograd.grad(y, list(model.layer.parameters()), g, retain_graph=True)
        for p, e in zip(model.layer.parameters(), expected, strict=True):
            assert_close64(p.grad, e)
    expected = torch.autograd.grad(model(x), list(model.layer.parameters()))
    for p, e in zip(model.layer.parameters(), expected, strict=True):
        assert_close64(p.grad, e, 1e-6)  # as many tangents as elements


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_what_batch_norm_used_is_kept(mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double().train(mode)
    model[1].running_var.uniform_(1, 2)
    x, y = torch.randn(B, 5, dtype=torch.float64), torch.randn(B, 3, dtype=torch.float64)
    fg = frog.ForwardGradient(model, nn.MSELoss(), k=4, per_sample=False)
    fg.derivatives(x, y)
    expected = fg.gradients()
    model.train(not mode)
    model[1].running_mean.add_(1)
    for name, g in fg.gradients().items():
        assert torch.equal(g, expected[name])
