"""The paper's models: groups cover every parameter, and forward gradients equal the simulated ones."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close64
from torch import nn

import frog_cuda as frog
from frog_cuda.experiments import models
from frog_cuda.layers import default_layers

SHAPES = [(1, 28, 28), (3, 32, 32), (1, 8, 8)]
SMALL = {
    "fc": dict(width=17),
    "lenet5": {},
    "resnet18": dict(width=4),
    "vit": dict(layers=2, heads=2, width=8, hidden=12),
    "mixer": dict(layers=2, width=8, hidden_positions=6, hidden=12),
}
NAMES = list(models.MODELS)


def small(name: str, shape=(1, 8, 8), seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return models.build(name, shape, 5, **SMALL[name]).double()


def batch(shape=(1, 8, 8), rows: int = 4):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, *shape, generator=generator, dtype=torch.float64), torch.randint(
        0, 5, (rows,), generator=generator
    )


def per_sample(output, target):
    return F.cross_entropy(output, target, reduction="none")


def check(fg: frog.ForwardGradient, x, y) -> None:
    """Loss, derivatives and every gradient as simulate() has them, relative to the largest entry of the whole gradient."""
    simulated = frog.simulate(fg, x, y)
    assert_close64(fg(x, y), simulated.loss)
    assert_close64(fg.last.directional_derivatives, simulated.directional_derivatives)
    found = {name: p.grad for name, p in fg.model.named_parameters() if p.grad is not None}
    assert set(found) == set(simulated.gradients) == {name for name, _ in fg.model.named_parameters()}
    largest = max(g.abs().max() for g in simulated.gradients.values())
    assert largest > 0
    for name, g in found.items():
        assert (g - simulated.gradients[name]).abs().max() <= 1e-10 * largest, name


def disagrees(fg: frog.ForwardGradient, x, y) -> bool:
    simulated = frog.simulate(fg, x, y).directional_derivatives
    fg.derivatives(x, y)
    return bool((fg.last.directional_derivatives - simulated).abs().max() > 1e-3 * simulated.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_weight_perturbation_equals_the_simulated_estimate(name):
    check(frog.ForwardGradient(small(name), per_sample, k=3, perturb="weight"), *batch())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grouped", [True, False], ids=["groups", "leaf-modules"])
@pytest.mark.parametrize("options", [dict(), dict(per_sample=False), dict(shared_across_batch=False)], ids=str)
def test_activity_perturbation_equals_the_simulated_estimate(name, grouped, options):
    model = small(name)
    if name == "resnet18":
        options = options | dict(per_sample=False)  # train mode: exact with one derivative for the batch
    layers = model.groups() if grouped else None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # ForwardGradient warns of parameters that no layer owns
        fg = frog.ForwardGradient(model, per_sample, k=3, layers=layers, **options)
    check(fg, *batch())


@pytest.mark.parametrize("grouped", [True, False], ids=["groups", "leaf-modules"])
def test_batch_normalisation_is_exact_per_sample_in_eval_mode_only(grouped):
    model = small("resnet18")
    x, y = batch()
    model(x)  # running statistics other than the initial ones
    fg = frog.ForwardGradient(model, per_sample, k=3, layers=model.groups() if grouped else None)
    assert disagrees(fg, x, y), "a sample's loss depends on the other samples through the batch statistics"
    model.eval()
    check(fg, x, y)


@pytest.mark.parametrize("perturb", ["weight", "activity"])
def test_running_statistics_move_once_a_step(perturb):
    model, twin = small("resnet18"), small("resnet18")
    x, y = batch()
    frog.ForwardGradient(model, per_sample, k=3, perturb=perturb, per_sample=False, chunk_size=2)(x, y)
    twin(x)
    for (name, b), (_, expected) in zip(model.named_buffers(), twin.named_buffers(), strict=True):
        assert_close64(b, expected) if b.is_floating_point() else torch.testing.assert_close(b, expected), name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_groups_and_innermost_modules_own_every_parameter_once(name, shape):
    model = models.build(name, shape, 10, **SMALL[name])
    assert model(torch.randn(2, *shape)).shape == (2, 10)
    modules = dict(model.named_modules())
    for layers in (model.groups(), [[n for n, _ in group] for group in default_layers(model)]):
        owned = [id(p) for group in layers for module in group for p in modules[module].parameters()]
        assert sorted(owned) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize(
    "name, shape, parameters, groups",
    [
        # 784-w-w-10: 785 w + (w + 1) w + 10 (w + 1)
        ("fc", (1, 28, 28), 785 * 1024 + 1025 * 1024 + 1025 * 10, 3),
        ("lenet5", (1, 28, 28), 61706, 5),  # LeCun et al. 1998 with full connections between the feature maps
        # torchvision's resnet18 has 11 689 512 with 1000 classes
        ("resnet18", (3, 32, 32), 11689512 - 513 * 990, 6),
        (
            "vit",
            (3, 32, 32),
            6 * (257 * 768 + 257 * 256 + 257 * 512 + 513 * 256 + 4 * 256) + 49 * 256 + 66 * 256 + 512 + 2570,
            6,
        ),
        ("mixer", (3, 32, 32), None, 6),
    ],
)
def test_sizes_of_the_paper(name, shape, parameters, groups):
    model = models.build(name, shape)
    count = sum(p.numel() for p in model.parameters())
    assert len(model.groups()) == groups
    if parameters is None:  # the mixer is about as large as the transformer
        parameters = sum(p.numel() for p in models.build("vit", shape).parameters())
        assert 0.9 * parameters < count < 1.1 * parameters
    else:
        assert count == parameters


@pytest.mark.parametrize("name", ["vit", "mixer"])
def test_input_and_output_processing_belong_to_the_first_and_last_layer(name):
    groups = models.build(name, (3, 32, 32)).groups()
    assert groups[0][0] == "input" and groups[0][-1] == "layers.0"
    assert groups[-1][0] == "layers.5" and groups[-1][-1] == "output"


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: models.build("resnet50"), "name is 'resnet50'; accepted are fc, lenet5, resnet18, vit, mixer"),
        (lambda: models.build("vit", (3, 30, 32)), "multiples of the patch size 4"),
        (lambda: models.build("lenet5", (3, 64, 64)), "at most 32"),
        (lambda: models.build("lenet5", (3, 27, 27)), "even sides"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
