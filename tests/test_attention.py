"""The operator attention_jvp."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_good_as_torch, assert_close32, assert_close64

from frog_cuda import ops, reference

# (B, H, Hkv, L, S, D, Dv, k)
SHAPES = [
    (2, 4, 2, 7, 33, 5, 9, 3),
    (1, 1, 1, 1, 1, 1, 1, 1),
    (1, 2, 2, 130, 65, 64, 64, 4),
    (2, 3, 1, 33, 129, 16, 70, 2),
    (1, 1, 1, 50, 50, 130, 20, 17),
    (1, 1, 1, 1, 1025, 33, 7, 1),
    (1, 2, 2, 1025, 3, 8, 8, 2),
    (0, 2, 2, 5, 5, 4, 4, 2),
    (2, 2, 1, 0, 5, 4, 4, 2),
    (1, 2, 2, 5, 0, 4, 4, 2),
    (1, 2, 2, 5, 4, 4, 0, 2),
]
PERTURBED = [c for c in itertools.product((True, False), repeat=3) if any(c)]


def inputs(shape, perturbed=(True, True, True), dtype=torch.float64, seed=0):
    b, h, hk, rows, keys, depth, width, k = shape
    g = torch.Generator().manual_seed(seed)
    primals = [
        torch.randn(s, generator=g, dtype=torch.float64).to(dtype)
        for s in ((b, h, rows, depth), (b, hk, keys, depth), (b, hk, keys, width))
    ]
    arguments = []
    for p, moves in zip(primals, perturbed, strict=True):
        t = torch.randn((k, *p.shape), generator=g, dtype=torch.float64).to(dtype) if moves else None
        arguments += [p, t]
    return arguments


def masks(shape, dtype=torch.float64):
    b, h, _, rows, keys, *_ = shape
    g = torch.Generator().manual_seed(5)
    some = torch.rand((b, 1, rows, keys), generator=g) > 0.3
    if some.numel():
        some[:, :, 0] = False  # this query attends to nothing
    return {
        "none": None,
        "boolean": some,
        "additive": torch.randn((h, rows, keys), generator=g, dtype=torch.float64).to(dtype),
        "keys": torch.randn((keys,), generator=g, dtype=torch.float64).to(dtype),
        "rows": torch.rand((b, h, rows, 1), generator=g) > 0.5,
        "nothing": torch.zeros((rows, keys), dtype=torch.bool),
        "infinite": torch.where(torch.rand((rows, keys), generator=g) > 0.5, 0.0, -torch.inf).to(dtype),
    }


def compare(arguments, dtype=torch.float64, **options):
    actual = ops.attention_jvp(*arguments, **options)
    expected = reference.attention_jvp(*arguments, **options)
    check = assert_close64 if dtype == torch.float64 else assert_close32
    for a, e in zip(actual, expected, strict=True):
        assert a.transpose(-3, -2).is_contiguous() and a.isfinite().all()  # heads can be joined without a copy
        check(a, e)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("perturbed", PERTURBED, ids=lambda p: "".join(n for n, m in zip("qkv", p, strict=True) if m))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_against_the_reference(shape, perturbed, dtype):
    compare(inputs(shape, perturbed, dtype), dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", list(masks(SHAPES[0])))
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_masks(shape, name, is_causal):
    for dtype in (torch.float64, torch.float32):
        compare(inputs(shape, dtype=dtype), dtype, mask=masks(shape, dtype)[name], is_causal=is_causal, scale=0.3)


def test_nothing_to_attend_to_gives_zeros():
    arguments = inputs(SHAPES[0])
    out, dout = ops.attention_jvp(*arguments, mask=masks(SHAPES[0])["nothing"])
    assert torch.count_nonzero(out) == 0 and torch.count_nonzero(dout) == 0
    out, dout = ops.attention_jvp(*arguments, mask=masks(SHAPES[0])["boolean"])
    assert torch.count_nonzero(out[:, :, 0]) == 0 and torch.count_nonzero(dout[:, :, :, 0]) == 0


def test_scores_of_any_size():
    """Large scores overflow exp() without the running maximum; the largest one comes in the last block of keys."""
    for sign in (1, -1):
        q, dq, k, dk, v, dv = inputs((1, 1, 1, 9, 200, 8, 8, 2), dtype=torch.float32)
        k[:, :, -1] *= 50
        actual = ops.attention_jvp(sign * 40 * q, dq, k, dk, v, dv)
        expected = reference.attention_jvp(sign * 40 * q, dq, k, dk, v, dv)
        largest = (40 * q.double() @ k.double().mT / 8**0.5).abs().max().item()  # a score's rounding is the error of log p
        for a, e in zip(actual, expected, strict=True):
            assert_close32(a, e, torch.finfo(torch.float32).eps * largest)


def test_nan_and_infinity_spread_as_in_pytorch():
    arguments = inputs((1, 1, 1, 4, 70, 4, 4, 2))
    arguments[2][0, 0, 66, 1] = torch.nan
    out, dout = ops.attention_jvp(*arguments)
    assert out.isnan().all() and dout.isnan().all()
    arguments = inputs((1, 1, 1, 4, 70, 4, 4, 2))
    arguments[0][0, 0, 2, 1] = torch.nan
    out, dout = ops.attention_jvp(*arguments)
    assert out[0, 0, 2].isnan().all() and dout[:, 0, 0, 2].isnan().all()
    assert out[0, 0, [0, 1, 3]].isfinite().all() and dout[:, 0, 0, [0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_good_as_pytorchs(dtype):
    arguments = inputs((2, 4, 4, 33, 65, 16, 16, 3), dtype=dtype)
    out, dout = ops.attention_jvp(*arguments)
    exact = reference.attention_jvp(*arguments)
    q, dq, k, dk, v, dv = arguments
    assert_as_good_as_torch(out, F.scaled_dot_product_attention(q, k, v), exact[0])

    def steps(q, k, v):
        return torch.softmax(q @ k.mT * 0.25, -1) @ v

    own = torch.stack([torch.func.jvp(steps, (q, k, v), (dq[i], dk[i], dv[i]))[1] for i in range(3)])
    assert_as_good_as_torch(dout, own, exact[1])


@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
@pytest.mark.parametrize("perturbed", PERTURBED, ids=lambda p: "".join(n for n, m in zip("qkv", p, strict=True) if m))
def test_tangents_of_another_dtype(shape, perturbed):
    """Rows of wider tensors, as those of q, k and v that one layer computes together."""
    arguments = inputs(shape, perturbed, torch.float32)
    for i in (1, 3, 5):
        if arguments[i] is not None:
            wide = F.pad(arguments[i].bfloat16(), (3, 5), value=1.0)
            arguments[i] = wide[..., 3 : 3 + arguments[i].shape[-1]]
    out, dout = ops.attention_jvp(*arguments)
    exact = reference.attention_jvp(*arguments)
    assert out.dtype == torch.float32 and dout.dtype == torch.bfloat16
    assert_close32(out, exact[0])
    assert_close32(dout.float(), exact[1], torch.finfo(torch.bfloat16).eps)  # one rounding of the result


def test_non_contiguous():
    q, dq, k, dk, v, dv = inputs((2, 4, 4, 7, 33, 8, 8, 3))

    def strided(t):
        return t.transpose(-2, -3).contiguous().transpose(-2, -3)

    mask = masks((2, 4, 4, 7, 33, 8, 8, 3))["boolean"].mT.contiguous().mT
    expected = ops.attention_jvp(q, dq, k, dk, v, dv, mask=mask.contiguous())
    actual = ops.attention_jvp(*map(strided, (q, dq, k, dk, v)), dv[..., ::1], mask=mask)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_the_same_bits_for_any_number_of_threads():
    arguments = inputs((2, 3, 3, 200, 150, 16, 16, 3), dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.attention_jvp(*arguments, is_causal=True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_against_torch_func():
    q, dq, k, dk, v, dv = inputs((2, 4, 4, 7, 33, 5, 9, 3))

    def math(q, k, v):
        return torch.ops.aten._scaled_dot_product_attention_math(q, k, v)[0]

    out, dout = ops.attention_jvp(q, dq, k, dk, v, dv)
    for i in range(3):
        value, moved = torch.func.jvp(math, (q, k, v), (dq[i], dk[i], dv[i]))
        assert_close64(out, value)
        assert_close64(dout[i], moved)


def test_memory_grows_with_the_length_not_its_square():
    """Peak memory of one call at T and 4 T, each in a fresh process; the scores alone would grow 16 times."""
    code = """
