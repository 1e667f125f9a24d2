from __future__ import annotations

import pytest
import torch
from against_func import check, compare, draw, dual, expected

from frog_cuda.dual import DualTensor, add_activity
from frog_cuda.rules.arithmetic import DERIVATIVES

SHAPES = [(1,), (7, 33), (0, 5), ()]
ABOVE_ONE = {"acosh"}
POSITIVE = {"log", "log2", "log10", "log1p", "sqrt", "rsqrt"}
INSIDE = {"acos", "asin", "atanh"}


def operand(name: str, *shape: int) -> torch.Tensor:
    x = draw(*shape)
    if name in ABOVE_ONE:
        return x.abs() + 1.5
    if name in POSITIVE:
        return x.abs() + 0.2
    return x.tanh() * 0.9 if name in INSIDE else x


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", sorted(DERIVATIVES))
def test_functions_of_one_argument(name, shape):
    check(getattr(torch, name), operand(name, *shape))


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div", "maximum", "minimum", "atan2", "hypot"])
@pytest.mark.parametrize(
    "shapes", [((7, 33), (7, 33)), ((33,), (7, 33)), ((7, 1), (1, 33)), ((), (7,)), ((0, 5), (5,))], ids=str
)
def test_functions_of_two_arguments_broadcast(name, shapes):
    op = getattr(torch, name)
    a, b = draw(*shapes[0], seed=1), draw(*shapes[1], seed=2) + 0.1
    for k in (1, 3):
        check(op, a, b, k=k)
    check(lambda x: op(x, b), a)
    check(lambda x: op(a, x), b)


