"""The CUDA kernels of the tangents' operators, run on the host, against the CPU operators and the float64 reference."""

from __future__ import annotations

import pytest
import torch
from cuda_on_cpu.client import InOut, Kernels, Out, Skewed
from helpers import assert_as_good_as_torch, assert_close32, assert_close64

from frog_cuda import ops, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DISTRIBUTIONS = ["normal", "rademacher", "standard_basis"]
OFFSETS = [0, 5, 8190, 2**32 + 16, 2**62 + 1023]


@pytest.fixture(scope="module")
def kernels():
    kernels = Kernels("tangents")
    yield kernels
    kernels.close()


def state_for(distribution, k, numel, offset=0):
    """[seed, step], or coordinates of which some fall into the range asked for, some beside it and two together."""
    if distribution != "standard_basis":
        return torch.tensor([-11, 4])
    hits = [offset + numel // 2, max(offset - 1, 0), offset + numel - 1, offset, offset + numel, offset + numel // 2]
    return torch.tensor((hits * k)[:k])


def sample(kernels, state, k, numel, offset=0, first=0, distribution="normal", dtype=torch.float32, skew=0, seed=0):
    out = Out((k, numel), dtype, skew * dtype.itemsize)
    code = ops.DISTRIBUTIONS[distribution]
    return kernels.run(
        "sample_tangents", state, out, k, numel, offset, first, code, DTYPES.index(dtype), seed=seed
    )[0]  # fmt: skip


def combine(kernels, state, c, target, offset=0, first=0, distribution="normal", add=False, alpha=1.0, seed=0):
    """``target``: an Out, or a tensor to add to."""
    tensor = InOut(target) if add else target
    shape, dtype = (target.shape, target.dtype) if add else (target.shape, target.dtype)
    code = ops.DISTRIBUTIONS[distribution]
    return kernels.run(
        "tangent_combine",
        *(state, c.double(), tensor, len(c), shape[0], offset, first, code, DTYPES.index(dtype), add, alpha),
        seed=seed,
    )[0]


def sgd(kernels, state, c, p, buffer, options, offset=0, first=0, distribution="normal", fresh=False, seed=0):
    """Parameter and buffer after a step; buffer None: without momentum."""
    code, dtype = ops.DISTRIBUTIONS[distribution], DTYPES.index(p.dtype)
    tensors = (InOut(p), None if buffer is None else InOut(buffer))
    numbers = (len(c), len(p), offset, first, code, dtype, options.get("nesterov", False), fresh)
    rates = (options.get(name, 0.0) for name in ("lr", "momentum", "dampening", "weight_decay"))
    return kernels.run("tangent_sgd", state, c.double(), *tensors, *numbers, *rates, seed=seed)


def workspace(kernels, k, n):
    """Filled with NaN: what the first kernel leaves out, the second finds."""
    return Out((int(kernels.run("gram_workspace", Out((1,), torch.int64), k, n)[0]),), torch.float64)


def tangent_gram(kernels, state, k, numel, offset=0, first=0, distribution="normal", seed=0):
    code = ops.DISTRIBUTIONS[distribution]
    work = workspace(kernels, k, numel)
    out = Out((k, k), torch.float64)
    return kernels.run("tangent_gram", state, work, out, k, numel, offset, first, code, seed=seed)[1]


def gram(kernels, tangents, k, n, stride, dtype, seed=0):
    out = Out((k, k), torch.float64)
    work = workspace(kernels, k, n)
    return kernels.run("gram", tangents, work, out, k, n, stride, DTYPES.index(dtype), seed=seed)[1]


# ---- what is drawn


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("numel", [1, 7, 33, 1025])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_sample_equals_the_cpu_bit_for_bit(kernels, distribution, numel, offset):
    state = state_for(distribution, 5, numel, offset)
    drawn = sample(kernels, state, 3, numel, offset, 2, distribution)
    assert torch.equal(drawn, ops.sample_tangents(state, 3, numel, offset=offset, first=2, distribution=distribution))


@pytest.mark.parametrize("skew", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_sample_in_every_dtype(kernels, distribution, dtype, skew):
    state = state_for(distribution, 2, 4800, 32)
    drawn = sample(kernels, state, 2, 4800, 32, 0, distribution, dtype, skew)
    assert torch.equal(drawn, ops.sample_tangents(state, 2, 4800, offset=32, distribution=distribution, dtype=dtype))


@pytest.mark.parametrize("k, numel", [(1, 600_001), (16, 2501), (40, 35_001)])  # 64 blocks on the emulated device
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_sample_strides_over_rows_and_windows(kernels, distribution, k, numel):
    state = state_for(distribution, k, numel, 3)
    drawn = sample(kernels, state, k, numel, 3, 0, distribution, torch.bfloat16)
    expected = ops.sample_tangents(state, k, numel, offset=3, distribution=distribution, dtype=torch.bfloat16)
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize("state", [[0, 2**32 - 1], [2**63 - 1, 0], [-(2**63), 1]], ids=str)
@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_the_whole_range_of_seeds_steps_and_tangents(kernels, distribution, state):
    first = 2**32 - 2
    drawn = sample(kernels, torch.tensor(state), 2, 300, 0, first, distribution)
    expected = ops.sample_tangents(torch.tensor(state), 2, 300, first=first, distribution=distribution)
    assert torch.equal(drawn, expected)


# ---- linear combinations


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 5, 16])
@pytest.mark.parametrize("numel", [7, 1025])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_combine_and_axpy(kernels, distribution, numel, k, dtype):
    offset = 1021
    state = state_for(distribution, k + 2, numel, offset)
    c = torch.randn(k, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start = torch.randn(numel, generator=torch.Generator().manual_seed(1)).to(dtype)
    combined = combine(kernels, state, c, Out((numel,), dtype), offset, 2, distribution)
    moved = combine(kernels, state, c, start, offset, 2, distribution, True, -0.3)
    expected = ops.tangent_combine(state, c, numel, offset=offset, first=2, distribution=distribution, dtype=dtype)
    expected_moved = ops.tangent_axpy_(
        start.clone(), state, c, alpha=-0.3, offset=offset, first=2, distribution=distribution
    )  # fmt: skip
    if distribution != "normal":  # the same sums in the same order
        assert torch.equal(combined, expected) and torch.equal(moved, expected_moved)
    v = ops.sample_tangents(state, k, numel, offset=offset, first=2, distribution=distribution, dtype=torch.float64)
    for actual, exact in ((combined, c @ v), (moved, start.double() - 0.3 * (c @ v))):
        if dtype == torch.float64:
            assert_close64(actual, exact)
        elif dtype == torch.float32:
            assert_close32(actual, exact)
        else:
            assert_as_good_as_torch(actual, exact.to(dtype), exact)


@pytest.mark.parametrize("skew", [0, 1])
@pytest.mark.parametrize("offset", [0, 2**40 + 1])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_combine_where_rows_are_aligned_and_where_not(kernels, distribution, offset, skew):
    n = 160_000 if distribution == "rademacher" else 40_000  # more windows than the emulated device has warps
    state, c = state_for(distribution, 3, n, offset), torch.tensor([0.5, -2.0, 1.0])
    combined = combine(kernels, state, c, Out((n,), torch.float32, 4 * skew), offset, 0, distribution, seed=skew)
    assert_close32(combined, reference.tangent_combine(state, c, n, offset=offset, distribution=distribution))


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_more_coefficients_than_a_block_holds(kernels, distribution):
    """In order over two tiles of coefficients, for one window and, with striding blocks, for several."""
    k = 515
    c = torch.linspace(-1, 2, k, dtype=torch.float64)
    state = torch.tensor([3, 1])
    combined = combine(kernels, state, c, Out((70,), torch.float64), 9, 0, distribution)
    assert_close64(combined, c @ ops.sample_tangents(
        state, k, 70, offset=9, distribution=distribution, dtype=torch.float64
    ))  # fmt: skip


def test_a_whole_basis_on_one_coordinate_is_added_in_order(kernels):
    state = torch.full((300,), 6)
    c = torch.randn(300, generator=torch.Generator().manual_seed(0))
    combined = combine(kernels, state, c, Out((9,), torch.float32), 0, 0, "standard_basis")
    assert torch.equal(combined, ops.tangent_combine(state, c, 9, distribution="standard_basis"))


# ---- combinations for every sample


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch, numel", [(1, 1), (7, 1), (5, 3), (9, 33), (3, 700), (2, 1024), (4, 512)])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_combine_samples(kernels, distribution, batch, numel, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for k, offset, skew in ((1, 0, 0), (5, 1021, 1)):
        state = state_for(distribution, k + 2, batch * numel, offset)
        c = torch.randn(k, batch, generator=torch.Generator().manual_seed(0), dtype=wide)
        code, out = ops.DISTRIBUTIONS[distribution], Out((batch, numel), dtype, skew * dtype.itemsize)
        numbers = (k, batch, numel, offset, 2, code, DTYPES.index(dtype))
        (actual,) = kernels.run("tangent_combine_samples", state, c, out, *numbers, seed=k)
        how = dict(offset=offset, first=2, distribution=distribution)
        exact = ops.tangent_combine_samples(state, c, numel, dtype=torch.float64, **how)
        if dtype == torch.float64:
            assert_close64(actual, exact)
        elif dtype == torch.float32:
            assert_close32(actual, exact)
        else:
            assert_as_good_as_torch(actual, exact.to(dtype), exact)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_combine_samples_strides_over_windows(kernels, distribution):
    batch, numel = 160 if distribution == "rademacher" else 40, 1001
    state, c = state_for(distribution, 3, batch * numel, 3), torch.randn(3, batch, generator=torch.Generator().manual_seed(0))
    code = ops.DISTRIBUTIONS[distribution]
    (actual,) = kernels.run("tangent_combine_samples", state, c, Out((batch, numel)), 3, batch, numel, 3, 0, code, 0)
    assert_close32(actual, ops.tangent_combine_samples(
        state, c, numel, offset=3, distribution=distribution, dtype=torch.float64
    ))  # fmt: skip


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_samples_of_a_step_out_of_range_are_nan(kernels, distribution):
    for code, state in ((ops.DISTRIBUTIONS[distribution], [1, 2**32]), (2, [3, -1])):
        c = torch.ones(2, 4)
        (actual,) = kernels.run("tangent_combine_samples", torch.tensor(state), c, Out((4, 99)), 2, 4, 99, 0, 0, code, 0)
        assert actual.isnan().all()


# ---- steps of SGD

SGD = [
    dict(lr=0.1, weight_decay=0.1),
    dict(lr=0.1, momentum=0.9, dampening=0.3),
    dict(lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
]


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("options", SGD, ids=["decay", "momentum", "nesterov"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_sgd(kernels, distribution, dtype, options, fresh):
    for numel, offset in ((7, 1021), (1025, 1021), (2048, 1024)):  # the last is aligned
        state, c = state_for(distribution, 5, numel, offset), torch.tensor([0.5, -2.0, 1.0])
        p = torch.randn(numel, generator=torch.Generator().manual_seed(1)).to(dtype)
        kept = p.flip(0) if "momentum" in options else None
        if fresh and kept is not None:
            kept.fill_(float("nan"))  # is not read
        found = sgd(kernels, state, c, p, kept, options, offset, 2, distribution, fresh)
        exact = [p.double(), *([] if kept is None else [kept.double()])]
        how = dict(options, offset=offset, first=2, distribution=distribution, fresh=fresh)
        twin = [p.clone(), None if kept is None else kept.clone()]
        ops.tangent_sgd_(exact[0], exact[1] if kept is not None else None, state, c, **how)
        ops.tangent_sgd_(*twin, state, c, **how)
        for actual, wanted, host in zip(found, exact, [t for t in twin if t is not None], strict=True):
            if dtype == torch.float64:
                assert_close64(actual, wanted)
            elif dtype == torch.float32:
                assert_close32(actual, wanted)
            else:
                assert_as_good_as_torch(actual, wanted.to(dtype), wanted)
            if distribution != "normal":  # the same sums in the same order, and the same operations on them
                assert torch.equal(actual, host)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_sgd_strides_over_windows(kernels, distribution):
    n = 160_000 if distribution == "rademacher" else 40_000
    state, c = state_for(distribution, 3, n, 3), torch.tensor([0.5, -2.0, 1.0])
    p, kept = torch.linspace(-1, 1, n), torch.linspace(1, -1, n)
    found = sgd(kernels, state, c, p, kept, SGD[2], 3, 0, distribution)
    exact = p.double(), kept.double()
    ops.tangent_sgd_(*exact, state, c, offset=3, distribution=distribution, **SGD[2])
    for actual, wanted in zip(found, exact, strict=True):
        assert_close32(actual, wanted)


# ---- Gram matrices


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 8, 16, 17, 33, 64, 65, 100])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_gram_of_drawn_tangents(kernels, distribution, k):
    numel, offset = (1025, 1021) if k <= 16 else (83, 61)
    state = state_for(distribution, k + 1, numel, offset)
    actual = tangent_gram(kernels, state, k, numel, offset, 1, distribution, seed=k)
    expected = ops.tangent_gram(state, k, numel, offset=offset, first=1, distribution=distribution)
    if distribution == "normal":
        assert torch.equal(actual, actual.T)
        assert_close64(actual, expected)
    else:
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("numel, offset", [(1, 0), (33, 2**32 + 31), (64, 64), (1024, 1024), (5000, 2**62 + 7)])
@pytest.mark.parametrize("k", [2, 9])
@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_gram_at_the_edges_of_groups(kernels, distribution, k, numel, offset):
    state = torch.tensor([5, 2**32 - 1])
    actual = tangent_gram(kernels, state, k, numel, offset, 0, distribution)
    expected = ops.tangent_gram(state, k, numel, offset=offset, distribution=distribution)
    assert_close64(actual, expected, 0 if distribution == "rademacher" else 1e-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 1025), (3, 7), (7, 33), (16, 1025), (33, 80), (70, 48), (5, 0)])
