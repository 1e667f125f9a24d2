"""On a GPU: every operator equals its CPU twin, on any stream, in CUDA graphs, run after run; models train as on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import relative_error
from operator_samples import SAMPLES, direct, schemas
from test_cuda_contract import OTHER_STRIDES
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import frog_cuda as frog
from frog_cuda import float8, ops, reference

pytestmark = pytest.mark.cuda

#: of the largest entry, between two devices that both keep the bound against float64
BOUNDS = {torch.float64: 2e-10, torch.float32: 2e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
DTYPES = pytest.mark.parametrize("dtype", list(BOUNDS), ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(autouse=True)
def full_float32():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def same_algorithms(monkeypatch):
    """cuDNN's quickest for the gradient of a convolution, of which a transposed one is made, may sum in any order."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def on(device: str, tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tree)


def results(name: str, arguments: dict[str, Any]) -> list[Tensor]:
    """Of an operator that returns something; of one that writes, what it wrote."""
    out = direct(name)(**arguments)
    return [arguments["self"]] if out is None else [out] if isinstance(out, Tensor) else list(out)


@DTYPES
@pytest.mark.parametrize("name", schemas())
def test_equals_cpu(name, dtype):
    for host, other in zip(SAMPLES[name](dtype), SAMPLES[name](dtype), strict=True):
        for actual, expected in zip(results(name, on("cuda", other)), results(name, host), strict=True):
            assert actual.is_cuda and actual.dtype == expected.dtype
            assert name in OTHER_STRIDES or actual.stride() == expected.stride()
            if expected.is_floating_point():
                assert relative_error(actual.cpu(), expected) <= BOUNDS[dtype]
            else:
                assert torch.equal(actual.cpu(), expected)


@pytest.mark.usefixtures("same_algorithms")
@pytest.mark.parametrize("name", schemas())
def test_runs_on_any_stream_and_gives_the_same_bits(name):
    for i, _ in enumerate(SAMPLES[name](torch.float32)):
        fresh = lambda i=i: on("cuda", SAMPLES[name](torch.float32)[i])  # noqa: E731
        expected = results(name, fresh())
        torch.cuda.synchronize()
        for _ in range(20):
            arguments = fresh()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                again = results(name, arguments)
            stream.synchronize()
            for a, b in zip(again, expected, strict=True):
                assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.usefixtures("same_algorithms")
@pytest.mark.parametrize("name", schemas())
def test_captured_in_a_graph(name):
    """Capture fails on any wait for the device or read of its memory."""
    arguments = on("cuda", SAMPLES[name](torch.float32)[0])
    expected = [t.clone() for t in results(name, on("cuda", SAMPLES[name](torch.float32)[0]))]  # also warms the libraries up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(name, arguments)
    for t in captured:
        if not name.endswith("_"):
            t.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", schemas())
def test_mixed_devices_are_refused(name):
    for arguments in SAMPLES[name](torch.float32):
        tensors = [key for key, value in arguments.items() if isinstance(value, Tensor)]
        for key in tensors if len(tensors) > 1 else []:
            mixed = on("cuda", arguments) | {key: arguments[key]}
            with pytest.raises(RuntimeError, match="device|GPU|CPU"):
                direct(name)(**mixed)


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("offset, numel", [(0, 1), (5, 1025), (1024, 4096), (2**33 + 7, 100_003)])
def test_tangents_are_those_of_the_cpu(distribution, offset, numel):
    for dtype in BOUNDS:
        state = torch.tensor([2**40 + 3, 17])
        options = dict(offset=offset, first=2, distribution=distribution, dtype=dtype)
        host = ops.sample_tangents(state, 5, numel, **options)
        device = ops.sample_tangents(state.cuda(), 5, numel, **options).cpu()
        assert torch.equal(host, device)


def test_the_state_on_the_device_advances_a_graph():
    state = torch.tensor([1, 0], device="cuda")
    ops.sample_tangents(state, 4, 1000)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = ops.sample_tangents(state, 4, 1000)
        state[1] += 1
    for step in range(3):
        graph.replay()
        assert torch.equal(drawn.cpu(), ops.sample_tangents(torch.tensor([1, step]), 4, 1000))


