from __future__ import annotations

import threading

import pytest
import torch
from against_func import compare, draw, dual, expected
from helpers import assert_close64
from torch import nn
from torch.autograd import Function, forward_ad
from torch.utils.checkpoint import checkpoint

import frog_cuda as frog
from frog_cuda import custom_functions
from frog_cuda.dual import DualTensor

K = 3


class Straight(Function):
    """Straight-through estimator: rounds, with the derivative of the identity."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def jvp(ctx, t):
        return t


round_ = Straight.apply  # as most code keeps it


class Reversed(Function):
    """The input as it is, with the derivative negated and scaled."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def jvp(ctx, t, scale):
        assert scale is None
        return -ctx.__dict__.pop("scale") * t  # what forward left is there for each tangent


class Product(Function):
    """Several outputs, one of them not differentiable, an integer one and an argument that is no tensor."""

    @staticmethod
    def forward(x, y, power=2):
        largest, at = (x * y).max(0)
        return x * y**power, largest, at, x > y

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, ctx.power = inputs
        ctx.save_for_forward(x, y)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def jvp(ctx, dx, dy, power):
        x, y = ctx.saved_tensors
        assert power is None and dx is not None and dy is not None
        return dx * y**ctx.power + x * dy * ctx.power * y ** (ctx.power - 1), None, None, None


