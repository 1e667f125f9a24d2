"""Max pooling with k = 16 tangents beside PyTorch's pooling with indices, at which the tangents are gathered."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import Compare
from torch import Tensor

from frog_cuda.dual import DualTensor

K = 16
Pool = Callable[..., Tensor]
#: shape, pooling with what follows its input
CASES: dict[str, tuple[tuple[int, ...], Pool, tuple[int, ...]]] = {
    "3x3 stride 2, padded, 32 x 64 x 16 x 16": ((32, 64, 16, 16), F.max_pool2d, (3, 2, 1)),
    "3x3 stride 2, padded, 2 x 64 x 112 x 112": ((2, 64, 112, 112), F.max_pool2d, (3, 2, 1)),
    "2x2, 32 x 32 x 32 x 32": ((32, 32, 32, 32), F.max_pool2d, (2,)),
    "2x2, 64 x 6 x 28 x 28": ((64, 6, 28, 28), F.max_pool2d, (2,)),
    "1-D, 3 stride 2, 16 x 64 x 256": ((16, 64, 256), F.max_pool1d, (3, 2)),
    "3-D, 2x2x2, 4 x 16 x 16 x 16 x 16": ((4, 16, 16, 16, 16), F.max_pool3d, (2,)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16 tangents"])
@pytest.mark.parametrize("k", [1, K])
@pytest.mark.parametrize("case", CASES)
def test_max_pool(case: str, k: int, dtype: torch.dtype, compare: Compare) -> None:
    shape, pool, options = CASES[case]
    _compare(compare, case, k, torch.randn(shape), torch.randn(k, *shape).to(dtype), pool, options)


@pytest.mark.parametrize("tangents", ["dense", "channels last"])
@pytest.mark.parametrize("k", [1, K])
def test_channels_last(k: int, tangents: str, compare: Compare) -> None:
    """The operator does not serve these on the CPU: equal to what it is compared with."""
    case = "3x3 stride 2, padded, 32 x 64 x 16 x 16"
    shape, pool, options = CASES[case]
    x, dx = torch.randn(shape).to(memory_format=torch.channels_last), torch.randn(k, *shape)
    if tangents == "channels last":
        dx = dx.movedim(2, -1).contiguous().movedim(-1, 2)
    _compare(compare, f"{case}, channels last, tangents {tangents}", k, x, dx, pool, options)


def _compare(compare: Compare, case: str, k: int, x: Tensor, dx: Tensor, pool: Pool, options: tuple[int, ...]) -> None:
    dual, spatial = DualTensor(x, dx), dx.dim() - 3

    def against() -> Tensor:
        _, indices = pool(x, *options, return_indices=True)
        flat = indices.flatten(-spatial).expand(k, *indices.shape[:-spatial], -1)
        return dx.flatten(-spatial).gather(-1, flat).view(k, *indices.shape)

    ours = lambda: pool(dual, *options)  # noqa: E731
    low = ", bfloat16 tangents" if dx.dtype != x.dtype else ""
    compare(ours, against, table="op", op="max pooling", against_name="indices and gather", case=f"{case}, k = {k}{low}")
    assert torch.equal(ours().tangents, against())  # type: ignore[attr-defined]
