from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from against_func import check, draw, dual
from helpers import assert_close64

import frog_cuda as frog
from frog_cuda.dual import DualTensor, tangents_of


def test_control_flow_on_values():
    def fn(x):
        if x.sum() > 0 and bool((x > -100).all()):
            x = x * float(x[0, 0]) + x.tolist()[0][1]
        for _ in range(int(x.abs().max().item()) % 3 + 1):
            x = x * 2
        assert len(x) == 7 and x.size(1) == 33 and x.numel() == 231 and f"{x.sum():.2f}"
        return x

    check(fn, draw(7, 33).abs())


def test_detach_drops_the_tangents_as_in_torch_func():
    check(lambda x: x * x.detach() + x.data, draw(7, 33))
    x = dual(draw(3))
    assert type(x.detach()) is torch.Tensor and x.detach().data_ptr() == x.primal.data_ptr()


def test_integer_and_boolean_results_are_plain():
    x = dual(draw(7, 33))
    for y in (x > 0, x.argmax(), x.long(), x.to(torch.int32), x.isnan(), x.nonzero(), x.sort(1)[1], x.max(0).indices, x == x):
        assert type(y) is torch.Tensor
    assert torch.equal(x.max(0).indices, x.primal.max(0).indices)


def test_taking_values_out_is_refused_where_tangents_would_be_lost():
    x = dual(draw(3))
    with pytest.raises(RuntimeError, match="tangents would be lost"):
        x.numpy()
    with pytest.raises(RuntimeError, match="tangents would be lost"):
        np.asarray(x)
    for export in (torch.from_dlpack, np.from_dlpack, lambda x: x.__dlpack__()):
        with pytest.raises(RuntimeError, match="__dlpack__: a DualTensor's tangents would be lost"):
            export(x)
    s = x.sum()
    for constant in (torch.tensor, torch.as_tensor, torch.ones(3).new_tensor, x.new_tensor, x.new):
        with pytest.raises(RuntimeError, match="(torch.tensor|new_tensor): a DualTensor in a list of numbers"):
            constant([2.0, s])
    assert torch.equal(x.new_tensor([1.0, 2.0]), x.new([1.0, 2.0]))
    assert torch.tensor([2.0, s.item(), float(s)]).shape == (3,) and complex(s).real == float(s)
    with pytest.raises(RuntimeError, match="nothing is recorded for backward"):
        x.sum().backward()
    with pytest.raises(RuntimeError, match=r"torch\.autograd\.grad: nothing is recorded.* torch\.func\.grad"):
        torch.autograd.grad(x.sum(), x)
    with pytest.raises(RuntimeError, match="nothing is recorded for backward"):
        x.requires_grad_()
    with pytest.raises(RuntimeError, match="nothing is recorded for backward"):
        x.requires_grad = True
    with pytest.raises(RuntimeError, match="cannot be replaced"):
        x.data = torch.ones(3)
    with pytest.raises(RuntimeError, match="share_memory_: a DualTensor has no memory of its own"):
        x.share_memory_()
    with pytest.raises(RuntimeError, match="apply_: the derivative of a Python function"):
        x.apply_(lambda value: value + 1)
    with pytest.raises(RuntimeError, match="map_: the derivative of a Python function"):
        x.map_(x, lambda a, b: a + b)
    for first, *others in ((x, x, x), (torch.ones(3).double(), x, x), (torch.ones(3).double(), torch.ones(3).double(), x)):
        with pytest.raises(RuntimeError, match="map2_: the derivative of a Python function"):
            first.map2_(*others, lambda a, b, c: a + b + c)