FORMULAS = {
    "reversed": lambda x: 2 - x + 3 / x + 2**x,
    "scalars": lambda x: ((x + 1) * 2 - 3) / 4 + -x,
    "alpha": lambda x: torch.add(x, x, alpha=3) - torch.sub(x, x * x, alpha=2) + torch.rsub(x, 2, alpha=3),
    "powers": lambda x: x**2 + x**3 + x**0 + x**1 + x.square() + x.abs() ** 0.5 + x.abs() ** x,
    "clamp": lambda x: x.clamp(-0.5, 0.5) + x.clamp(min=0.1) + x.clamp_max(0.3) + torch.clamp(x, max=0.2),
    "clamp to tensors": lambda x: torch.clamp(x, -x.abs(), 0.5 * x.abs()),
    "where": lambda x: torch.where(x > 0, x, x * x) + torch.where(x > 1, 2.0, x),
    "ties": lambda x: torch.maximum(x, x.clone()) * torch.minimum(x.relu(), torch.zeros_like(x)),
    "steps": lambda x: x * x.sign() + x.floor() * x.round() + torch.div(x, 0.3, rounding_mode="floor") * x,
    "chain": lambda x: (x.sin() * x.exp().log1p()).tanh() / (1 + x * x).sqrt(),
    "remainder": lambda x: torch.remainder(x, 0.7) + torch.fmod(x, 0.7),
    "lerp": lambda x: torch.lerp(x, x * x, 0.3) + torch.addcmul(x, x, x, value=2) + torch.addcdiv(x, x, 1 + x * x),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formulas(name, shape):
    check(FORMULAS[name], draw(*shape))


def test_non_contiguous_operands():
    check(lambda x, y: (x * y.t()).exp() + x, draw(33, 7).t(), draw(33, 14)[:, ::2])


def test_sums_however_they_are_called():
    x, y = dual(draw(4)), dual(draw(4, seed=1))
    exact = x.primal + y.primal, x.tangents + y.tangents
    for out in (
        x + y,
        torch.add(x, y),
        torch.add(x, other=y),
        torch.add(input=x, other=y),
        x.add(y),
        x.add(other=y),
        torch.add(x, y, alpha=1),
        torch.add(x, y, out=None),
    ):
        assert torch.equal(out.primal, exact[0]) and torch.equal(out.tangents, exact[1])
    assert torch.equal(torch.add(x, other=y.primal).tangents, x.tangents)
    assert torch.equal(torch.add(x, y, alpha=3).tangents, x.tangents + 3 * y.tangents)


def test_addcmul_of_what_broadcasts_and_of_plain_tensors():
    row, column, plain = draw(1, 5), draw(4, 1, seed=1), draw(4, 5, seed=2)
    check(lambda x, y: torch.addcmul(x, y, plain, value=-2), row, column)
    check(lambda x, y: torch.addcmul(plain, x, y, value=0.5), row, column)
    check(lambda x, y: torch.addcmul(x, plain, plain) + y, row, column)
    check(lambda x: torch.addcmul(plain, plain, x), row)
    x = DualTensor(torch.randn(5, 3), torch.randn(2, 5, 3).bfloat16())
    assert torch.addcmul(x, x, x).tangents.dtype == torch.bfloat16


def test_promotion_keeps_pytorchs_dtypes():
    x = dual(draw(4))
    wide = DualTensor(draw(4).float(), draw(2, 4).float()) * draw(4)
    assert wide.dtype == torch.float64 and wide.tangents.dtype == torch.float64
    assert (x * torch.arange(4)).dtype == torch.float64
    assert (DualTensor(torch.ones(4), torch.ones(2, 4)) * DualTensor(draw(), draw(2))).tangents.dtype == torch.float32


def test_tangents_of_lower_precision_stay_so():
    x = DualTensor(torch.randn(5, 3), torch.randn(2, 5, 3).bfloat16())
    for y in (x + 1, x * x, x.exp(), x.t(), x.sum(), x.amax(1), torch.cat([x, x]), x @ torch.randn(3, 2)):
        assert y.dtype == torch.float32 and y.tangents.dtype == torch.bfloat16


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_sums_of_tangents_of_lower_precision_are_rounded_once(low):
    value = draw(5, 3).float()
    dx, dy, v = draw(2, 5, 3).to(low), draw(2, 5, 3, seed=1).to(low), draw(2, 3, seed=2).to(low)
    for alpha in (1, -0.3):
        out = torch.add(add_activity(DualTensor(value, dx), v), DualTensor(value, dy), alpha=alpha)
        assert out.dtype == torch.float32 and out.tangents.dtype == low
        assert torch.equal(out.tangents, ((dx.float() + v.float()[:, None]) + alpha * dy.float()).to(low))


def test_complex_and_lazy_conjugation():
    x = torch.complex(draw(4, 3), draw(4, 3, seed=5))
    dx = torch.complex(draw(2, 4, 3, seed=6), draw(2, 4, 3, seed=7))
    w = torch.complex(draw(3, 3, seed=8), draw(3, 3, seed=9)).conj()  # pending: kernels must not ignore it

    def fn(z):
        return torch.view_as_real((z.conj() * z @ w).exp()) + z.abs().unsqueeze(-1)

    out = fn(DualTensor(x, dx))
    for i in range(2):
        value, tangent = torch.func.jvp(fn, (x,), (dx[i],))
        torch.testing.assert_close(out.primal, value, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(out.tangents[i], tangent, rtol=1e-10, atol=1e-10)


def test_different_numbers_of_tangents_are_named():
    with pytest.raises(ValueError, match=r"aten\.add.*k = 2.*k = 3"):
        dual(draw(4), k=2) + dual(draw(4), k=3)
    with pytest.raises(ValueError, match=r"cat.*k = 1.*k = 3"):
        torch.cat([dual(draw(4), k=1), dual(draw(4), k=3)])
    with pytest.raises(ValueError, match=r"hypot.*k = 1.*k = 3"):
        torch.hypot(dual(draw(4), k=1), dual(draw(4), k=3))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", ["maximum", "minimum", "clamp_min", "clamp_max"])
def test_lists_beside_numbers(name, k):
    each = {"maximum": torch.clamp_min, "minimum": torch.clamp_max}.get(name) or getattr(torch, name)
    listed, in_place = getattr(torch, f"_foreach_{name}"), getattr(torch, f"_foreach_{name}_")
    x, y = draw(4, 3), draw(5, seed=2)
    tangents = [draw(k, *t.shape, seed=3) for t in (x, y)]
    for numbers in (0.3, [0.3, -0.2]):
        several = numbers if isinstance(numbers, list) else [numbers] * 2
        values, moved = expected(lambda x, y, s=several: [each(x, s[0]), each(y, s[1])], [x, y], tangents)
        duals = [DualTensor(t.clone(), v.clone()) for t, v in zip((x, y), tangents, strict=True)]
        for out, value, tangent in zip(listed(duals, numbers), values, moved, strict=True):
            compare(out, value, tangent)
        in_place(duals, numbers)
        for out, value, tangent in zip(duals, values, moved, strict=True):
            compare(out, value, tangent)
