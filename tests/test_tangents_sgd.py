"""tangent_sgd_: steps of SGD along replayed tangents, against combining them first and torch.optim.SGD."""

from __future__ import annotations

import hashlib
import itertools

import pytest
import torch
from helpers import assert_as_good_as_torch, assert_close32, assert_close64
from test_tangents import DISTRIBUTIONS, DTYPES, state_for, state_of
from torch import Tensor

from frog_cuda import ops, reference

C = torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64)
#: every kind of step that torch.optim.SGD knows
OPTIONS = [
    dict(momentum=momentum, dampening=dampening, weight_decay=decay, nesterov=nesterov)
    for momentum, dampening, decay, nesterov in itertools.product((0.0, 0.9), (0.0, 0.3), (0.0, 0.01), (False, True))
    if (momentum or not dampening) and (not nesterov or (momentum and not dampening))
]
NAMES = ["-".join(f"{k}={v}" for k, v in o.items() if v) or "plain" for o in OPTIONS]


def steps(p: Tensor, options: dict, distribution: str = "normal", count: int = 3, offset: int = 1021) -> tuple[Tensor, Tensor]:
    """``p`` after some steps of the operator, and its buffer, which starts as NaN."""
    buffer = torch.full_like(p, float("nan")) if options["momentum"] else None
    for step in range(count):
        state = state_for(distribution, 5, p.numel(), offset) if distribution == "standard_basis" else state_of(11, step)
        how = dict(lr=0.1, fresh=step == 0, offset=offset, first=2, distribution=distribution, **options)
        assert ops.tangent_sgd_(p, buffer, state, C, **how) is p
    return p, torch.zeros((), dtype=p.dtype) if buffer is None else buffer


def torch_steps(p: Tensor, options: dict, distribution: str = "normal", count: int = 3, offset: int = 1021):
    """The same by torch.optim.SGD, with what tangent_combine gives in p's dtype as the gradient."""
    p = p.clone().requires_grad_()
    optimizer = torch.optim.SGD([p], lr=0.1, **options)
    for step in range(count):
        state = state_for(distribution, 5, p.numel(), offset) if distribution == "standard_basis" else state_of(11, step)
        how = dict(offset=offset, first=2, distribution=distribution, dtype=p.dtype)
        p.grad = ops.tangent_combine(state, C, p.numel(), **how).view(p.shape)
        optimizer.step()
    buffer = optimizer.state[p].get("momentum_buffer")
    return p.detach(), torch.zeros((), dtype=p.dtype) if buffer is None else buffer