#: operations on x with a number s
WITH_A_NUMBER = {
    "negative_slope": lambda x, s: F.leaky_relu(x, s),
    "alpha": lambda x, s: F.elu(x, alpha=s),
    "beta": lambda x, s: F.softplus(x, beta=s),
    "max_val": lambda x, s: F.hardtanh(x, -1.0, s),
    "p": lambda x, s: F.dropout(x, s),
    "eps": lambda x, s: F.layer_norm(x, (3,), eps=s),
    "scale": lambda x, s: F.scaled_dot_product_attention(*[x[None, None]] * 3, scale=s),
    "label_smoothing": lambda x, s: F.cross_entropy(x, torch.tensor([0, 1]), label_smoothing=s),
    "a number, such as alpha": lambda x, s: torch.add(x, x, alpha=s),
    "a number, such as alpha or": lambda x, s: F.leaky_relu(x.detach(), s),
    "a number, such as alpha or eps": lambda x, s: torch.full((2,), s),
    "is a number": lambda x, s: F.celu(x, alpha=s),
}


@pytest.mark.parametrize("argument", WITH_A_NUMBER)
def test_a_dual_tensor_is_no_number(argument):
    """PyTorch would read its value and lose the tangents without a word."""
    fn, x, s = WITH_A_NUMBER[argument], dual(draw(2, 3)), dual(torch.tensor(0.7, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=argument):
        fn(x, s)
    fn(x, s.item())
    fn(x, float(s))
    assert int(s) == 0 and [1, 2][dual(torch.zeros(())).long()] == 1 and bool(s)


def test_numbers_are_read_inside_torch_func_and_compiled_functions():
    def fn(x):
        return x.square().sum() * (1.0 if x.sum().item() < 100 and x.sum() else 2.0)

    check(torch.func.grad(fn), draw(3))
    assert_close64(torch.compile(fn, backend="eager")(dual(draw(3))).tangents, fn(dual(draw(3))).tangents)


def test_a_number_under_no_grad_in_a_pass_is_a_constant_as_in_training():
    class Model(torch.nn.Linear):
        def forward(self, x):
            x = super().forward(x)
            with torch.no_grad():
                half = torch.full((2,), x.mean()) * 0.5
            return x + half

    model = Model(4, 2)
    frog.ForwardGradient(model, F.mse_loss, k=2, perturb="weight")(torch.ones(5, 4), torch.zeros(5, 2))
    assert model.weight.grad is not None


@pytest.mark.parametrize("make", [torch.zeros, lambda n: torch.nn.Parameter(torch.zeros(n))])
def test_a_dual_tensor_is_not_the_data_of_a_plain_one(make):
    def fn(x):
        y = make(2)
        y.data = x[:2]
        return y * 2

    attribute = torch.Tensor.data
    for run in (lambda: frog.jvp(fn, (torch.ones(3),), (torch.ones(2, 3),)), lambda: fn(dual(draw(3)))):
        with pytest.raises(RuntimeError, match="data: a DualTensor as the data of a plain tensor"):
            run()
    y = make(2)
    y.data = torch.ones(3)  # by the attribute of passes, which a DualTensor made by hand leaves in place
    assert torch.equal(y.data, torch.ones(3)) and torch.Tensor.data is attribute


def test_torch_func_inside():
    """What the error of torch.autograd.grad advises."""
    x, w = draw(5, 4), draw(3, 4, seed=1)

    def fn(x, w):
        inner = torch.func.grad(lambda x, w: torch.tanh(F.layer_norm(F.linear(x, w), (3,))).square().sum())(x, w)
        _, pull = torch.func.vjp(lambda w, x: F.gelu(F.linear(x, w)), w, x)
        return inner.sin().sum() + pull(torch.ones(5, 3, dtype=x.dtype))[0].square().sum()

    check(fn, x, w)
    with pytest.raises(RuntimeError, match="no gradient is recorded"):
        torch.func.grad(lambda x: F.linear(x, dual(w)).sum())(dual(x))


@pytest.mark.parametrize("create_graph", [True, False])
@pytest.mark.parametrize("vectorize", [True, False])
def test_torch_autograd_functional_is_refused_where_derivatives_would_be_zeros(create_graph, vectorize):
    def closed_over(x):
        options = dict(create_graph=create_graph, vectorize=vectorize)
        return torch.autograd.functional.jacobian(lambda y: y * x, torch.ones(3, dtype=x.dtype), **options)

    def argument(x):
        return torch.autograd.functional.hessian(lambda x: (x**3).sum(), x, create_graph=True, vectorize=vectorize)

    for fn in (closed_over, argument):
        with pytest.raises(RuntimeError, match="torch.autograd.functional: nothing is recorded.*use torch.func"):
            fn(dual(draw(3)))
    check(lambda x: torch.func.jacrev(torch.func.jacrev(lambda x: (x**3).sum()))(x), draw(3))
    assert not dual(draw(3)).requires_grad


@pytest.mark.parametrize("perturb", ["weight", "activity"])
def test_requiring_grad_changes_nothing_in_a_pass_as_in_training(perturb):
    class Model(torch.nn.Sequential):
        requires = True

        def forward(self, x):
            x = self[0](x)
            if self.requires:
                x.requires_grad_()
                x.requires_grad = True
            return self[1](x)

    grads = []
    for requires in (True, False):
        torch.manual_seed(0)
        model = Model(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        model.requires = requires
        frog.ForwardGradient(model, F.mse_loss, k=2, perturb=perturb, per_sample=False)(torch.ones(5, 4), torch.zeros(5, 2))
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


DROPOUTS = {
    "F.dropout": lambda x: F.dropout(x, 0.4),
    "torch.dropout": lambda x: torch.dropout(x, 0.4, True),
    "in place": lambda x: F.dropout(x * 1, 0.4, inplace=True),
    "all": lambda x: F.dropout(x, 1.0),
    "none": lambda x: F.dropout(x, 0.0),
    "evaluation": lambda x: F.dropout(x, 0.4, training=False),
    "native": lambda x: torch.native_dropout(x, 0.4, True)[0],
    "alpha": lambda x: F.alpha_dropout(x, 0.4, training=True),
    "channels": lambda x: F.dropout2d(x[None, ..., None], 0.4),
    "module": lambda x: torch.nn.Dropout(0.3)(x),
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_draws_one_mask_and_pytorchs(name):
    fn = DROPOUTS[name]
    x = draw(7, 33)
    out = check(fn, x)  # reseeded before each: the same mask as plain PyTorch
    torch.manual_seed(7)
    assert_close64(out.primal if isinstance(out, DualTensor) else out, fn(x))


def test_random_slopes_are_the_same_for_value_and_tangents():
    x = draw(7, 33)
    check(lambda x: F.rrelu(x, training=True), x)
    before = torch.get_rng_state()
    F.rrelu(dual(x), training=True)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    F.rrelu(x, training=True)
    assert torch.equal(after, torch.get_rng_state())  # as many numbers are consumed as by the plain operation


def test_random_numbers_without_differentiable_input_are_plain():
    x = dual(draw(7, 33))
    for y in (torch.rand_like(x), torch.randn_like(x), torch.randint_like(x, 5), torch.bernoulli(x.sigmoid())):
        assert type(y) is torch.Tensor
    y = x * 1
    assert_close64(y.normal_().tangents, torch.zeros(3, 7, 33, dtype=torch.float64))
    check(lambda x: torch.normal(x, 0.1), draw(7, 33))
    check(lambda x: x * torch.rand_like(x), draw(7, 33))


def test_constant_buffers_have_zero_tangents():
    x = dual(draw(7, 33))
    for y in (torch.zeros_like(x), x.new_ones(3), torch.full_like(x, 2.0)):
        assert torch.count_nonzero(y.tangents) == 0
    assert tangents_of(torch.zeros_like(x, dtype=torch.int64)) is None
    check(lambda x: torch.ones_like(x) * 3 + x.new_full((33,), 2.0) + x.new_tensor([1.0]), draw(7, 33))
