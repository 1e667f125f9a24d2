"""convolution_jvp against its reference; rules built on it are in test_rules_convolution.py."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close32, assert_close64

from frog_cuda import ops, reference

K = 3
#: x, weight, options
SHAPES = {
    "2d": ((2, 4, 7, 5), (6, 4, 3, 3), dict(stride=[1, 1], padding=[1, 1], dilation=[1, 1], output_padding=[0, 0])),
    "strided": ((2, 4, 9, 9), (6, 4, 3, 3), dict(stride=[2, 2], padding=[1, 0], dilation=[1, 2], output_padding=[0, 0])),
    "grouped": (
        (2, 4, 7, 5),
        (6, 2, 3, 3),
        dict(stride=[1, 1], padding=[0, 0], dilation=[1, 1], output_padding=[0, 0], groups=2),
    ),
    "transposed": (
        (2, 4, 5, 5),
        (4, 6, 3, 3),
        dict(stride=[2, 2], padding=[1, 1], dilation=[1, 1], output_padding=[1, 0], transposed=True),
    ),
    "1d": ((2, 3, 9), (6, 3, 4), dict(stride=[1], padding=[2], dilation=[1], output_padding=[0])),
    "3d": ((1, 2, 4, 5, 3), (6, 2, 2, 2, 2), dict(stride=[1] * 3, padding=[0] * 3, dilation=[1] * 3, output_padding=[0] * 3)),
    "empty": ((0, 4, 7, 5), (6, 4, 3, 3), dict(stride=[1, 1], padding=[1, 1], dilation=[1, 1], output_padding=[0, 0])),
}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def neighbours(k: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x and dx one behind the other, as the other operators leave them."""
    both = draw(1 + k, *shape, dtype=dtype)
    return both[0], both[1:]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("together", [True, False], ids=["neighbours", "apart"])
@pytest.mark.parametrize("name", SHAPES)
def test_against_the_reference(name, together, dtype):
    x_shape, w_shape, options = SHAPES[name]
    x, dx = neighbours(K, x_shape, dtype)
    if not together:
        dx = dx.clone()
    w, b = draw(*w_shape, seed=2, dtype=dtype), draw(6, seed=3, dtype=dtype)
    same = assert_close64 if dtype == torch.float64 else assert_close32
    for bias in (b, None):
        for got, expected in zip(
            ops.convolution_jvp(x, dx, w, bias, **options), reference.convolution_jvp(x, dx, w, bias, **options), strict=True
        ):
            same(got, expected)


def test_results_are_neighbours_for_the_next_layer():
    x_shape, w_shape, options = SHAPES["2d"]
    x, dx = neighbours(K, x_shape, torch.float32)
    y, dy = ops.convolution_jvp(x, dx, draw(*w_shape, dtype=torch.float32), **options)
    assert y.data_ptr() + y.numel() * 4 == dy.data_ptr() and y.is_contiguous() and dy.is_contiguous()
    del x, dx
    kept = dy.clone()
    del y
    draw(1 << 16)  # whoever takes freed memory next
    assert torch.equal(dy, kept)


def test_strided_operands():
    x_shape, w_shape, options = SHAPES["2d"]
    x = draw(*x_shape).contiguous(memory_format=torch.channels_last)
    dx, w = draw(*x_shape, K).permute(4, 0, 1, 2, 3), draw(*w_shape).contiguous(memory_format=torch.channels_last)
    for got, expected in zip(
        ops.convolution_jvp(x, dx, w, **options), reference.convolution_jvp(x, dx, w, **options), strict=True
    ):
        assert_close64(got, expected)


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(x=torch.zeros(4, 5)), r"x has shape \(4, 5\)"),
        (dict(x=torch.zeros(2, 4, 7, 5, dtype=torch.int64)), "x has dtype Long"),
        (dict(weight=torch.zeros(6, 4, 3)), r"weight has shape \(6, 4, 3\)"),
        (dict(weight=torch.zeros(6, 4, 3, 3).double()), "weight has dtype Double, expected Float"),
        (dict(dx=torch.zeros(3, 2, 4, 7, 6)), r"dx has shape \(3, 2, 4, 7, 6\)"),
        (dict(dx=torch.zeros(0, 2, 4, 7, 5)), "k is 0"),
        (dict(dx=torch.zeros(3, 2, 4, 7, 5).double()), "dx has dtype Double, expected Float"),
        (dict(bias=torch.zeros(5)), r"bias has shape \(5,\), expected \(6,\)"),
    ],
)
def test_bad_input(change, match):
    arguments = dict(x=torch.zeros(2, 4, 7, 5), dx=torch.zeros(3, 2, 4, 7, 5), weight=torch.zeros(6, 4, 3, 3))
    with pytest.raises(RuntimeError, match="convolution_jvp: .*" + match):
        ops.convolution_jvp(**arguments | change, **SHAPES["2d"][2])
