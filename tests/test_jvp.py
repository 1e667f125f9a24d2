from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from against_func import draw
from helpers import assert_close64
from torch import nn

from frog_cuda.dual import DualTensor
from frog_cuda.functional import jvp

K = 5


def loop(fn, primals, tangents):
    rows = []
    for i in range(tangents[0].shape[0]):
        torch.manual_seed(7)
        rows.append(torch.func.jvp(fn, primals, tuple(t[i] for t in tangents)))
    return rows[0][0], torch.stack([r[1] for r in rows])


def network(x, w1, b1, w2):
    return F.cross_entropy(F.linear(torch.tanh(F.linear(x, w1, b1)), w2), torch.arange(x.shape[0]) % 4, reduction="none")


@pytest.mark.parametrize("chunk_size", [None, 1, 2, np.int64(3), 5, 9])
@pytest.mark.parametrize("batch", [7, 0])
def test_network_against_torch_func(chunk_size, batch):
    primals = (draw(batch, 33), draw(8, 33, seed=1), draw(8, seed=2), draw(4, 8, seed=3))
    tangents = tuple(draw(K, *p.shape, seed=10 + i) for i, p in enumerate(primals))
    out, d = jvp(network, primals, tangents, chunk_size=chunk_size)
    value, want = loop(network, primals, tangents)
    assert_close64(out, value)
    assert_close64(d, want)


def test_chunks_share_random_numbers():
    def fn(x):
        return F.dropout(x, 0.5).sin() + torch.rand_like(x)

    x, t = draw(7, 33), draw(K, 7, 33, seed=1)
    torch.manual_seed(7)
    out, d = jvp(fn, (x,), (t,), chunk_size=2)
    after = torch.rand(1)
    torch.manual_seed(7)
    whole, d_whole = jvp(fn, (x,), (t,))
    assert torch.equal(torch.rand(1), after)
    assert_close64(out, whole)
    assert_close64(d, d_whole)
    assert_close64(d, loop(fn, (x,), (t,))[1])


def test_pytrees_and_missing_tangents():
    def fn(p, scale, n):
        return {"y": p["w"] @ p["b"][0] * scale, "rest": [p["b"][1] ** n, p["w"]]}

    p = {"w": draw(3, 4), "b": (draw(4, seed=1), draw(2, seed=2))}
    v = {"w": None, "b": (draw(K, 4, seed=3), None)}
    out, d = jvp(fn, (p, torch.tensor(2.0).double(), 3), (v, None, None))
    assert_close64(d["y"], 2 * v["b"][0] @ p["w"].t())
    assert torch.equal(d["rest"][0], torch.zeros(K, 2).double()) and torch.equal(d["rest"][1], torch.zeros(K, 3, 4).double())
    assert_close64(out["rest"][0], p["b"][1] ** 3)
    again = jvp(fn, (p, torch.tensor(2.0).double(), 3), ({"b": (v["b"][0], None)}, None, None), chunk_size=2)[1]
    assert_close64(again["y"], d["y"])


def test_outputs_that_do_not_depend_on_the_input_get_zeros():
    out, d = jvp(lambda x: (torch.ones(2), x.argmax(), x > 0), (draw(3),), (draw(K, 3),))
    assert [t.dtype for t in d] == [o.dtype for o in out] == [torch.float32, torch.int64, torch.bool]
    assert [tuple(t.shape) for t in d] == [(K, 2), (K,), (K, 3)] and not any(t.any() for t in d)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_functions_that_write_into_their_arguments(chunk_size):
    def fn(x):
        x.mul_(3)
        x[0] = x[1] * 2
        return x.sum(0)

    x, t = draw(4, 3), draw(K, 4, 3, seed=1)
    x_before, t_before = x.clone(), t.clone()
    out, d = jvp(fn, (x,), (t,), chunk_size=chunk_size)
    value, want = loop(lambda x: fn(x * 1), (x_before,), (t_before,))
    assert_close64(out, value)
    assert_close64(d, want)
    assert torch.equal(t, t_before)
    assert_close64(x, torch.cat([x_before[1:2] * 6, x_before[1:] * 3]))  # once, as plain code would


def test_nothing_is_recorded():
    w = nn.Parameter(draw(3, 3))
    out, d = jvp(lambda x: F.linear(x, w) @ w, (w,), (draw(K, 3, 3),))
    assert not out.requires_grad and not d.requires_grad and w.grad is None


