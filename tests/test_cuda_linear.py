"""The CUDA kernels of linear_jvp, run on the host, against the float64 reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from cuda_on_cpu.client import InOut, Kernels, Out, Skewed
from helpers import FLOAT32_BOUND, assert_as_good_as_torch, assert_close32, assert_close64
from torch import Tensor

from frog_cuda import ops, reference

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
STATE = torch.tensor([-7, 3])
DISTRIBUTIONS = ["normal", "rademacher"]


@pytest.fixture(scope="module")
def kernels():
    kernels = Kernels("linear")
    yield kernels
    kernels.close()


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 31 * len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def compute_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def drawn(k, out, size, offset, first, distribution) -> Tensor:
    """The very elements the kernels draw, so that only their arithmetic is in question."""
    how = dict(offset=offset, first=first, distribution=distribution, dtype=torch.float64)
    return ops.sample_tangents(STATE, k, out * size, **how).view(k, out, size)


def check(actual: Tensor, own: Tensor, exact: Tensor, terms: int) -> None:
    """Against the bound of the dtype; ``own`` is what PyTorch's own arithmetic in that dtype gives."""
    if actual.dtype == torch.float64:
        assert_close64(actual, exact)
    elif actual.dtype == torch.float32:
        # A lone sum that happens to cancel is held to what sums of so many terms are like, not to its own size
        largest = exact.abs().max().item() if exact.numel() else 1.0
        assert_close32(actual, exact, FLOAT32_BOUND * max(1.0, terms**0.5 / largest))
    else:
        assert_as_good_as_torch(actual, own, exact)


