"""Bad input gets an error that names the argument, what was given and what is accepted; nothing is half-written."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import frog_cuda as frog

X, Y = torch.randn(6, 3), torch.randint(0, 2, (6,))


def per_sample(output, target):
    return F.cross_entropy(output, target, reduction="none")


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def make(model=None, loss_fn=per_sample, **options):
    return frog.ForwardGradient(mlp() if model is None else model, loss_fn, **{"k": 2, **options})


def untouched(fg, x=X, y=Y, error=ValueError, match=""):
    """The call raises, and leaves .grad, parameters, step and last as they were."""
    parameters = [p.detach().clone() for p in fg.model.parameters()]
    for p in fg.model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    with pytest.raises(error, match=match):
        fg(x, y)
    assert fg.step == 0 and fg.last is None
    for p, before in zip(fg.model.parameters(), parameters, strict=True):
        assert torch.equal(p, before)
        assert p.grad is None or torch.equal(p.grad, torch.ones_like(p))
    assert not any(m._forward_hooks for m in fg.model.modules())


BOTH = pytest.mark.parametrize("perturb", ["weight", "activity"])


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (dict(k=0), ValueError, "k is 0"),
        (dict(k=-3), ValueError, "k is -3"),
        (dict(k=2.0), TypeError, "k is 2.0.*integer"),
        (dict(k=True), TypeError, "k is True"),
        (dict(k="4"), TypeError, "k is '4'"),
        (dict(tangents="gauss"), ValueError, "tangents is 'gauss'; accepted names are normal, rademacher"),
        (dict(tangents="cone"), ValueError, r"Cone\(angle\)"),
        (dict(tangents=3), TypeError, "tangents is of type int"),
        (dict(tangents=frog.tangents.Normal), TypeError, r"Normal\(\.\.\.\)"),
        (dict(aggregate="median"), ValueError, "aggregate is 'median'; accepted names are orthogonal, mean"),
        (dict(aggregate=None), TypeError, "aggregate is of type NoneType"),
        (dict(perturb="both"), ValueError, "perturb is 'both'; accepted are 'activity' and 'weight'"),
        (dict(chunk_size=0), ValueError, "chunk_size is 0"),
        (dict(tangent_dtype=torch.int32), ValueError, "tangent_dtype is torch.int32"),
        (dict(seed=2**64), ValueError, "seed is 18446744073709551616; expected a 64-bit"),
        (dict(seed="a"), TypeError, "seed is 'a' of type str; expected a 64-bit integer"),
        (dict(layers=[]), ValueError, "layers is empty"),
        (dict(layers="0"), TypeError, "layers is '0'"),
        (dict(layers=["nowhere"]), ValueError, "no module or parameter 'nowhere'; it has 0, 1, 2"),
        (dict(layers=["0", "0"]), ValueError, "'0' is named twice"),
        (dict(layers=[["0"], []]), TypeError, "non-empty list"),
        (dict(layers=lambda n, m: False), ValueError, "predicate selects no module"),
        (dict(layers=["1"]), ValueError, "nothing to perturb"),
        (dict(model=nn.ReLU()), ValueError, "nothing to perturb"),
        (dict(model=mlp().requires_grad_(False)), ValueError, "nothing to perturb"),
        (dict(model=lambda x: x), TypeError, "model is of type function"),
        (dict(loss_fn="mse"), TypeError, "loss_fn is of type str"),
        (dict(scaling_correction=True, aggregate="max"), ValueError, "no closed form for Max"),
        (dict(scaling_correction=True, aggregate=lambda v, d: d @ v), ValueError, "custom"),
        (dict(scaling_correction=True, tangents=torch.randn(2, 12)), ValueError, "supplied"),
    ],
    ids=lambda o: ",".join(f"{k}" for k in o) if isinstance(o, dict) else None,
)
@BOTH
def test_construction(perturb, options, error, match):
    with pytest.raises(error, match=match):
        make(**{"perturb": perturb, **options})


def test_more_orthonormal_tangents_than_dimensions():
    with pytest.raises(ValueError, match="k is 99, but only 26"):
        make(k=99, perturb="weight", tangents="orthonormal")
    untouched(make(k=99, tangents="orthonormal"), match="k is 99, but only 6")
    untouched(make(k=99, tangents="standard_basis"), match="only 6 coordinate axes")


@BOTH
def test_parameters_that_have_no_tangents(perturb):
    with pytest.raises(TypeError, match=r"0.weight has dtype torch.complex64"):
        make(nn.Sequential(nn.Linear(3, 2, dtype=torch.complex64)), perturb="weight")
    model = mlp()
    model.register_parameter("count", nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False))
    make(model, perturb=perturb)(X, Y)  # an integer parameter cannot require grad: as good as a buffer
    only = nn.Module()
    only.count = model.count
    with pytest.raises(ValueError, match="nothing to perturb"):
        make(only, perturb=perturb)
    with pytest.raises(TypeError, match="count has dtype torch.int64"):
        make(only, perturb="weight", layers=[""])


@BOTH
def test_mixed_devices(perturb):
    model = mlp()
    model[2] = model[2].to("meta")
    with pytest.raises(ValueError, match="several devices.*cpu, meta"):
        make(model, perturb=perturb)


@BOTH
@pytest.mark.parametrize(
    ("loss_fn", "error", "match"),
    [
        (lambda o, t: o, ValueError, r"shape \(6, 2\); expected a scalar \(\) or one loss per sample"),
        (lambda o, t: per_sample(o, t)[:0], ValueError, r"shape \(0,\)"),
        (lambda o, t: per_sample(o, t).sum().item(), TypeError, "returned float"),
        (lambda o, t: o.argmax(1), TypeError, "returned torch.int64"),
        (lambda o, t: per_sample(o, t).detach(), ValueError, "does not depend on anything that is perturbed"),
        (lambda o, t: torch.ones(6), ValueError, "does not depend"),
        (lambda o, t: per_sample(o, t) * math.nan, FloatingPointError, "the loss: 6 of 6 values are not finite"),
        (lambda o, t: per_sample(o, t) / torch.tensor([0.0, 1, 1, 1, 1, 1]), FloatingPointError, "the loss: 1 of 6"),
        (lambda o, t: torch.where(t == t, (o * 0).sum(1).sqrt(), 0), FloatingPointError, "directional derivatives"),
    ],
    ids=["2d", "empty", "float", "integer", "detached", "constant", "nan", "inf", "derivative"],
)
def test_losses(perturb, loss_fn, error, match):
    untouched(make(loss_fn=loss_fn, perturb=perturb), error=error, match=match)


@BOTH
def test_supplied_tangents_that_do_not_fit(perturb):
    n = 26 if perturb == "weight" else 6
    names = dict(mlp().named_parameters()) if perturb == "weight" else {"0": torch.empty(4), "2": torch.empty(2)}
    good = {name: torch.randn(2, *p.shape) for name, p in names.items()}
    first = next(iter(good))
    cases = [
        (torch.randn(2, n + 1), ValueError, rf"tangents has shape \(2, {n + 1}\); expected .*\(2, {n}\)"),
        (torch.randn(3, n), ValueError, "shape"),
        (torch.ones(2, n, dtype=torch.int64), TypeError, "dtype torch.int64"),
        (torch.randn(2, n, device="meta"), ValueError, "on meta"),
        ({**good, "extra": good[first]}, ValueError, r"not perturbed \['extra'\]"),
        ({n: v for n, v in good.items() if n != first}, ValueError, rf"missing \['{first}'\]"),
        ({**good, first: torch.randn(2, 1)}, ValueError, rf"tangents\['{first}'\] has shape"),
        ({**good, first: [1.0]}, TypeError, "of type list"),
        (lambda k, n, generator: None, TypeError, "the callable returned a NoneType"),
        (lambda k, n, generator: torch.randn(n, k), ValueError, "from the callable"),
    ]
    for tangents, error, match in cases:
        untouched(make(tangents=tangents, perturb=perturb), error=error, match=match)


def test_custom_aggregations_that_do_not_fit():
    for perturb in ("weight", "activity"):
        untouched(make(perturb=perturb, aggregate=lambda v, d: v), match="the callable returned")
        untouched(make(perturb=perturb, aggregate=lambda v, d: 1), match="the callable returned int")
    untouched(make(aggregate=lambda v, d: d.T @ v, shared_across_batch=False), match="shared_across_batch=True")


def test_outputs_that_are_no_activities():
    class Net(nn.Module):
        def __init__(self, out):
            super().__init__()
            self.inner, self.out = nn.Bilinear(3, 3, 2), out
            self.wrap = nn.Module()

        def forward(self, x):
            return self.out(self.inner(x, x))

    class Box:
        def __init__(self, y):
            self.y = y

    class Odd(nn.Linear):
        def forward(self, x):
            return Box(super().forward(x))

    class Unwrap(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd = Odd(3, 2)

        def forward(self, x):
            return self.odd(x).y

    untouched(make(Unwrap()), error=TypeError, match="output of odd is Box")
    rows = nn.Sequential(nn.Flatten(0, 1), nn.Linear(3, 2), nn.Unflatten(0, (6, 1)), nn.Flatten(1))
    make(rows)(X[:, None], Y)
    pairs = nn.Sequential(nn.Flatten(0, 1), nn.Linear(3, 2), nn.Unflatten(0, (6, 2)), nn.Flatten(1))
    untouched(make(pairs), torch.randn(6, 2, 3), Y, match="output of 1 has 12 rows, but there are 6 losses")
    make(pairs, per_sample=False)(torch.randn(6, 2, 3), Y)


def test_input_modified_after_the_layer_read_it():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            h = self.a(x)
            y = self.b(h)
            h.mul_(2)
            return y

    fg = make(Net())
    with pytest.raises(RuntimeError, match="input of b was modified in place"):
        fg(X, Y)
    assert fg.model.a.weight.grad is None


def test_order_of_calls():
    fg = make(perturb="weight")
    for call in (fg.accumulate_, fg.gradients, lambda: fg.update_(0.1)):
        with pytest.raises(RuntimeError, match="no gradient was estimated yet"):
            call()
    fg(X, Y)
    with pytest.raises(TypeError, match="lr is of type str"):
        fg.update_("0.1")
    activity = make()
    activity(X, Y)
    with pytest.raises(RuntimeError, match="only for perturb='weight'"):
        activity.update_(0.1)


def test_state_dict():
    fg = make()
    for state, error, match in (
        ({}, ValueError, "expected 'seed' and 'step'"),
        ({"seed": 1, "step": -1}, ValueError, "step is -1"),
        ({"seed": 1.5, "step": 0}, TypeError, "seed is 1.5 of type float"),
    ):
        with pytest.raises(error, match=match):
            fg.load_state_dict(state)
    assert fg.state_dict() == {"seed": 0, "step": 0}


def test_forward_gradient():
    def square(x):
        return (x**2).sum()

    for x, error, match in (
        (torch.arange(3), TypeError, "x is torch.int64"),
        ([1.0], TypeError, "x is list"),
        (torch.ones(2, dtype=torch.complex64), TypeError, "x is torch.complex64"),
        (torch.ones(0), ValueError, "no element"),
    ):
        with pytest.raises(error, match=match):
            frog.forward_gradient(square, x, k=1)
    x = torch.ones(3)
    with pytest.raises(ValueError, match=r"returned shape \(3,\); expected a scalar"):
        frog.forward_gradient(lambda x: x**2, x, k=1)
    with pytest.raises(ValueError, match="does not depend"):
        frog.forward_gradient(lambda x: torch.ones(()), x, k=1)
    with pytest.raises(FloatingPointError, match="the loss"):
        frog.forward_gradient(lambda x: (x - 2).log().sum(), x, k=1)
    with pytest.raises(ValueError, match="step is -1"):
        frog.forward_gradient(square, x, k=1, step=-1)
    with pytest.raises(ValueError, match="only 3 orthonormal"):
        frog.forward_gradient(square, x, k=4, tangents="orthonormal")


def test_parameters_without_a_layer_are_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift, self.fc = nn.Parameter(torch.zeros(3)), nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(x + self.shift)

    with pytest.warns(UserWarning, match="shift belong to no innermost layer") as caught:
        fg = frog.ForwardGradient(Net(), per_sample, k=2)
    assert caught[0].filename == __file__, "the line of the call"
    fg(X, Y)
    assert fg.model.shift.grad is None and fg.model.fc.weight.grad is not None


@pytest.mark.parametrize("name", ["per_sample", "shared_across_batch", "scaling_correction", "cuda_graph"])
@pytest.mark.parametrize("value", ["no", 1, None, torch.tensor(True)], ids=str)
def test_flags_are_true_or_false(name, value):
    with pytest.raises(TypeError, match=rf"{name} is .* of type {type(value).__name__}; expected True or False"):
        frog.ForwardGradient(nn.Linear(2, 2), nn.MSELoss(), k=1, **{name: value})


@pytest.mark.parametrize("name", ["scaling_correction", "simulate"])
def test_flags_of_functions(name):
    with pytest.raises(TypeError, match=f"{name} is 'no' of type str; expected True or False"):
        frog.forward_gradient(torch.sum, torch.ones(2), k=1, **{name: "no"})


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("perturb", ["activity", "weight"])
def test_torchscript_is_refused(perturb):
    traced = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    with pytest.raises(TypeError, match="model: 1 is TorchScript, which carries no tangents; expected modules as they were"):
        frog.ForwardGradient(nn.Sequential(nn.Tanh(), traced), nn.MSELoss(), k=1, perturb=perturb)
