"""attention_jvp beside the formula in plain torch, which stores the T x T matrices; 8 heads of depth 64, float32."""

from __future__ import annotations

import pytest
import torch
from attention_cases import OURS, UNFUSED, inputs, prepare, unfused
from conftest import Compare, numbers


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "length" in metafunc.fixturenames:
        metafunc.parametrize("length", numbers(metafunc.config.getoption("--lengths")), ids="T{}".format)


@pytest.mark.parametrize("k", [1, 4])
def test_attention(length: int, k: int, compare: Compare) -> None:
    ours = prepare(OURS, length, k)
    compare(ours, prepare(UNFUSED, length, k), table="attention", length=length, k=k)
    # One head and some queries of it in double precision; all keys take part
    q, dq, key, dkey, v, dv = (t[..., :1, :, :].double() for t in inputs(length, k))
    rows = slice(0, None, max(1, length // 16))
    exact = unfused(q[..., rows, :], dq[..., rows, :], key, dkey, v, dv)
    for got, expected in zip(ours(), exact, strict=True):
        got = got[..., :1, rows, :].double()
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
