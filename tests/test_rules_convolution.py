from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from against_func import check, compare, draw, expected
from helpers import assert_as_good_as_torch, assert_close64
from torch import nn

from frog_cuda import ops
from frog_cuda.dual import DualTensor, SampledTangents
from frog_cuda.one_place import one_place
from frog_cuda.rules import convolution

CONVOLUTIONS = {
    "2d": (F.conv2d, (2, 3, 7, 5), (4, 3, 3, 3), {}),
    "strided": (F.conv2d, (2, 3, 7, 5), (4, 3, 3, 3), {"stride": 2, "padding": 1}),
    "dilated": (F.conv2d, (1, 3, 9, 9), (1, 3, 3, 1), {"dilation": 2}),
    "grouped": (F.conv2d, (2, 4, 7, 5), (4, 2, 3, 3), {"groups": 2}),
    "same": (F.conv2d, (2, 3, 7, 5), (4, 3, 3, 3), {"padding": "same"}),
    "unbatched": (F.conv2d, (3, 7, 5), (4, 3, 3, 3), {}),
    "1d": (F.conv1d, (2, 3, 7), (4, 3, 3), {"padding": 1}),
    "3d": (F.conv3d, (1, 2, 3, 4, 5), (3, 2, 2, 2, 2), {}),
    "transposed": (F.conv_transpose2d, (2, 3, 4, 5), (3, 4, 3, 3), {"stride": 2, "output_padding": 1}),
    "empty": (F.conv2d, (0, 3, 7, 5), (4, 3, 3, 3), {}),
    "no channels": (F.conv2d, (2, 0, 7, 5), (4, 0, 3, 3), {}),
    "one place, no channels": (F.conv2d, (2, 0, 3, 3), (4, 0, 3, 3), {}),
    "depthwise": (F.conv2d, (2, 4, 7, 5), (4, 1, 3, 3), {"groups": 4, "padding": 1}),
    "valid": (F.conv1d, (2, 3, 33), (4, 3, 7), {"padding": "valid"}),
    "pointwise": (F.conv2d, (1, 33, 1, 7), (4, 33, 1, 1), {}),
    "one place": (F.conv2d, (2, 3, 1, 1), (4, 3, 3, 3), {"padding": 1}),
    "one place, most of the kernel": (F.conv2d, (100, 3, 2, 2), (4, 3, 3, 3), {"padding": 1, "stride": 2}),
    "one place, whole kernel": (F.conv1d, (7, 3, 5), (4, 3, 5), {}),
    "one place, dilated": (F.conv2d, (2, 3, 6, 1), (4, 3, 3, 1), {"padding": (1, 0), "dilation": (3, 1), "stride": (2, 4)}),
    "one place, empty": (F.conv2d, (0, 3, 1, 1), (4, 3, 3, 3), {"padding": 1}),
    "transposed 1d": (F.conv_transpose1d, (2, 3, 7), (3, 4, 3), {"stride": 3, "padding": 1, "dilation": 2}),
    "transposed 3d": (F.conv_transpose3d, (1, 2, 3, 4, 5), (2, 3, 2, 2, 2), {"padding": 1}),
    "transposed grouped": (F.conv_transpose2d, (2, 4, 4, 5), (4, 2, 3, 3), {"groups": 2}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    op, x_shape, w_shape, options = CONVOLUTIONS[name]
    x, w, b = draw(*x_shape), draw(*w_shape, seed=2), draw(3 if "3d" in name else 4, seed=3)
    b = b[:1] if name == "dilated" else b
    check(lambda x, w, b: op(x, w, b, **options), x, w, b)
    check(lambda x: op(x, w, b, **options), x, k=1)
    check(lambda w: op(x, w, **options), w)
    check(lambda b: op(x, w, b, **options), b)


SAMPLED = [
    "2d",
    "strided",
    "grouped",
    "1d",
    "3d",
    "transposed",
    "transposed 1d",
    "transposed grouped",
    "depthwise",
    "one place",
]


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_sampled_weights_are_drawn_by_the_operator_or_one_at_a_time(name, distribution, fits, monkeypatch):
    op, x_shape, w_shape, options = CONVOLUTIONS[name]
    x, w, b = draw(*x_shape), draw(*w_shape, seed=2), draw(3 if name == "3d" else 4, seed=3)
    k, state, at = 5, torch.tensor([3, 9]), 70
    counts = []
    original = convolution.draw
    monkeypatch.setattr(convolution, "draw", lambda *a: counts.append(a[3]) or original(*a))
    if not fits:  # as groups of few filters on a GPU
        monkeypatch.setattr(convolution, "_fits", lambda *a: False)

    def sampled(p, offset):
        return DualTensor.sampled_from(p, SampledTangents(state, k, 2, offset, distribution))

    def stored(p, offset):
        flat = ops.sample_tangents(state, k, p.numel(), first=2, offset=offset, distribution=distribution, dtype=torch.float64)
        return flat.view(k, *p.shape)

    tangents = [draw(k, *x_shape, seed=4), stored(w, at), stored(b, at + w.numel())]
    (value,), (moved,) = expected(lambda x, w, b: op(x, w, b, **options), [x, w, b], tangents)
    compare(op(DualTensor(x, tangents[0]), sampled(w, at), sampled(b, at + w.numel()), **options), value, moved)
    (value,), (moved,) = expected(lambda w: op(x, w, b, **options), [w], tangents[1:2])
    compare(op(x, sampled(w, at), b, **options), value, moved)
    assert counts == ([] if fits else [1] * 2 * k)


@pytest.mark.parametrize("device, groups, filters, fits", [("cpu", 4, 1, True), ("meta", 4, 1, False), ("meta", 1, 1, True)])
def test_groups_of_few_filters_are_the_library_s_beside_a_cpu(device, groups, filters, fits):
    x, w = torch.empty(1, 4, 3, 3, device=device), torch.empty(groups * filters, 4 // groups, 3, 3, device=device)
    tangents = SampledTangents(torch.tensor([0, 0]), 2, 0, 0, "normal")
    assert convolution._fits(x, w, tangents, None, groups, filters) is fits


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "taps, stride, padding, dilation", [(3, 1, 1, 1), (3, 2, 1, 1), (5, 7, 3, 1), (3, 4, 2, 3), (1, 2, 0, 1)]
)
def test_convolutions_with_one_place(size, taps, stride, padding, dilation):
    """The product, the part of the kernel that meets the input, and the gradient of the weight."""
    x, w = draw(2, 3, size, size + 1), draw(4, 3, taps, 2, seed=2).requires_grad_()
    options = (stride, 3), (padding, 0), (dilation, size)
    place = one_place(x.shape[2:], w, *options)
    try:
        y = F.conv2d(x, w, None, *options)
    except RuntimeError:  # the kernel is larger than the padded image
        assert place is None
        return
    if place is None:
        assert y.shape[2:] != (1, 1)
        return
    assert y.shape[2:] == (1, 1)
    assert_close64(place.rows(x) @ place.matrix(w.detach()).T, y.detach().flatten(1))
    g = draw(*y.shape, seed=3)
    y.backward(g)
    assert_close64(place.spread(g.flatten(1).T @ place.rows(x), w.detach()), w.grad)


def test_one_place_where_it_pays():
    """Not where a part of the kernel must be gathered; but what libraries make of bfloat16 takes longer still."""
    w = draw(4, 3, 3, 3)
    for size, stride, padding, cheap in ((1, 1, 1, True), (3, 1, 0, True), (2, 2, 1, False)):
        x, options = draw(2, 3, size, size), ((stride,) * 2, (padding,) * 2, (1, 1))
        place = one_place(x.shape[2:], w, *options)
        assert place is not None and place.is_cheap(w) == cheap
        assert (convolution._one_place(x, w, None, None, *options) is not None) == cheap
        assert convolution._one_place(x, w, None, torch.bfloat16, *options) is not None
        assert convolution._one_place(x.bfloat16(), w.bfloat16(), None, None, *options) is not None


def test_low_precision_tangents_with_one_place():
    x, w, b = draw(2, 33, 2, 2).float(), draw(7, 33, 3, 3, seed=2).float(), draw(7, seed=3).float()
    dx = draw(3, *x.shape, seed=4).bfloat16()
    y = F.conv2d(DualTensor(x, dx), w, b, 2, 1)
    assert y.primal.dtype == torch.float32 and y.tangents.dtype == torch.bfloat16
    torch.testing.assert_close(y.primal, F.conv2d(x, w, b, 2, 1))
    exact = torch.stack([F.conv2d(v.double(), w.double(), None, 2, 1) for v in dx])
    own = torch.stack([F.conv2d(v, w.bfloat16(), None, 2, 1) for v in dx])
    assert_as_good_as_torch(y.tangents, own, exact)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("layer", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_padding_modes(layer, mode):
    if layer is nn.Conv3d and mode == "reflect":
        mode = "replicate"  # PyTorch has no reflection in three dimensions under vmap
    torch.manual_seed(0)
    spatial = {nn.Conv1d: (7,), nn.Conv2d: (7, 5), nn.Conv3d: (4, 5, 3)}[layer]
    module = layer(2, 3, 3, padding=1, padding_mode=mode, dtype=torch.float64)

    def call(x, w, b):
        return torch.func.functional_call(module, {"weight": w, "bias": b}, (x,))

    check(call, draw(2, 2, *spatial), module.weight.detach(), module.bias.detach())


def test_non_contiguous_operands():
    x, w = draw(2, 7, 5, 3).permute(0, 3, 1, 2), draw(3, 3, 3, 4).permute(3, 2, 0, 1)
    check(lambda x, w: F.conv2d(x, w), x, w)
    assert_close64(F.conv2d(DualTensor(x, draw(2, *x.shape)), w).primal, F.conv2d(x, w))


@pytest.mark.parametrize(
    "weight, options",
    [
        ((4, 5, 3, 3), {}),
        ((4, 3, 9, 9), {}),
        ((4, 3, 3, 3), {"groups": 2}),
        ((4, 3, 3, 3), {"stride": (1, 1, 1)}),
        ((4, 3, 3, 3), {"padding": (1, 1, 1)}),
        ((4, 3, 3, 3), {"dilation": 0}),
    ],
)
def test_bad_input_gets_the_error_of_pytorch(weight, options):
    x, w = torch.zeros(2, 3, 8, 8), torch.zeros(weight)
    with pytest.raises(RuntimeError) as plain:
        F.conv2d(x, w, **options)
    with pytest.raises(RuntimeError) as dual:
        F.conv2d(DualTensor(x, torch.zeros(2, *x.shape)), w, **options)
    assert str(plain.value).splitlines()[0] == str(dual.value).splitlines()[0]
