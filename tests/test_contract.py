"""What every operator must come with, whoever adds it: kernel, fake, reference, face, tests; no derivative lost in silence."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import frog_cuda
from frog_cuda import _autograd, _load, ops, reference

ROOT = Path(__file__).parent.parent
NAMES = {
    "distribution": {code: name for name, code in ops.DISTRIBUTIONS.items()},
    "function": {code: name for name, code in ops.POINTWISE.items()},
    "activation": {code: name for name, code in ops.POINTWISE.items()},
}


# ---- what there is


def schemas(namespace: str = "frog_cuda") -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return sorted(n.removeprefix(f"{namespace}::") for n in names if n.startswith(f"{namespace}::"))


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
            lacks.append(f"{name}: sample arguments in tests/test_contract.py")
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


def _rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def _state() -> Tensor:
    return torch.tensor([3, 1])


def _spd(*shape: int, dtype: torch.dtype) -> Tensor:
    v = _rand(*shape[:-1], 9, dtype=dtype)
    return v @ v.mT


#: name -> dtype -> arguments by the schema's names
SAMPLES: dict[str, Callable[[torch.dtype], list[dict[str, Any]]]] = {
    "sample_tangents": lambda dtype: [
        dict(state=_state(), k=3, numel=70, offset=5, first=1, distribution=d, dtype=dtype) for d in (0, 1)
    ],
    "tangent_gram": lambda dtype: [dict(state=_state(), k=3, numel=70, offset=5, first=0, distribution=0)],
    "gram": lambda dtype: [dict(tangents=_rand(3, 70, dtype=dtype)), dict(tangents=_rand(70, 3, dtype=dtype).T)],
    "tangent_combine": lambda dtype: [
        dict(state=_state(), coefficients=_rand(3, dtype=dtype), numel=70, offset=5, first=1, distribution=0, dtype=dtype)
    ],
    "tangent_combine_samples": lambda dtype: [
        dict(state=_state(), coefficients=c, numel=20, offset=5, first=1, distribution=0, dtype=dtype)
        for c in (_rand(3, 4, dtype=dtype), _rand(4, 3, dtype=dtype).T)
    ],
    "tangent_axpy_": lambda dtype: [
        dict(self=target, state=_state(), coefficients=_rand(3), alpha=0.5, offset=5, first=1, distribution=0)
        for target in (_rand(7, 10, dtype=dtype), _rand(10, 7, dtype=dtype).T)
    ],
    "tangent_sgd_": lambda dtype: [
        dict(
            self=target,
            buffer=buffer,
            state=_state(),
            coefficients=_rand(3),
            lr=0.5,
            momentum=0.0 if buffer is None else 0.9,
            dampening=0.0,
            weight_decay=0.1,
            nesterov=buffer is not None,
            fresh=False,
            offset=5,
            first=1,
            distribution=0,
        )
        for target, buffer in (
            (_rand(7, 10, dtype=dtype), _rand(10, 7, dtype=dtype).T),
            (_rand(10, 7, dtype=dtype).T, _rand(7, 10, dtype=dtype)),
            (_rand(7, 10, dtype=dtype), None),
        )
    ],
    "cholesky_project": lambda dtype: [
        dict(gram=_spd(3, 3, dtype=dtype), derivatives=_rand(3, 4, dtype=dtype), rtol=1e-7),
        dict(gram=_spd(2, 3, 3, dtype=dtype), derivatives=_rand(2, 3, 4, dtype=dtype), rtol=1e-7),
    ],
    "linear_jvp": lambda dtype: [_linear(dtype, sampled=False), _linear(dtype, sampled=True)],
    "pointwise_jvp": lambda dtype: [
        dict(x=_rand(5, 7, dtype=dtype), dx=_rand(3, 5, 7, dtype=dtype), activity=None, function=5, alpha=0.0, beta=0.0),
        dict(x=_rand(7, 5, dtype=dtype).T, dx=None, activity=_rand(3, 7, dtype=dtype), function=2, alpha=0.0, beta=0.0),
    ],
    "tangent_sum": lambda dtype: [
        dict(a=_rand(3, 5, 7, dtype=dtype), va=_rand(3, 7, dtype=dtype), b=None, vb=None, alpha=1.0),
        dict(
            a=_rand(5, 7, 3, dtype=dtype).permute(2, 0, 1),
            va=None,
            b=_rand(3, 5, 7, dtype=dtype),
            vb=_rand(3, 5, 7, dtype=dtype),
            alpha=-2.0,
        ),
    ],
    "convolution_jvp": lambda dtype: [
        dict(
            x=_rand(2, 4, 5, 6, dtype=dtype),
            dx=_rand(3, 2, 4, 5, 6, dtype=dtype),
            weight=_rand(4, 2, 3, 3, dtype=dtype),
            bias=_rand(4, dtype=dtype),
            stride=[2, 1],
            padding=[1, 1],
            dilation=[1, 1],
            transposed=transposed,
            output_padding=[0, 0],
            groups=2,
        )
        for transposed in (False, True)
    ],
    "sampled_convolution_": lambda dtype: [
        dict(
            self=target,
            x=_rand(2, 4, 5, 6, dtype=dtype),
            state=_state(),
            kernel=[3, 2],
            stride=[2, 1],
            padding=[1, 0],
            dilation=[1, 2],
            offset=5,
            first=1,
            distribution=0,
            add=True,
        )
        for target in (_rand(3, 2, 7, 3, 4, dtype=dtype), _rand(2, 7, 3, 3, 4, dtype=dtype).transpose(0, 2).transpose(1, 2))
    ],
    "embedding_jvp": lambda dtype: [
        dict(indices=indices, weight=_rand(5, 7, dtype=dtype), k=3, **tangents)
        for indices in (torch.tensor([[0, 4, 4], [1, 0, 2]]), torch.tensor([3, 1], dtype=torch.int32))
        for tangents in (
            dict(dweight=_rand(3, 7, 5, dtype=dtype).mT, state=None, first=0, distribution=0, weight_offset=None, dtype=None),
            dict(dweight=None, state=_state(), first=1, distribution=1, weight_offset=10, dtype=dtype),
        )
    ],
    "softmax_jvp": lambda dtype: [
        dict(x=_rand(5, 7, dtype=dtype), dx=_rand(3, 5, 7, dtype=dtype), dim=1),
        dict(x=_rand(7, 5, dtype=dtype).T, dx=_rand(3, 5, 7, dtype=dtype), dim=0),
    ],
    "log_softmax_jvp": lambda dtype: [
        dict(x=_rand(5, 7, dtype=dtype), dx=_rand(3, 5, 7, dtype=dtype), dim=-1),
        dict(x=_rand(7, 5, dtype=dtype).T, dx=_rand(3, 5, 7, dtype=dtype), dim=0),
    ],
    "max_pool_jvp": lambda dtype: [
        dict(
            x=x,
            dx=dx,
            kernel=[3, 2],
            stride=[2, 2],
            padding=[1, 0],
            dilation=[1, 2],
            ceil_mode=want_indices,
            want_indices=want_indices,
        )
        for x, dx, want_indices in (
            (_rand(2, 4, 7, 6, dtype=dtype), _rand(3, 2, 4, 7, 6, dtype=dtype), False),
            (_rand(2, 7, 6, 4, dtype=dtype).permute(0, 3, 1, 2), _rand(2, 4, 7, 6, 3, dtype=dtype).movedim(-1, 0), True),
        )
    ],
    "attention_jvp": lambda dtype: [
        dict(
            query=_rand(2, 4, 5, 6, dtype=dtype),
            dquery=_rand(3, 2, 4, 5, 6, dtype=dtype),
            key=_rand(2, 2, 7, 6, dtype=dtype),
            dkey=_rand(3, 2, 2, 7, 6, dtype=dtype),
            value=_rand(2, 2, 8, 7, dtype=dtype).mT,
            dvalue=_rand(3, 2, 2, 7, 8, dtype=dtype),
            mask=mask,
            is_causal=False,
            scale=0.4,
        )
        for mask in (_rand(5, 7, dtype=dtype), _rand(5, 7) > 0.3)
    ],
    "normalization_jvp": lambda dtype: [
        dict(
            x=_rand(5, 7, dtype=dtype),
            dx=_rand(3, 5, 7, dtype=dtype),
            weight=_rand(7, dtype=dtype),
            dweight=_rand(3, 7, dtype=dtype),
            bias=_rand(7, dtype=dtype),
            dbias=_rand(3, 7, dtype=dtype),
            **statistics,
        )
        for statistics in (
            dict(mean=None, var=None, outer=1, groups=5, weight_groups=1, centred=True, eps=1e-5),
            dict(mean=_rand(7), var=_rand(7), outer=5, groups=7, weight_groups=7, centred=True, eps=1e-5),
        )
    ],
    "linear_gradient": lambda dtype: [
        dict(gradient=_rand(5, 7, dtype=dtype), x=_rand(5, 3, dtype=dtype)),
        dict(gradient=_rand(7, 5, dtype=dtype).T, x=_rand(3, 5, dtype=dtype).T),
    ],
    "cross_entropy_jvp": lambda dtype: [
        dict(
            logits=_rand(5, 7, dtype=dtype),
            dlogits=_rand(3, 5, 7, dtype=dtype),
            target=torch.tensor([0, 6, -100, 2, 2]),
            weight=_rand(7, dtype=dtype),
            ignore_index=-100,
            label_smoothing=0.1,
        )
    ],
    "mse_jvp": lambda dtype: [
        dict(
            input=_rand(5, 7, dtype=dtype),
            dinput=_rand(3, 5, 7, dtype=dtype),
            target=_rand(7, 5, dtype=dtype).T,
            dtarget=_rand(3, 5, 7, dtype=dtype),
        )
    ],
    "bce_jvp": lambda dtype: [
        dict(
            input=_rand(5, 7, dtype=dtype),
            dinput=_rand(3, 5, 7, dtype=dtype),
            target=_rand(7, 5, dtype=dtype).T,
            weight=_rand(7, dtype=dtype),
            pos_weight=_rand(5, 1, dtype=dtype),
            with_logits=True,
        )
    ],
}


def _linear(dtype: torch.dtype, sampled: bool) -> dict[str, Any]:
    return dict(
        x=_rand(2, 3, 7, dtype=dtype),
        dx=_rand(4, 2, 3, 7, dtype=dtype),
        weight=_rand(5, 7, dtype=dtype),
        bias=_rand(5, dtype=dtype),
        dweight=None if sampled else _rand(4, 5, 7, dtype=dtype),
        dbias=None if sampled else _rand(4, 5, dtype=dtype),
        activity=_rand(4, 3, 5, dtype=dtype),
        state=_state() if sampled else None,
        k=4,
        first=2,
        distribution=1,
        weight_offset=10 if sampled else None,
        bias_offset=50 if sampled else None,
        activation=1,
        alpha=0.0,
        beta=0.0,
        want_gram=sampled,
    )


def direct(name: str) -> Callable[..., Any]:
    return getattr(torch.ops.frog_cuda, name)


def face(name: str) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        named = {key: NAMES[key][value] if key in NAMES else value for key, value in arguments.items()}
        return getattr(ops, name)(**named)

    return call


WAYS = pytest.mark.parametrize("way", [direct, face])


def _cases(wanted: Callable[[Any], bool]) -> list[Any]:
    """(operator, arguments, one of them that is a tensor and wanted), for all operators, samples and such arguments"""
    return [
        pytest.param(name, i, key, id=f"{name}-{i}-{key}")
        for name in schemas()
        for i, arguments in enumerate(SAMPLES[name](torch.float32) if name in SAMPLES else [])
        for key, value in arguments.items()
        if isinstance(value, Tensor) and wanted(value)
    ]


FLOATING = pytest.mark.parametrize("name, i, key", _cases(Tensor.is_floating_point))
TENSORS = pytest.mark.parametrize("name, i, key", _cases(lambda t: True))


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


@WAYS
@FLOATING
def test_an_input_that_requires_grad_raises(name, i, key, way):
    arguments = SAMPLES[name](torch.float32)[i]
    arguments[key].requires_grad_()
    with pytest.raises(RuntimeError, match=rf"{name}: got a tensor that requires grad"):
        way(name)(**arguments)
    with torch.no_grad():
        out = way(name)(**arguments)
    if not name.endswith("_"):
        for t in (out,) if isinstance(out, Tensor) else out:
            assert not t.requires_grad


@WAYS
@FLOATING
def test_a_dual_tensor_raises(name, i, key, way):
    arguments = SAMPLES[name](torch.float32)[i]
    with forward_ad.dual_level():
        arguments[key] = forward_ad.make_dual(arguments[key], torch.ones_like(arguments[key]))
        for grad in (True, False):
            with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=rf"{name}: got a .*dual tensor"):
                way(name)(**arguments)


@WAYS
@FLOATING
def test_torch_func_jvp_raises(name, i, key, way):
    arguments = SAMPLES[name](torch.float32)[i]
    value = arguments.pop(key)
    with pytest.raises(RuntimeError, match=rf"{name}: got a .*(torch\.func)"):
        torch.func.jvp(lambda t: way(name)(**{key: t}, **arguments), (value,), (torch.ones_like(value),))


@WAYS
@FLOATING
def test_torch_func_grad_raises(name, i, key, way):
    arguments = SAMPLES[name](torch.float32)[i]
    value = arguments.pop(key)

    def total(t: Tensor) -> Tensor:
        out = way(name)(**{key: t}, **arguments)
        return (out if isinstance(out, Tensor) else out[0]).sum()

    with pytest.raises(RuntimeError, match=rf"{name}: got a tensor (that requires grad|wrapped by torch\.func)"):
        torch.func.grad(total)(value)


@WAYS
@TENSORS
def test_torch_func_vmap_raises(name, i, key, way):
    arguments = SAMPLES[name](torch.float32)[i]
    value = arguments.pop(key)
    with pytest.raises(RuntimeError, match=rf"{name}: got a tensor (batched|wrapped) by torch\.func"):
        torch.func.vmap(lambda t: way(name)(**{key: t}, **arguments))(torch.stack([value, value]))


@WAYS
@FLOATING
def test_a_dualtensor_raises(name, i, key, way):
    """The package's own kind of dual: operators take primal and tangents apart."""
    arguments = SAMPLES[name](torch.float32)[i]
    arguments[key] = frog_cuda.DualTensor(arguments[key], torch.ones(2, *arguments[key].shape))
    with pytest.raises((RuntimeError, NotImplementedError, TypeError), match=name):
        way(name)(**arguments)


