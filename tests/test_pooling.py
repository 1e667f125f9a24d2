"""max_pool_jvp against the float64 reference and PyTorch: places, ties, NaN, layouts, dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from against_func import check, draw, dual, expected
from torch import Tensor, nn

import frog_cuda as frog
from frog_cuda import ops, reference
from frog_cuda.dual import DualTensor

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
K = 3
INF, NAN = float("inf"), float("nan")


def options(kernel: list[int], stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False) -> dict:
    def each(value: Any) -> list[int]:
        return [value] * len(kernel) if isinstance(value, int) else list(value)

    stride = kernel if stride is None else stride
    return dict(kernel=kernel, stride=each(stride), padding=each(padding), dilation=each(dilation), ceil_mode=ceil_mode)


#: shape of x, options
CASES = {
    "2": ((2, 3, 9), options([2])),
    "3 stride 2, padded": ((2, 3, 9), options([3], 2, 1)),
    "1-D dilated, ceil": ((2, 3, 10), options([3], 2, 1, 2, True)),
    "2x2": ((2, 3, 7, 6), options([2, 2])),
    "3x3 stride 2, padded": ((2, 3, 7, 6), options([3, 3], 2, 1)),
    "overlapping": ((2, 3, 7, 6), options([3, 2], 1)),
    "mixed": ((2, 3, 9, 12), options([3, 5], [2, 3], [1, 2], [2, 1], True)),
    "ceil leaves a window out": ((1, 2, 4, 4), options([1, 1], 3, 0, 1, True)),
    "ceil, padded": ((1, 2, 5, 6), options([2, 3], 2, 1, 1, True)),
    "one window": ((2, 3, 5, 4), options([5, 4])),
    "larger than a block": ((1, 2, 90, 100), options([2, 2], 1)),
    "a line longer than a block": ((1, 1, 3, 9000), options([2, 3], [1, 2], [0, 1])),
    "3-D": ((2, 3, 4, 5, 6), options([2, 2, 2])),
    "3-D, mixed": ((1, 2, 6, 7, 8), options([3, 2, 3], [2, 1, 3], [1, 0, 1], [1, 2, 2], True)),
    "3-D, windows of later lines begin earlier": ((1, 2, 5, 40, 40), options([4, 3, 3], 1, [2, 1, 1])),
    "more planes than lanes": ((3, 11, 7, 6), options([3, 3], 2, 1)),
    "some windows nowhere": ((1, 2, 2, 1), options([2, 2], 1, 1, 2)),
    "3-D nowhere": ((1, 1, 1, 1, 2), options([2, 2, 2], 1, 1, 2)),
    "no leading axis": ((7, 6), options([3, 3], 2, 1)),
    "four leading axes": ((2, 1, 3, 2, 8), options([3], 2, 1)),
    "no batch": ((0, 3, 7, 6), options([2, 2])),
}
each_case = pytest.mark.parametrize("name", CASES)


def inputs(name: str, dtype: torch.dtype = torch.float64, tangents: torch.dtype = torch.float64, k: int = K) -> Any:
    shape, o = CASES[name]
    return draw(*shape).to(dtype), draw(k, *shape, seed=1).to(tangents), o


def same(got: Any, exact: Any) -> None:
    """All is chosen, nothing computed: equal to the bit."""
    for actual, wanted in zip(got, exact, strict=True):
        assert actual.shape == wanted.shape
        torch.testing.assert_close(actual.to(wanted.dtype), wanted, rtol=0, atol=0, equal_nan=True)


@each_case
@pytest.mark.parametrize("k", [1, 3])
def test_against_reference(name, k):
    x, dx, o = inputs(name, k=k)
    for want_indices in (False, True):
        same(
            ops.max_pool_jvp(x, dx, **o, want_indices=want_indices),
            reference.max_pool_jvp(x, dx, **o, want_indices=want_indices),
        )


@pytest.mark.parametrize("name", [n for n, (shape, o) in CASES.items() if len(shape) == len(o["kernel"]) + 2 and shape[0]])
def test_value_and_indices_are_pytorchs(name):
    x, dx, o = inputs(name)
    y, _, indices = ops.max_pool_jvp(x, dx, **o, want_indices=True)
    arguments = (o["kernel"], o["stride"], o["padding"], o["dilation"], o["ceil_mode"])
    same((y, indices), POOL[len(o["kernel"])](x, *arguments, return_indices=True))


@pytest.mark.parametrize("tangent_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["3x3 stride 2, padded", "3-D, mixed", "some windows nowhere"])
def test_every_pair_of_dtypes(name, dtype, tangent_dtype):
    x, dx, o = inputs(name, dtype, tangent_dtype)
    got = ops.max_pool_jvp(x, dx, **o, want_indices=True)
    assert [t.dtype for t in got] == [dtype, tangent_dtype, torch.int64]
    same(got, reference.max_pool_jvp(x, dx, **o, want_indices=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["2", "3x3 stride 2, padded", "overlapping", "3-D"])
def test_ties_infinity_and_nan_are_pytorchs(name, dtype):
    shape, o = CASES[name]
    values = torch.tensor([0.0, -0.0, 1.0, NAN, -INF, INF, -1.0, NAN, 1.0, -INF])
    generator = torch.Generator().manual_seed(2)
    for allowed in (10, 3, 1):  # all of them; zeros and ones; a plain of zeros
        x = values[torch.randint(allowed, shape, generator=generator)].to(dtype)
        dx = draw(K, *shape, seed=1)
        y, dy, indices = ops.max_pool_jvp(x, dx, **o, want_indices=True)
        arguments = (o["kernel"], o["stride"], o["padding"], o["dilation"], o["ceil_mode"])
        same((y, indices), POOL[len(o["kernel"])](x, *arguments, return_indices=True))
        same((y, dy, indices), reference.max_pool_jvp(x, dx, **o, want_indices=True))
    only = torch.full(shape, -INF, dtype=dtype)
    same(ops.max_pool_jvp(only, dx, **o, want_indices=True), reference.max_pool_jvp(only, dx, **o, want_indices=True))


@pytest.mark.parametrize("name", [n for n, (shape, _) in CASES.items() if len(shape) > 3 and shape[0]])
def test_layouts(name):
    x, dx, o = inputs(name)
    exact = reference.max_pool_jvp(x, dx, **o, want_indices=True)
    for value in (_channels_last(x), x.mT.contiguous().mT):
        for tangents in (dx, torch.stack([_channels_last(t) for t in dx]), dx.movedim(0, -1).contiguous().movedim(-1, 0)):
            same(ops.max_pool_jvp(value, tangents, **o, want_indices=True), exact)
    same(
        ops.max_pool_jvp(x, dx[:1].expand(K, *x.shape), **o)[:2], reference.max_pool_jvp(x, dx[:1].expand(K, *x.shape), **o)[:2]
    )


def _channels_last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()]) if x.dim() in formats else x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_with_any_number_of_threads(dtype):
    x, dx = draw(3, 7, 90, 100).to(dtype), draw(4, 3, 7, 90, 100, seed=1).to(dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.max_pool_jvp(x, dx, **options([3, 3], 2, 1), want_indices=True))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        same(result, results[0])


X = torch.ones(2, 3, 7, 6)
BAD = [
    (dict(x=X.long()), "x has dtype Long; accepted are float32, float64"),
    (dict(dx=torch.ones(K, *X.shape).long()), "dx has dtype Long"),
    (dict(dx=torch.ones(K, 2, 3, 7, 5)), r"dx has shape \(3, 2, 3, 7, 5\), expected \(3, 2, 3, 7, 6\)"),
    (dict(dx=torch.ones(0, *X.shape)), "k is 0; at least 1 tangent is needed"),
    (dict(kernel=[]), "kernel has 0 entries; accepted are 1 to 3"),
    (dict(kernel=[2] * 4), "kernel has 4 entries; accepted are 1 to 3"),
    (dict(x=X[0, 0, 0], dx=torch.ones(K, 6)), r"x has shape \(6,\), expected \(\*, s\) with 2 spatial axes"),
    (dict(stride=[2]), "stride has 1 entries, expected 2, as many as kernel"),
    (dict(kernel=[0, 2]), r"kernel has an entry 0; accepted are 1 to 2\^31 - 1"),
    (dict(stride=[2, 0]), "stride has an entry 0; accepted are 1 to"),
    (dict(dilation=[-1, 1]), "dilation has an entry -1; accepted are 1 to"),
    (dict(padding=[0, -1]), "padding has an entry -1; accepted are 0 to"),
    (dict(padding=[0, 2]), "padding has an entry 2; accepted is at most half of what a window spans, 2"),
    (dict(kernel=[8, 2]), r"x has shape \(2, 3, 7, 6\), in whose axis 2 no window fits; one spans 8 elements"),
    (dict(x=X[..., :0], dx=torch.ones(K, 2, 3, 7, 0)), r"x has shape \(2, 3, 7, 0\), in whose axis 3 no window fits"),
    (dict(dx=torch.ones(K, *X.shape, device="meta")), "arguments are on cpu and meta; all must be on one device"),
]


@pytest.mark.parametrize("changes, message", BAD, ids=[message[:40] for _, message in BAD])
def test_bad_input(changes, message):
    given = {"x": X, "dx": torch.ones(K, *X.shape), **options([2, 2])}
    with pytest.raises(RuntimeError, match=f"max_pool_jvp: {message}"):
        ops.max_pool_jvp(**(given | changes))


# ---- the rule


CALLS = {
    "int": lambda x: F.max_pool2d(x, 2),
    "lists": lambda x: F.max_pool2d(x, [3, 2], [2, 1], [1, 0], [1, 2], True),
    "torch": lambda x: torch.max_pool2d(x, (2, 3)),
    "one entry": lambda x: torch.max_pool2d(x, (2,), stride=(1,)),
    "indices": lambda x: F.max_pool2d(x, 3, 2, 1, return_indices=True),
    "module": nn.MaxPool2d(3, 2, 1),
    "module with indices": nn.MaxPool2d(2, return_indices=True),
    "drop-in": frog.nn.MaxPool2d(2, ceil_mode=True),
    "1-D": lambda x: F.max_pool1d(x[0], 3, 2, return_indices=True),
    "1-D without indices": lambda x: F.max_pool1d(x[0], 3, padding=1),
    "3-D": lambda x: F.max_pool3d(x, 2),
    "3-D with indices": nn.MaxPool3d((1, 2, 3), return_indices=True),
}


@pytest.mark.parametrize("name", CALLS)
def test_rule_is_torch_func(name):
    check(CALLS[name], draw(2, 3, 8, 6))
    if "3-D" not in name:  # without a batch axis PyTorch's own takes no such layout
        check(CALLS[name], draw(2, 3, 8, 6).to(memory_format=torch.channels_last), k=1)


def test_rule_carries_pending_and_low_tangents():
    x, v = draw(2, 3, 8, 6), draw(4, 3, 8, 6, seed=1)
    t = frog.dual.add_activity(x, v)
    (value,), (moved,) = expected(lambda x: F.max_pool2d(x, 2), [x], [v[:, None].expand(4, *x.shape)])
    out = F.max_pool2d(t, 2)
    same((out.primal, out.tangents), (value, moved))
    low = F.max_pool2d(DualTensor(x.float(), v[:, None].expand(4, *x.shape).bfloat16()), 2)
    assert low.tangents.dtype == torch.bfloat16
    same((low.tangents,), (ops.max_pool_jvp(x.float(), v[:, None].expand(4, *x.shape).bfloat16(), **options([2, 2]))[1],))


def test_rule_refuses_what_pytorch_refuses():
    with pytest.raises(RuntimeError, match="max_pool_jvp: stride has an entry 0"):
        F.max_pool2d(dual(draw(2, 3, 8, 6)), 2, 0)
    with pytest.raises(RuntimeError):  # no channel: PyTorch's own error
        F.max_pool2d(dual(draw(2, 0, 8, 6)), 2)


def test_coverage_calls_it_fused():
    found = frog.coverage(nn.Sequential(nn.MaxPool2d(2), nn.MaxPool2d(2, return_indices=True)), draw(1, 2, 8, 8))
    assert found.rows["0", "max_pool2d", "fused"] == 1 and found.rows["1", "aten.max_pool2d_with_indices", "fused"] == 1