import resource, sys, torch
from frog_cuda import ops
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
t = int(sys.argv[1])
torch.set_num_threads(1)
make = lambda n: [torch.randn(*s) for s in ((1, 2, n, 32), (2, 1, 2, n, 32)) * 3]
small, large = make(64), make(t)
ops.attention_jvp(*small)
before = peak()
ops.attention_jvp(*large)
print(peak() - before)
"""
    lengths = (1024, 4096)
    extra = [
        int(subprocess.run([sys.executable, "-c", code, str(t)], capture_output=True, text=True, check=True).stdout)
        for t in lengths
    ]
    scores = 2 * lengths[1] ** 2 * 4 * 3  # value and two tangents
    assert extra[1] < scores / 10
    assert extra[1] <= 4 * extra[0] + 2**22


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(query=torch.zeros(2, 3, 4)), r"query has shape \(2, 3, 4\), expected \(batch, heads, length, depth\)"),
        (dict(query=torch.zeros(2, 4, 7, 5, dtype=torch.int64)), "query has dtype Long"),
        (dict(key=torch.zeros(2, 2, 33, 5)), "key has dtype Float, expected Double"),
        (dict(key=torch.zeros(2, 3, 33, 5).double()), "number of heads that divides"),
        (dict(key=torch.zeros(2, 2, 33, 6).double()), r"key has shape \(2, 2, 33, 6\)"),
        (dict(value=torch.zeros(2, 2, 32, 9).double()), r"value has shape \(2, 2, 32, 9\), expected \(2, 2, 33, 9\)"),
        (dict(dquery=torch.zeros(3, 2, 4, 7, 6).double()), "dquery has shape"),
        (dict(dquery=torch.zeros(2, 2, 4, 7, 5).double()), "dkey has k = 3, but another tangent has k = 2"),
        (dict(dquery=torch.zeros(0, 2, 4, 7, 5).double(), dkey=None, dvalue=None), "k is 0"),
        (dict(dquery=None, dkey=None, dvalue=None), "nothing is perturbed"),
        (dict(mask=torch.zeros(3, 7, 33)), r"mask has shape \(3, 7, 33\), expected to broadcast to \(2, 4, 7, 33\)"),
        (dict(mask=torch.zeros(7, 33, dtype=torch.int64)), "mask has dtype Long"),
        (dict(scale=float("nan")), "scale is nan"),
    ],
    ids=range(13),
)
def test_bad_input(change, match):
    names = ("query", "dquery", "key", "dkey", "value", "dvalue")
    arguments = dict(zip(names, inputs(SHAPES[0]), strict=True)) | change
    positional = [arguments.pop(n) for n in names]
    with pytest.raises(RuntimeError, match=match):
        ops.attention_jvp(*positional, **arguments)
