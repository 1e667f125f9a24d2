"""linear_jvp: every mix of incoming, supplied, sampled and added tangents, against the float64 reference."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import FLOAT32_BOUND, assert_as_good_as_torch, assert_close32, assert_close64
from torch import Tensor

import frog_cuda
from frog_cuda import ops, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
STATE = torch.tensor([-7, 3])
WEIGHT_OFFSET, BIAS_OFFSET = 2**33 + 5, 1021


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 31 * len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def arguments(
    k: int,
    shape: tuple[int, ...],
    out: int,
    dtype: torch.dtype,
    *,
    dx: bool = False,
    weight: str | None = None,
    bias: str | None = "plain",
    activity: str | None = None,
    tangent_dtype: torch.dtype | None = None,
    **other: Any,
) -> dict[str, Any]:
    """Arguments for x of the given shape; weight and bias tangents: None, "given" or "sampled", or the weight's "factors"."""
    t = tangent_dtype or dtype
    made: dict[str, Any] = dict(
        x=randn(*shape, dtype=dtype, seed=1),
        dx=randn(k, *shape, dtype=t, seed=2) if dx else None,
        weight=randn(out, shape[-1], dtype=dtype, seed=3),
        bias=randn(out, dtype=dtype, seed=4) if bias is not None else None,
        k=k,
    )
    if weight == "given":
        made["dweight"] = randn(k, out, shape[-1], dtype=t, seed=5)
    if weight == "factors":
        made.update(left=randn(k, 2, out, dtype=t, seed=9), right=randn(k, 2, shape[-1], dtype=t, seed=10))
    if bias == "given":
        made["dbias"] = randn(k, out, dtype=t, seed=6)
    if activity == "shared":
        made["activity"] = randn(k, out, dtype=t, seed=7)
    if activity == "rows":
        made["activity"] = randn(k, *shape[:-1], out, dtype=t, seed=8)
    if weight == "sampled":
        made.update(state=STATE, weight_offset=WEIGHT_OFFSET)
    if bias == "sampled":
        made.update(state=STATE, bias_offset=BIAS_OFFSET)
    return made | other


def supplied(given: dict[str, Any]) -> dict[str, Any]:
    """The same with sampled tangents drawn beforehand in float64, so that only the arithmetic of linear_jvp is in question."""
    made = dict(given)
    how = dict(first=given.get("first", 0), distribution=given.get("distribution", "normal"), dtype=torch.float64)
    k, w = given["k"], given["weight"]
    if given.get("weight_offset") is not None:
        drawn = ops.sample_tangents(given["state"], k, w.numel(), offset=given["weight_offset"], **how)
        made["dweight"] = drawn.view(k, *w.shape)
    if given.get("bias_offset") is not None:
        made["dbias"] = ops.sample_tangents(given["state"], k, w.shape[0], offset=given["bias_offset"], **how)
    return made | dict(state=None, weight_offset=None, bias_offset=None, want_gram=False)


