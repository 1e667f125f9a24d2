from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from against_func import check, draw, dual
from helpers import assert_close64

from frog_cuda.dual import DualTensor


def of_copy(change):
    """The in-place operation on a fresh tensor, returning that tensor."""

    def fn(x, *others):
        y = x * 1
        change(y, *others)
        return y

    return fn


CHANGES = {
    "add_": lambda y: y.add_(2).add_(y, alpha=3),
    "operators": lambda y: y.__iadd__(1).__imul__(3).__isub__(y * y).__itruediv__(7),
    "pow_": lambda y: y.pow_(3),
    "exp_": lambda y: y.exp_(),
    "clamp_": lambda y: y.clamp_(-0.5, 0.5),
    "addcmul_": lambda y: y.addcmul_(y * 2, y * 3),
    "masked_fill_": lambda y: y.masked_fill_(y > 0, 1.5),
    "zero_": lambda y: y[:2].zero_(),
    "fill_": lambda y: (y[0].fill_(3.0), y[1].fill_(y[2, 0])),
    "fill_diagonal_": lambda y: (y.fill_diagonal_(2.5), y.t()[1:3, 1:3].fill_diagonal_(0)),
    "copy_": lambda y: (y[0].copy_(y[1]), y[2:4].copy_(y[5]), y[6].copy_(torch.ones(33))),
    "copy_ of numbers": lambda y: (y[0].copy_(2), y[1].copy_(0.5)),
    "setitem": lambda y: (y.__setitem__(0, 5.0), y.__setitem__((slice(1, 3), 2), y[3, 4] * y[3, 5])),
    "setitem with indices": lambda y: y.__setitem__(torch.tensor([0, 2]), y[4:6] * 2),
    "setitem with a mask": lambda y: y.__setitem__(y > 0, 0.5),
    "index_add_": lambda y: y.index_add_(0, torch.tensor([0, 0]), y[:2] * 2),
    "scatter_": lambda y: y.scatter_(0, torch.zeros(1, 33, dtype=torch.int64), y[1:2] * 2),
    "index_put_ accumulating": lambda y: y.index_put_((torch.tensor([1, 1]),), y[:2] * 2, accumulate=True),
    "detach_": lambda y: y.detach_(),
    "round_": lambda y: y.round_(),
    "view of a view": lambda y: y.t()[1:].reshape(-1)[:0].sum() + y.t()[2:4].mul_(2).sum(),
    "view()": lambda y: y.view(-1)[3:9].sin_(),
    "unbind": lambda y: [row.mul_(i) for i, row in enumerate(y)],
    "split and chunk": lambda y: (y.split(3)[1].mul_(2), y.chunk(2, 1)[0].add_(y[0, 0] * 1)),
    "diagonal": lambda y: y.diagonal().mul_(4),
    "squeeze and unsqueeze": lambda y: (y[:1].squeeze(0).mul_(2), y.unsqueeze(0)[0, 1].mul_(3)),
    "permute": lambda y: y[None].permute(2, 0, 1)[4].mul_(2),
    "unfold": lambda y: y.unfold(1, 3, 3)[0, 0].mul_(2),
    "relu_ through a view": lambda y: F.relu(y[:, ::2], inplace=True),
    "dropout off": lambda y: F.dropout(y, 0.5, training=False, inplace=True).mul_(2),
    "foreach": lambda y: torch._foreach_mul_([y[0], y[1]], 3.0),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("k", [1, 3])
def test_changes(name, k):
    check(of_copy(CHANGES[name]), draw(7, 33), k=k)


@pytest.mark.parametrize("name", [n for n in CHANGES if n != "view()"])
def test_changes_of_non_contiguous_tensors(name):
    check(lambda x: of_copy(CHANGES[name])(x.t().clone(memory_format=torch.preserve_format)), draw(33, 7))


def test_a_wrapped_diagonal_has_no_tangents():
    for wrap in (True, False):
        check(of_copy(lambda y, wrap=wrap: y.fill_diagonal_(2.5, wrap)), draw(33, 7))


def test_base_changes_show_in_views():
    def fn(x):
        y = x * 1
        view = y[1:3]
        y.mul_(x)
        return view + 1

    check(fn, draw(7, 5))


def test_squaring_in_place_is_right_where_pytorchs_forward_mode_is_not():
    """y.mul_(y): PyTorch scales the tangent by y first and then uses the scaled one for the other factor."""
    x, t = draw(4), draw(1, 4, seed=2)
    right = torch.func.jvp(lambda x: (x * 1).mul_(x * 1), (x,), (t[0],))[1]
    assert_close64(right, 2 * x * t[0])

    def square(x):
        y = x * 1
        return y.mul_(y)

    assert not torch.allclose(torch.func.jvp(square, (x,), (t[0],))[1], 2 * x * t[0])
    assert_close64(square(DualTensor(x, t)).tangents, 2 * x * t)


def test_operands_are_not_shared_with_results():
    def fn(x):
        y, z, w = x + 1, x - torch.ones_like(x), 1 + x
        for t in (y, z, w, x.clone(), x.to(torch.float64, copy=True), x.reshape(-1).clone()):
            t.mul_(3)
        zeros = torch.zeros_like(x)
        zeros.copy_(x)
        zeros.mul_(5)
        return x * 2, y, zeros

    check(fn, draw(7, 5))


ALONE = {
    "a + z": lambda a, z: a + z,
    "z + a": lambda a, z: z + a,
    "a - z": lambda a, z: a - z,
    "rsub": lambda a, z: torch.rsub(z, a),
    "alpha": lambda a, z: torch.add(z, a, alpha=1.0),
    "addcmul": lambda a, z: torch.addcmul(a, z, z),
}


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("shape", [(3,), (1, 3), (1, 1, 3)], ids=str)
def test_operands_are_not_shared_with_results_of_more_axes(name, shape):
    def fn(a):
        out = ALONE[name](a, torch.zeros(shape, dtype=a.dtype))
        out.mul_(2)
        return a * 1, out

    check(fn, draw(3))


@pytest.mark.parametrize("op", [torch.frac, torch.squeeze_copy, lambda a: torch.expand_copy(a, (1, 3))])
def test_what_pytorchs_forward_mode_shares_is_copied(op):
    """torch.func.jvp writes into the tangent of ``a``, too."""
    a = dual(draw(3))
    before = a.tangents.clone()
    out = op(a)
    out.mul_(2)
    assert torch.equal(a.tangents, before) and torch.equal(out.tangents, 2 * before.view(3, *out.shape))


def test_in_place_with_another_dual():
    def fn(x, y):
        z = x * 1
        z.add_(y).mul_(y[0]).sub_(x)
        z[0] = y[1]
        return z

    check(fn, draw(7, 5), draw(7, 5, seed=3))


def test_buffers_made_from_a_dual_can_be_filled():
    def fn(x):
        out = x.new_zeros(3, 7)
        other = torch.empty_like(x)
        other.fill_(1.0)
        for i in range(3):
            out[i] = x[:, i] * (i + 1)
        other[:, 0] += x[:, 1]
        return out, other, torch.zeros_like(x), torch.full_like(x, 2.0) * x

    check(fn, draw(7, 5))


COPIES = {
    "clone": lambda zeros: zeros.clone(),
    "repeat": lambda zeros: zeros.repeat(1, 1),
    "to": lambda zeros: zeros.to(torch.float32).to(torch.float64),
    "cat": lambda zeros: torch.cat([zeros[:3], torch.zeros(4, 5, dtype=torch.float64)]),
    "stack": lambda zeros: torch.stack([zeros, zeros])[1],
    "pad": lambda zeros: F.pad(zeros[:3], (0, 0, 0, 4)),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_of_such_buffers_can_be_filled(name):
    check(lambda x: COPIES[name](torch.zeros_like(x)).index_add_(0, torch.tensor([1, 2, 1]), x[:3]), draw(7, 5))
    check(lambda x: COPIES[name](torch.zeros_like(x)) + 1, draw(7, 5))
    assert type(torch.zeros_like(dual(draw(3))).to(torch.int64)) is torch.Tensor


def test_shape_changes_in_place():
    def fn(x):
        y = x * 1
        y.t_()
        y.unsqueeze_(0).squeeze_(0).transpose_(0, 1)
        y.unsqueeze_(1).squeeze_().swapaxes_(0, 1)
        assert y.shape == (5, 7)
        return y * y

    check(fn, draw(7, 5))


def test_a_plain_tensor_cannot_take_tangents():
    x = dual(draw(3))
    plain = torch.zeros(3, dtype=torch.float64)
    for change in (
        lambda: plain.add_(x),
        lambda: plain.copy_(x),
        lambda: plain.__setitem__(0, x[0]),
        lambda: plain.__setitem__(torch.tensor([0]), x[:1]),
        lambda: torch._foreach_add_([plain], [x]),
    ):
        with pytest.raises(RuntimeError, match=r"aten\..*in-place operation on a plain tensor with a DualTensor argument"):
            change()
    assert torch.equal(plain, torch.zeros_like(plain))
    with pytest.raises(NotImplementedError, match=r"aten\.add\.out: out= is not supported"):
        torch.add(x, x, out=plain)


def test_pytorchs_own_limits_hold():
    x = dual(draw(3))
    with pytest.raises(RuntimeError, match="does not fit"):
        x.add_(draw(2, 3))
    before = x.primal.clone()
    with pytest.raises(RuntimeError, match="does not fit"):
        x.mul_(torch.ones(3, dtype=torch.complex128))
    assert torch.equal(x.primal, before)
    with pytest.raises(NotImplementedError, match="resize_"):
        x.resize_(2)


def test_expanded_tangents_can_be_written():
    x = DualTensor(draw(4), torch.ones(1, 4, dtype=torch.float64).expand(3, 4))
    x[0] = 0
    assert torch.equal(x.tangents, torch.tensor([0.0, 1, 1, 1], dtype=torch.float64).expand(3, 4))
