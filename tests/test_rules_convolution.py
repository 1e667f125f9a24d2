from __future__ import annotations

import pytest
import torch.nn.functional as F
from against_func import check, draw

CONVOLUTIONS = {
    "2d": (F.conv2d, (2, 3, 7, 5), (4, 3, 3, 3), {}),
    "strided": (F.conv2d, (2, 3, 7, 5), (4, 3, 3, 3), {"stride": 2, "padding": 1}),
    "dilated": (F.conv2d, (1, 3, 9, 9), (1, 3, 3, 1), {"dilation": 2}),
    "grouped": (F.conv2d, (2, 4, 7, 5), (4, 2, 3, 3), {"groups": 2}),
    "same": (F.conv2d, (2, 3, 7, 5), (4, 3, 3, 3), {"padding": "same"}),
    "unbatched": (F.conv2d, (3, 7, 5), (4, 3, 3, 3), {}),
    "1d": (F.conv1d, (2, 3, 7), (4, 3, 3), {"padding": 1}),
    "3d": (F.conv3d, (1, 2, 3, 4, 5), (3, 2, 2, 2, 2), {}),
    "transposed": (F.conv_transpose2d, (2, 3, 4, 5), (3, 4, 3, 3), {"stride": 2, "output_padding": 1}),
    "empty": (F.conv2d, (0, 3, 7, 5), (4, 3, 3, 3), {}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    op, x_shape, w_shape, options = CONVOLUTIONS[name]
    x, w, b = draw(*x_shape), draw(*w_shape, seed=2), draw(4 if name != "3d" else 3, seed=3)
    b = b[:1] if name == "dilated" else b
    check(lambda x, w, b: op(x, w, b, **options), x, w, b)
    check(lambda x: op(x, w, b, **options), x, k=1)
    check(lambda w: op(x, w, **options), w)
    check(lambda b: op(x, w, b, **options), b)