def expected(given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    drawn = supplied(given)
    y, dy, _ = reference.linear_jvp(**drawn)
    side = given["k"] if given.get("want_gram") else 0
    gram = torch.zeros(side, side, dtype=torch.float64)
    if side:
        for name, offset in (("dweight", "weight_offset"), ("dbias", "bias_offset")):
            if given.get(offset) is not None:
                gram += reference.gram(drawn[name].flatten(1))
    return y, dy, gram


def torch_own(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What PyTorch's own operations in the given dtypes make of it."""
    a = supplied(given)
    x, w = a["x"], a["weight"]
    y = F.linear(x, w, a["bias"])
    dtype = x.dtype if a["dx"] is None else a["dx"].dtype
    dy = torch.zeros(a["k"], *y.shape, dtype=dtype)
    for i in range(a["k"]):
        if a["dx"] is not None:
            dy[i] += F.linear(a["dx"][i], w.to(dtype))
        if a.get("dweight") is not None:
            dy[i] += F.linear(x.to(dtype), a["dweight"][i].to(dtype))
        if a.get("left") is not None:
            dy[i] += F.linear(F.linear(x.to(dtype), a["right"][i].to(dtype)), a["left"][i].to(dtype).T)
        for name in ("dbias", "activity"):
            if a.get(name) is not None:
                dy[i] += a[name][i].to(dtype)
    return y, dy


def check(given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    got = ops.linear_jvp(**given)
    terms = given["x"].shape[-1]
    for actual, exact in zip(got, expected(given)):
        assert actual.is_contiguous()
        if actual.dtype == torch.float64 and given["x"].dtype == torch.float64:
            assert_close64(actual, exact)
        elif actual.dtype == torch.float64:  # the Gram matrix of float32 work
            assert_close32(actual.float(), exact)
        else:
            # A lone sum that happens to cancel is held to what sums of so many terms are like, not to its own size
            largest = exact.abs().max().item() if exact.numel() else 1.0
            assert_close32(actual, exact, FLOAT32_BOUND * max(1.0, terms**0.5 / largest))
    return got


MIXES = [
    dict(dx=dx, weight=weight, bias=bias, activity=activity)
    for dx, weight, bias, activity in itertools.product(
        (False, True), (None, "given", "sampled", "factors"), (None, "plain", "given", "sampled"), (None, "shared", "rows")
    )
    if dx or weight or bias in ("given", "sampled") or activity
]


@pytest.mark.parametrize("mix", MIXES, ids=lambda m: "-".join(str(v) for v in m.values()))
def test_every_mix_of_tangents(mix):
    for dtype in (torch.float32, torch.float64):
        for want_gram in (False, True):
            _, _, gram = check(arguments(3, (5, 7), 9, dtype, **mix, want_gram=want_gram))
            assert gram.shape == ((3, 3) if want_gram else (0, 0))
        check(arguments(1, (2, 3, 33), 7, dtype, **mix, activation="tanh"))


SAMPLED = dict(weight="sampled", bias="sampled", want_gram=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows, size, out", [*itertools.product((1, 7, 33), (1, 7, 33, 1025), (1, 7, 33)), (1025, 33, 7)])
def test_odd_sizes(rows, size, out, dtype):
    for k in (1, 5):
        check(arguments(k, (rows, size), out, dtype, dx=True, **SAMPLED))
        check(arguments(k, (rows, size), out, dtype, activity="rows", **SAMPLED, first=3, distribution="rademacher"))
        check(arguments(k, (rows, size), out, dtype, dx=True, weight="factors"))
        check(arguments(k, (rows, size), out, dtype, weight="factors", bias="given"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wide_and_tall(dtype):
    check(arguments(2, (33, 7), 1025, dtype, dx=True, **SAMPLED))
    check(arguments(2, (65, 1025), 1025, dtype, **SAMPLED))


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize(
    "k, rows, size, out",
    [
        (33, 9, 1025, 8),  # six rows of 33 tangents no longer fit the cache: columns are drawn in blocks
        (16, 70, 3001, 7),
        (130, 1500, 33, 7),  # the running sums of 130 tangents do not fit: rows of x go in batches, tangents are drawn again
        (130, 1500, 300, 3),  # both
    ],
)
def test_blocks_of_columns_and_batches_of_rows(k, rows, size, out, distribution):
    for dtype in (torch.float32, torch.float64):
        check(arguments(k, (rows, size), out, dtype, **SAMPLED, distribution=distribution))


def test_gram_is_that_of_the_tangents_whatever_the_batch():
    for distribution in ("normal", "rademacher"):
        grams = [
            ops.linear_jvp(**arguments(4, (rows, 300), 40, torch.float32, **SAMPLED, distribution=distribution))[2]
            for rows in (0, 1, 50)
        ]
        assert torch.equal(grams[0], grams[1]) and torch.equal(grams[0], grams[2])
        v = torch.cat(
            [
                ops.sample_tangents(STATE, 4, n, offset=at, distribution=distribution, dtype=torch.float64)
                for n, at in ((300 * 40, WEIGHT_OFFSET), (40, BIAS_OFFSET))
            ],
            dim=1,
        )
        # Off the diagonal as well as on it: float32 sums of at most 2048 products at a time
        assert ((grams[0] - v @ v.T).abs().max() / (v @ v.T).diagonal().min()).item() < 1e-6
        assert torch.equal(grams[0], grams[0].T)


def test_gram_of_a_small_layer_is_exact():
    """There k may come near the number of parameters, the Gram matrix near singular, and float32 sums would not do."""
    _, _, gram = ops.linear_jvp(**arguments(30, (2, 8), 4, torch.float32, weight="sampled", want_gram=True))
    v = ops.sample_tangents(STATE, 30, 32, offset=WEIGHT_OFFSET, dtype=torch.float64)
    assert_close64(gram, v @ v.T)


def test_standard_basis():
    given = arguments(4, (5, 7), 9, torch.float64, weight="sampled", bias="sampled", want_gram=True)
    given["state"] = torch.tensor([WEIGHT_OFFSET, WEIGHT_OFFSET + 62, BIAS_OFFSET + 3, 0, WEIGHT_OFFSET + 9])
    for first in (0, 1):
        y, dy, gram = ops.linear_jvp(**given | dict(distribution="standard_basis", first=first))
        exact = expected(given | dict(distribution="standard_basis", first=first))
        for actual, wanted in zip((y, dy, gram), exact):
            assert_close64(actual, wanted)


@pytest.mark.parametrize("distribution", ["normal", "rademacher", "standard_basis"])
def test_against_the_reference_that_draws_by_itself(distribution):
    given = arguments(3, (5, 70), 33, torch.float32, dx=True, **SAMPLED, distribution=distribution, first=2)
    if distribution == "standard_basis":
        given["state"] = torch.tensor([0, 0, WEIGHT_OFFSET + 1000, BIAS_OFFSET, 5])
    for actual, exact in zip(ops.linear_jvp(**given), reference.linear_jvp(**given)):
        assert_close32(actual.float(), exact)


def test_a_chunk_of_tangents_is_part_of_the_whole():
    whole = ops.linear_jvp(**arguments(8, (9, 300), 20, torch.float32, **SAMPLED))
    part = ops.linear_jvp(**arguments(3, (9, 300), 20, torch.float32, **SAMPLED, first=4))
    assert torch.equal(part[1], whole[1][4:7])
    assert_close32(part[2].float(), whole[2][4:7, 4:7])


@pytest.mark.skipif(frog_cuda.build_info()["simd"] == "baseline", reason="the library's products")
@pytest.mark.parametrize("dx", [False, True])
@pytest.mark.parametrize("tangent_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_chunk_of_factors_is_part_of_the_whole(tangent_dtype, dx):
    given = arguments(8, (9, 300), 20, torch.float32, dx=dx, weight="factors", bias="given", tangent_dtype=tangent_dtype)
    whole = ops.linear_jvp(**given)
    for begin, count in ((0, 1), (4, 3)):
        some = {n: given[n][begin : begin + count] for n in ("left", "right", "dbias", *(["dx"] if dx else []))}
        part = ops.linear_jvp(**given | some | dict(k=count))
        assert torch.equal(part[0], whole[0]) and torch.equal(part[1], whole[1][begin : begin + count])


ACTIVATIONS = {
    "identity": (0.0, 0.0),
    "relu": (0.0, 0.0),
    "gelu": (0.0, 0.0),
    "gelu_tanh": (0.0, 0.0),
    "silu": (0.0, 0.0),
    "tanh": (0.0, 0.0),
    "sigmoid": (0.0, 0.0),
    "softplus": (2.0, 5.0),
    "elu": (1.3, 0.0),
    "leaky_relu": (0.1, 0.0),
    "hardtanh": (-0.5, 2.0),
}


@pytest.mark.parametrize("activation", ops.POINTWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_activations(activation, dtype):
    alpha, beta = ACTIVATIONS[activation]
    how = dict(activation=activation, alpha=alpha, beta=beta)
    check(arguments(3, (7, 33), 25, dtype, dx=True, activity="rows", **SAMPLED, **how))
    check(arguments(1, (1, 1), 1, dtype, activity="shared", **how))


@pytest.mark.parametrize(
    "dtype, tangent_dtype", [(d, d) for d in DTYPES[2:]] + [(torch.float32, d) for d in DTYPES[2:]], ids=str
)
@pytest.mark.parametrize(
    "mix",
    [
        dict(dx=True),
        dict(dx=True, activity="rows"),
        dict(dx=True, bias="given", activity="shared"),
        dict(dx=True, bias="sampled", want_gram=True),
        dict(dx=True, weight="given", bias="given", activity="rows"),
        dict(dx=True, **SAMPLED),
        SAMPLED,
        dict(dx=True, weight="factors", bias="given"),
        dict(weight="factors"),
    ],
    ids=str,
)
def test_low_precision(dtype, tangent_dtype, mix):
    for k, rows, size, out in [(1, 1, 7, 1), (3, 33, 65, 9), (2, 7, 1025, 33)]:
        given = arguments(k, (rows, size), out, dtype, tangent_dtype=tangent_dtype, **mix)
        y, dy, gram = ops.linear_jvp(**given)
        exact_y, exact_dy, exact_gram = expected(given)
        own_y, own_dy = torch_own(given)
        if dtype == torch.float32:
            assert_close32(y, exact_y)
        else:
            assert_as_good_as_torch(y, own_y, exact_y)
        if dy.dtype == torch.float32:
            assert_close32(dy, exact_dy)
        else:
            assert_as_good_as_torch(dy, own_dy, exact_dy)
        if mix.get("want_gram"):
            assert_close32(gram.float(), exact_gram)
        assert dy.dtype == (tangent_dtype if mix.get("dx") else dtype)


def test_low_precision_tangents_of_many_rows():
    """More than a cache holds: they are multiplied and added to some at a time."""
    mix: dict[str, Any] = dict(dx=True, weight="factors", bias="given", activity="shared", tangent_dtype=torch.bfloat16)
    given = arguments(3, (1025, 7), 2049, torch.float32, **mix)
    _, dy, _ = ops.linear_jvp(**given)
    assert_as_good_as_torch(dy, torch_own(given)[1], expected(given)[1])


def test_low_precision_tangents_of_many_columns():
    """More of them than a panel of the weight has in a cache; an odd number, as the tile multiplies pairs."""
    for size in (1023, 4095, 4097):
        given = arguments(2, (7, size), 9, torch.float32, dx=True, weight="factors", tangent_dtype=torch.bfloat16)
        _, dy, _ = ops.linear_jvp(**given)
        assert_as_good_as_torch(dy, torch_own(given)[1], expected(given)[1])


def test_low_precision_values_that_are_not_finite_stay_where_they_belong():
    given = arguments(2, (7, 33), 70, torch.float32, dx=True, tangent_dtype=torch.bfloat16)
    finite = ops.linear_jvp(**given)[1]
    given["dx"][1, 3, 32], given["dx"][0, 2, 0] = torch.inf, torch.nan
    dy = ops.linear_jvp(**given)[1]
    touched = torch.zeros(2, 7, dtype=torch.bool)
    touched[1, 3] = touched[0, 2] = True
    assert torch.equal(dy[~touched], finite[~touched])
    assert torch.equal(dy[1, 3], torch.inf * given["weight"][:, 32].sign().bfloat16())
    assert dy[0, 2].isnan().all()


def test_low_precision_tangents_strided_activated_or_empty():
    """What the product of bfloat16 tangents leaves to other code."""
    wide = randn(3, 40, 34, dtype=torch.bfloat16)
    given = arguments(3, (40, 17), 33, torch.float32, dx=True, tangent_dtype=torch.bfloat16)
    given["dx"] = wide[:, :, ::2]
    y, dy, _ = ops.linear_jvp(**given)
    same = ops.linear_jvp(**{**given, "dx": given["dx"].contiguous()})
    assert torch.equal(dy, same[1]) and torch.equal(y, same[0])
    activated = ops.linear_jvp(**given, activation="tanh")
    assert_close32(activated[0], y.double().tanh())
    assert_as_good_as_torch(activated[1], (1 - y.tanh() ** 2).bfloat16() * dy, (1 - y.double().tanh() ** 2) * dy.double())
    for shape in ((0, 17), (40, 0)):
        nothing = arguments(3, shape, 33, torch.float32, dx=True, bias="given", tangent_dtype=torch.bfloat16)
        y, dy, _ = ops.linear_jvp(**nothing)
        assert torch.equal(dy, nothing["dbias"][:, None].to(torch.bfloat16).expand(3, shape[0], 33))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 7), (3, 0, 7), (5, 0), (40, 0), (0, 0)])
def test_empty_batches_and_empty_features(shape, dtype):
    for mix in (dict(dx=True, activity="rows"), dict(weight="given", bias="given"), dict(weight="factors", dx=True), SAMPLED):
        given = arguments(3, shape, 5, dtype, **mix)
        y, dy, gram = ops.linear_jvp(**given)
        assert y.shape == (*shape[:-1], 5) and dy.shape == (3, *shape[:-1], 5) and y.dtype == dtype
        exact_y, exact_dy, exact_gram = expected(given)
        assert torch.equal(y, exact_y.to(dtype))
        assert torch.allclose(dy.double(), exact_dy, rtol=1e-2)  # bias tangents alone, rounded to the dtype
        if mix is SAMPLED:
            assert_close32(gram.float(), exact_gram)
    y, dy, _ = ops.linear_jvp(torch.ones(2, 3), torch.ones(4, 2, 3), torch.ones(0, 3), torch.ones(0), k=4)
    assert y.shape == (2, 0) and dy.shape == (4, 2, 0)


@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 7), (2, 1, 3, 7)])
def test_leading_axes_and_suffixes_of_the_activity(shape):
    for n in range(len(shape)):
        given = arguments(3, shape, 5, torch.float64, dx=True, **SAMPLED)
        given["activity"] = randn(3, *shape[len(shape) - 1 - n : -1], 5)
        y, dy, _ = check(given)
        assert y.shape == (*shape[:-1], 5) and dy.shape == (3, *shape[:-1], 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sampled_part_has_the_same_bits_whatever_the_number_of_threads(dtype):
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            both = []
            for k, rows, size, out in [(4, 33, 300, 100), (16, 70, 3001, 20)]:
                both += ops.linear_jvp(**arguments(k, (rows, size), out, dtype, **SAMPLED))[1:]
            results.append(both)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.equal(a, b)


def test_values_that_are_not_finite_stay_in_their_row():
    given = arguments(3, (6, 7), 9, torch.float32, dx=True, **SAMPLED)
    given["x"][2, 3] = float("nan")
    given["x"][4, 1] = float("inf")
    y, dy, gram = ops.linear_jvp(**given)
    assert y[2].isnan().all() and dy[:, 2].isnan().all() and not y[4].isfinite().any()
    for row in (0, 1, 3, 5):
        assert y[row].isfinite().all() and dy[:, row].isfinite().all()
    assert gram.isfinite().all()


# ---- bad input


def _with(**changes: Any) -> dict[str, Any]:
    given = arguments(3, (5, 7), 9, torch.float32, dx=True)
    return given | changes


BAD = [
    (dict(k=0), "k is 0"),
    (dict(k=4), r"dx has shape \(3, 5, 7\), expected \(4, 5, 7\)"),
    (dict(x=torch.ones(())), r"x has shape \(\), expected \(\*, 7\)"),
    (dict(x=torch.ones(5, 6)), r"x has shape \(5, 6\), expected \(\*, 7\)"),
    (dict(x=torch.ones(5, 7, dtype=torch.int64)), "x has dtype Long"),
    (dict(x=torch.ones(5, 7, dtype=torch.complex64)), "x has dtype ComplexFloat"),
    (dict(x=torch.ones(5, 7, dtype=torch.float64)), "weight has dtype Float, expected Double"),
    (dict(dx=torch.ones(3, 7)), r"dx has shape \(3, 7\), expected \(3, 5, 7\)"),
    (dict(dx=torch.ones(3, 5, 7, dtype=torch.int32)), "dx has dtype Int"),
    (dict(weight=torch.ones(9)), r"weight has shape \(9,\), expected \(out, in\)"),
    (dict(weight=torch.ones(9, 7, dtype=torch.float64)), "weight has dtype Double, expected Float"),
    (dict(bias=torch.ones(8)), r"bias has shape \(8,\), expected \(9,\)"),
    (dict(bias=torch.ones(9, dtype=torch.bfloat16)), "bias has dtype BFloat16, expected Float"),
    (dict(dweight=torch.ones(3, 7, 9)), r"dweight has shape \(3, 7, 9\), expected \(3, 9, 7\)"),
    (dict(dweight=torch.ones(3, 9, 7, dtype=torch.int64)), "dweight has dtype Long"),
    (dict(dbias=torch.ones(2, 9)), r"dbias has shape \(2, 9\), expected \(3, 9\)"),
    (dict(activity=torch.ones(9)), r"activity has shape \(9,\)"),
    (dict(activity=torch.ones(2, 9)), r"activity has shape \(2, 9\), expected \(k, \*s, out\)"),
    (dict(activity=torch.ones(3, 1, 9)), r"activity has shape \(3, 1, 9\)"),
    (dict(activity=torch.ones(3, 1, 5, 9)), r"activity has shape \(3, 1, 5, 9\)"),
    (dict(activity=torch.ones(3, 5, 9, dtype=torch.int64)), "activity has dtype Long"),
    (dict(weight_offset=0), r"state is None, but sampled tangents need \[seed, step\]"),
    (dict(bias_offset=0), r"state is None, but sampled tangents need \[seed, step\]"),
    (dict(weight_offset=-1, state=STATE), "weight_offset is -1"),
    (dict(bias_offset=-1, state=STATE), "bias_offset is -1"),
    (dict(weight_offset=2**63 - 1, state=STATE), "weight_offset is 9223372036854775807"),
    (dict(weight_offset=0, state=STATE, dweight=torch.ones(3, 9, 7)), "dweight and weight_offset are both given"),
    (dict(bias_offset=0, state=STATE, dbias=torch.ones(3, 9)), "dbias and bias_offset are both given"),
    (dict(weight_offset=0, state=STATE, first=-1), "first is -1"),
    (dict(weight_offset=0, state=torch.zeros(2)), "state has dtype Float"),
    (dict(weight_offset=0, state=torch.tensor([0, -1])), "step is -1"),
    (dict(left=torch.ones(3, 2, 9)), "right is None; accepted are both factors of the weight's tangents, or none"),
    (dict(right=torch.ones(3, 2, 7)), "left is None; accepted are both factors"),
    (dict(left=torch.ones(3, 9), right=torch.ones(3, 7)), r"left has shape \(3, 9\), expected \(k, r, out\) with r >= 1"),
    (
        dict(left=torch.ones(3, 0, 9), right=torch.ones(3, 0, 7)),
        r"left has shape \(3, 0, 9\), expected \(k, r, out\) with r >= 1",
    ),
    (dict(left=torch.ones(3, 2, 8), right=torch.ones(3, 2, 7)), r"left has shape \(3, 2, 8\), expected \(3, 2, 9\)"),
    (dict(left=torch.ones(3, 2, 9), right=torch.ones(3, 1, 7)), r"right has shape \(3, 1, 7\), expected \(3, 2, 7\)"),
    (dict(left=torch.ones(3, 1, 9), right=torch.ones(3, 1, 7, dtype=torch.int32)), "right has dtype Int"),
    (
        dict(left=torch.ones(3, 1, 9), right=torch.ones(3, 1, 7), dweight=torch.ones(3, 9, 7)),
        "left is given, and so is dweight",
    ),
    (
        dict(left=torch.ones(3, 1, 9), right=torch.ones(3, 1, 7), weight_offset=0, state=STATE),
        "left is given, and so is weight_offset",
    ),
    (dict(dx=None), "nothing is perturbed; give .* dx, dweight, dbias, activity, weight_offset, bias_offset, left"),
]


@pytest.mark.parametrize("changes, message", BAD, ids=[message[:40] for _, message in BAD])
def test_bad_input(changes, message):
    with pytest.raises(RuntimeError, match=message):
        ops.linear_jvp(**_with(**changes))


@pytest.mark.parametrize("dtype, tangent_dtype", [*((d, d) for d in DTYPES), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("rows", [3, 40])
def test_without_input_features_tangents_are_what_is_added(rows, dtype, tangent_dtype):
    for activity, activation in itertools.product((None, "shared"), ("identity", "relu")):
        given = arguments(2, (rows, 0), 5, dtype, dx=True, activity=activity, tangent_dtype=tangent_dtype)
        dirty = [torch.full((size,), 7.7) for size in range(1, 300)]
        del dirty
        y, dy, _ = ops.linear_jvp(**given, activation=activation)
        assert torch.equal(y, getattr(torch, activation, torch.clone)(given["bias"]).expand(rows, 5))
        added = (given["activity"] if activity else torch.zeros(2, 5, dtype=tangent_dtype))[:, None].expand(2, rows, 5)
        assert torch.equal(dy, torch.where((y > 0) | (activation == "identity"), added, 0))


def test_unknown_names():
    with pytest.raises(ValueError, match="activation is 'swish'; accepted are identity, relu"):
        ops.linear_jvp(**_with(activation="swish"))
    with pytest.raises(ValueError, match="distribution is 'cauchy'; accepted are normal"):
        ops.linear_jvp(**_with(distribution="cauchy"))
    given = _with()
    with pytest.raises(RuntimeError, match="activation is 11"):
        torch.ops.frog_cuda.linear_jvp(
            given["x"], given["dx"], given["weight"], None, None, None, None, None, 3, 0, 0, None, None, 11, 0.0, 0.0, False
        )


def test_arguments_on_another_device_are_named():
    with pytest.raises(RuntimeError, match="linear_jvp: arguments are on cpu and meta; all must be on one device"):
        ops.linear_jvp(**_with(weight=torch.ones(9, 7, device="meta")))