def test_gram_of_given_tangents(kernels, shape, dtype):
    k, n = shape
    v = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = reference.gram(v)
    for tangents in (v, Skewed(v)):
        actual = gram(kernels, tangents, k, n, n, dtype)
        assert torch.equal(actual, actual.T)
        assert_close64(actual, expected)
    wide = torch.full((k, n + 8), float("nan"), dtype=dtype)
    wide[:, :n] = v
    assert_close64(gram(kernels, wide, k, n, n + 8, dtype, seed=1), expected)


@pytest.mark.parametrize("k", [2, 20])
def test_values_that_are_not_finite_stay_in_their_row(kernels, k):
    v = torch.randn(k, 40, generator=torch.Generator().manual_seed(0))
    v[1, 3] = float("nan")
    actual = gram(kernels, v, k, 40, 40, torch.float32)
    touched = torch.zeros(k, k, dtype=torch.bool)
    touched[1] = touched[:, 1] = True
    assert torch.equal(actual.isnan(), touched)
    assert_close64(actual[~touched], reference.gram(v)[~touched])


# ---- the order of threads, empty results, and what a kernel cannot refuse


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_same_bits_whatever_the_order_of_threads(kernels, distribution):
    k, n = 5, 3001
    state, c = state_for(distribution, k, n), torch.linspace(1, 2, k)
    seen = [
        [
            sample(kernels, state, k, n, 0, 0, distribution, seed=seed),
            combine(kernels, state, c, Out((n,), torch.float32), 0, 0, distribution, seed=seed),
            combine(kernels, state, c, torch.ones(n), 0, 0, distribution, True, seed=seed),
            tangent_gram(kernels, state, k, n, 0, 0, distribution, seed=seed),
            gram(kernels, ops.sample_tangents(state, k, n, distribution=distribution), k, n, n, torch.float32, seed=seed),
        ]
        for seed in (0, 1, 2)
    ]
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_empty(kernels, distribution):
    state = state_for(distribution, 3, 1)
    assert sample(kernels, state, 3, 0, 5, 0, distribution).shape == (3, 0)
    assert combine(kernels, state, torch.ones(3), Out((0,)), 5, 0, distribution).shape == (0,)
    assert torch.equal(tangent_gram(kernels, state, 3, 0, 5, 0, distribution), torch.zeros(3, 3, dtype=torch.float64))