def sampled(
    kernels,
    name: str,
    rows: int,
    size: int,
    out: int,
    k: int,
    distribution: str,
    *,
    first: int = 0,
    offset: int = 2**33 + 5,
    filled: bool = False,
    dbias: bool = False,
    activity: int = 0,
    slope: bool = False,
    split: int = 0,
    unpacked: bool = False,
    skew: bool = False,
    seed: int = 0,
    x: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs the kernel, compares its result, and returns it and what it should be. ``activity``: its period, 0 for none."""
    dtype, compute = DTYPES[name], compute_type(DTYPES[name])
    x = randn(rows, size, dtype=dtype, seed=1) if x is None else x
    before = randn(k, rows, out, dtype=dtype, seed=2) if filled else None
    b = randn(k, out, dtype=dtype, seed=3) if dbias else None
    v = randn(k, activity, out, dtype=dtype, seed=4) if activity else None
    s = randn(rows, out, dtype=compute, seed=5) if slope else None
    place = Skewed if skew else lambda t: t
    (dy,) = kernels.run(
        f"sampled_{name}",
        place(x),
        STATE,
        None if b is None else place(b),
        None if v is None else place(v),
        None if s is None else place(s),
        Out((k, rows, out), dtype, dtype.itemsize if skew else 0) if before is None else InOut(before),
        rows,
        size,
        out,
        k,
        first,
        DISTRIBUTIONS.index(distribution),
        offset,
        max(1, activity),
        filled,
        False,
        split,
        unpacked,
        seed=seed,
    )
    dw = drawn(k, out, size, offset, first, distribution)
    exact = x.double() @ dw.mT
    own = (x @ dw.to(dtype).mT).clone()
    for t in (before, None if b is None else b[:, None], None if v is None else v[:, torch.arange(rows) % activity]):
        if t is not None:
            exact, own = exact + t.double(), own + t
    if s is not None:
        exact, own = exact * s.double(), (own * s).to(dtype)
    if rows and out:
        check(dy, own, exact, size)
    return dy, exact


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", DTYPES)
def test_odd_sizes(kernels, name, distribution):
    sizes = [*itertools.product((1, 33), (1, 7, 33, 65), (1, 33)), (7, 65, 7), (7, 33, 65)]
    for seed, (rows, size, out) in enumerate(sizes):
        sampled(kernels, name, rows, size, out, 3 if out == 7 else 1, distribution, first=seed, seed=seed)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", DTYPES)
def test_many_rows(kernels, name, distribution):
    """Another tile, and two of them for the rows."""
    sampled(kernels, name, {"float64": 65, "float32": 130}.get(name, 260), 97, 66, 1, distribution)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_many_tangents(kernels, name, distribution):
    dy, _ = sampled(kernels, name, 7, 33, 33, 16, distribution, first=2**32 - 16)
    part, _ = sampled(kernels, name, 7, 33, 33, 3, distribution, first=2**32 - 9)
    assert torch.equal(part, dy[7:10]), "a chunk of tangents is part of the whole"


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("offset", [0, 4, 1021, 2**40 + 64 * 3, 2**62 + 63])
def test_offsets(kernels, name, distribution, offset):
    for size in (128, 68, 63):  # a multiple of the group, of the quads that are stored at once, of neither
        sampled(kernels, name, 5, size, 34, 1, distribution, offset=offset)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("size", [1024, 2500])
def test_long_rows(kernels, distribution, size):
    for name in ("float32", "bfloat16"):
        sampled(kernels, name, 9, size, 5, 1, distribution, offset=1024 if size == 1024 else 77, split=4096)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_float32_sums_of_one_sign_do_not_drift(kernels, distribution):
    """Tensor cores cut sums off: over a long row of products of one sign it would show."""
    size, offset = 4096, 0
    v = drawn(1, 3, size, offset, 0, distribution)
    dy, exact = sampled(kernels, "float32", 3, size, 3, 1, distribution, offset=offset, x=v[0].float(), split=4096)
    diagonal = (dy[0].diagonal().double() / exact[0].diagonal() - 1).abs().max().item()
    assert diagonal < 1e-6


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", DTYPES)
def test_columns_divided_among_blocks(kernels, name, distribution):
    for split in (64, 128):
        sampled(kernels, name, 7, 257, 9, 2, distribution, split=split, dbias=True, slope=True)


EXTRAS = [
    dict(filled=filled, dbias=dbias, activity=activity, slope=slope)
    for filled, dbias, activity, slope in itertools.product((False, True), (False, True), (0, 1, 3, 7), (False, True))
]


@pytest.mark.parametrize("extras", EXTRAS, ids=lambda e: "-".join(str(v) for v in e.values()))
def test_every_mix_of_what_is_added(kernels, extras):
    for name in ("float32", "bfloat16"):
        for out in (9, 16):
            sampled(kernels, name, 7, 20, out, 2, "rademacher", **extras)


@pytest.mark.parametrize("name", DTYPES)
def test_pointers_that_are_not_aligned(kernels, name):
    extras = dict(dbias=True, activity=7, slope=True)
    for out in (9, 16):
        sampled(kernels, name, 7, 24, out, 2, "normal", skew=True, **extras)


@pytest.mark.parametrize("name", ["float64", "bfloat16", "float16"])
def test_x_that_is_read_as_it_is(kernels, name):
    for size in (8, 72, 104):
        unpacked, _ = sampled(kernels, name, 33, size, 9, 2, "normal", unpacked=True)
        packed, _ = sampled(kernels, name, 33, size, 9, 2, "normal")
        assert torch.equal(unpacked, packed)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", DTYPES)
def test_order_of_threads_does_not_matter(kernels, name, distribution):
    results = [
        sampled(kernels, name, 40, 130, 40, 1, distribution, offset=offset, seed=seed)[0]
        for seed in (1, 2, 3)
        for offset in (0, 13)
    ]
    assert all(torch.equal(a, b) for a, b in zip(results, results[2:]))


def test_against_the_reference_that_draws_by_itself(kernels):
    for distribution in DISTRIBUTIONS:
        dy, _ = sampled(kernels, "float32", 5, 70, 33, 3, distribution, first=2, offset=13)
        x = randn(5, 70, dtype=torch.float32, seed=1)
        weight = torch.zeros(33, 70)
        how = dict(state=STATE, k=3, first=2, distribution=distribution, weight_offset=13)
        assert_close32(dy, reference.linear_jvp(x, None, weight, **how)[1])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", DTYPES)
def test_values_that_are_not_finite_stay_in_their_row(kernels, name, distribution):
    x = randn(6, 70, dtype=DTYPES[name])
    x[2, 3], x[4, 69] = float("nan"), float("-inf")
    if name == "float32":
        x[2, 3] = torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32)  # a NaN by its last bit alone
        x[5, 5] = torch.finfo(torch.float32).max / 100
    args = [name, 6, 70, 9, 2, DISTRIBUTIONS.index(distribution)]
    (dy,) = kernels.run(
        f"sampled_{name}", x, STATE, None, None, None, Out((2, 6, 9), x.dtype), *args[1:5], 0, args[5], 0, 1, 0, 0, 0, 0
    )
    assert dy[:, 2].isnan().all() and not dy[:, 4].isfinite().any()
    assert dy[:, [0, 1, 3, 5]].isfinite().all()


@pytest.mark.parametrize("name", DTYPES)
def test_a_step_that_is_none_gives_nan(kernels, name):
    for distribution in (0, 1):
        args = (4, 9, 5, 1, 0, distribution, 0, 1, 0, 0, 0, 0)
        x = torch.ones(4, 9, dtype=DTYPES[name])
        (dy,) = kernels.run(f"sampled_{name}", x, torch.tensor([1, 2**32]), None, None, None, Out((1, 4, 5), x.dtype), *args)
        assert dy.isnan().all()


@pytest.mark.parametrize("name", DTYPES)
def test_empty(kernels, name):
    for rows, size, out in [(0, 9, 5), (4, 9, 0)]:
        dy, _ = sampled(kernels, name, rows, size, out, 2, "normal")
        assert dy.shape == (2, rows, out)


# ---- the last step on its own


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("k, rows, out", [(1, 1, 1), (3, 7, 33), (5, 33, 16), (16, 5, 7), (4, 65, 48)])
def test_finish(kernels, name, k, rows, out):
    dtype, compute = DTYPES[name], compute_type(DTYPES[name])
    for mix in itertools.product((False, True), repeat=5):
        filled, product, parts, bias, slope = mix
        period = rows if product else 1
        given = {
            "dy": randn(k, rows, out, dtype=dtype, seed=1) if filled else None,
            "product": randn(k, rows, out, dtype=dtype, seed=2) if product else None,
            "partials": randn(3, k, rows, out, dtype=compute, seed=3) if parts else None,
            "dbias": randn(k, out, dtype=dtype, seed=4) if bias else None,
            "activity": randn(k, period, out, dtype=dtype, seed=5),
            "slope": randn(rows, out, dtype=compute, seed=6) if slope else None,
        }
        (dy,) = kernels.run(
            f"finish_{name}",
            InOut(given["dy"]) if filled else Out((k, rows, out), dtype),
            *list(given.values())[1:],
            filled,
            3 if parts else 0,
            False,
            k,
            rows,
            out,
            period,
        )
        exact = given["activity"].double().expand(k, rows, out)
        for t in (given["dy"], given["product"], given["dbias"] if not bias else given["dbias"][:, None]):
            exact = exact if t is None else exact + t.double()
        exact = exact + given["partials"].double().sum(0) if parts else exact
        exact = exact * given["slope"].double() if slope else exact
        check(dy, exact.to(dtype), exact, 1)


def test_slopes_of_zero_stop_what_is_not_finite(kernels):
    dy = torch.tensor([[[float("inf"), float("nan"), 2.0]]])
    slope = torch.tensor([[0.0, 0.0, 1.0]])
    args = (None, None, None, torch.zeros(1, 1, 3), slope, True, 0)
    (stopped,) = kernels.run("finish_float32", InOut(dy), *args, True, 1, 1, 3, 1)
    assert stopped.tolist() == [[[0, 0, 2]]]
    (multiplied,) = kernels.run("finish_float32", InOut(dy), *args, False, 1, 1, 3, 1)
    assert multiplied[0, 0, :2].isnan().all()


PARAMETERS = {"softplus": (2.0, 5.0), "elu": (1.3, 0.0), "leaky_relu": (0.1, 0.0), "hardtanh": (-0.5, 2.0)}


@pytest.mark.parametrize("name", DTYPES)
def test_bias_and_activation(kernels, name):
    dtype, compute = DTYPES[name], compute_type(DTYPES[name])
    for code, (function, f) in enumerate(reference.POINTWISE.items()):
        assert list(ops.POINTWISE)[code] == function
        alpha, beta = PARAMETERS.get(function, (0.0, 0.0))
        for rows, out, with_bias, with_slope in [
            (7, 33, True, True),
            (5, 16, True, True),
            (33, 8, False, True),
            (3, 5, True, False),
        ]:
            y = randn(rows, out, dtype=dtype, seed=code)
            bias = randn(out, dtype=dtype, seed=1) if with_bias else None
            results = kernels.run(
                f"activate_rows_{name}",
                InOut(y),
                bias,
                Out((rows, out), compute) if with_slope else None,
                rows,
                out,
                code,
                alpha,
                beta,
            )
            exact = f(y.double() if bias is None else y.double() + bias.double(), alpha, beta)
            check(results[0], exact[0].to(dtype), exact[0], 1)
            if with_slope:
                check(results[1], exact[1], exact[1], 1)


@pytest.mark.parametrize("name", DTYPES)
def test_standard_basis(kernels, name):
    rows, size, out, offset = 300, 7, 5, 1000
    x, before = randn(rows, size, dtype=DTYPES[name]), randn(5, rows, out, dtype=DTYPES[name], seed=1)
    coordinates = torch.tensor([offset, offset + 34, offset - 1, offset + 35, -1])  # first and last element, just outside
    (dy,) = kernels.run(f"basis_product_{name}", x, coordinates, InOut(before), rows, size, out, 5, offset)
    expected = before.clone()
    expected[0, :, 0] += x[:, 0]
    expected[1, :, 4] += x[:, 6]
    assert torch.equal(dy[:4], expected[:4])
    assert dy[4].isnan().all(), "a negative coordinate is none"


def test_add(kernels):
    a, b = randn(33, 33), randn(33, 33, seed=1)
    assert torch.equal(kernels.run("add", InOut(a), b, 33 * 33)[0], a + b)


# ---- the operator on a GPU


@pytest.mark.cuda
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", DTYPES)
def test_layers_of_every_size_on_a_gpu(name, distribution):
    """Rows for both tiles, columns for one block and for several, offsets that suit groups and others."""
    dtype = DTYPES[name]
    for rows, size, out, k in [(300, 784, 70, 3), (64, 5000, 10, 1), (5, 64, 64, 16), (129, 1024, 128, 2), (1, 1, 1, 1)]:
        for offset in (0, 1021):
            x, weight = randn(rows, size, dtype=dtype), randn(out, size, dtype=dtype, seed=1)
            activity = randn(k, rows, out, dtype=dtype, seed=2)
            how = dict(k=k, first=1, distribution=distribution, weight_offset=offset, want_gram=True)
            _, dy, gram = ops.linear_jvp(x.cuda(), None, weight.cuda(), activity=activity.cuda(), state=STATE.cuda(), **how)
            dw = drawn(k, out, size, offset, 1, distribution)
            own = x @ dw.to(dtype).mT + activity
            check(dy.cpu(), own, x.double() @ dw.mT + activity.double(), size)
            assert_close64(gram.cpu(), reference.gram(dw.flatten(1)), 1e-6)
            again = ops.linear_jvp(x.cuda(), None, weight.cuda(), activity=activity.cuda(), state=STATE.cuda(), **how)
            assert torch.equal(dy, again[1]), "the same bits every run"


@pytest.mark.cuda
@pytest.mark.parametrize("name", DTYPES)
def test_factors_of_weight_tangents_on_a_gpu(name):
    dtype, k, r = DTYPES[name], 3, 2
    for rows, size, out in [(300, 784, 70), (5, 64, 64), (1, 1, 1), (0, 7, 9)]:
        x, dx, weight = (
            randn(rows, size, dtype=dtype),
            randn(k, rows, size, dtype=dtype, seed=1),
            randn(out, size, dtype=dtype, seed=2),
        )
        left, right = randn(k, r, out, dtype=dtype, seed=3), randn(k, r, size, dtype=dtype, seed=4)
        for incoming in (None, dx):
            given = dict(x=x, dx=incoming, weight=weight, left=left, right=right)
            on_gpu = {n: None if t is None else t.cuda() for n, t in given.items()}
            _, dy, _ = ops.linear_jvp(**on_gpu, k=k, activation="tanh")
            _, own, _ = ops.linear_jvp(**given, k=k, activation="tanh")
            check(dy.cpu(), own, reference.linear_jvp(**given, k=k, activation="tanh")[1], size)
