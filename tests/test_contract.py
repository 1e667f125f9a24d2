"""What every operator must come with, whoever adds it: kernel, fake, reference, face, tests."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from operator_samples import SAMPLES, TENSORS, _rand, direct, schemas
from torch import Tensor
from torch.autograd import forward_ad

from frog_cuda import _load, ops, reference

ROOT = Path(__file__).parent.parent


# ---- what there is


def stems() -> dict[str, str]:
    """operator -> stem of the file in csrc/cpu that registers its kernel"""
    found = {}
    for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        for name in re.findall(r'm\.impl\("(\w+)"', path.read_text()):
            found[name] = path.stem
    return found


def missing(namespace: str) -> list[str]:
    """Each thing that an operator of the namespace lacks, in words."""
    lacks = []
    by_stem = stems() if namespace == "frog_cuda" else {}
    for name in schemas(namespace):
        full = f"{namespace}::{name}"
        for key, what in (
            ("CPU", "CPU kernel"),
            ("Meta", "fake"),
            ("Autograd", "kernel above autograd"),
            ("FuncTorchBatched", "kernel under vmap"),
        ):
            if not torch._C._dispatch_has_kernel_for_dispatch_key(full, key):
                lacks.append(f"{name}: {what}")
        if not callable(getattr(reference, name, None)):
            lacks.append(f"{name}: function in frog_cuda/reference")
        if not callable(getattr(ops, name, None)):
            lacks.append(f"{name}: function in frog_cuda/ops")
        if name not in by_stem:
            lacks.append(f"{name}: registration in csrc/cpu")
        elif not (ROOT / "tests" / f"test_{by_stem[name]}.py").exists():
            lacks.append(f"{name}: tests/test_{by_stem[name]}.py")
        if name not in SAMPLES:
            lacks.append(f"{name}: sample arguments in tests/operator_samples.py")
    return lacks


def test_every_operator_is_complete():
    assert missing("frog_cuda") == []


def test_the_table_of_contents_is_what_is_registered():
    source = re.sub(r'"\s+"', "", (ROOT / "csrc" / "ops.cpp").read_text())
    assert sorted(re.findall(r'm\.def\(\s*"(\w+)\(', source)) == schemas()
    assert sorted(stems()) == schemas()


def test_every_file_of_kernels_has_tests():
    for path in (ROOT / "csrc" / "cpu").glob("*.cpp"):
        tests = ROOT / "tests" / f"test_{path.stem}.py"
        assert tests.exists() and "def test_" in tests.read_text(), f"{path.name} has no {tests.name}"


def test_the_scan_notices_an_operator_without_anything():
    library = torch.library.Library("frog_scratch_scan", "DEF")
    library.define("lonely(Tensor x) -> Tensor")
    lacks = missing("frog_scratch_scan")
    assert all(line.startswith("lonely: ") for line in lacks)
    assert len(lacks) == 8
    library.impl("lonely", lambda x: x.clone(), "CPU")
    assert len(missing("frog_scratch_scan")) == 7


@pytest.mark.parametrize("name", schemas())
def test_face_reference_and_schema_take_the_same_arguments(name):
    face = inspect.signature(getattr(ops, name)).parameters
    twin = inspect.signature(getattr(reference, name)).parameters
    assert [(p.name, p.kind, p.default) for p in face.values()] == [(p.name, p.kind, p.default) for p in twin.values()]
    assert inspect.getdoc(getattr(ops, name)) and inspect.getdoc(getattr(reference, name))
    schema = getattr(torch.ops.frog_cuda, name).default._schema
    assert sorted(face) == sorted(a.name for a in schema.arguments)


# ---- calls of every operator


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", schemas())
def test_opcheck(name, dtype):
    for arguments in SAMPLES[name](dtype):
        torch.library.opcheck(getattr(torch.ops.frog_cuda, name).default, (), arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("name", schemas())
def test_fakes_foretell_shape_dtype_and_strides(name, dtype):
    def facts(result: Any) -> list[Any]:
        parts = (result,) if isinstance(result, Tensor) else result or ()
        return [(t.shape, t.stride(), t.dtype, t.requires_grad) for t in parts]

    for arguments in SAMPLES[name](dtype):
        meta = {key: t.to("meta") if isinstance(t, Tensor) else t for key, t in arguments.items()}
        assert facts(direct(name)(**meta)) == facts(direct(name)(**arguments))


def _inside(t: Tensor) -> Tensor:
    """The same values and strides within a larger block of memory, full of NaN where that is possible."""
    reach = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    block = torch.full((reach + 16,), torch.nan if t.is_floating_point() else 1, dtype=t.dtype)
    return block.as_strided(t.shape, t.stride(), 5).copy_(t)


@TENSORS
def test_a_part_of_a_larger_tensor_is_read_where_it_lies(name, i, key):
    expected, arguments = SAMPLES[name](torch.float32)[i], SAMPLES[name](torch.float32)[i]
    arguments[key] = _inside(arguments[key])
    results = []
    for given in (expected, arguments):
        out = direct(name)(**given)
        changed = [given[n] for n in ("self", "buffer") if isinstance(given.get(n), Tensor)]
        results.append([*changed, *((out,) if isinstance(out, Tensor) else out or ())])
    for e, a in zip(*results, strict=True):
        assert torch.equal(a, e)


def test_under_torch_compile():
    """Traced as one operator each; what raises without compilation raises with it."""

    def layer(x: Tensor, dx: Tensor, w: Tensor) -> Tensor:
        y, dy, _ = torch.ops.frog_cuda.linear_jvp(
            x.sin(), dx * x.cos(), w, None, None, None, None, None, 2, 0, 0, None, None, 5, 0.0, 0.0, False
        )
        return dy.sum(0) + y

    x, dx, w = _rand(3, 7), _rand(2, 3, 7), _rand(5, 7)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, dx, w), layer(x, dx, w))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="linear_jvp: got a .*dual tensor"):
        compiled(x, forward_ad.make_dual(dx, dx), w)


# ---- the stable ABI


def unstable_symbols(library: Path) -> list[str]:
    """Symbols that tie a library to one version of torch."""
    nm = shutil.which("nm")
    assert nm is not None, "nm is missing; it comes with the compiler (binutils)"
    listing = subprocess.run([nm, "-D", "--undefined-only", "-C", library], capture_output=True, text=True, check=True).stdout
    assert listing.strip(), f"nm lists nothing for {library}"
    return [line.strip() for line in listing.splitlines() if re.search(r"\b(at|c10)::", line)]


def test_the_library_uses_the_stable_abi_only():
    assert unstable_symbols(_load._find("_C")) == []


def test_the_abi_check_notices_other_symbols():
    assert unstable_symbols(Path(torch.__file__).parent / "lib" / "libtorch_python.so")
