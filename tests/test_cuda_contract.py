"""What every operator must come with on CUDA: a registration, kernels that run on the host in tests, a fake for the device."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from operator_samples import SAMPLES, direct, schemas
from test_contract import stems, unstable_symbols
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

import frog_cuda
from frog_cuda import _load

ROOT = Path(__file__).parent.parent
CUDA = ROOT / "csrc" / "cuda"
BUILT = bool(frog_cuda.build_info()["cuda"]) and torch.version.cuda is not None
#: operators that lay their results out differently on a GPU: on the CPU, heads are left so that they can be joined
OTHER_STRIDES = {"attention_jvp"}
#: stems whose CUDA operators only call the library, so that there is no kernel to run on the host
LIBRARY_ONLY = {"convolution", "low_rank"}


def registered() -> dict[str, str]:
    """operator -> stem of the file in csrc/cuda that registers it; <stem>_<part>.cu is a part that compiles by itself"""
    known, found = set(stems().values()), {}
    for path in sorted(CUDA.glob("*.cu")):
        stem = path.stem if path.stem in known else path.stem.rsplit("_", 1)[0]
        for name in re.findall(r'm\.impl\("(\w+)"', path.read_text()):
            found[name] = stem
    return found


def test_every_operator_has_a_cuda_twin_of_the_same_stem():
    assert registered() == stems()


@pytest.mark.parametrize("stem", sorted(set(stems().values()) - LIBRARY_ONLY))
def test_every_kernel_runs_on_the_host_in_a_test(stem):
    for path in (
        CUDA / "kernels" / f"{stem}.cuh",
        ROOT / "tests" / "cuda_on_cpu" / f"{stem}.cpp",
        ROOT / "tests" / f"test_cuda_{stem}.py",
    ):
        assert path.exists(), f"{path.relative_to(ROOT)} is missing"


@pytest.mark.parametrize("path", sorted((CUDA / "kernels").glob("*.cuh")), ids=lambda p: p.name)
def test_kernels_keep_to_what_runs_on_the_host(path):
    text = path.read_text()
    assert "torch" not in re.sub(r"//.*", "", text), "kernel files know nothing of torch"
    assert "<<<" not in text or path.name == "platform.cuh", "launch through frog::launch"
    assert "asm" not in re.sub(r"//.*", "", text) or path.name in ("platform.cuh", "mma.cuh"), "inline PTX"


@pytest.mark.skipif(not BUILT, reason="CUDA kernels are not built here; make test-cuda-build does")
class TestBuilt:
    @pytest.mark.parametrize("name", schemas())
    def test_every_schema_has_a_cuda_kernel(self, name):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"frog_cuda::{name}", "CUDA")

    def test_the_library_uses_the_stable_abi_only(self):
        assert unstable_symbols(_load._find("_C_cuda")) == []

    @pytest.mark.parametrize("name", schemas())
    def test_fakes_stay_on_the_device(self, name):
        for arguments in SAMPLES[name](torch.float32):
            with FakeTensorMode() as mode:
                on_cuda = tree_map(lambda t: mode.from_tensor(t).to("cuda") if isinstance(t, Tensor) else t, arguments)
                out = direct(name)(**on_cuda)
            expected = direct(name)(**arguments)
            for fake, real in zip(_tensors(out), _tensors(expected), strict=True):
                assert fake.device.type == "cuda"
                assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
                if name not in OTHER_STRIDES:
                    assert fake.stride() == real.stride()


def _tensors(out: object) -> list[Tensor]:
    return [] if out is None else [out] if isinstance(out, Tensor) else list(out)  # type: ignore[call-overload]


@pytest.mark.skipif(BUILT, reason="CUDA kernels are built here")
def test_without_cuda_kernels_the_error_says_what_to_do():
    gram, cuda = torch.ops.frog_cuda.gram.default, torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    try:
        _load._refuse_cuda("it was built for a test")
        with pytest.raises(
            RuntimeError, match="frog_cuda.ops.gram: got CUDA tensors, but it was built for a test; build it with"
        ):
            gram.redispatch(cuda, torch.ones(2, 3))
    finally:
        _load._refusals.clear()
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("frog_cuda::gram", "CUDA")
