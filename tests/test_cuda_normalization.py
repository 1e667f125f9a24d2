"""The CUDA kernels of normalization_jvp, run on the host, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cuda_on_cpu.client import Kernels
from cuda_on_cpu.pairs import NAMES, PAIRS, check, given, name_of, result
from helpers import assert_as_good_as_torch

from frog_cuda import reference

# name -> (x shape, weight shape, options)
LAYOUTS = {
    "layer": ((7, 33), (33,), dict(groups=7)),
    "layer, packed": ((7, 40), (40,), dict(groups=7)),
    "layer, a block": ((3, 1040), (1040,), dict(groups=3)),
    "layer, long": ((2, 9008), (9008,), dict(groups=2)),
    "layer, long, odd": ((2, 5001), (5001,), dict(groups=2)),
    "layer, one element": ((5, 1), (1,), dict(groups=5)),
    "rms": ((7, 33), (33,), dict(groups=7, centred=False)),
    "rms, long": ((2, 9008), (9008,), dict(groups=2, centred=False)),
    "group": ((2, 6, 5, 3), (6,), dict(groups=4, weight_groups=2)),
    "group, packed": ((2, 6, 4, 4), (6,), dict(groups=4, weight_groups=2)),
    "group, long": ((1, 4, 50, 50), (4,), dict(groups=2, weight_groups=2)),
    "group, long, packed": ((1, 4, 64, 72), (4,), dict(groups=2, weight_groups=2)),
    "instance": ((2, 3, 1025), (3,), dict(groups=6, weight_groups=3)),
    "batch": ((33, 4), (4,), dict(outer=33, groups=4, weight_groups=4)),
    "batch, long": ((1100, 3), (3,), dict(outer=1100, groups=3, weight_groups=3)),
    "batch, many channels": ((200, 40), (40,), dict(outer=200, groups=40, weight_groups=40)),
    "batch 2d": ((7, 5, 3, 4), (5,), dict(outer=7, groups=5, weight_groups=5)),
    "batch 2d, packed": ((7, 5, 4, 4), (5,), dict(outer=7, groups=5, weight_groups=5)),
    "batch 2d, long": ((5, 2, 32, 56), (2,), dict(outer=5, groups=2, weight_groups=2)),
    "batch 2d, odd runs": ((3, 2, 9, 9), (2,), dict(outer=3, groups=2, weight_groups=2)),
    "batch 3d": ((2, 1, 3, 4, 5), (1,), dict(outer=2, groups=1, weight_groups=1)),
    "one group of several channels": ((3, 4, 5), (4,), dict(outer=3, groups=1, weight_groups=1)),
    "channels in a batch group": ((3, 8, 8), (8,), dict(outer=3, groups=2, weight_groups=2)),
    "empty": ((0, 4), (4,), dict(groups=0)),
}
GIVEN = ["x----", "xw---", "xwWbB", "-wW--", "--.bB", "-wWbB", "x-.bB"]  # of dx, weight, dweight, bias, dbias


@pytest.fixture(scope="module")
def kernels():
    kernels = Kernels("normalization")
    yield kernels
    kernels.close()


def inputs(layout, k=3, dtype=torch.float64, tangent_dtype=None, present="xwWbB", offset=0.5):
    """Factors are in the type that is computed in, as the operator hands them on."""
    x_shape, w_shape, options = LAYOUTS[layout]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    factors = [draw(*shape, dtype=compute) for shape in (w_shape, (k, *w_shape), w_shape, (k, *w_shape))]
    tensors = [draw(k, *x_shape, dtype=tangent_dtype or dtype), *factors]
    x = (draw(*x_shape, dtype=torch.float64) + offset).to(dtype)
    return [x, *(t if letter not in "-." else None for t, letter in zip(tensors, present, strict=True))], options


def run(
    kernels, tensors, k, tangent_dtype, outer=1, groups=1, weight_groups=1, centred=True, statistics=None, skew=False, seed=0
):
    x, dx, weight, dweight, bias, dbias = tensors
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    inner = x.numel() // max(1, outer * groups)
    weights = next((t.numel() for t in (weight, bias) if t is not None), weight_groups)
    arguments = given((*tensors, *(statistics or (None, None))), skew)
    results = [
        result(x.shape, x.dtype, skew),
        result((k, *x.shape), tangent_dtype, skew),
        result((groups,), compute, False),
        result((groups,), compute, False),
    ]
    sizes = (outer, groups, inner, k, weight_groups, weights // weight_groups, centred)
    return kernels.run(f"normalization_{name_of(x.dtype, tangent_dtype)}", *arguments, *results, *sizes, 1e-5, seed=seed)


def compare(kernels, arguments, options, k=3, statistics=None, skew=False, seed=0):
    tangents = next(t for t in (arguments[1], arguments[3], arguments[5]) if t is not None)
    got = run(kernels, arguments, k, tangents.dtype, statistics=statistics, skew=skew, seed=seed, **options)
    mean, var = statistics or (None, None)
    exact = reference.normalization_jvp(*arguments, **options, mean=mean, var=var)
    if arguments[0].numel() == 0:  # the kernel is not run; the operator fills in NaN
        got, exact = got[:2], exact[:2]
    check(got, exact)
    return got


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_layouts(kernels, layout, dtype):
    compare(kernels, *inputs(layout, dtype=dtype))


@pytest.mark.parametrize("present", GIVEN)
@pytest.mark.parametrize("layout", ["layer", "layer, packed", "layer, long", "rms", "group", "group, packed", "batch 2d"])
def test_every_mix_of_arguments(kernels, layout, present):
    compare(kernels, *inputs(layout, present=present))


@pytest.mark.parametrize("dtype, tangent_dtype", PAIRS, ids=lambda t: NAMES[t])
@pytest.mark.parametrize("layout", ["layer", "layer, a block", "group, long, packed", "batch"])
@pytest.mark.parametrize("skew", [False, True], ids=["aligned", "skewed"])
def test_types(kernels, layout, dtype, tangent_dtype, skew):
    compare(kernels, *inputs(layout, dtype=dtype, tangent_dtype=tangent_dtype), skew=skew)


@pytest.mark.parametrize("layout", ["layer", "layer, long", "batch", "batch 2d, long"])
@pytest.mark.parametrize("k", [1, 16])
def test_numbers_of_tangents(kernels, layout, k):
    compare(kernels, *inputs(layout, k=k, dtype=torch.float32), k=k)


@pytest.mark.parametrize("present", ["xwWbB", "-wWbB", "x----"])
@pytest.mark.parametrize("layout", ["batch", "batch 2d", "batch 2d, packed", "batch 2d, long"])
def test_given_statistics(kernels, layout, present):
    arguments, options = inputs(layout, present=present)
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(options["groups"], dtype=torch.float64, generator=generator)
    var = torch.rand(options["groups"], dtype=torch.float64, generator=generator) + 0.1
    compare(kernels, arguments, options, statistics=(mean, var))


@pytest.mark.parametrize("layout", ["layer, a block", "layer, long", "batch", "batch, many channels", "batch 2d, long"])
def test_the_same_bits_in_any_order_of_threads(kernels, layout):
    arguments, options = inputs(layout, dtype=torch.float32)
    first, *others = [compare(kernels, arguments, options, seed=seed) for seed in (0, 1, 2)]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("layout", ["layer", "layer, long"])
def test_a_large_mean_does_not_cancel(kernels, layout):
    """Variance from squared deviations, not from the difference of two large numbers."""
    arguments, options = inputs(layout, dtype=torch.float32, offset=1000.0)
    y = run(kernels, arguments, 3, torch.float32, **options)[0]
    exact = reference.normalization_jvp(*arguments, **options)
    width = arguments[0].shape[-1:]
    assert_as_good_as_torch(y, F.layer_norm(arguments[0], width, arguments[2], arguments[4]), exact[0])
