"""The CUDA kernels of attention_jvp, run on the host, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from cuda_on_cpu.client import Kernels, Out, Skewed
from helpers import assert_as_good_as_torch, assert_close32, assert_close64, relative_error

from frog_cuda import ops, reference

MASK_TYPES = [None, torch.bool, torch.float64, torch.float32, torch.bfloat16, torch.float16]
QKV, QK, Q, K, V = (True, True, True), (True, True, False), (True, False, False), (False, True, False), (False, False, True)


@pytest.fixture(scope="module")
def kernels():
    kernels = Kernels("attention")
    yield kernels
    kernels.close()


def inputs(shape, perturbed=QKV, dtype=torch.float32, tangent_dtype=None):
    """q, dq, k, dk, v, dv of the shape (B, H, Hkv, L, S, D, Dv, k)."""
    b, h, hkv, rows, keys, depth, width, k = shape
    g = torch.Generator().manual_seed(sum(shape))
    arguments = []
    for size, moves in zip(((b, h, rows, depth), (b, hkv, keys, depth), (b, hkv, keys, width)), perturbed, strict=True):
        arguments.append(torch.randn(size, generator=g, dtype=torch.float64).to(dtype))
        tangents = torch.randn((k, *size), generator=g, dtype=torch.float64).to(tangent_dtype or dtype)
        arguments.append(tangents if moves else None)
    return arguments


def run(kernels, arguments, mask=None, is_causal=False, scale=None, seed=0, interleaved=False, skew=False):
    q, _, key, _, v, _ = arguments
    b, h, rows, depth = q.shape
    hkv, keys, width = key.shape[1], key.shape[2], v.shape[3]
    moved = next(t for t in arguments[1::2] if t is not None)
    k, dtype, tangent_dtype = moved.shape[0], str(q.dtype)[6:], str(moved.dtype)[6:]
    strides = torch.zeros(4, dtype=torch.int64)
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
        for j in range(4):
            strides[j] = mask.stride(j) if mask.shape[j] > 1 else 0
    if interleaved:
        arguments = [t if t is None else t.transpose(-2, -3).contiguous() for t in arguments]
    if skew:
        arguments = [t if t is None else Skewed(t) for t in arguments]
    before = q.dtype.itemsize if skew else 0
    return kernels.run(
        f"attention_{dtype}" if tangent_dtype == dtype else f"attention_{dtype}_{tangent_dtype}",
        *arguments,
        mask,
        strides,
        Out((b, h, rows, width), q.dtype, before),
        Out((k, b, h, rows, width), moved.dtype, before),
        MASK_TYPES.index(None if mask is None else mask.dtype),
        b, h, hkv, rows, keys, depth, width, k, is_causal, interleaved,
        depth**-0.5 if scale is None else scale,
        seed=seed,
    )  # fmt: skip


def as_good_as_torch(actual, arguments, **options):
    """Low precision: PyTorch's own attention, and its own arithmetic at that precision for the tangents."""
    exact = reference.attention_jvp(*arguments, **options)
    q, dq, k, dk, v, dv = arguments
    mask, is_causal = options.get("mask"), options.get("is_causal", False)
    groups = q.shape[1] // k.shape[1]

    def steps(q, k, v):
        scores = q @ k.repeat_interleave(groups, 1).mT * options.get("scale", q.shape[-1] ** -0.5)
        if is_causal:
            scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return torch.softmax(scores, -1) @ v.repeat_interleave(groups, 1)

    zero = [
        torch.zeros((dq.shape[0], *t.shape), dtype=t.dtype) if d is None else d
        for t, d in zip((q, k, v), (dq, dk, dv), strict=True)
    ]
    own = [torch.func.jvp(steps, (q, k, v), tuple(z[i] for z in zero)) for i in range(dq.shape[0])]
    assert_as_good_as_torch(actual[0], own[0][0], exact[0])
    assert_as_good_as_torch(actual[1], torch.stack([d for _, d in own]), exact[1])


