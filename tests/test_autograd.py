"""What every operator does with tensors that carry a derivative: none is lost in silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operator_samples import FLOATING, SAMPLES, TENSORS, WAYS, _state, direct, schemas
from torch import Tensor
from torch.autograd import forward_ad

import frog_cuda
from frog_cuda import _autograd, ops


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
