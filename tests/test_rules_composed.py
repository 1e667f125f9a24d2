from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from against_func import along, check, check_with_differences, draw, dual
from helpers import assert_close64

import frog_cuda as frog
from frog_cuda.dual import DualTensor


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("zeros", [0, 1, 2])
def test_products_with_zero_factors(zeros, include_self):
    """Rows 0 and 1 of the result get three factors each, of which some are zero; row 2 gets none."""
    x, src = draw(3, 5), draw(6, 5, seed=2)
    src[:zeros] = 0
    x[1, ::2] = 0
    index = torch.tensor([0, 0, 0, 1, 1, 1])

    def scattered(x, src):
        return x.scatter_reduce(0, index[:, None].expand(6, 5), src, "prod", include_self=include_self)

    moved = check_with_differences(scattered, x, src)
    primals, tangents = (x, src), along(x, src)
    reduced = frog.jvp(lambda x, src: x.index_reduce(0, index, src, "prod", include_self=include_self), primals, tangents)[1]
    assert_close64(reduced, moved)


@pytest.mark.parametrize("perturbed", [0, 1])
def test_products_with_one_perturbed_argument(perturbed):
    x, src, index = draw(4), draw(7, seed=2), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    both = [x, src]

    def fn(v):
        arguments = list(both)
        arguments[perturbed] = v
        return arguments[0].scatter_reduce(0, index, arguments[1], "prod")

    check_with_differences(fn, both[perturbed])


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0, float("inf")])
def test_distances(p):
    check_with_differences(lambda a, b: torch.cdist(a, b, p=p), draw(2, 7, 3), draw(2, 5, 3, seed=2))
    check_with_differences(lambda a: F.pdist(a, p=p), draw(7, 3))


def test_a_distance_of_zero_has_no_tangent():
    """The subgradient that PyTorch's backward mode takes."""
    x = draw(4, 3)
    duals = [DualTensor(x, t) for t in along(x, x)]
    assert not torch.cdist(*duals).tangents.diagonal(dim1=1, dim2=2).any()


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
def test_sampling_from_a_grid(mode, padding_mode):
    x, grid = draw(2, 3, 5, 7), torch.tanh(draw(2, 4, 3, 2, seed=2)) * 1.2
    check_with_differences(
        lambda x, grid: F.grid_sample(x, grid, mode=mode, padding_mode=padding_mode, align_corners=False), x, grid
    )


def test_sampling_keeps_low_precision_tangents():
    x, grid = draw(1, 2, 5, 5).float(), torch.tanh(draw(1, 3, 3, 2, seed=2)).float()
    low = DualTensor(grid, along(grid)[0].bfloat16())
    out = F.grid_sample(DualTensor(x, along(x)[0].bfloat16()), low, align_corners=False)
    assert out.tangents.dtype == torch.bfloat16 and out.primal.dtype == torch.float32


def test_a_step_takes_the_tangents_of_its_middle():
    x, middle = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64), draw(3)
    tangents = along(x, middle)
    assert_close64(
        frog.jvp(torch.heaviside, (x, middle), tangents)[1], torch.where(x == 0, tangents[1], torch.zeros_like(tangents[1]))
    )


def test_linear_cross_entropy_in_chunks():
    module = pytest.importorskip("torch.nn.modules.linear_cross_entropy_options", reason="needs torch 2.13")
    options = module.LinearCrossEntropyOptions()
    x, w, target = draw(5, 7), draw(4, 7, seed=2), torch.tensor([0, 3, 1, 2, 2])
    chunked, whole = (
        frog.jvp(lambda x, w, o=o: F.linear_cross_entropy(x, w, target, options=o), (x, w), along(x, w))
        for o in (options, None)
    )
    assert_close64(chunked[0], whole[0])
    assert_close64(chunked[1], whole[1])


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shape", [(4, 5), (4,), ()], ids=str)
def test_index_fill_with_any_of_its_arguments_perturbed(shape, k):
    index, x, value = torch.tensor([0, 2, 0] if shape else [0]), draw(*shape), draw(seed=2)
    check(lambda x, value: x.index_fill(0, index, value), x, value, k=k)
    check(lambda x, value: (x * 1).index_fill_(-1, index, value), x, value, k=k)
    check(lambda x: x.index_fill(0, index, value), x, k=k)
    tangents = torch.arange(1, k + 1, dtype=torch.float64)
    _, moved = frog.jvp(lambda value: x.index_fill(0, index, value), (value,), (tangents,))
    filled = torch.zeros(shape, dtype=torch.float64).index_fill(0, index, 1.0)
    assert torch.equal(moved, tangents.view(k, *(1,) * len(shape)) * filled)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
def test_sequences_of_different_lengths(side, batch_first):
    def padded(a, b, c):
        options = dict(batch_first=batch_first, padding_value=2.0, padding_side=side)
        return torch.nn.utils.rnn.pad_sequence([a, b, torch.ones(1, 3, dtype=a.dtype), c], **options)

    check(padded, draw(2, 3), draw(4, 3, seed=2), draw(4, 3, seed=3))
    check(lambda a, b: torch.nn.utils.rnn.pad_sequence([a, b]), draw(2), draw(5, seed=2))
    a, b = dual(draw(4, 3)), dual(draw(2, 3, seed=2), seed=5)
    packed = torch.nn.utils.rnn.pack_sequence([a, b]).data
    for part in ("primal", "tangents"):
        rows = [getattr(t, part)[..., i, :] for i in range(4) for t in (a, b)[: 1 if i > 1 else 2]]
        assert torch.equal(getattr(packed, part), torch.stack(rows, -2))
    with pytest.raises(RuntimeError, match="size"):
        torch.nn.utils.rnn.pad_sequence([dual(draw(2, 3)), dual(draw(2, 4))])
