from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from against_func import check, compare, draw, dual, expected
from helpers import assert_close64
from torch import nn
from torch.func import functional_call

from frog_cuda import dual as dual_module
from frog_cuda import ops
from frog_cuda.dual import DualTensor, SampledTangents, add_activity, primal_of, tangents_of

K = 3


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(12, 9), nn.Linear(9, 12), nn.LayerNorm(12)

    def forward(self, x):
        return self.norm(x + self.second(F.gelu(self.first(x))))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(10, 12), nn.Linear(12, 10, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x):
        return self.out(torch.tanh(self.embedding(x)).mean(1))


class Buffers(nn.Module):
    """Writes into buffers, splits a packed parameter, branches on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Parameter(torch.randn(12, 24))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        a, b = self.packed.chunk(2, 1)
        self.seen = self.seen + 1
        h = x @ a if x.sum() > -1e9 else x
        out = h.new_zeros(h.shape)
        out[:, ::2] = h[:, ::2]
        out[:, 1::2] -= (x @ b)[:, 1::2]
        return out


CNN = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 5)]
MODULES = {
    "mlp": (lambda: nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5), nn.LogSoftmax(1)), (7, 12)),
    "in-place relu": (lambda: nn.Sequential(nn.Linear(12, 9), nn.ReLU(inplace=True), nn.Linear(9, 5)), (7, 12)),
    "dropout": (lambda: nn.Sequential(nn.Linear(12, 9), nn.SiLU(), nn.Dropout(0.5), nn.Linear(9, 5)), (7, 12)),
    "norms": (lambda: nn.Sequential(nn.Linear(12, 8), nn.LayerNorm(8), nn.Softplus(), nn.BatchNorm1d(8)), (7, 12)),
    "residual": (lambda: nn.Sequential(Residual(), Residual()), (2, 7, 12)),
    "convolution": (lambda: nn.Sequential(*copy.deepcopy(CNN)), (3, 1, 6, 6)),
    "attention": (lambda: nn.TransformerEncoderLayer(12, 3, 16, dropout=0.0, batch_first=True), (2, 5, 12)),
    "recurrent": (lambda: nn.GRUCell(12, 4), (7, 12)),
    "prelu": (lambda: nn.Sequential(nn.Linear(12, 4), nn.PReLU(), nn.Hardswish()), (7, 12)),
    "buffers": (Buffers, (7, 12)),
    "empty batch": (lambda: nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5)), (0, 12)),
}  # fmt: skip


def duals_of(parameters: dict, tangents: dict) -> dict:
    return {n: DualTensor(p, tangents[n]) for n, p in parameters.items()}


def check_module(make, x: torch.Tensor, k: int = K) -> None:
    """An unmodified module with DualTensor parameters against one torch.func.jvp per tangent."""
    torch.manual_seed(0)
    module = make().double()
    before = {n: v.clone() for n, v in module.state_dict().items()}
    parameters = dict(module.named_parameters())
    names = list(parameters)
    tangents = [draw(k, *p.shape, seed=50 + i) for i, p in enumerate(parameters.values())]

    def run(*values, module=None):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            # Running statistics cannot be updated inside torch.func; a copy that has none of its own does the same
            return functional_call(module, dict(zip(names, values, strict=True)), (x,))

    reference = copy.deepcopy(module)
    for m in reference.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.running_mean = m.running_var = m.num_batches_tracked = None
    (value,), (moved,) = expected(lambda *v: run(*v, module=reference), [p.detach() for p in parameters.values()], tangents)
    torch.manual_seed(7)
    out = run(*(DualTensor(p, t) for p, t in zip(parameters.values(), tangents, strict=True)), module=module)
    compare(out, value, moved)
    assert not out.requires_grad
    for n, p in module.named_parameters():
        assert type(p) is nn.Parameter and p.requires_grad and torch.equal(p, before[n]) and p.grad is None


@pytest.mark.parametrize("name", MODULES)
def test_unmodified_modules(name):
    make, shape = MODULES[name]
    check_module(make, draw(*shape))


def test_tied_weights():
    torch.manual_seed(0)
    module = Tied().double()
    tokens = torch.tensor([[1, 4, 4], [9, 0, 2]])
    w, t = module.out.weight, draw(K, 10, 12)
    out = functional_call(module, {"embedding.weight": DualTensor(w, t)}, (tokens,))
    (value,), (moved,) = expected(lambda w: F.linear(torch.tanh(F.embedding(tokens, w)).mean(1), w), [w.detach()], [t])
    compare(out, value, moved)


@pytest.mark.parametrize("name", ["mlp", "residual", "attention", "buffers"])
def test_sampled_parameters_give_the_same_as_stored_ones(name):
    make, shape = MODULES[name]
    torch.manual_seed(0)
    module, x = make().double(), draw(*shape)
    state, offset, sampled, stored = torch.tensor([3, 1]), 0, {}, {}
    for n, p in module.named_parameters():
        sampled[n] = DualTensor.sampled_from(p, SampledTangents(state, K, 2, offset, "normal"))
        drawn = ops.sample_tangents(state, K, p.numel(), offset=offset, first=2, dtype=p.dtype)
        stored[n] = DualTensor(p, drawn.view(K, *p.shape))
        offset += p.numel()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        a, b = functional_call(module, sampled, (x,)), functional_call(module, stored, (x,))
    assert_close64(a.primal, b.primal)
    assert_close64(a.tangents, b.tangents)
    assert all(d._tangents is None for d in sampled.values())


def test_weight_norm_which_has_no_forward_mode_in_pytorch():
    v, g, x = draw(5, 12), draw(5, 1, seed=2).abs(), draw(7, 12, seed=3)
    with pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(lambda v: torch._weight_norm(v, g, 0), (v,), (v,))
    tangents = [draw(K, *v.shape, seed=4), draw(K, *g.shape, seed=5)]
    (value,), (moved,) = expected(lambda v, g: F.linear(x, v * (g / v.norm(dim=1, keepdim=True))), [v, g], tangents)
    module = nn.utils.parametrizations.weight_norm(nn.Linear(12, 5, bias=False).double())
    names = ("parametrizations.weight.original1", "parametrizations.weight.original0")
    duals = {n: DualTensor(p, t) for n, p, t in zip(names, (v, g), tangents, strict=True)}
    compare(functional_call(module, duals, (x,)), value, moved)


def test_functions_mixing_many_operations():
    def fn(x, w):
        h = torch.einsum("bi,oi->bo", x, w).sigmoid()
        h = torch.cat([h, h.flip(1)], 1)[:, 1:].cumsum(1)
        h[:, 0] = h[:, 1] ** 2
        mask = h > h.mean()
        h = torch.where(mask, h, h.detach() * 0.1).masked_fill(h > 5, 0.0)
        scores = (h @ h.t() / h.shape[1] ** 0.5).softmax(-1)
        return (scores @ h).std(0), scores.logsumexp(0).prod(), h.norm()

    for k in (1, 4):
        check(fn, draw(7, 5), draw(9, 5, seed=3), k=k)
    check(fn, draw(5, 7).t(), draw(9, 10)[:, ::2], k=2)


def test_only_what_depends_on_the_input_carries_tangents():
    x, plain = dual(draw(4)), draw(4)
    assert type(plain * 2) is torch.Tensor and isinstance(plain * x, DualTensor)
    assert type(x > 0) is torch.Tensor and tangents_of(plain) is None and primal_of(plain) is plain
    assert primal_of(x) is x.primal and tangents_of(x) is x.tangents


def test_attributes():
    x = dual(draw(2, 3).t())
    assert x.shape == (3, 2) and x.stride() == x.primal.stride() and not x.is_contiguous() and x.dtype == torch.float64
    assert x.k == K and x.sampled is None and x.device.type == "cpu" and not x.requires_grad and x.ndim == 2
    assert "k=3" in repr(x) and "sampled" in repr(
        DualTensor.sampled_from(draw(2), SampledTangents(torch.zeros(2), 1, 0, 0, "normal"))
    )
    y = copy.deepcopy(x)
    y.mul_(2)
    assert torch.equal(y.tangents, 2 * x.tangents) and not torch.equal(y.primal, x.primal)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(x)


def test_primals_are_detached():
    p = nn.Parameter(draw(3))
    x = DualTensor(p, draw(2, 3).requires_grad_())
    assert not x.requires_grad and not x.primal.requires_grad and not x.tangents.requires_grad
    assert x.primal.data_ptr() == p.data_ptr()
    assert not (x * p).primal.requires_grad


def test_pending_activities_add_up():
    x, dx, v, w = draw(5, 4), draw(K, 5, 4, seed=2), draw(K, 4, seed=3), draw(K, 5, 4, seed=4)
    y = add_activity(DualTensor(x, dx), v)
    assert y._activity is not None and y._tangents is not None
    z = add_activity(y, w)
    assert_close64(z.tangents, dx + v[:, None] + w)
    assert_close64(y.tangents, dx + v[:, None])
    plain = add_activity(x, v)
    assert plain.primal.data_ptr() == x.data_ptr()
    assert_close64((plain * 2).tangents, (2 * v[:, None]).expand(K, 5, 4))
    view = add_activity(x.clone(), v)
    view[0].mul_(3)
    assert_close64(view.tangents[:, 0], 3 * v)
    source = DualTensor(x, dx)
    add_activity(source, v).tangents  # noqa: B018
    assert_close64(source.tangents, dx)


BAD = [
    (lambda: DualTensor([1.0], draw(1, 1)), TypeError, "primal is of type list"),
    (lambda: DualTensor(dual(draw(3)), draw(1, 3)), TypeError, "primal is of type DualTensor"),
    (lambda: DualTensor(torch.arange(3), draw(1, 3)), TypeError, "primal has dtype torch.int64"),
    (lambda: DualTensor(draw(3), torch.ones(1, 3, dtype=torch.int64)), TypeError, "tangents has dtype torch.int64"),
    (lambda: DualTensor(draw(3), draw(3)), ValueError, r"tangents have shape \(3,\)"),
    (lambda: DualTensor(draw(3), draw(0, 3)), ValueError, r"tangents have shape \(0, 3\)"),
    (lambda: DualTensor(draw(3), draw(2, 4)), ValueError, r"primal.shape \(3,\)"),
    (lambda: DualTensor(draw(3), draw(2, 3).to("meta")), ValueError, "tangents are on meta"),
    (lambda: DualTensor(draw(3) * 1j, draw(2, 3)), TypeError, "tangents have dtype torch.float64"),
    (lambda: DualTensor(draw(3).to_sparse(), draw(2, 3)), TypeError, "layout"),
    (lambda: DualTensor.sampled_from(draw(3), SampledTangents(torch.zeros(2), 0, 0, 0, "normal")), ValueError, "k is 0"),
    (lambda: add_activity(draw(5, 4), draw(2, 5)), ValueError, r"v has shape \(2, 5\)"),
    (lambda: add_activity(dual(draw(5, 4)), draw(2, 4)), ValueError, "k = 3.*k = 2"),
    (lambda: add_activity(torch.arange(4), draw(2, 4)), TypeError, "t has dtype torch.int64"),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(BAD)))
def test_bad_input(index):
    build, error, message = BAD[index]
    with pytest.raises(error, match=message):
        build()


def test_rules_may_be_imported_in_any_order():
    for first in ("frog_cuda.rules.linear", "frog_cuda.functional"):
        code = f"import {first}; from frog_cuda.dual import FUNCTION_RULES; assert FUNCTION_RULES"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_a_rule_can_be_added():
    def double(x):
        return x * 2

    before = dict(dual_module.FUNCTION_RULES)
    try:
        dual_module.rule(torch.sinh)(double)
        x = dual(draw(3))
        assert torch.equal(torch.sinh(x).tangents, (x * 2).tangents)
        dual_module.rule(torch.sinh)(lambda x: NotImplemented)  # declines: the next stage serves it
        assert_close64(torch.sinh(x).tangents, x.tangents * x.primal.cosh())
    finally:
        dual_module.FUNCTION_RULES.clear()
        dual_module.FUNCTION_RULES.update(before)


def test_a_shallow_copy_shares_the_memory():
    x = DualTensor(torch.ones(3), torch.ones(2, 3))
    copied = copy.copy(x)
    x.mul_(2)
    assert copied is not x and torch.equal(copied.primal, x.primal) and torch.equal(copied.tangents, 2 * torch.ones(2, 3))


def test_no_tangents_of_eight_bits():
    with pytest.raises(TypeError, match="torch.float8_e4m3fn would have tangents of 8 bits; at least 16 are needed"):
        DualTensor(torch.ones(3), torch.ones(2, 3)).to(torch.float8_e4m3fn)