def start(n: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_equals_combining_and_torch(distribution, options, dtype):
    for n in (7, 1025, 9000):
        found = steps(start(n, dtype), options, distribution)
        exact = torch_steps(start(n, dtype).double(), options, distribution)
        own = torch_steps(start(n, dtype), options, distribution)
        for actual, wanted, torchs in zip(found, exact, own, strict=True):
            if dtype == torch.float64:
                assert_close64(actual, wanted)
            elif dtype == torch.float32:
                assert_close32(actual, wanted)
            else:
                assert_as_good_as_torch(actual, torchs, wanted)


@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
def test_equals_the_reference(options):
    for fresh in (True, False):
        for distribution in ("normal", "rademacher"):
            p, q = start(1025, torch.float32), start(1025, torch.float64)
            own, twin = (torch.ones_like(t) if options["momentum"] else None for t in (p, q))
            q.copy_(p)
            how = dict(lr=0.2, fresh=fresh, offset=9, first=1, distribution=distribution, **options)
            ops.tangent_sgd_(p, own, state_of(-9, 3), C, **how)
            reference.tangent_sgd_(q, twin, state_of(-9, 3), C, **how)
            assert_close32(p, q)
            if own is not None and twin is not None:
                assert_close32(own, twin)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_whatever_the_threads_and_the_slice(distribution, dtype):
    options, threads = dict(momentum=0.9, weight_decay=0.01, nesterov=True), torch.get_num_threads()
    n, state, hashes = 50001, state_for(distribution, 3, 50001), set()
    how = dict(lr=0.1, distribution=distribution, **options)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            p, buffer = start(n, dtype), start(n, dtype).flip(0)
            ops.tangent_sgd_(p, buffer, state, C, **how)
            hashes.add(hashlib.sha256(torch.stack([p, buffer]).view(torch.uint8).numpy().tobytes()).hexdigest())
    finally:
        torch.set_num_threads(threads)
    assert len(hashes) == 1
    part, kept = start(n, dtype)[8191:17000], start(n, dtype).flip(0)[8191:17000]
    ops.tangent_sgd_(part, kept, state, C, offset=8191, **how)
    assert torch.equal(part, p[8191:17000]) and torch.equal(kept, buffer[8191:17000])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_that_are_not_contiguous(dtype):
    dense, kept = torch.ones(41, 25, dtype=dtype), torch.ones(41, 25, dtype=dtype)
    ops.tangent_sgd_(dense, kept, state_of(1), C, lr=0.1, momentum=0.5)
    base, other = torch.ones(25, 41, 2, dtype=dtype), torch.ones(41, 25, 3, dtype=dtype)
    ops.tangent_sgd_(base[..., 1].T, other[..., 0], state_of(1), C, lr=0.1, momentum=0.5)
    assert torch.equal(base[..., 1].T, dense) and torch.equal(other[..., 0], kept)
    assert bool((base[..., 0] == 1).all()) and bool((other[..., 1:] == 1).all())


def test_empty_and_infinite():
    assert ops.tangent_sgd_(torch.empty(0, 3), torch.empty(0, 3), state_of(0), C, lr=0.1, momentum=0.5).shape == (0, 3)
    p = torch.full((3,), float("inf"))
    ops.tangent_sgd_(p, torch.zeros(3), state_of(0), C, lr=0.1, momentum=0.5)
    assert bool((p == float("inf")).all()), "without weight decay the parameter is no part of its gradient"


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(self=torch.ones(3, dtype=torch.int64)), "self has dtype Long"),
        (dict(buffer=None), "buffer is missing, but momentum is 0.9"),
        (dict(momentum=0.0), "buffer is given, but momentum is 0"),
        (dict(buffer=torch.ones(3, dtype=torch.float64)), "buffer has dtype Double, expected Float"),
        (dict(buffer=torch.ones(3, 1)), r"buffer has shape \(3, 1\), expected \(3,\)"),
        (dict(buffer="self"), "buffer and self share memory"),
        (dict(self=torch.complex(torch.ones(3), torch.ones(3)).conj().imag), "self is a view that negates"),
        (dict(buffer=torch._neg_view(torch.ones(3))), "buffer is a view that negates"),
        (dict(self=torch.ones(1).expand(3)), "self has stride 0 along axis 0"),
        (dict(buffer=torch.ones(1).expand(3)), "buffer has stride 0 along axis 0"),
        (dict(lr=float("nan")), "lr is nan"),
        (dict(dampening=float("inf")), "dampening is inf"),
        (dict(momentum=-0.1), "momentum is -0.1"),
        (dict(weight_decay=-1.0), "weight_decay is -1"),
        (dict(nesterov=True, dampening=0.5), "nesterov needs momentum > 0 and dampening 0"),
        (dict(nesterov=True, momentum=0.0, buffer=None), "nesterov needs momentum > 0"),
        (dict(offset=-2), "offset is -2"),
        (dict(coefficients=torch.ones(1, 1)), r"coefficients has shape \(1, 1\)"),
        (dict(state=state_of(0, -1)), "step is -1"),
    ],
)
def test_bad_input_leaves_all_as_it_was(change, message):
    p, buffer = torch.ones(3), torch.ones(3)
    arguments = dict(self=p, buffer=buffer, state=state_of(0), coefficients=C, lr=0.1, momentum=0.9) | change
    if isinstance(arguments["buffer"], str):
        arguments["buffer"] = p
    with pytest.raises(RuntimeError, match=message):
        ops.tangent_sgd_(**arguments)
    assert torch.equal(p, torch.ones(3)) and torch.equal(buffer, torch.ones(3))


def test_buffer_and_self_may_be_parts_of_one_tensor_that_do_not_overlap():
    both = torch.zeros(10)
    step = dict(state=state_of(0), coefficients=C, lr=0.1, momentum=0.9)
    with pytest.raises(RuntimeError, match="buffer and self share memory"):
        ops.tangent_sgd_(both[:-1], both[1:], **step)
    assert bool((both == 0).all())
    expected, kept = torch.zeros(5), torch.zeros(5)
    ops.tangent_sgd_(expected, kept, **step)
    ops.tangent_sgd_(both[:5], both[5:], **step)
    assert torch.equal(both, torch.cat([expected, kept]))
    ops.tangent_sgd_(both.zero_()[::2], both[1::2], **step)
    assert torch.equal(both, torch.stack([expected, kept], 1).flatten())


def test_unknown_distribution():
    with pytest.raises(ValueError, match="distribution is 'cauchy'"):
        ops.tangent_sgd_(torch.ones(3), None, state_of(0), C, lr=0.1, distribution="cauchy")
