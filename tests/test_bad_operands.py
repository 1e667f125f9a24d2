"""Operands that DualTensor, jvp and single operations cannot take: a named error, or the result where it is well defined."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from against_func import check, compare, draw, dual, expected
from torch import nn

import frog_cuda as frog
from frog_cuda import DualTensor


def other(*shape: int, k: int = 4) -> DualTensor:
    """A DualTensor with another k than ``dual`` gives."""
    return DualTensor(draw(*shape, seed=5), draw(k, *shape, seed=6))


# ---- shapes and numbers of tangents


@pytest.mark.parametrize(
    "primal, tangents, match",
    [
        ((3,), (2, 4), r"tangents have shape \(2, 4\); expected \(k, \*primal.shape\) with k >= 1 and primal.shape \(3,\)"),
        ((3,), (3,), r"tangents have shape \(3,\)"),
        ((3,), (0, 3), r"tangents have shape \(0, 3\)"),
        ((2, 3), (5, 3, 2), r"tangents have shape \(5, 3, 2\)"),
        ((), (), r"tangents have shape \(\)"),
    ],
)
def test_tangents_that_do_not_fit_the_primal(primal, tangents, match):
    with pytest.raises(ValueError, match="DualTensor: " + match):
        DualTensor(torch.zeros(primal), torch.zeros(tangents))


def test_tangents_that_do_not_fit_in_jvp():
    x, y = torch.zeros(3), torch.zeros(3)
    for tangents, error, match in (
        ((torch.zeros(2, 4), torch.zeros(2, 3)), ValueError, r"jvp: tangent 0 has shape \(2, 4\); expected \(k, \*\(3,\)\)"),
        ((torch.zeros(2, 3), torch.zeros(3)), ValueError, r"jvp: tangent 1 has shape \(3,\)"),
        ((torch.zeros(2, 3),), TypeError, "jvp: tangents do not have the structure of primals"),
        (
            (torch.zeros(2, 3), torch.zeros(4, 3)),
            ValueError,
            "tangents disagree in number: tangent 1 has k = 4, another has k = 2",
        ),
    ):
        with pytest.raises(error, match=match):
            frog.jvp(torch.mul, (x, y), tangents)


TWO = {
    "add": lambda: dual(draw(3)) + other(3),
    "mul": lambda: dual(draw(3)) * other(3),
    "cat": lambda: torch.cat([dual(draw(3)), other(3)]),
    "stack": lambda: torch.stack([dual(draw(3)), other(3)]),
    "where": lambda: torch.where(torch.tensor([True, False, True]), dual(draw(3)), other(3)),
    "matmul": lambda: dual(draw(3, 3)) @ other(3, 3),
    "linear": lambda: F.linear(dual(draw(2, 3)), other(4, 3)),
    "linear, bias": lambda: F.linear(dual(draw(2, 3)), draw(4, 3), other(4)),
    "conv": lambda: F.conv1d(dual(draw(1, 2, 5)), other(2, 2, 3)),
    "layer_norm": lambda: F.layer_norm(dual(draw(2, 3)), (3,), other(3)),
    "attention": lambda: F.scaled_dot_product_attention(dual(draw(2, 3, 4)), other(2, 3, 4), dual(draw(2, 3, 4))),
    "mse": lambda: F.mse_loss(dual(draw(3)), other(3)),
    "copy_": lambda: dual(draw(3)).clone().copy_(other(3)),
    "setitem": lambda: dual(draw(3)).clone().__setitem__(0, other(3)[0]),
    "index_put_": lambda: dual(draw(3)).clone().index_put_((torch.tensor([0]),), other(1)),
    "addcmul": lambda: torch.addcmul(dual(draw(3)), dual(draw(3)), other(3)),
    "pow": lambda: dual(draw(3)).abs() ** other(3),
    "lerp": lambda: torch.lerp(dual(draw(3)), other(3), 0.5),
}


@pytest.mark.parametrize("name", TWO)
def test_another_number_of_tangents(name):
    with torch.no_grad(), pytest.raises(ValueError, match="tangents disagree in number: .*k = 3.*k = 4|.*k = 4.*k = 3"):
        TWO[name]()


# ---- dtypes


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_dtypes_without_tangents(dtype):
    x = torch.ones(3, dtype=dtype)
    with pytest.raises(TypeError, match=f"primal has dtype {dtype}; only floating point and complex"):
        DualTensor(x, torch.ones(2, 3))
    with pytest.raises(TypeError, match=f"tangents has dtype {dtype}; only floating point and complex"):
        DualTensor(torch.ones(3), torch.ones(2, 3, dtype=dtype))
    with pytest.raises(TypeError, match=re.escape(f"jvp: primal 0 ({dtype}) has a tangent")):
        frog.jvp(torch.abs, (x,), (torch.ones(2, 3),))


def test_eight_bit_floats():
    x = torch.ones(3).to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match="primal has dtype torch.float8_e4m3fn; .* at least 16 bits"):
        DualTensor(x, torch.ones(2, 3))
    with pytest.raises(TypeError, match="tangents has dtype torch.float8_e4m3fn"):
        DualTensor(torch.ones(3), x.expand(2, 3))


def test_real_and_complex_do_not_mix():
    with pytest.raises(TypeError, match="tangents have dtype torch.complex64, but the primal has torch.float32"):
        DualTensor(torch.ones(3), torch.ones(2, 3, dtype=torch.complex64))


# ---- attention


def attend(**options):
    q, k, v = (dual(draw(2, 2, 5, 4, seed=i)) for i in range(3))
    return F.scaled_dot_product_attention(**dict(query=q, key=k, value=v) | options)


@pytest.mark.parametrize(
    "options, error, match",
    [
        (dict(attn_mask=draw(3, 5)), ValueError, r"attn_mask has shape \(3, 5\); expected .* broadcasts to \(2, 2, 5, 5\)"),
        (dict(attn_mask=draw(5, 6)), ValueError, r"attn_mask has shape \(5, 6\)"),
        (dict(attn_mask=draw(3, 1, 5, 5)), ValueError, r"attn_mask has shape \(3, 1, 5, 5\)"),
        (dict(attn_mask=draw(1, 1, 1, 5, 5)), ValueError, r"attn_mask has shape \(1, 1, 1, 5, 5\)"),
        (dict(attn_mask=torch.ones(5, 3, dtype=torch.bool)), ValueError, r"attn_mask has shape \(5, 3\)"),
        (
            dict(attn_mask=torch.ones(5, 5, dtype=torch.int64)),
            TypeError,
            "attn_mask has dtype torch.int64; accepted are torch.bool",
        ),
        (dict(dropout_p=-0.1), ValueError, "dropout_p is -0.1; expected a probability, 0 to 1"),
        (dict(dropout_p=1.5), ValueError, "dropout_p is 1.5"),
        (dict(key=draw(2, 2, 6, 4)), ValueError, r"shapes \(2, 2, 5, 4\), \(2, 2, 6, 4\) and \(2, 2, 5, 4\); expected"),
        (dict(key=draw(2, 2, 5, 3)), ValueError, r"shapes \(2, 2, 5, 4\), \(2, 2, 5, 3\)"),
    ],
)
def test_attention(options, error, match):
    with pytest.raises(error, match="scaled_dot_product_attention: .*" + match):
        attend(**options)

    class Attends(nn.Module):
        def forward(self, x):
            return attend(**options)

    with torch.no_grad(), pytest.raises(error, match=r"scaled_dot_product_attention \(called from a Attends\): "):
        Attends()(None)


def test_attention_dropout_draws_one_mask_for_the_value_and_all_tangents():
    q, k, v = (draw(2, 2, 5, 4, seed=i) for i in range(3))
    torch.manual_seed(3)
    out = F.scaled_dot_product_attention(dual(q), k, v, dropout_p=0.5)
    torch.manual_seed(3)
    keep = torch.ops.aten._scaled_dot_product_attention_math.default(q, k, v, None, 0.5)[1] != 0
    torch.manual_seed(3)
    plain = torch.ops.aten._scaled_dot_product_attention_math.default(q, k, v, None, 0.5)[0]

    def fixed(q):
        return ((q @ k.mT / 2).softmax(-1) * keep * 2) @ v

    (value,), (moved,) = expected(fixed, [q], [dual(q).tangents])
    assert not bool(keep.all())
    compare(out, value, moved)
    torch.testing.assert_close(plain, value)


# ---- sparse and quantized


SPARSE = draw(3, 3, seed=9).relu()


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_products_with_a_sparse_matrix(layout):
    sparse = SPARSE.to_sparse(layout=layout)
    for call in (
        lambda m, x: m @ x,
        lambda m, x: m @ x[0],
        lambda m, x: x @ m,
        lambda m, x: F.linear(x, m),
        lambda m, x: torch.addmm(x, m, x),
    ):
        x = draw(3, 3)
        (value,), (moved,) = expected(lambda x, call=call: call(SPARSE, x), [x], [dual(x).tangents])
        with torch.no_grad():
            compare(call(sparse, dual(x)), value, moved)


def test_sums_and_products_of_torch_sparse():
    sparse, x = SPARSE.to_sparse(), draw(3, 4)
    (value,), (moved,) = expected(lambda x: SPARSE @ x, [x], [dual(x).tangents])
    with torch.no_grad():
        compare(torch.sparse.mm(sparse, dual(x)), value, moved)
    x = draw(3, 3)
    (value,), (moved,) = expected(lambda x: x + SPARSE, [x], [dual(x).tangents])
    compare(dual(x) + sparse, value, moved)


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda x: x * SPARSE.to_sparse(), r"aten\.mul\.Tensor.*layout torch.sparse_coo.*to_dense"),
        (lambda x: x.to_sparse(), r"aten\._to_sparse\.default"),
        (lambda x: x.to_sparse_csr(), r"aten\._to_sparse_csr\.default"),
        (lambda x: x + quantized(), r"aten\.add\.Tensor.*quantized tensor \(torch.qint8\).*dequantize"),
        (lambda x: F.linear(x, quantized()), r"aten\.\w+\.default.*quantized tensor"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), r"aten\.quantize_per_tensor\.default.*is quantized"),
        (
            lambda x: torch.quantize_per_channel(x, torch.ones(3), torch.zeros(3), 0, torch.qint8),
            r"aten\.quantize_per_channel\.default.*is quantized",
        ),
        (lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127), r"aten\.fake_quantize_per_tensor_affine"),
    ],
)
def test_sparse_and_quantized_operands_are_named(call, match):
    x = draw(3, 3).float()

    class Net(nn.Module):
        def forward(self, x):
            return call(x)

    with torch.no_grad():
        with pytest.raises(NotImplementedError, match=match):
            call(DualTensor(x, torch.ones(2, 3, 3)))
        with pytest.raises(NotImplementedError, match=match.split(".*")[0] + r".*\(called from a Net\)"):
            Net()(DualTensor(x, torch.ones(2, 3, 3)))


def quantized() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(3, 3), 0.1, 0, torch.qint8)


def test_sparse_and_quantized_primals_and_tangents():
    sparse, dense = torch.eye(3).to_sparse(), torch.ones(2, 3, 3)
    with pytest.raises(TypeError, match="primal has layout torch.sparse_coo; only torch.strided"):
        DualTensor(sparse, dense)
    with pytest.raises(TypeError, match="tangents has layout torch.sparse_coo"):
        DualTensor(torch.eye(3), dense.to_sparse())
    with pytest.raises(TypeError, match="primal has dtype torch.qint8"):
        DualTensor(quantized(), dense)


# ---- results whose shape depends on values


def test_selections_carry_tangents():
    x = draw(3, 4)
    mask = x > 0
    check(lambda x: x[mask], x)
    check(lambda x: torch.masked_select(x, mask), x)
    check(lambda x: x[mask.nonzero(as_tuple=True)], x)
    check(lambda x: x.masked_scatter(mask, x.flatten() * 2), x)
    check(lambda x: torch.repeat_interleave(x, torch.tensor([2, 0, 1]), 0), x)
    assert dual(x)[dual(x) > 0].primal.equal(x[mask])


def test_positions_are_plain():
    x = draw(3, 4)
    for call in (torch.nonzero, torch.argwhere, lambda x: torch.where(x > 0)[1], lambda x: x.count_nonzero()):
        got = call(dual(x))
        assert type(got) is torch.Tensor and torch.equal(got, call(x))


@pytest.mark.parametrize(
    "call, op",
    [
        (torch.unique, "_unique2"),
        (lambda x: torch.unique(x, dim=0), "unique_dim"),
        (torch.unique_consecutive, "unique_consecutive"),
        (lambda x: torch.bincount(torch.tensor([0, 1, 1]), weights=x[:, 0]), "bincount"),
        (lambda x: torch.histogram(x, 4), "histogram"),
    ],
)
def test_what_pytorch_cannot_differentiate_is_named(call, op):
    with pytest.raises(NotImplementedError, match=rf"aten\.{op}\.\w+: no rule for DualTensor"):
        call(dual(draw(3, 3)))
    net = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Tanh(), nn.Module())).double()
    net[1][1].forward = call  # type: ignore[method-assign]
    with pytest.raises(NotImplementedError, match=rf"aten\.{op}\.\w+ \(called from 1\.1, a Module of Sequential\)"):
        frog.jvp(net, (draw(3, 3),), (draw(2, 3, 3),))