class Plain(Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


class Doubled(Function):
    @staticmethod
    def forward(ctx, x):
        x.mul_(2)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def jvp(ctx, t):
        return t.mul_(2)


def forward_mode(fn, *primals):
    """What PyTorch's forward mode gives, one tangent at a time."""
    tangents = [draw(K, *p.shape, seed=9 + i) for i, p in enumerate(primals)]
    rows = []
    for i in range(K):
        with forward_ad.dual_level():
            duals = (forward_ad.make_dual(p.clone(), t[i].clone()) for p, t in zip(primals, tangents, strict=True))
            rows.append(forward_ad.unpack_dual(fn(*duals)))
    return tangents, rows[0].primal, torch.stack([r.tangent for r in rows])


FUNCTIONS = {
    "straight through": lambda x: round_(x * 3).sin() * x,
    "default": lambda x: Product.apply(x, x.cos())[0],
    "keyword": lambda x: Product.apply(x, x.cos(), power=3)[0],
    "one plain": lambda x: Product.apply(x, torch.full_like(x, 2.0).detach(), 3)[0],
    "not differentiable": lambda x: Product.apply(x, x.cos())[1] * x,
    "in place": lambda x: (y := x * 1, Doubled.apply(y), y * x)[2],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_equals_pytorchs_forward_mode(name):
    x = draw(4, 3).abs() + 0.1
    (tangent,), value, moved = forward_mode(FUNCTIONS[name], x)
    out, d = frog.jvp(FUNCTIONS[name], (x,), (tangent,))
    assert_close64(out, value)
    assert_close64(d, moved)


def test_gradient_reversal():
    """PyTorch's forward mode asks for a tangent that is a view where the result is one; here it need not be."""
    x, t = draw(4, 3), draw(K, 4, 3, seed=1)
    out, d = frog.jvp(lambda x: Reversed.apply(x.exp(), 0.5).square() + x, (x,), (t,))
    assert_close64(out, (2 * x).exp() + x)
    assert_close64(d, t - (2 * x).exp() * t)


def test_results_without_a_derivative_are_plain():
    x = dual(draw(4, 3))
    _, largest, at, larger = Product.apply(x, x * 2)
    assert [type(t) for t in (largest, at, larger)] == [torch.Tensor] * 3


def test_a_missing_jvp_names_the_class():
    x = draw(4)
    for call in (
        lambda: frog.jvp(Plain.apply, (x,), (draw(K, 4),)),
        lambda: Plain.apply(dual(x)),
        lambda: Plain.apply(x, dual(x)),
    ):
        with pytest.raises(NotImplementedError, match=r"Plain\.apply.* jvp staticmethod"):
            call()

    class Layer(nn.Linear):
        def forward(self, x):
            return Plain.apply(super().forward(x))

    with pytest.raises(NotImplementedError, match=r"Plain.apply \(called from 1, a Layer of Sequential\)"):
        model = nn.Sequential(nn.Linear(3, 4), Layer(4, 2))
        frog.ForwardGradient(model, nn.MSELoss(), k=2)(torch.ones(5, 3), torch.ones(5, 2))


def test_zero_tangents_need_no_jvp():
    x = dual(draw(4))
    y = Plain.apply(torch.ones_like(x))
    assert type(y) is DualTensor and torch.equal(y.primal, torch.full((4,), 2.0).double()) and not y.tangents.any()
    y.copy_(x)  # a buffer as before


@pytest.mark.parametrize("perturb", ["weight", "activity"])
def test_models(perturb):
    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4).double(), nn.Linear(4, 1).double()

        def forward(self, x):
            return self.second(Straight.apply(self.first(x) * 4).tanh())

    model, x = Quantised(), draw(1, 3)
    n = sum(p.numel() for p in model.parameters()) if perturb == "weight" else 5
    fg = frog.ForwardGradient(model, lambda y, _: y.sum(), k=n, perturb=perturb)
    fg(x, None)
    rounded = (model.first(x) * 4).round().detach()
    slope = 4 * model.second.weight.detach() * (1 - rounded.tanh() ** 2)
    assert_close64(model.first.weight.grad, slope.t() @ x, 1e-9)


def test_what_cannot_be_told_is_refused():
    class Many(Function):
        @staticmethod
        def forward(ctx, xs, y=None):
            return xs[0] * 2

        jvp = Straight.jvp

    class Closed(Function):
        @staticmethod
        def forward(ctx, x):
            return x * outside

        jvp = Straight.jvp

    class Saved(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def jvp(ctx, t):
            return ctx.saved_tensors[0] * t

    class Wrong(Straight):
        @staticmethod
        def jvp(ctx, t):
            return t[0]

    class TooMany(Straight):
        @staticmethod
        def jvp(ctx, t):
            return t, t

    x = outside = dual(draw(3))
    plain = draw(3)
    for call, error, message in (
        (lambda: Many.apply([x]), NotImplementedError, r"Many\.apply: a DualTensor inside a list"),
        (lambda: Many.apply([plain], y=x), TypeError, "keyword argument"),
        (lambda: Closed.apply(x * 2), NotImplementedError, "not among its arguments"),
        (lambda: Saved.apply(x), RuntimeError, "save_for_forward"),
        (lambda: Wrong.apply(x), RuntimeError, r"Wrong: jvp returned a tangent of shape \(\)"),
        (lambda: TooMany.apply(x), RuntimeError, "2 tangents; forward returned 1"),
        (lambda: Straight.apply(x, 1), TypeError, "positional argument"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_results_that_view_an_argument_refuse_to_be_written():
    x = dual(draw(3)) * 1
    y = Reversed.apply(x, 1.0)
    assert y.primal.data_ptr() == x.primal.data_ptr()
    with pytest.raises(RuntimeError, match="in-place operation on a view made by Reversed"):
        y.add_(1)
    with pytest.raises(RuntimeError, match="missed by a view .*Reversed"):
        x.add_(1)


def test_tangents_of_lower_precision_stay_so():
    x = DualTensor(torch.randn(4), torch.randn(2, 4).bfloat16())
    y = Straight.apply(x)
    assert y.dtype == torch.float32 and y.tangents.dtype == torch.bfloat16


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_go_on_working(reentrant):
    def fn(x):
        return checkpoint(lambda x: x.sin() * x, x, use_reentrant=reentrant)

    x = draw(4)
    (value,), (moved,) = expected(lambda x: x.sin() * x, [x], [dual(x).tangents])
    compare(fn(dual(x)), value, moved)


def test_other_arguments_take_the_usual_way():
    def fn(x):
        leaf = draw(3).requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(Plain.apply(leaf).sum(), leaf)
        return x * slope

    assert_close64(frog.jvp(fn, (draw(3),), (draw(1, 3),))[1], 2 * draw(1, 3))


def test_only_passes_are_intercepted():
    """Where no DualTensor is made by hand, also after errors and with passes in several threads."""
    while custom_functions._passes:  # by an earlier test, for good
        custom_functions._count(-1)
    caught = lambda: "__getattribute__" in vars(type(Function))  # noqa: E731
    seen = []

    def fn(x):
        seen.append(caught())
        return Straight.apply(x)

    def work():
        for _ in range(20):
            assert_close64(frog.jvp(fn, (draw(3),), (draw(2, 3),))[1], draw(2, 3))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 80 and not caught()
    with pytest.raises(NotImplementedError):
        frog.jvp(Plain.apply, (draw(3),), (draw(2, 3),))
    assert not caught()
    x = dual(draw(3))
    assert caught() and torch.equal(Straight.apply(x).tangents, x.tangents)
