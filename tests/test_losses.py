"""cross_entropy_jvp, mse_jvp and bce_jvp against the float64 reference and torch.func.jvp."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_good_as_torch, assert_close32, assert_close64
from torch import Tensor

from frog_cuda import ops, reference

LOW = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, torch.float64, *LOW]
INF = float("inf")
SHAPES = [(1,), (7,), (33,), (1025,), (7, 33), (3, 5, 1025), (0, 5), ()]


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def uniform(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)


def classes(rows: int, count: int, ignored: int | None = None) -> Tensor:
    target = torch.randint(count, (rows,), generator=torch.Generator().manual_seed(rows + count))
    if ignored is not None:
        target[::3] = ignored
    return target


def torch_own(fn: Callable[..., Tensor], primals: list[Tensor], tangents: list[Tensor]) -> tuple[Tensor, Tensor]:
    k = tangents[0].shape[0]
    pairs = [torch.func.jvp(fn, tuple(primals), tuple(t[i] for t in tangents)) for i in range(k)]
    return pairs[0][0], torch.stack([p[1] for p in pairs])


def same_bits(call: Callable[[], tuple[Tensor, Tensor]]) -> bool:
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(call())
    finally:
        torch.set_num_threads(threads)
    return all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))


def check_close(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    for a, b in zip(got, wanted, strict=True):
        if dtype == torch.float64:
            assert_close64(a, b)
        else:
            assert_close32(a, b)


# ---- cross entropy

OPTIONS = [{}, {"weight": True}, {"label_smoothing": 0.1}, {"weight": True, "label_smoothing": 1.0, "ignore_index": 1}]


def options_for(options: dict[str, Any], count: int, dtype: torch.dtype) -> dict[str, Any]:
    return options | ({"weight": uniform(count, dtype=dtype) + 0.5} if "weight" in options else {})


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ", ".join(o) or "plain")
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("rows, count", [(1, 1), (1, 7), (7, 33), (33, 10), (5, 1025), (1025, 7), (0, 5)])
def test_cross_entropy(rows, count, k, options):
    x, dx = 3 * randn(rows, count, seed=1), randn(k, rows, count, seed=2)
    if count == 1:  # the only class has probability 1 and no derivative
        loss, dloss = ops.cross_entropy_jvp(x, dx, torch.zeros(rows, dtype=torch.int64))
        assert loss.tolist() == [0.0] * rows and dloss.abs().max() == 0
        return
    target = classes(rows, count, options.get("ignore_index", -100))
    if rows > 0:
        target[0] = 0  # at least one is counted
    how = options_for(options, count, x.dtype)
    got = ops.cross_entropy_jvp(x, dx, target, **how)
    check_close(got, reference.cross_entropy_jvp(x, dx, target, **how), x.dtype)
    check_close(got, torch_own(lambda v: F.cross_entropy(v, target, reduction="none", **how), [x], [dx]), x.dtype)
    how = options_for(options, count, torch.float32)
    got = ops.cross_entropy_jvp(x.float(), dx.float(), target, **how)
    check_close(got, reference.cross_entropy_jvp(x.float(), dx.float(), target, **how), torch.float32)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ", ".join(o) or "plain")
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("rows, count", [(1, 7), (7, 33), (1025, 7), (0, 5)])
def test_cross_entropy_reduced(rows, count, k, options, reduction):
    x, dx, target = 3 * randn(rows, count, seed=1), randn(k, rows, count, seed=2), classes(rows, count)
    if rows > 2:
        target[::3] = options.get("ignore_index", -100)
    for dtype in (torch.float64, torch.float32):
        how = options_for(options, count, dtype) | dict(reduction=reduction)
        got = ops.cross_entropy_jvp(x.to(dtype), dx.to(dtype), target, **how)
        assert got[0].shape == () and got[1].shape == (k,)
        if rows == 0 and reduction == "mean":  # as PyTorch says it
            assert all(t.isnan().all() for t in (*got, F.cross_entropy(x.to(dtype), target, **how)))
            continue
        exact = reference.cross_entropy_jvp(x.to(dtype), dx.to(dtype), target, **how)
        # sums cancel: relative to their largest terms
        each = ops.cross_entropy_jvp(x.to(dtype), dx.to(dtype), target, **how | dict(reduction="none"))[1]
        shift = 2 * each.abs().sum() / (rows if reduction == "mean" else 1)
        check_close((got[0], got[1] + shift), (exact[0], exact[1] + shift.double()), dtype)
        if dtype == torch.float64:
            assert_close64(got[0], F.cross_entropy(x, target, **how))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ", ".join(o) or "plain")
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_cross_entropy_in_low_precision(dtype, options, reduction):
    x, dx, target = 3 * randn(7, 33, dtype=dtype, seed=1), randn(3, 7, 33, dtype=dtype, seed=2), classes(7, 33)
    how = options_for(options, 33, dtype) | dict(reduction=reduction)
    got, exact = ops.cross_entropy_jvp(x, dx, target, **how), reference.cross_entropy_jvp(x, dx, target, **how)
    own = torch_own(lambda v: F.cross_entropy(v, target, **how), [x], [dx])
    for a, b, c in zip(got, own, exact, strict=True):
        assert_as_good_as_torch(a, b, c)


def test_the_mean_of_more_losses_than_low_precision_can_count():
    x, dx = torch.zeros(3 << 16, 2, dtype=torch.float16), torch.ones(1, 3 << 16, 2, dtype=torch.float16)
    dx[..., 1] = 0
    loss, dloss = ops.cross_entropy_jvp(x, dx, torch.zeros(3 << 16, dtype=torch.int64), reduction="mean")
    assert abs(loss.item() - math.log(2)) < 1e-3 and dloss.tolist() == [-0.5]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_samples_are_exactly_zero(dtype):
    x, dx = randn(3, 5, dtype=dtype), randn(2, 3, 5, dtype=dtype)
    x[1] = float("nan")
    loss, dloss = ops.cross_entropy_jvp(x, dx, torch.tensor([2, -100, 4]))
    assert loss[1] == 0 and (dloss[:, 1] == 0).all()
    assert (loss[[0, 2]] > 0).all() and (dloss[:, [0, 2]] != 0).all()
    loss, dloss = ops.cross_entropy_jvp(x, dx, torch.tensor([7, 7, 7]), ignore_index=7)
    assert (loss == 0).all() and (dloss == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_cross_entropy_of_extreme_logits(dtype):
    x = torch.tensor([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0], [0.0, -INF, 2.0], [-INF, -INF, 1.0]], dtype=dtype)
    dx, target = randn(2, 4, 3, dtype=dtype), torch.tensor([0, 1, 0, 2])
    got = ops.cross_entropy_jvp(x, dx, target)
    assert torch.isfinite(got[0]).all() and torch.isfinite(got[1]).all()
    check_close(got, reference.cross_entropy_jvp(x, dx, target), dtype)
    impossible = torch.tensor([[0.0, -INF]], dtype=dtype)
    assert ops.cross_entropy_jvp(impossible, dx[:, :1, :2], torch.tensor([1]))[0].item() == INF


# ---- mean squared error


@pytest.mark.parametrize("given", ["dinput", "dtarget", "both"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mse(shape, k, given):
    a, b = randn(*shape, seed=1), randn(*shape, seed=2)
    da = randn(k, *shape, seed=3) if given != "dtarget" else None
    db = randn(k, *shape, seed=4) if given != "dinput" else None
    got = ops.mse_jvp(a, da, b, db)
    check_close(got, reference.mse_jvp(a, da, b, db), a.dtype)
    zero = torch.zeros(k, *shape, dtype=a.dtype)
    moved = [zero if da is None else da, zero if db is None else db]
    check_close(got, torch_own(lambda v, w: F.mse_loss(v, w, reduction="none"), [a, b], moved), a.dtype)
    low = [None if t is None else t.float() for t in (a, da, b, db)]
    check_close(ops.mse_jvp(*low), reference.mse_jvp(*low), torch.float32)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_mse_in_low_precision(dtype):
    a, b = randn(7, 33, dtype=dtype, seed=1), randn(7, 33, dtype=dtype, seed=2)
    da, db = randn(3, 7, 33, dtype=dtype, seed=3), randn(3, 7, 33, dtype=dtype, seed=4)
    own = torch_own(lambda v, w: F.mse_loss(v, w, reduction="none"), [a, b], [da, db])
    for got, theirs, exact in zip(ops.mse_jvp(a, da, b, db), own, reference.mse_jvp(a, da, b, db), strict=True):
        assert_as_good_as_torch(got, theirs, exact)


# ---- binary cross entropy


def bce_arguments(shape: tuple[int, ...], with_logits: bool, weighted: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict]:
    x = 3 * randn(*shape, dtype=dtype, seed=1) if with_logits else uniform(*shape, dtype=dtype, seed=1)
    how: dict[str, Any] = {}
    if weighted:
        how["weight"] = uniform(*shape[-1:], dtype=dtype, seed=5)
        if with_logits:
            how["pos_weight"] = 3 * uniform(*shape, dtype=dtype, seed=6)
    return x, uniform(*shape, dtype=dtype, seed=3), how


def bce_of_torch(with_logits: bool, target: Tensor, how: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    fn: Callable[..., Tensor] = F.binary_cross_entropy_with_logits if with_logits else F.binary_cross_entropy
    return lambda v: fn(v, target, reduction="none", **how)


bce_forms = pytest.mark.parametrize("with_logits", [True, False], ids=["logits", "probabilities"])


@bce_forms
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bce(shape, k, weighted, with_logits):
    x, target, how = bce_arguments(shape, with_logits, weighted, torch.float64)
    dx = randn(k, *shape, seed=2)
    got = ops.bce_jvp(x, dx, target, with_logits=with_logits, **how)
    check_close(got, reference.bce_jvp(x, dx, target, with_logits=with_logits, **how), x.dtype)
    check_close(got, torch_own(bce_of_torch(with_logits, target, how), [x], [dx]), x.dtype)
    x, target, how = bce_arguments(shape, with_logits, weighted, torch.float32)
    got = ops.bce_jvp(x, dx.float(), target, with_logits=with_logits, **how)
    check_close(got, reference.bce_jvp(x, dx.float(), target, with_logits=with_logits, **how), torch.float32)


@bce_forms
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_bce_in_low_precision(dtype, with_logits):
    x, target, how = bce_arguments((7, 33), with_logits, True, dtype)
    dx = randn(3, 7, 33, dtype=dtype, seed=2)
    exact = reference.bce_jvp(x, dx, target, with_logits=with_logits, **how)
    own = torch_own(bce_of_torch(with_logits, target, how), [x], [dx])
    for a, b, c in zip(ops.bce_jvp(x, dx, target, with_logits=with_logits, **how), own, exact, strict=True):
        assert_as_good_as_torch(a, b, c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bce_clamps_as_pytorch(dtype):
    x = torch.tensor([0.0, 1.0, 1e-30, 1e-13, 0.5, 1 - 1e-7] * 3, dtype=dtype)
    target = torch.tensor([0.0, 0.5, 1.0], dtype=dtype).repeat_interleave(6)
    dx = randn(2, 18, dtype=dtype)
    loss, dloss = ops.bce_jvp(x, dx, target, with_logits=False)
    value, tangents = torch_own(bce_of_torch(False, target, {}), [x], [dx])
    tight = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(loss, value, **tight)
    torch.testing.assert_close(dloss, tangents, **tight)
    assert loss[6:8].tolist() == [50.0, 50.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bce_of_extreme_logits(dtype):
    x = torch.tensor([-1e30, -1e4, -100.0, 100.0, 1e4, 1e30] * 2, dtype=dtype)
    target = torch.tensor([0.0, 1.0], dtype=dtype).repeat_interleave(6)
    dx = torch.ones(1, 12, dtype=dtype)
    loss, dloss = ops.bce_jvp(x, dx, target)
    value, slope = torch_own(bce_of_torch(True, target, {}), [x], [dx])
    torch.testing.assert_close(loss, value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dloss, slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (4, 1), (1, 5), (4, 5)], ids=str)
def test_bce_weights_broadcast(shape):
    x, dx, target = randn(3, 4, 5), randn(2, 3, 4, 5), uniform(3, 4, 5)
    weights = {"weight": uniform(*shape, seed=8), "pos_weight": uniform(*shape, seed=9)}
    check_close(ops.bce_jvp(x, dx, target, **weights), reference.bce_jvp(x, dx, target, **weights), x.dtype)


# ---- all of them


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("tangent_dtype", DTYPES, ids=str)
def test_tangents_of_another_dtype(dtype, tangent_dtype):
    x, dx, y = randn(7, 33, dtype=dtype), randn(3, 7, 33, dtype=tangent_dtype), uniform(7, 33, dtype=dtype)
    t = classes(7, 33)
    for got, exact in (
        (ops.cross_entropy_jvp(x, dx, t), reference.cross_entropy_jvp(x, dx, t)),
        (ops.mse_jvp(x, dx, y), reference.mse_jvp(x, dx, y)),
        (ops.mse_jvp(x, None, y, dx), reference.mse_jvp(x, None, y, dx)),
        (ops.bce_jvp(x, dx, y), reference.bce_jvp(x, dx, y)),
        (ops.bce_jvp(y, dx, y, with_logits=False), reference.bce_jvp(y, dx, y, with_logits=False)),
    ):
        assert got[0].dtype == dtype and got[1].dtype == tangent_dtype
        for a, e in zip(got, exact, strict=True):
            if a.dtype in LOW:
                assert_as_good_as_torch(a, e.to(a.dtype), e)
            elif a.dtype == torch.float32:
                assert_close32(a, e)
            else:
                assert_close64(a, e)


def test_mse_takes_the_dtype_of_dinput():
    a, b = randn(5), randn(5)
    _, dloss = ops.mse_jvp(a, randn(2, 5, dtype=torch.float32), b, randn(2, 5, dtype=torch.bfloat16))
    assert dloss.dtype == torch.float32


def test_non_contiguous():
    x, dx, y = randn(33, 14)[:, ::2].t(), randn(33, 3, 7).permute(1, 2, 0), uniform(33, 7).t()
    t = classes(14, 33)[::2]
    w = uniform(66)[::2]
    for tangents in (dx, randn(1, 7, 33).expand(3, 7, 33)):
        for got, exact in (
            (ops.cross_entropy_jvp(x, tangents, t, weight=w), reference.cross_entropy_jvp(x, tangents, t, weight=w)),
            (ops.mse_jvp(x, tangents, y, tangents * 2), reference.mse_jvp(x, tangents, y, tangents * 2)),
            (ops.bce_jvp(x, tangents, y, weight=w), reference.bce_jvp(x, tangents, y, weight=w)),
        ):
            check_close(got, exact, x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_with_any_number_of_threads(dtype):
    x, dx, y = randn(257, 129, dtype=dtype), randn(4, 257, 129, dtype=dtype), uniform(257, 129, dtype=dtype)
    t = classes(257, 129)
    for reduction in ("none", "mean"):
        assert same_bits(lambda r=reduction: ops.cross_entropy_jvp(x, dx, t, label_smoothing=0.1, reduction=r))
    assert same_bits(lambda: ops.mse_jvp(x, dx, y, dx))
    assert same_bits(lambda: ops.bce_jvp(x, dx, y))
    assert same_bits(lambda: ops.bce_jvp(y, dx, y, with_logits=False))


# ---- bad input

X, DX, Y, T = randn(4, 5), randn(3, 4, 5), uniform(4, 5), torch.tensor([0, 1, 2, 3])
LONG = torch.ones(4, 5, dtype=torch.int64)
META = torch.ones(3, 4, 5, device="meta")

BAD_CROSS_ENTROPY = [
    (
        dict(target=torch.tensor([0, 5, 1, 2])),
        r"target\[1\] is 5; accepted are class indices from 0 to 4 and ignore_index -100",
    ),
    (dict(target=torch.tensor([0, 1, -1, 2])), r"target\[2\] is -1; accepted are class indices from 0 to 4"),
    (dict(target=T.int()), "target has dtype Int, expected Long"),
    (dict(target=T[:3]), r"target has shape \(3,\), expected \(4,\)"),
    (dict(logits=LONG), "logits has dtype Long; accepted are float32"),
    (dict(logits=X[0], dlogits=DX[:, 0]), r"logits has shape \(5,\), expected \(B, C\)"),
    (dict(dlogits=DX.long()), "dlogits has dtype Long; accepted are float32"),
    (dict(dlogits=X), r"dlogits has shape \(4, 5\), expected \(4, 4, 5\)"),
    (dict(dlogits=DX[:0]), "k is 0; at least 1 tangent is needed"),
    (dict(weight=torch.ones(5)), "weight has dtype Float, expected Double"),
    (dict(weight=randn(4)), r"weight has shape \(4,\), expected \(5,\)"),
    (dict(label_smoothing=1.5), r"label_smoothing is 1.5; it must lie in \[0, 1\]"),
    (dict(label_smoothing=float("nan")), r"label_smoothing is -?nan; it must lie in \[0, 1\]"),
    (dict(dlogits=META), "arguments are on cpu and meta; all must be on one device"),
]
BAD_MSE = [
    (dict(dinput=None), "dinput and dtarget are both None; at least one must be given"),
    (dict(input=LONG), "input has dtype Long; accepted are float32"),
    (dict(target=Y.float()), "target has dtype Float, expected Double"),
    (dict(target=Y[0]), r"target has shape \(5,\), expected \(4, 5\)"),
    (dict(dinput=X), r"dinput has shape \(4, 5\), expected \(4, 4, 5\)"),
    (dict(dtarget=DX[:2]), r"dtarget has shape \(2, 4, 5\), expected \(3, 4, 5\)"),
    (dict(dtarget=DX.long()), "dtarget has dtype Long; accepted are float32"),
    (dict(dinput=DX[:0]), "k is 0; at least 1 tangent is needed"),
    (dict(dinput=META), "arguments are on cpu and meta; all must be on one device"),
]
BAD_BCE = [
    (dict(input=LONG), "input has dtype Long; accepted are float32"),
    (dict(target=Y.float()), "target has dtype Float, expected Double"),
    (dict(target=Y[0]), r"target has shape \(5,\), expected \(4, 5\)"),
    (dict(dinput=X), r"dinput has shape \(4, 5\), expected \(4, 4, 5\)"),
    (dict(dinput=DX[:0]), "k is 0; at least 1 tangent is needed"),
    (dict(weight=randn(4)), r"weight has shape \(4,\), expected one that broadcasts to \(4, 5\)"),
    (dict(weight=randn(2, 4, 5)), r"weight has shape \(2, 4, 5\), expected one that broadcasts to \(4, 5\)"),
    (dict(weight=torch.ones(5)), "weight has dtype Float, expected Double"),
    (dict(pos_weight=randn(4)), r"pos_weight has shape \(4,\), expected one that broadcasts to \(4, 5\)"),
    (dict(with_logits=False, pos_weight=randn(5)), "pos_weight is given; "),
    (dict(with_logits=False, input=Y + 1), r"input holds 1\.\d+; without logits all elements must lie in \[0, 1\]"),
    (dict(with_logits=False, input=Y * float("nan")), r"input holds -?nan; without logits all elements must lie in \[0, 1\]"),
    (dict(dinput=META), "arguments are on cpu and meta; all must be on one device"),
]


@pytest.mark.parametrize("changes, message", BAD_CROSS_ENTROPY, ids=[m[:40] for _, m in BAD_CROSS_ENTROPY])
def test_bad_input_of_cross_entropy(changes, message):
    with pytest.raises(RuntimeError, match=f"cross_entropy_jvp: {message}"):
        ops.cross_entropy_jvp(**(dict(logits=X, dlogits=DX, target=T) | changes))


def test_unknown_reductions():
    with pytest.raises(ValueError, match="reduction is 'average'; accepted are none, mean, sum"):
        ops.cross_entropy_jvp(X, DX, T, reduction="average")
    with pytest.raises(RuntimeError, match=r"reduction is 3; accepted are 0 \(none\), 1 \(mean\) and 2 \(sum\)"):
        torch.ops.frog_cuda.cross_entropy_jvp(X, DX, T, None, -100, 0.0, 3)


@pytest.mark.parametrize("changes, message", BAD_MSE, ids=[m[:40] for _, m in BAD_MSE])
def test_bad_input_of_mse(changes, message):
    with pytest.raises(RuntimeError, match=f"mse_jvp: {message}"):
        ops.mse_jvp(**(dict(input=X, dinput=DX, target=Y, dtarget=None) | changes))


@pytest.mark.parametrize("changes, message", BAD_BCE, ids=[m[:40] for _, m in BAD_BCE])
def test_bad_input_of_bce(changes, message):
    with pytest.raises((RuntimeError, ValueError), match=f"bce_jvp: {message}"):
        ops.bce_jvp(**(dict(input=X, dinput=DX, target=Y) | changes))
