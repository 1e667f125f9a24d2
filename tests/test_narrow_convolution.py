"""The operator narrow_convolution, which csrc/cpu/convolution.cpp registers beside convolution_jvp."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_as_good_as_torch, assert_close32, assert_close64

from frog_cuda import ops, reference

#: shape of x, filters, kernel, stride, padding, dilation
CASES = {
    "3x3": ((3, 7, 8, 8), 5, (3, 3), (1, 1), (1, 1), (1, 1)),
    "1x1, stride 2": ((2, 33, 9, 8), 1, (1, 1), (2, 2), (0, 0), (1, 1)),
    "5x3, mixed": ((2, 6, 11, 10), 3, (5, 3), (2, 1), (0, 3), (1, 2)),
    "same, dilated": ((2, 4, 7, 9), 2, (3, 5), (1, 1), (2, 4), (2, 2)),
    "padding beyond the image": ((2, 3, 2, 2), 2, (5, 5), (1, 1), (2, 2), (1, 1)),
    "as large, unevenly padded": ((2, 3, 4, 6), 2, (2, 2), (1, 1), (1, 1), (2, 2)),
    "no padding": ((1, 5, 6, 7), 4, (3, 2), (1, 1), (0, 0), (1, 1)),
    "one place": ((5, 16, 1, 1), 3, (3, 3), (1, 1), (1, 1), (1, 1)),
    "several images in a panel": ((11, 9, 2, 3), 7, (3, 3), (1, 1), (1, 1), (1, 1)),
    "panels in an image": ((2, 3, 33, 21), 2, (3, 3), (1, 1), (1, 1), (1, 1)),
    "filters in groups": ((1, 2, 40, 40), 37, (3, 3), (1, 1), (1, 1), (1, 1)),
    "1-D": ((3, 5, 17), 4, (4,), (1,), (2,), (1,)),
    "1-D, same": ((3, 5, 1025), 1, (3,), (1,), (1,), (1,)),
    "3-D": ((2, 3, 4, 5, 6), 3, (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
    "3-D, mixed": ((2, 3, 5, 4, 6), 2, (2, 3, 1), (2, 1, 3), (1, 1, 0), (1, 1, 2)),
    "no images": ((0, 4, 5, 5), 3, (3, 3), (1, 1), (1, 1), (1, 1)),
}


def inputs(name: str, dtype: torch.dtype = torch.float64):
    shape, filters, kernel, stride, padding, dilation = CASES[name]
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in (shape, (filters, shape[1], *kernel)))
    return x, w, dict(stride=list(stride), padding=list(padding), dilation=list(dilation))


@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(name):
    for dtype, check in ((torch.float64, assert_close64), (torch.float32, assert_close32)):
        x, w, options = inputs(name, dtype)
        actual = ops.narrow_convolution(x, w, **options)
        assert actual.is_contiguous() and actual.dtype == dtype
        check(actual, reference.narrow_convolution(x, w, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_good_as_pytorchs(dtype):
    x, w, options = inputs("3x3", dtype)
    torchs = torch.convolution(x, w, None, *options.values(), False, [0, 0], 1)
    assert_as_good_as_torch(ops.narrow_convolution(x, w, **options), torchs, reference.narrow_convolution(x, w, **options))


def test_non_contiguous():
    x, w, options = inputs("3x3")
    x, w = x.to(memory_format=torch.channels_last), w.mT
    assert_close64(ops.narrow_convolution(x, w, **options), reference.narrow_convolution(x, w, **options))
    x = x.expand(3, *x.shape)[:, 1, ::2]
    w = w[:, ::2]
    assert_close64(ops.narrow_convolution(x, w, **options), reference.narrow_convolution(x, w, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_filter_has_the_bits_it_has_alone(dtype):
    for name in ("3x3", "filters in groups", "several images in a panel", "5x3, mixed"):
        x, w, options = inputs(name, dtype)
        whole = ops.narrow_convolution(x, w, **options)
        for first, count in ((0, 1), (1, 1), (0, 2), (1, 2)):
            part = ops.narrow_convolution(x, w[first : first + count], **options)
            assert torch.equal(part, whole[:, first : first + count]), (name, first, count)
        assert torch.equal(ops.narrow_convolution(x[:1], w, **options), whole[:1])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(x=torch.zeros(3, 4)), r"x has shape \(3, 4\), expected \(batch, channels, \*\)"),
        (dict(weight=torch.zeros(2, 3, 3, 3)), r"weight has shape \(2, 3, 3, 3\), expected \(filters, 4, \*\)"),
        (dict(weight=torch.zeros(0, 4, 3, 3)), r"weight has shape \(0, 4, 3, 3\), expected .* a filter and a channel at least"),
        (dict(weight=torch.zeros(2, 4, 3)), r"weight has shape \(2, 4, 3\), expected \(filters, 4, \*\)"),
        (dict(weight=torch.zeros(2, 4, 3, 3).double()), "weight has dtype Double, expected Float"),
        (dict(weight=torch.zeros(2, 4, 9, 3)), "the kernel spans 9 places of axis 0, but the padded image has 7"),
        (dict(weight=torch.zeros(2, 4, 0, 3)), "kernel holds 0"),
        (dict(stride=[1]), "stride has 1 elements, expected 2"),
        (dict(stride=[0, 1]), "stride holds 0; accepted are integers from 1"),
        (dict(padding=[-1, 1]), "padding holds -1; accepted are integers from 0"),
        (dict(dilation=[1, 0]), "dilation holds 0; accepted are integers from 1"),
    ],
    ids=range(11),
)
def test_bad_input(change, match):
    given = dict(x=torch.zeros(2, 4, 5, 5), weight=torch.zeros(2, 4, 3, 3), stride=[1, 1], padding=[1, 1], dilation=[1, 1])
    with pytest.raises(RuntimeError, match=match):
        ops.narrow_convolution(**(given | change))