def test_jacobian_by_unit_tangents():
    x = draw(4)
    _, d = jvp(lambda x: torch.outer(x, x).exp().sum(1), (x,), (torch.eye(4, dtype=torch.float64),))
    assert_close64(d.t(), torch.func.jacrev(lambda x: torch.outer(x, x).exp().sum(1))(x))


def test_control_flow_that_vmap_refuses():
    def fn(x):
        return x * 2 if x.sum() > 0 else x**2

    for sign in (1.0, -1.0):
        x, t = draw(4).abs() * sign, draw(K, 4, seed=1)
        assert_close64(jvp(fn, (x,), (t,))[1], loop(fn, (x,), (t,))[1])
        with pytest.raises(RuntimeError, match="data-dependent control flow"):
            torch.func.vmap(lambda t, x=x: torch.func.jvp(fn, (x + t,), (t,))[1])(t)


X = draw(3, 4)
V = draw(K, 3, 4)
BAD = [
    (lambda: jvp(torch.sin, X, (V,)), TypeError, "types Tensor and tuple"),
    (lambda: jvp(torch.sin, (X,), (V, V)), TypeError, "a tuple of length 2, expected a tuple of length 1"),
    (lambda: jvp(lambda p: p["a"], ({"a": X},), ({"b": V},)), TypeError, "structure"),
    (lambda: jvp(torch.sin, (X,), (3.0,)), TypeError, r"tangent of primals\[0\] is of type float"),
    (lambda: jvp(torch.sin, (X,), (V[0],)), ValueError, r"tangent 0 has shape \(3, 4\)"),
    (lambda: jvp(torch.sin, (X,), (draw(0, 3, 4),)), ValueError, "k = 0"),
    (lambda: jvp(torch.add, (X, X), (V, V[:2])), ValueError, "tangent 1 has k = 2, another has k = 5"),
    (lambda: jvp(torch.sin, (X,), (V.float(),)), ValueError, "torch.float32.*torch.float64"),
    (lambda: jvp(torch.abs, (torch.arange(3),), (torch.zeros(2, 3),)), TypeError, "primal 0 .torch.int64. has a tangent"),
    (lambda: jvp(torch.sin, (X,), (None,)), ValueError, "no primal has a tangent"),
    (lambda: jvp(torch.sin, (X,), (V,), chunk_size=0), ValueError, "chunk_size is 0"),
    (lambda: jvp(torch.sin, (X,), (V,), chunk_size=1.5), ValueError, "chunk_size is 1.5"),
    (lambda: jvp(lambda x: 3.0, (X,), (V,)), TypeError, "returned a float"),
    (lambda: jvp(torch.sin, (X,), (DualTensor(V, V[None]),)), TypeError, "tangent 0 is a DualTensor"),
    (lambda: jvp(lambda x: jvp(torch.sin, (x,), (V,))[1], (X,), (V,)), TypeError, "primal 0 is a DualTensor.* not nest"),
    (lambda: jvp(lambda x: jvp(torch.mul, (X, x), (V, None))[1], (X,), (V,)), TypeError, "primal 1 is a DualTensor"),
    (lambda: jvp(lambda x: jvp(lambda p: p[0], ([x],), ([V],))[1], (X,), (V,)), TypeError, "primal 0 is a DualTensor"),
]


@pytest.mark.parametrize("index", range(len(BAD)))
def test_bad_input(index):
    call, error, message = BAD[index]
    with pytest.raises(error, match=message):
        call()


def test_pytorchs_own_transforms_are_refused():
    with pytest.raises(RuntimeError, match="torch.func transform"):
        torch.func.grad(lambda x: jvp(torch.sin, (x,), (V,))[1].sum())(X)
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(X, X)
        with pytest.raises(RuntimeError, match="forward_ad dual tensor"):
            jvp(torch.sin, (x,), (V,))


def test_memory_that_pytorch_did_not_allocate():
    """Arrays of numpy, as primal and as tangent; what fn writes into them changes no tangent of the caller."""
    x, v = torch.from_numpy(np.full(4, 3.0)), torch.from_numpy(np.eye(4)[:3])

    def fn(x):
        return x.mul_(2).square().sum()

    for chunk_size in (None, 2):
        primal, before = torch.from_numpy(x.numpy().copy()), v.clone()
        value, derivatives = jvp(fn, (primal,), (v,), chunk_size=chunk_size)
        assert value == 144 and torch.equal(derivatives, torch.full((3,), 24.0, dtype=torch.float64))
        assert torch.equal(v, before)