def test_more_than_two_billion_elements():
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free memory")
    n = 2**31 + 1029
    drawn = ops.sample_tangents(torch.tensor([1, 0], device="cuda"), 1, n, distribution="rademacher", dtype=torch.bfloat16)
    expected = ops.sample_tangents(
        torch.tensor([1, 0]), 1, 100, offset=n - 100, distribution="rademacher", dtype=torch.bfloat16
    )
    assert torch.equal(drawn[:, -100:].cpu(), expected)
    y, dy = ops.pointwise_jvp(drawn[0], drawn, function="tanh")
    z, dz = reference.pointwise_jvp(expected[0].double(), expected.double(), function="tanh")
    assert relative_error(y[-100:].cpu(), z) <= 2**-8 and relative_error(dy[:, -100:].cpu(), dz) <= 2**-7


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 33), nn.GELU(), nn.LayerNorm(33), nn.Linear(33, 10))


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 10)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("perturb", ["weight", "activity"])
@pytest.mark.parametrize("make, shape", [(mlp, (8, 20)), (convolutional, (8, 3, 8, 8))], ids=["mlp", "convolutional"])
@pytest.mark.parametrize("tangents", ["normal", "rademacher", "orthonormal"])
def test_a_gradient_equals_that_of_the_cpu(perturb, make, shape, tangents):
    found = {}
    x, target = torch.randn(shape, generator=torch.Generator().manual_seed(1)), torch.arange(8)
    for device in ("cpu", "cuda"):
        model = make().to(device, torch.float64)
        loss = nn.CrossEntropyLoss(reduction="none")
        fg = frog.ForwardGradient(model, loss, k=5, perturb=perturb, tangents=tangents, per_sample=make is mlp)
        value = fg(x.to(device, torch.float64), target.to(device))
        found[device] = [value.cpu(), *(p.grad.cpu() for p in model.parameters() if p.grad is not None)]
    for a, b in zip(found["cuda"], found["cpu"], strict=True):
        assert relative_error(a, b) <= 1e-9


def test_update_in_place_equals_that_of_the_cpu():
    found = {}
    for device in ("cpu", "cuda"):
        model = mlp().to(device)
        fg = frog.ForwardGradient(model, nn.CrossEntropyLoss(), k=4, perturb="weight", tangents="rademacher")
        for _ in range(3):
            fg.derivatives(torch.ones(2, 20, device=device), torch.tensor([1, 2], device=device))
            fg.update_(1e-2)
        found[device] = [p.detach().cpu() for p in model.parameters()]
    for a, b in zip(found["cuda"], found["cpu"], strict=True):
        assert relative_error(a, b) <= 1e-4  # three steps of float32, summed in another order


def test_nan_leaves_gradients_alone():
    model = mlp().cuda()
    fg = frog.ForwardGradient(model, nn.CrossEntropyLoss(), k=2, perturb="weight")
    with pytest.raises(FloatingPointError, match="loss"):
        fg(torch.full((2, 20), float("nan"), device="cuda"), torch.tensor([1, 2], device="cuda"))
    assert all(p.grad is None for p in model.parameters())


def test_attention_runs_on_every_length():
    for length in (1, 63, 64, 65, 200):
        q, dq = torch.randn(2, 3, length, 64, dtype=torch.float64), torch.randn(4, 2, 3, length, 64, dtype=torch.float64)
        out = ops.attention_jvp(q.cuda(), dq.cuda(), q.cuda(), dq.cuda(), q.cuda(), dq.cuda(), is_causal=True)
        expected = ops.attention_jvp(q, dq, q, dq, q, dq, is_causal=True)
        for a, b in zip(out, expected, strict=True):
            assert relative_error(a.cpu(), b) <= 2e-10


@pytest.mark.parametrize("shape, outputs", [((1, 1, 16), 16), ((3, 7, 5, 48), 32), ((4, 300, 784), 1024)], ids=str)
def test_products_in_float8(shape, outputs):
    """Against exact sums of the rounded numbers; PyTorch's sums on a GPU keep fewer bits than float32 has."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    g = torch.Generator().manual_seed(0)
    dx, w = torch.randn(shape, generator=g).bfloat16().cuda(), torch.randn(outputs, shape[-1], generator=g).cuda()
    (a, a_scale), (b, b_scale) = float8._rounded(dx), float8._rounded(w)
    exact = (a.double() @ b.double().T) * (a_scale.double() * b_scale.double())
    assert relative_error(float8.product(dx, w).cpu(), exact.cpu()) <= 2**-7
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = float8.product(dx, w)
    graph.replay()
    assert torch.equal(captured, float8.product(dx, w))


@pytest.mark.parametrize("perturb", ["weight", "activity"])
def test_tangents_in_float8(perturb):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    derivatives = []
    for dtype in (None, torch.float8_e4m3fn):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 16)).cuda()
        fg = frog.ForwardGradient(model, nn.CrossEntropyLoss(), k=4, perturb=perturb, tangent_dtype=dtype)
        fg(torch.randn(20, 32, generator=torch.Generator().manual_seed(1)).cuda(), (torch.arange(20) % 16).cuda())
        derivatives.append(fg.last.directional_derivatives.double())
    exact, found = derivatives
    assert 0 < (found - exact).norm() / exact.norm() < 2**-3
