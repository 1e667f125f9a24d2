from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from against_func import compare, draw, dual, expected
from torch import nn
from torch.func import functional_call

import frog_cuda as frog

#: class name -> constructor arguments and input shapes; classes that are missing here take none and (2, 3, 8, 8)
CASES: dict[str, tuple[tuple, tuple]] = {
    "Linear": ((7, 5), ((3, 7),)),
    "Bilinear": ((7, 4, 5), ((3, 7), (3, 4))),
    "Conv1d": ((3, 4, 3), ((2, 3, 9),)),
    "Conv2d": ((3, 4, 3), ((2, 3, 7, 6),)),
    "Conv3d": ((3, 4, 2), ((2, 3, 4, 4, 3),)),
    "ConvTranspose1d": ((3, 4, 3), ((2, 3, 9),)),
    "ConvTranspose2d": ((3, 4, 3), ((2, 3, 7, 6),)),
    "ConvTranspose3d": ((3, 4, 2), ((2, 3, 4, 4, 3),)),
    **{f"{kind}{d}d": ((3,), ((4, 3, *(5,) * d),)) for kind in ("BatchNorm", "InstanceNorm") for d in (1, 2, 3)},
    "LayerNorm": ((6,), ((4, 6),)),
    "RMSNorm": ((6,), ((4, 6),)),
    "GroupNorm": ((3, 6), ((4, 6, 5),)),
    "LocalResponseNorm": ((2,), ((2, 3, 5, 5),)),
    **{f"{kind}Pool{d}d": ((2,), ((2, 3, *(6,) * d),)) for kind in ("Max", "Avg") for d in (1, 2, 3)},
    **{f"Adaptive{kind}Pool{d}d": ((2,), ((2, 3, *(5,) * d),)) for kind in ("Max", "Avg") for d in (1, 2, 3)},
    "Threshold": ((0.1, 2.0), ((3, 4),)),
    "GLU": ((), ((3, 4),)),
    "Softmax": ((1,), ((3, 4),)),
    "LogSoftmax": ((1,), ((3, 4),)),
    "Softmin": ((1,), ((3, 4),)),
    "Unflatten": ((1, (2, 3)), ((4, 6),)),
    "Upsample": ((None, 2), ((2, 3, 4, 4),)),
    "PixelShuffle": ((2,), ((2, 4, 3, 3),)),
    "PixelUnshuffle": ((2,), ((2, 3, 4, 4),)),
    "Fold": (((4, 5), 2), ((2, 12, 12),)),
    "Unfold": ((2,), ((2, 3, 4, 4),)),
    **{f"{kind}Pad2d": ((1,), ((2, 3, 4, 4),)) for kind in ("Zero", "Reflection", "Replication")},
    "MultiheadAttention": ((8, 2, 0.0, True, False, False, None, None, True), ((2, 5, 8), (2, 7, 8), (2, 7, 8))),
    "TransformerEncoderLayer": ((8, 2, 12, 0.0), ((5, 2, 8),)),
    "TransformerDecoderLayer": ((8, 2, 12, 0.0), ((5, 2, 8), (7, 2, 8))),
    "Dropout1d": ((), ((2, 3, 8),)),
    "Dropout3d": ((), ((2, 3, 4, 4, 4),)),
    **{name: ((), ((4, 5), (4, 5))) for name in ("MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss")},
}
SPECIAL = ("Embedding", "EmbeddingBag", "CrossEntropyLoss", "NLLLoss", "BCELoss", "BCEWithLogitsLoss")
NAMES = [c.__name__ for c in frog.nn.DROP_IN]


def make(module, name):
    arguments, shapes = CASES.get(name, ((), ((2, 3, 8, 8),)))
    torch.manual_seed(0)
    return getattr(module, name)(*arguments).double(), [draw(*s, seed=i) for i, s in enumerate(shapes)]