@pytest.mark.parametrize("name", [n for n in schemas() if not n.endswith("_")])
def test_a_plain_call_inside_a_transform_is_fine(name):
    """Only what would lose a derivative raises: an operator on tensors that do not take part gives what it gives outside."""
    arguments = SAMPLES[name](torch.float32)[0]
    inside: list[Any] = []
    torch.func.jvp(lambda t: inside.append(direct(name)(**arguments)) or t, (torch.ones(()),), (torch.ones(()),))
    torch.testing.assert_close(inside[0], direct(name)(**arguments), rtol=0, atol=0, equal_nan=True)


@WAYS
def test_writing_in_place_is_seen_by_backward(way):
    p = torch.ones(3, requires_grad=True)
    out = (p * p).sum()
    with torch.no_grad():
        way("tangent_axpy_")(self=p, state=_state(), coefficients=torch.ones(1), alpha=1.0, offset=0, first=0, distribution=0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_writing_in_place_under_inference_mode():
    with torch.inference_mode():
        p = torch.zeros(3)
        ops.tangent_axpy_(p, _state(), torch.ones(1))
    assert p.abs().min() > 0


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


# ---- traps in PyTorch that these kernels are there for


def test_trap_a_custom_operator_loses_tangents_without_a_word():
    library = torch.library.Library("frog_scratch_trap", "DEF")
    library.define("double(Tensor x) -> Tensor")
    library.impl("double", lambda x: torch.tensor([2 * value for value in x.tolist()]), "CPU")  # opaque, as compiled code is
    double = torch.ops.frog_scratch_trap.double
    x = torch.ones(3)
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(double(forward_ad.make_dual(x, x))).tangent is None
    y, dy = torch.func.jvp(double, (x,), (x,))
    assert torch.equal(y, 2 * x) and torch.equal(dy, 0 * x)  # the derivative is 2
    registered = _autograd.register("frog_scratch_trap")
    with pytest.raises(RuntimeError, match="dual tensor"):
        torch.func.jvp(double, (x,), (x,))
    assert torch.equal(double(x), 2 * x)
    del registered


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