@pytest.mark.parametrize("step", [-1, 2**32, -(2**63)])
@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_a_step_out_of_range_gives_nan(kernels, distribution, step):
    state = torch.tensor([1, step])
    for dtype in DTYPES:
        assert sample(kernels, state, 3, 1025, 5, 0, distribution, dtype).isnan().all()
    assert combine(kernels, state, torch.ones(2), Out((1025,)), 5, 0, distribution).isnan().all()
    assert combine(kernels, state, torch.ones(2), torch.ones(1025), 5, 0, distribution, True).isnan().all()
    for moved in sgd(kernels, state, torch.ones(2), torch.ones(1025), torch.ones(1025), SGD[1], 5, 0, distribution):
        assert moved.isnan().all()
    assert tangent_gram(kernels, state, 3, 1025, 5, 0, distribution).isnan().all()


def test_a_negative_coordinate_gives_nan(kernels):
    state = torch.tensor([3, -1, 4])
    drawn = sample(kernels, state, 3, 1025, 0, 0, "standard_basis")
    assert drawn[1].isnan().all() and drawn[0].sum() == 1 and drawn[2].sum() == 1
    assert combine(kernels, state, torch.ones(3), Out((1025,)), 0, 0, "standard_basis").isnan().all()
    assert combine(kernels, state, torch.ones(3), torch.ones(1025), 0, 0, "standard_basis", True).isnan().all()
    for moved in sgd(kernels, state, torch.ones(3), torch.ones(1025), torch.ones(1025), SGD[1], 0, 0, "standard_basis"):
        assert moved.isnan().all()
    nan = float("nan")
    expected = torch.tensor([[1, nan, 0], [nan, nan, nan], [0, nan, 1]], dtype=torch.float64)
    actual = tangent_gram(kernels, state, 3, 1025, 0, 0, "standard_basis")
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
