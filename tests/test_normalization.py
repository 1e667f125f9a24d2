"""The operator normalization_jvp."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_good_as_torch, assert_close32, assert_close64

from frog_cuda import ops, reference

# name -> (x shape, weight shape, options)
LAYOUTS = {
    "layer": ((7, 33), (33,), dict(groups=7)),
    "layer, long rows": ((3, 10001), (10001,), dict(groups=3)),
    "layer, two axes": ((2, 3, 5, 7), (5, 7), dict(groups=6)),
    "layer, one element": ((5, 1), (1,), dict(groups=5)),
    "rms": ((7, 33), (33,), dict(groups=7, centred=False)),
    "group": ((2, 6, 5, 3), (6,), dict(groups=4, weight_groups=2)),
    "instance": ((2, 3, 1025), (3,), dict(groups=6, weight_groups=3)),
    "batch": ((33, 4), (4,), dict(outer=33, groups=4, weight_groups=4)),
    "batch 2d": ((7, 5, 3, 4), (5,), dict(outer=7, groups=5, weight_groups=5)),
    "batch 3d": ((2, 1, 3, 4, 5), (1,), dict(outer=2, groups=1, weight_groups=1)),
    "batch, many channels": ((5, 150), (150,), dict(outer=5, groups=150, weight_groups=150)),
    "batch 2d, many channels": ((3, 37, 2, 3), (37,), dict(outer=3, groups=37, weight_groups=37)),
    "batch, long rows": ((3, 4, 70), (4,), dict(outer=3, groups=4, weight_groups=4)),
    "empty": ((0, 4), (4,), dict(groups=0)),
    "empty rows": ((4, 0), (0,), dict(groups=4)),
}
# which of dx, weight, dweight, bias, dbias are given
GIVEN = [
    g
    for g in itertools.product((True, False), repeat=5)
    if (g[0] or g[2] or g[4]) and (g[1] or not g[2]) and (g[3] or not g[4])
]


def inputs(layout, k=3, dtype=torch.float64, given=(True,) * 5, offset=0.5):
    x_shape, w_shape, options = LAYOUTS[layout]
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    tensors = [draw(k, *x_shape), draw(*w_shape), draw(k, *w_shape), draw(*w_shape), draw(k, *w_shape)]
    return [draw(*x_shape) + offset, *(t if use else None for t, use in zip(tensors, given, strict=True))], options


def compare(arguments, options, check=assert_close64):
    actual = ops.normalization_jvp(*arguments, **options)
    for a, e in zip(actual, reference.normalization_jvp(*arguments, **options), strict=True):
        assert a.is_contiguous()
        check(a, e)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("k", [1, 4, 6])
def test_against_the_reference(layout, k):
    compare(*inputs(layout, k))
    compare(*inputs(layout, k, torch.float32), assert_close32)


@pytest.mark.parametrize("given", GIVEN, ids=lambda g: "".join("xwWbB"[i] if use else "-" for i, use in enumerate(g)))
@pytest.mark.parametrize("layout", ["layer", "rms", "group", "batch 2d"])
def test_every_mix_of_arguments(layout, given):
    for k in (3, 6):
        compare(*inputs(layout, k, given=given))


@pytest.mark.parametrize("layout", ["batch", "batch 2d"])
@pytest.mark.parametrize("k", [3, 6])
def test_given_statistics(layout, k):
    arguments, options = inputs(layout, k)
    channels = options["groups"]
    mean, var = torch.randn(channels, dtype=torch.float64), torch.rand(channels, dtype=torch.float64) + 0.1
    compare(arguments, options | dict(mean=mean, var=var))
    compare([arguments[0], None, *arguments[2:]], options | dict(mean=mean, var=var))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_good_as_pytorchs(dtype):
    (x, dx, w, _, b, _), options = inputs("layer", dtype=dtype)
    y, dy, mean, _ = ops.normalization_jvp(x, dx, w, None, b, **options)
    exact = reference.normalization_jvp(x, dx, w, None, b, **options)
    assert mean.dtype == torch.float32
    assert_as_good_as_torch(y, F.layer_norm(x, (33,), w, b), exact[0])
    own = torch.stack([torch.func.jvp(lambda x: F.layer_norm(x, (33,), w, b), (x,), (t,))[1] for t in dx])
    assert_as_good_as_torch(dy, own, exact[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("incoming", [True, False], ids=["x", "weights alone"])
@pytest.mark.parametrize("k", [3, 6])
def test_tangents_of_another_dtype(layout, incoming, k):
    (x, dx, w, dw, b, db), options = inputs(layout, k, dtype=torch.float32)
    low = [x, dx.bfloat16() if incoming else None, w, dw.bfloat16(), b, db.bfloat16()]
    y, dy, *_ = ops.normalization_jvp(*low, **options)
    exact = reference.normalization_jvp(*low, **options)
    assert y.dtype == torch.float32 and dy.dtype == torch.bfloat16
    assert_close32(y, exact[0])
    assert_close32(dy.float(), exact[1], torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_some_tangents_are_part_of_all(layout, low):
    """Four are taken together, the others one by one."""
    (x, dx, w, dw, b, db), options = inputs(layout, 6, torch.float32)
    dx = dx.bfloat16() if low else dx
    whole = ops.normalization_jvp(x, dx, w, dw, b, db, **options)[1]
    for begin, end in ((0, 3), (2, 6), (5, 6)):
        part = ops.normalization_jvp(x, dx[begin:end], w, dw[begin:end], b, db[begin:end], **options)[1]
        assert torch.equal(part, whole[begin:end])


def test_a_large_mean_does_not_cancel():
    """Variance from squared deviations, not from the difference of two large numbers."""
    arguments, options = inputs("layer", dtype=torch.float32, offset=1000.0)
    y, dy, *_ = ops.normalization_jvp(*arguments, **options)
    exact = reference.normalization_jvp(*arguments, **options)
    own = F.layer_norm(arguments[0], (33,), arguments[2], arguments[4])
    assert_as_good_as_torch(y, own, exact[0])


def test_non_contiguous():
    (x, dx, *rest), options = inputs("layer")
    a = ops.normalization_jvp(x, dx, *rest, **options)
    b = ops.normalization_jvp(x.T.contiguous().T, dx.mT.contiguous().mT, *rest, **options)
    assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def test_many_tangents_of_short_pieces():
    """So many that fewer groups than usual are laid out anew together."""
    x, dx = torch.randn(200, 9, 3, dtype=torch.float64), torch.randn(40, 200, 9, 3, dtype=torch.float64)
    compare([x, dx], dict(outer=200, groups=9))


@pytest.mark.parametrize("inner", [1, 4, 200])
def test_the_same_bits_for_any_number_of_threads(inner):
    g = torch.Generator().manual_seed(0)
    x, dx = torch.randn(64, 400, inner, generator=g), torch.randn(3, 64, 400, inner, generator=g)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.normalization_jvp(x, dx, outer=64, groups=400))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


X, DX = torch.zeros(6, 4), torch.zeros(2, 6, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        ((X.long(), None), dict(groups=6, dbias=DX), "x has dtype Long"),
        ((X, None), dict(groups=6), "nothing is perturbed"),
        ((X, DX[:, :5]), dict(groups=6), r"dx has shape \(2, 5, 4\), expected \(2, 6, 4\)"),
        ((X, DX[:0]), dict(groups=6), "k is 0"),
        ((X, DX), dict(outer=6148914691236517206, groups=3), "their product must stay below 2.63"),
        ((X, DX), dict(outer=2**32, groups=2**32), "their product must stay below 2.63"),
        ((X, DX), dict(groups=5), "outer x groups = 1 x 5 does not divide"),
        ((X, DX), dict(groups=-6), "must not be negative"),
        ((X, DX), dict(groups=6, weight_groups=4), "weight_groups is 4; expected a divisor of groups = 6"),
        ((X, DX, torch.zeros(3)), dict(groups=6), "weight has 3 elements, expected weight_groups = 1 times a divisor"),
        ((X, DX, torch.zeros(4), torch.zeros(3, 4)), dict(groups=6), r"dweight has shape \(3, 4\), expected \(2, 4\)"),
        ((X, DX, torch.zeros(4), None, torch.zeros(2)), dict(groups=6), r"bias has shape \(2,\), expected \(4,\)"),
        ((X, DX, None, torch.zeros(2, 4)), dict(groups=6), "dweight is given, but weight is None"),
        ((X, DX, None, None, None, torch.zeros(2, 4)), dict(groups=6), "dbias is given, but bias is None"),
        ((X, DX), dict(groups=6, mean=torch.zeros(6)), "together"),
        ((X, DX), dict(groups=6, mean=torch.zeros(5), var=torch.ones(5)), r"mean has shape \(5,\), expected \(6,\)"),
        ((X, DX), dict(groups=6, eps=-1.0), "eps is -1"),
    ],
    ids=range(17),
)
def test_bad_input(arguments, options, match):
    with pytest.raises(RuntimeError, match=match):
        ops.normalization_jvp(*arguments, **options)
