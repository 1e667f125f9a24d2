from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from against_func import check, compare, draw, dual, expected
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import frog_cuda as frog
from frog_cuda.dual import DualTensor
from frog_cuda.rules import attention as rules

MASK = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) > 0.3


@pytest.fixture
def fused(monkeypatch):
    """How often the fused operator was called."""
    calls = []
    original = rules._attention_jvp

    def counted(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(rules, "_attention_jvp", counted)
    return calls


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "additive": {"attn_mask": torch.arange(5.0).double()},
    "boolean": {"attn_mask": MASK},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("lead", [(), (2,), (2, 2), (2, 3, 2)], ids=str)
def test_attention(options, lead, fused):
    q, k, v = draw(*lead, 3, 4), draw(*lead, 5, 4, seed=2), draw(*lead, 5, 7, seed=3)
    with sdpa_kernel(SDPBackend.MATH):  # the only backend with a forward mode
        check(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options), q, k, v)
        check(lambda q: F.scaled_dot_product_attention(q, k, v, **options), q, k=1)
        check(lambda k: F.scaled_dot_product_attention(q, k, v, **options), k)
        check(lambda v: F.scaled_dot_product_attention(q, k, v, **options), v)
    assert len(fused) == 4


def test_grouped_query_heads(fused):
    q, k, v = draw(2, 6, 3, 4), draw(2, 2, 5, 4, seed=2), draw(2, 2, 5, 7, seed=3)
    with sdpa_kernel(SDPBackend.MATH):
        check(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), q, k, v)
    assert len(fused) == 1
    with pytest.raises(RuntimeError):  # PyTorch's own error
        F.scaled_dot_product_attention(dual(q), k, v)


def test_causal_and_mask_together(fused):
    q, k, v = draw(2, 2, 3, 4), draw(2, 2, 5, 4, seed=2), draw(2, 2, 5, 7, seed=3)
    both = MASK & torch.ones(3, 5, dtype=torch.bool).tril()
    both[0] = False
    mask = MASK.clone()
    mask[0] = False
    with sdpa_kernel(SDPBackend.MATH):
        (value,), (moved,) = expected(lambda q: F.scaled_dot_product_attention(q, k, v, both), [q], [dual(q).tangents])
    compare(F.scaled_dot_product_attention(dual(q), k, v, mask, is_causal=True), value, moved)
    assert len(fused) == 1
    additive = torch.zeros(3, 5, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    learnt = DualTensor(additive, torch.zeros(3, 3, 5, dtype=torch.float64))
    compare(F.scaled_dot_product_attention(dual(q), k, v, learnt, is_causal=True), value, moved)


def test_what_the_operator_does_not_take(fused):
    q, k, v = draw(2, 2, 3, 4), draw(2, 2, 5, 4, seed=2), draw(2, 2, 5, 7, seed=3)
    with sdpa_kernel(SDPBackend.MATH):
        check(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.3), q, k, v)
        check(lambda q: F.scaled_dot_product_attention(q, k, v, MASK, dropout_p=0.3), q)
        check(lambda q, m: F.scaled_dot_product_attention(q, k, v, m), q, draw(3, 5))
        check(lambda q: F.scaled_dot_product_attention(q, k[:1], v[:1]), q)
    assert not fused


def test_fused_backends_called_by_name(fused):
    q, k, v = draw(2, 2, 6, 4), draw(2, 2, 5, 4, seed=2), draw(2, 2, 5, 4, seed=3)
    (value,), (moved,) = expected(
        lambda q: torch.ops.aten._scaled_dot_product_attention_math(q, k, v)[0], [q], [dual(q).tangents]
    )
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, statistics = flash(dual(q), k, v)
    compare(out, value, moved)
    assert torch.equal(statistics, flash(q, k, v)[1])
    with pytest.raises(NotImplementedError, match="flash_attention_for_cpu.*dropout"):
        flash(dual(q), k, v, 0.5)


def test_fused_backends_have_no_forward_mode_in_pytorch():
    """The trap: torch.func.jvp fails on the backend PyTorch chooses by itself; a DualTensor does not meet it."""
    q = draw(2, 2, 5, 4)
    with pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(lambda q: F.scaled_dot_product_attention(q, q, q), (q,), (q,))
    assert F.scaled_dot_product_attention(dual(q), q, q).tangents.shape == (3, 2, 2, 5, 4)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "unmasked"])
def test_multihead_attention(training, need_weights, masked, fused):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64).train(training)
    x, y = draw(3, 5, 8), draw(3, 7, 8, seed=2)
    options = {"attn_mask": torch.zeros(5, 7).bool().fill_diagonal_(True)} if masked else {}
    names = [n for n, _ in layer.named_parameters()]

    def call(x, y, *parameters):
        out, weights = functional_call(
            layer, dict(zip(names, parameters, strict=True)), (x, y, y), {"need_weights": need_weights, **options}
        )
        return (out, weights) if need_weights else out

    with sdpa_kernel(SDPBackend.MATH):
        check(call, x, y, *(p.detach() for p in layer.parameters()))
    assert bool(fused) != need_weights


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_transformer_encoder_layer(training, fused):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, dtype=torch.float64).train(training)
    names = [n for n, _ in layer.named_parameters()]

    def call(x, *parameters):
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    x, parameters = draw(3, 5, 8), [p.detach() for p in layer.parameters()]
    duals = [dual(p, seed=i) for i, p in enumerate((x, *parameters))]
    torch.backends.mha.set_fastpath_enabled(False)  # which torch.func would take in eval mode, without a forward mode
    try:
        with sdpa_kernel(SDPBackend.MATH):
            (value,), (moved,) = expected(call, [x, *parameters], [d.tangents for d in duals])
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    compare(call(*duals), value, moved)
    assert fused


def test_forward_gradient_of_a_transformer():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, dtype=torch.float64)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(40, 3, dtype=torch.float64))
    x, y = draw(6, 5, 8), torch.randint(0, 3, (6,))
    for perturb in ("weight", "activity"):
        fg = frog.ForwardGradient(model, lambda o, t: F.cross_entropy(o, t, reduction="none"), k=4, perturb=perturb)
        simulated = frog.simulate(fg, x, y)
        fg(x, y)
        largest = max(g.abs().max() for g in simulated.gradients.values())
        for name, p in model.named_parameters():
            assert (p.grad - simulated.gradients[name]).abs().max() <= 1e-10 * largest, name
        model.zero_grad()
