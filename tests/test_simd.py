"""Every instruction set draws the same bits and multiplies to the same precision.

The choice is made once per process (FROG_CUDA_SIMD), so each set runs in a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_close32, assert_close64

ROOT = Path(__file__).parent.parent

SCRIPT = """
import sys, torch
from frog_cuda import ops
torch.set_num_threads(1)
state = torch.tensor([-12345678901, 77])
drawn, computed = {}, {}
for distribution in ("normal", "rademacher"):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for first, offset, n in [(0, 0, 30000), (3, 1021, 1025), (2**32 - 20, 2**35 - 50, 200), (5, 17, 3)]:
            for k in (1, 2, 3, 17):
                drawn[distribution, dtype, first, k] = ops.sample_tangents(
                    state, k, n, offset=offset, first=first, distribution=distribution, dtype=dtype)
    for dtype in (torch.float32, torch.float64):
        c = torch.linspace(-1, 1, 17, dtype=dtype)
        where = dict(offset=1021, distribution=distribution)
        computed[distribution, dtype, "combine"] = ops.tangent_combine(state, c, 1025, dtype=dtype, **where)
        computed[distribution, dtype, "axpy"] = ops.tangent_axpy_(torch.ones(1025, dtype=dtype), state, c, **where)
        computed[distribution, dtype, "tangent_gram"] = ops.tangent_gram(state, 17, 1025, **where)
        computed[distribution, dtype, "gram"] = ops.gram(drawn[distribution, dtype, 0, 17])
        for rows in (1, 7, 16, 33, 100):
            x = torch.linspace(-1, 1, rows * 70, dtype=dtype).sin().view(rows, 70)
            w = torch.linspace(0, 9, 13 * 70, dtype=dtype).cos().view(13, 70)
            how = dict(state=state, k=5, weight_offset=9, distribution=distribution)
            _, dy, gram = ops.linear_jvp(x, None, w, want_gram=True, **how)
            computed[distribution, dtype, "dy", rows] = dy
            computed[distribution, dtype, "gram of dW", rows] = gram
            dx = torch.linspace(-2, 1, 5 * rows * 70, dtype=dtype).cos().view(5, rows, 70)
            y, dy, _ = ops.linear_jvp(x, dx, w, k=5)
            computed[distribution, dtype, "y", rows], computed[distribution, dtype, "dx W^T", rows] = y, dy
            computed[distribution, dtype, "gradient", rows] = ops.linear_gradient(x, x.sin())
            images = torch.linspace(-3, 2, rows * 3 * 35, dtype=dtype).sin().view(rows, 3, 7, 5)
            moved = torch.ones(5, rows, 7, 4, 5, dtype=dtype)
            places = dict(kernel=[3, 3], stride=[2, 1], padding=[1, 1], dilation=[1, 1])
            ops.sampled_convolution_(moved, images, state, offset=3, distribution=distribution, **places)
            computed[distribution, dtype, "sampled convolution", rows] = moved
            moved, places = torch.ones(5, rows, 6, 13, 5, dtype=dtype), places | dict(transposed=True, groups=3)
            ops.sampled_convolution_(moved, images, state, offset=3, distribution=distribution, **places)
            computed[distribution, dtype, "sampled transposed convolution", rows] = moved
torch.save((drawn, computed), sys.argv[1])
"""


def run(simd: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments],
        cwd=ROOT,
        env=os.environ | {"FROG_CUDA_SIMD": simd},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """instruction set -> what the script drew and computed with it, for each that this machine runs"""
    folder = tmp_path_factory.mktemp("simd")
    processes = {simd: run(simd, str(folder / simd)) for simd in ("sse9", "baseline", "avx2", "avx512")}
    wrong = processes.pop("sse9").communicate()[1]
    listed = re.search(r"FROG_CUDA_SIMD is 'sse9'; this build on this machine accepts ([\w, ]+)", wrong)
    assert listed, wrong
    accepted = listed.group(1).split(", ")
    found = {}
    for simd, process in processes.items():
        errors = process.communicate()[1]
        if simd not in accepted:
            assert f"FROG_CUDA_SIMD is '{simd}'" in errors
            continue
        assert process.returncode == 0, errors
        found[simd] = torch.load(folder / simd, weights_only=False)
    return found


def test_what_the_processor_has_is_offered(results):
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert "baseline" in results
    if re.search(r"\bavx2\b", flags) and re.search(r"\bfma\b", flags):
        assert "avx2" in results
        if all(re.search(rf"\b{flag}\b", flags) for flag in ("avx512f", "avx512bw", "avx512dq", "avx512vl")):
            assert "avx512" in results


def test_every_instruction_set_draws_the_same_bits(results):
    baseline, _ = results["baseline"]
    for simd, (drawn, _) in results.items():
        assert drawn.keys() == baseline.keys()
        for key, values in drawn.items():
            assert torch.equal(values, baseline[key]), f"{simd} draws other values: {key}"


def test_every_instruction_set_computes_to_the_same_precision(results):
    _, baseline = results["baseline"]
    for _, computed in results.values():
        for key, values in computed.items():
            compare = assert_close64 if values.dtype == torch.float64 and "gram of dW" not in key else assert_close32
            if compare is assert_close32:
                values = values.float()
            compare(values, baseline[key] if compare is assert_close64 else baseline[key].double())