def compare(kernels, arguments, mask=None, is_causal=False, scale=None, **options):
    actual = run(kernels, arguments, mask, is_causal, scale, **options)
    assert all(a.isfinite().all() for a in actual)
    how = {} if scale is None else dict(scale=scale)
    if actual[0].dtype in (torch.bfloat16, torch.float16):
        return as_good_as_torch(actual, arguments, mask=mask, is_causal=is_causal, **how)
    exact = reference.attention_jvp(*arguments, mask=mask, is_causal=is_causal, **how)
    check = assert_close64 if actual[0].dtype == torch.float64 else assert_close32
    check(actual[0], exact[0])
    if actual[1].dtype == actual[0].dtype:
        check(actual[1], exact[1])
    else:  # one rounding of the result
        assert_close32(actual[1].float(), exact[1], torch.finfo(actual[1].dtype).eps)


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1, 1),
    (1, 2, 1, 7, 33, 8, 8, 3),
    (1, 4, 2, 33, 7, 33, 20, 3),
    (2, 1, 1, 65, 129, 16, 64, 1),
    (1, 1, 1, 129, 65, 64, 33, 2),
    (1, 2, 1, 70, 130, 64, 64, 2),  # depth and width that a kernel of its own is compiled for
    (1, 1, 1, 33, 65, 128, 128, 1),
    (1, 1, 1, 3, 33, 20, 130, 2),
    (1, 1, 1, 17, 33, 136, 8, 1),
    (1, 1, 1, 2, 9, 192, 3, 1),
    (1, 2, 1, 17, 40, 24, 192, 2),
    (1, 1, 1, 5, 9, 8, 8, 16),
    (1, 1, 1, 1, 1025, 8, 4, 1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(kernels, shape, dtype):
    compare(kernels, inputs(shape, dtype=dtype), seed=sum(shape))


@pytest.mark.parametrize("perturbed", [QK, Q, K, V, (True, False, True), (False, True, True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_absent_tangents(kernels, perturbed, dtype):
    arguments = inputs((1, 2, 2, 7, 40, 24, 17, 3), perturbed, dtype)
    actual = run(kernels, arguments)
    zeros = [
        t if t is not None else torch.zeros_like(other)
        for t, other in zip(arguments, inputs((1, 2, 2, 7, 40, 24, 17, 3), dtype=dtype), strict=True)
    ]
    for a, e in zip(actual, run(kernels, zeros), strict=True):
        assert torch.equal(a, e)
    compare(kernels, zeros)


def masks(b, h, rows, keys, dtype):
    g = torch.Generator().manual_seed(5)
    some = torch.rand((b, 1, rows, keys), generator=g) > 0.3
    some[:, :, 0] = False  # this query attends to nothing
    return {
        "none": None,
        "boolean": some,
        "additive": torch.randn((h, rows, keys), generator=g, dtype=torch.float64).to(dtype),
        "double": torch.randn((1, rows, keys), generator=g, dtype=torch.float64),
        "keys": torch.randn((keys,), generator=g, dtype=torch.float64).to(dtype),
        "rows": torch.rand((b, h, rows, 1), generator=g) > 0.5,
        "nothing": torch.zeros((rows, keys), dtype=torch.bool),
        "infinite": torch.where(torch.rand((rows, keys), generator=g) > 0.5, 0.0, -torch.inf).to(dtype),
    }


@pytest.mark.parametrize("name", list(masks(1, 1, 2, 2, torch.float32)))
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks(kernels, name, is_causal, dtype):
    arguments = inputs((2, 2, 1, 70, 67, 5, 6, 1), dtype=dtype)
    mask = masks(2, 2, 70, 67, dtype)[name]
    if dtype not in (torch.bfloat16, torch.float16) or name in ("none", "additive", "keys"):
        return compare(kernels, arguments, mask, is_causal, scale=0.3)
    # PyTorch's softmax gives NaN where a query attends to nothing: compare with the same arithmetic in float32
    actual = run(kernels, arguments, mask, is_causal, scale=0.3)
    exact = reference.attention_jvp(*arguments, mask=mask, is_causal=is_causal, scale=0.3)
    for a, e in zip(actual, exact, strict=True):
        assert a.isfinite().all()
        assert_close32(a.float(), e, 4 * torch.finfo(dtype).eps)  # p, p ds and the result are rounded, and sums of them


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_causal_cross_attention(kernels, dtype):
    compare(kernels, inputs((1, 1, 1, 130, 70, 8, 8, 1), dtype=dtype), is_causal=True)
    compare(kernels, inputs((1, 1, 1, 3, 140, 8, 8, 1), dtype=dtype), is_causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 3, 16])
def test_every_chunk_of_tangents(kernels, dtype, k):
    compare(kernels, inputs((1, 3, 1, 65, 66, 9, 7, k), dtype=dtype), is_causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [8, 72])
def test_strided_and_misaligned_operands_give_the_same(kernels, dtype, width):
    arguments = inputs((2, 2, 2, 9, 37, 24, width, 3), dtype=dtype)
    plain = run(kernels, arguments)
    for options in (dict(interleaved=True), dict(skew=True), dict(interleaved=True, skew=True), dict(seed=1), dict(seed=2)):
        for a, e in zip(run(kernels, arguments, **options), plain, strict=True):
            assert torch.equal(a, e), options


@pytest.mark.parametrize("width", [9, 72])
def test_tangents_of_a_lower_precision(kernels, width):
    compare(kernels, inputs((1, 2, 1, 7, 33, 24, width, 3), tangent_dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty(kernels, dtype):
    for shape in ((0, 2, 2, 5, 5, 4, 4, 2), (2, 2, 1, 0, 5, 4, 4, 2), (1, 2, 2, 5, 4, 4, 0, 2)):
        run(kernels, inputs(shape, dtype=dtype))
    for result in run(kernels, inputs((1, 2, 2, 5, 0, 4, 4, 2), dtype=dtype)):  # no keys
        assert torch.count_nonzero(result) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_of_any_size(kernels, dtype, sign):
    """Large scores overflow exp() without the running maximum; the largest one comes in the last block of keys."""
    q, dq, k, dk, v, dv = inputs((1, 1, 1, 9, 200, 8, 8, 2), dtype=dtype)
    k[:, :, -1] *= 50
    arguments = (sign * 40 * q, dq, k, dk, v, dv)
    exact = reference.attention_jvp(*arguments)
    largest = (40 * q.double() @ k.double().mT / 8**0.5).abs().max().item()  # a score's rounding is the error of log p
    for a, e in zip(run(kernels, arguments), exact, strict=True):
        check = assert_close64 if dtype == torch.float64 else assert_close32
        check(a, e, max(1e-10, torch.finfo(dtype).eps * largest))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_spreads_as_in_pytorch(kernels, dtype):
    arguments = inputs((1, 1, 1, 4, 70, 4, 4, 2), dtype=dtype)
    arguments[2][0, 0, 66, 1] = torch.nan
    out, dout = run(kernels, arguments)
    assert out.isnan().all() and dout.isnan().all()
    arguments = inputs((1, 1, 1, 4, 70, 4, 4, 2), dtype=dtype)
    arguments[0][0, 0, 2, 1] = torch.nan
    out, dout = run(kernels, arguments)
    assert out[0, 0, 2].isnan().all() and dout[:, 0, 0, 2].isnan().all()
    assert out[0, 0, [0, 1, 3]].isfinite().all() and dout[:, 0, 0, [0, 1, 3]].isfinite().all()


def on_gpu(arguments, mask=None, is_causal=False, scale=None):
    moved = [t if t is None else t.cuda() for t in (*arguments, mask)]
    return [t.cpu() for t in ops.attention_jvp(*moved[:-1], mask=moved[-1], is_causal=is_causal, scale=scale)]


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [*SHAPES, (1, 4, 2, 300, 260, 64, 64, 3), (1, 2, 2, 100, 90, 200, 40, 3)], ids=str)
@pytest.mark.parametrize("perturbed", [QKV, Q, (False, True, True)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu(shape, perturbed, dtype):
    b, h, _, rows, keys, *_ = shape
    arguments = inputs(shape, perturbed, dtype=dtype)
    zeros = [z if t is None else t for t, z in zip(arguments, inputs(shape, dtype=dtype), strict=True)]
    zeros = [torch.zeros_like(t) if own is None else t for t, own in zip(zeros, arguments, strict=True)]
    for name, mask in masks(b, h, rows, keys, dtype).items():
        for is_causal in (False, True):
            actual = on_gpu(arguments, mask, is_causal)
            if dtype in (torch.bfloat16, torch.float16) and name in ("none", "additive", "keys"):
                as_good_as_torch(actual, zeros, mask=mask, is_causal=is_causal)
            elif dtype not in (torch.bfloat16, torch.float16):
                check = assert_close64 if dtype == torch.float64 else assert_close32
                for a, e in zip(actual, reference.attention_jvp(*zeros, mask=mask, is_causal=is_causal), strict=True):
                    check(a, e)
            else:  # PyTorch's own is NaN where a query attends to nothing
                for a, e in zip(actual, ops.attention_jvp(*zeros, mask=mask, is_causal=is_causal), strict=True):
                    assert relative_error(a, e) <= 4 * torch.finfo(dtype).eps
            again = on_gpu(arguments, mask, is_causal)
            assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))