@pytest.mark.parametrize("name", [n for n in NAMES if n not in SPECIAL])
def test_as_the_original_on_plain_tensors_and_as_torch_func_on_duals(name):
    layer, xs = make(frog.nn, name)
    original, _ = make(nn, name)
    assert isinstance(layer, type(original)) and repr(layer) == repr(original)
    layer.load_state_dict(original.state_dict())
    torch.manual_seed(1)
    out = layer(*xs)
    torch.manual_seed(1)
    want = original(*xs)
    for o, w in zip(*(t if isinstance(t, tuple) else (t,) for t in (out, want)), strict=True):
        assert torch.equal(o, w) and not o.requires_grad

    original, _ = make(nn, name)  # with running statistics that have not moved
    layer, _ = make(frog.nn, name)
    layer.load_state_dict(original.state_dict())
    parameters = {n: p.detach() for n, p in original.named_parameters()}

    def call(module):
        def run(*values):
            state = dict(zip(parameters, values[len(xs) :], strict=True))
            state |= {n: b.clone() for n, b in module.named_buffers()}
            out = functional_call(module, state, values[: len(xs)])
            return out[0] if isinstance(out, tuple) else out

        return run

    values = [*xs, *parameters.values()]
    duals = [dual(v, seed=i) for i, v in enumerate(values)]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        original = _without_batching_trouble(original)
        (value,), (moved,) = expected(call(original), values, [d.tangents for d in duals])
    torch.manual_seed(7)
    compare(call(layer)(*duals), value, moved)


def _without_batching_trouble(module):
    """torch.func cannot write plain buffers; statistics of the batch are the same without them."""
    if isinstance(module, nn.modules.batchnorm._NormBase):
        module.running_mean = module.running_var = module.num_batches_tracked = None
    return module


def test_losses_and_embeddings():
    logits, target = draw(5, 7), torch.tensor([0, 6, 2, 2, 1])
    assert torch.equal(frog.nn.CrossEntropyLoss()(logits, target), F.cross_entropy(logits, target))
    (value,), (moved,) = expected(lambda x: F.cross_entropy(x, target), [logits], [dual(logits).tangents])
    compare(frog.nn.CrossEntropyLoss()(dual(logits), target), value, moved)
    log = logits.log_softmax(1)
    (value,), (moved,) = expected(lambda x: F.nll_loss(x, target), [log], [dual(log).tangents])
    compare(frog.nn.NLLLoss()(dual(log), target), value, moved)
    p, t = torch.sigmoid(draw(5, 3)), torch.rand(5, 3, dtype=torch.float64)
    (value,), (moved,) = expected(lambda x: F.binary_cross_entropy(x, t), [p], [dual(p).tangents])
    compare(frog.nn.BCELoss()(dual(p), t), value, moved)
    (value,), (moved,) = expected(lambda x: F.binary_cross_entropy_with_logits(x, t), [p], [dual(p).tangents])
    compare(frog.nn.BCEWithLogitsLoss()(dual(p), t), value, moved)
    table = frog.nn.Embedding(9, 4, dtype=torch.float64)
    w = table.weight.detach()
    (value,), (moved,) = expected(lambda w: F.embedding(target, w), [w], [dual(w).tangents])
    compare(functional_call(table, {"weight": dual(w)}, (target,)), value, moved)
    bag = frog.nn.EmbeddingBag(9, 4, dtype=torch.float64)
    w, bags = bag.weight.detach(), target.view(1, 5)
    compare(functional_call(bag, {"weight": dual(w)}, (bags,)), w[bags].mean(1), dual(w).tangents[:, bags].mean(2))


@pytest.mark.parametrize("name", NAMES)
def test_signature_copies_and_pickles(name):
    original, made = getattr(nn, name), getattr(frog.nn, name)
    assert inspect.signature(made) == inspect.signature(original)
    assert made.__module__ == "frog_cuda.nn" and name in made.__doc__
    if name in SPECIAL[:2]:
        layer = made(5, 3)
    else:
        layer = make(frog.nn, name)[0] if name not in SPECIAL else made()
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(again) is made and again.state_dict().keys() == layer.state_dict().keys()


def test_layer_local_gradients_need_no_second_pass():
    assert frog.local.local_rule(frog.nn.Linear(2, 2)) is frog.local.local_rule(nn.Linear(2, 2))
    assert frog.local.local_rule(frog.nn.Conv2d(2, 2, 1)) is not None
