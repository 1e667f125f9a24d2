"""On a GPU: drawing, combining and Gram matrices give what the CPU gives, wherever the result lies and whatever runs beside."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close32, assert_close64, relative_error

from frog_cuda import ops, reference

pytestmark = pytest.mark.cuda

DEVICE = "cuda"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DISTRIBUTIONS = ["normal", "rademacher", "standard_basis"]
RANGES = [(1, 0), (7, 5), (1025, 1021), (4096, 2**32), (100_003, 2**62 + 1023)]


def state_for(distribution, k, numel, offset=0):
    if distribution != "standard_basis":
        return torch.tensor([-11, 4])
    hits = [offset + numel // 2, max(offset - 1, 0), offset + numel - 1, offset, offset + numel, offset + numel // 2]
    return torch.tensor((hits * k)[:k])


def units_in_the_last_place(actual, expected):
    """Largest distance between two float32 tensors, counted in representable numbers."""
    ordered = [
        torch.where(t.view(torch.int32) < 0, -(t.view(torch.int32) & 0x7FFFFFFF), t.view(torch.int32))
        for t in (actual, expected)
    ]
    return (ordered[0].long() - ordered[1].long()).abs().max().item()


@pytest.mark.parametrize("numel, offset", RANGES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_sample_equals_the_cpu(distribution, numel, offset):
    state = state_for(distribution, 6, numel, offset)
    for k, dtype in [(1, torch.float32), (5, torch.float32), (3, torch.float64), (3, torch.bfloat16), (2, torch.float16)]:
        options = dict(offset=offset, first=1, distribution=distribution)
        actual = ops.sample_tangents(state.to(DEVICE), k, numel, dtype=dtype, **options).cpu()
        expected = ops.sample_tangents(state, k, numel, dtype=dtype, **options)
        if distribution == "normal" and dtype == torch.float32:
            assert units_in_the_last_place(actual, expected) <= 2
        elif distribution == "normal":
            assert relative_error(actual, expected) <= max(2**-21, torch.finfo(dtype).eps)
        else:
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("numel, offset", RANGES)
@pytest.mark.parametrize("k", [1, 4, 16, 600])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_combine_and_axpy_equal_the_cpu(distribution, k, numel, offset):
    if k * numel > 5_000_000:
        numel //= 50
    state = state_for(distribution, k, numel, offset)
    c = torch.randn(k, generator=torch.Generator().manual_seed(0))
    options = dict(offset=offset, distribution=distribution)
    start = torch.linspace(-1, 1, numel)
    actual = ops.tangent_combine(state.to(DEVICE), c.to(DEVICE), numel, **options).cpu()
    moved = ops.tangent_axpy_(start.clone().to(DEVICE), state.to(DEVICE), c.to(DEVICE), alpha=-0.3, **options).cpu()
    expected = ops.tangent_combine(state, c, numel, **options)
    expected_moved = ops.tangent_axpy_(start.clone(), state, c, alpha=-0.3, **options)
    if distribution == "normal":
        assert_close32(actual, expected.double())
        assert_close32(moved, expected_moved.double())
    else:
        assert torch.equal(actual, expected) and torch.equal(moved, expected_moved)


@pytest.mark.parametrize("batch, numel", [(1, 1), (33, 7), (64, 1000), (3, 100_003)])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_combine_samples_equals_the_cpu(distribution, batch, numel):
    state = state_for(distribution, 5, batch * numel, 1021)
    c = torch.randn(5, batch, generator=torch.Generator().manual_seed(0))
    options = dict(offset=1021, distribution=distribution)
    actual = ops.tangent_combine_samples(state.to(DEVICE), c.to(DEVICE), numel, **options).cpu()
    assert_close32(actual, ops.tangent_combine_samples(state, c, numel, dtype=torch.float64, **options))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "batch, channels, outputs, side, stride, groups",
    [
        (1, 3, 5, 7, 1, 1),
        (8, 64, 96, 14, 2, 1),
        (2, 300, 10, 4, 1, 1),
        (3, 10, 6, 9, 2, 2),
        (4, 192, 144, 6, 1, 2),
        (2, 33, 66, 7, 2, 33),
    ],
)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_sampled_convolution_equals_the_cpu(distribution, batch, channels, outputs, side, stride, groups, transposed, dtype):
    numel = 9 * channels * outputs // groups
    state = state_for(distribution, 5, numel, 77)
    x = torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(0)).to(dtype)
    more = stride - 1 if transposed else 0
    result = side * stride if transposed else (side - 1) // stride + 1
    places = dict(kernel=[3, 3], stride=[stride, stride], padding=[1, 1], dilation=[1, 1])
    places |= dict(transposed=transposed, output_padding=[more, more], groups=groups)
    target = torch.zeros(4, batch, outputs, result, result, dtype=dtype)
    options = dict(offset=77, first=1, distribution=distribution, **places)
    actual = ops.sampled_convolution_(target.to(DEVICE), x.to(DEVICE), state.to(DEVICE), add=False, **options).cpu()
    exact = ops.sampled_convolution_(target.double(), x.double(), state, **options)
    bound = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]  # elements are drawn in float32
    assert relative_error(actual, exact) <= bound


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("numel, offset", RANGES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_sgd_equals_the_cpu(distribution, numel, offset, fresh):
    state, c = state_for(distribution, 3, numel, offset), torch.tensor([0.5, -2.0, 1.0])
    how = dict(lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True, fresh=fresh, offset=offset, distribution=distribution)
    host = torch.linspace(-1, 1, numel), torch.linspace(1, 2, numel)
    device = tuple(t.to(DEVICE) for t in host)
    ops.tangent_sgd_(*host, state, c, **how)
    ops.tangent_sgd_(*device, state.to(DEVICE), c.to(DEVICE), **how)
    for actual, expected in zip(device, host, strict=True):
        assert_close32(actual.cpu(), expected.double())


@pytest.mark.parametrize("numel, offset", RANGES)
@pytest.mark.parametrize("k", [1, 2, 3, 7, 16, 33, 64, 65, 100])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_gram_of_drawn_tangents_equals_the_cpu(distribution, k, numel, offset):
    state = state_for(distribution, k, numel, offset)
    actual = ops.tangent_gram(state.to(DEVICE), k, numel, offset=offset, distribution=distribution).cpu()
    expected = ops.tangent_gram(state, k, numel, offset=offset, distribution=distribution)
    assert torch.equal(actual, actual.T)
    if distribution == "normal":
        assert_close64(actual, expected)
    else:
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 100_003), (3, 7), (16, 4096), (33, 1025), (64, 100_000), (100, 777), (5, 0)])
def test_gram_of_given_tangents_equals_the_cpu(shape, dtype):
    v = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = ops.gram(v)
    for tangents in (v.to(DEVICE), v.T.contiguous().to(DEVICE).T, torch.stack([v, v], 2).to(DEVICE)[..., 0]):
        assert_close64(ops.gram(tangents).cpu(), expected)
    wide = torch.full((shape[0], shape[1] + 9), float("nan"), dtype=dtype, device=DEVICE)
    wide[:, 1:-8] = v.to(DEVICE)
    assert_close64(ops.gram(wide[:, 1:-8]).cpu(), expected)


def everything(state, c, n, distribution, parameter):
    """What one step draws: tangents, their Gram matrices and combination, and a parameter moved along them."""
    k = len(c)
    v = ops.sample_tangents(state, k, n, offset=3, distribution=distribution)
    g = ops.tangent_gram(state, k, n, offset=3, distribution=distribution)
    combined = ops.tangent_combine(state, c, n, offset=3, distribution=distribution)
    ops.tangent_axpy_(parameter, state, c, alpha=0.5, offset=3, distribution=distribution)
    return v, g, ops.gram(v), combined, parameter


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_twenty_runs_give_the_same_bits(distribution):
    n, c = 300_001, torch.linspace(-1, 1, 9, device=DEVICE)
    state = torch.tensor([5, 6], device=DEVICE)
    first = everything(state, c, n, distribution, torch.ones(n, device=DEVICE))
    for _ in range(20):
        again = everything(state, c, n, distribution, torch.ones(n, device=DEVICE))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_axpy_into_views(distribution, dtype):
    """Not contiguous, and contiguous but not aligned; what lies beside stays."""
    state, c = torch.tensor([1, 2], device=DEVICE), torch.tensor([1.0, 0.5], device=DEVICE)
    dense = torch.zeros(41, 25, dtype=dtype, device=DEVICE)
    ops.tangent_axpy_(dense, state, c, distribution=distribution)
    assert dense.any()
    base = torch.zeros(25, 41, 2, dtype=dtype, device=DEVICE)
    ops.tangent_axpy_(base[..., 1].T, state, c, distribution=distribution)
    assert torch.equal(base[..., 1].T, dense) and not base[..., 0].any()
    flat = torch.zeros(1 + dense.numel() + 3, dtype=dtype, device=DEVICE)
    ops.tangent_axpy_(flat[1:-3], state, c, distribution=distribution)
    assert torch.equal(flat[1:-3], dense.reshape(-1)) and not flat[0] and not flat[-3:].any()


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_two_streams_do_not_disturb_each_other(distribution):
    n, c = 200_003, torch.linspace(-1, 1, 8, device=DEVICE)
    states = [torch.tensor([seed, 0], device=DEVICE) for seed in (1, 2)]
    expected = [everything(state, c, n, distribution, torch.zeros(n, device=DEVICE)) for state in states]
    parameters = [torch.zeros(n, device=DEVICE) for _ in states]
    streams = [torch.cuda.Stream() for _ in states]
    torch.cuda.synchronize()
    found = []
    for state, parameter, stream in zip(states, parameters, streams, strict=True):
        with torch.cuda.stream(stream):
            found.append(everything(state, c, n, distribution, parameter))
    torch.cuda.synchronize()
    for actual, wanted in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(actual, wanted, strict=True))


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_a_graph_whose_state_advances_draws_what_eager_steps_draw(distribution):
    n, c = 50_001, torch.linspace(-1, 1, 5, device=DEVICE)
    state = torch.tensor([9, 0], device=DEVICE)
    eager, expected = torch.zeros(n, device=DEVICE), []
    for step in range(3):
        at = torch.tensor([9, step], device=DEVICE)
        expected.append([t.clone() for t in everything(at, c, n, distribution, eager)])
    parameter = torch.zeros(n, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(state, c, n, distribution, parameter)
        state[1] += 1
    for wanted in expected:
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, wanted, strict=True))
    assert state.tolist() == [9, 3]


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_a_step_out_of_range_gives_nan(distribution):
    state, c = torch.tensor([1, 2**32], device=DEVICE), torch.ones(3, device=DEVICE)
    for result in everything(state, c, 1025, distribution, torch.zeros(1025, device=DEVICE)):
        assert result.isnan().all()


def test_a_negative_coordinate_gives_nan():
    state = torch.tensor([3, -1, 4], device=DEVICE)
    drawn = ops.sample_tangents(state, 3, 1025, distribution="standard_basis")
    assert drawn[1].isnan().all() and drawn[0].sum() == 1 and drawn[2].sum() == 1
    assert ops.tangent_combine(state, torch.ones(3, device=DEVICE), 9, distribution="standard_basis").isnan().all()
    gram = ops.tangent_gram(state, 3, 1025, distribution="standard_basis")
    assert (
        gram[1].isnan().all() and gram[:, 1].isnan().all() and torch.equal(gram[::2, ::2], torch.eye(2, device=DEVICE).double())
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s, c: ops.sample_tangents(s, 0, 5), "k is 0"),
        (lambda s, c: ops.sample_tangents(s, 1, -5), "numel is -5"),
        (lambda s, c: ops.sample_tangents(s, 2, 5, first=2**32 - 1), "first is 4294967295"),
        (lambda s, c: ops.sample_tangents(s.int(), 1, 5), "state has dtype Int"),
        (lambda s, c: ops.sample_tangents(s, 3, 5, distribution="standard_basis"), "state holds 2 coordinates"),
        (lambda s, c: ops.sample_tangents(s, 3, 5, dtype=torch.int64), "dtype is Long"),
        (lambda s, c: ops.tangent_gram(s, 2, 5, offset=-1), "offset is -1"),
        (lambda s, c: ops.gram(c), r"tangents has shape \(1,\)"),
        (lambda s, c: ops.tangent_combine(s, c[:0], 5), r"coefficients has shape \(0,\)"),
        (lambda s, c: ops.tangent_combine(s, c.long(), 5), "coefficients has dtype Long"),
        (lambda s, c: ops.tangent_axpy_(c.long(), s, c), "self has dtype Long"),
    ],
)
def test_bad_input_says_what_the_cpu_says(call, message):
    state, c = torch.tensor([1, 0], device=DEVICE), torch.ones(1, device=DEVICE)
    with pytest.raises(RuntimeError, match=message):
        call(state, c)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_blocks_are_those_of_single_calls(distribution):
    numels, offsets = [7, 1025, 0, 100_003], [5, 1021, 9, 2**40]
    state = state_for(distribution, 6, 1025, 1021).to(DEVICE)
    for k, dtype in [(1, torch.float32), (5, torch.float32), (3, torch.float64), (3, torch.bfloat16)]:
        options = dict(first=1, distribution=distribution, dtype=dtype)
        drawn = ops.sample_blocks(state, k, numels, offsets, **options)
        grams = ops.gram_blocks(drawn, k, numels)
        blocks = drawn.split([k * n for n in numels])
        for block, gram, n, at in zip(blocks, grams, numels, offsets, strict=True):
            assert torch.equal(block.view(k, n), ops.sample_tangents(state, k, n, offset=at, **options))
            assert torch.equal(gram, ops.gram(block.view(k, n)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_combinations_of_blocks_and_factors(dtype):
    k, r, numels, heights, widths = 5, 2, [7, 1025, 0], [33, 0, 7], [1025, 3, 1]
    generator = torch.Generator().manual_seed(0)
    c = torch.randn(k, generator=generator, dtype=torch.float64)
    blocks = torch.randn(k * sum(numels), generator=generator).to(dtype)
    factors = torch.randn(k * r * (sum(heights) + sum(widths)), generator=generator).to(dtype)
    # low precision is rounded once, at the end
    bound = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    for name, given in (("combine_blocks", (blocks, k, numels)), ("low_rank_combine", (factors, k, r, heights, widths))):
        found = getattr(ops, name)(given[0].to(DEVICE), *given[1:], c.to(DEVICE))
        for v, exact in zip(found, getattr(reference, name)(*given, c), strict=True):
            assert v.dtype == dtype and v.shape == exact.shape and relative_error(v.cpu(), exact) < bound
