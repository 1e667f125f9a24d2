from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from against_func import check, compare, draw, dual, expected

from frog_cuda.dual import ATEN_RULES, DualTensor, SampledTangents

MOVES = {
    "view": lambda x: x.contiguous().view(-1, 11).view(3, -1),
    "reshape": lambda x: x.reshape(-1) * 2,
    "flatten": lambda x: x.unsqueeze(0).flatten(1),
    "unflatten": lambda x: x.unflatten(1, (3, 11)),
    "transpose": lambda x: x.t() + x.transpose(0, 1) + x.transpose(-1, -2) + x.T + x.mT,
    "permute": lambda x: x[None].permute(2, 0, 1) + x[None].permute(-1, 0, -2),
    "movedim": lambda x: x[None].movedim(0, -1),
    "expand": lambda x: x[:, None].expand(-1, 4, -1) * x.expand(2, -1, -1)[:1].sum(),
    "broadcast_to": lambda x: x[:1].broadcast_to(5, 33),
    "slices": lambda x: x[1:5, ::2] * x[-4:, 1:18:1],
    "selects": lambda x: x[0] * x[-1] + x[2, 3] + x.select(1, -1).sum(),
    "narrow": lambda x: x.narrow(1, 3, 4),
    "index": lambda x: x[torch.tensor([0, 2, 2])] * x[:, torch.tensor([1])][:3],
    "index pair": lambda x: x[torch.tensor([0, 2]), torch.tensor([1, 5])],
    "separated indices": lambda x: x.reshape(7, 3, 11)[torch.tensor([0, 2]), :, torch.tensor([1, 5])],
    "mask": lambda x: x[x > 0].sum() + x[x[:, 0] > 0].sum() + x.masked_fill(x > 0, 2.0).sum(),
    "none and ellipsis": lambda x: x[None, ..., 0, None],
    "squeeze": lambda x: x[:1].squeeze() * x[:1].squeeze(0) + x[:1, :1].squeeze((0, 1)),
    "unsqueeze": lambda x: x.unsqueeze(-1) * x.unsqueeze(1).transpose(1, 2),
    "split": lambda x: [p * 2 for p in (*x.split(3), *x.split([4, 3]), *x.chunk(2, 1), *x.tensor_split([2, 5]))],
    "unbind": lambda x: [p * 2 for p in (*x, *x.unbind(1)[:2])],
    "cat": lambda x: torch.cat([x, torch.ones(2, 33, dtype=x.dtype), x * x]) + torch.cat([x[:1], x[:1]], -1)[0, :33],
    "cat with empty": lambda x: torch.cat([x[0], torch.empty(0, dtype=x.dtype)]),
    "stack": lambda x: torch.stack([x, x * x, torch.zeros_like(x)], -1).sum(-1) + torch.stack([x, x])[0],
    "flip and roll": lambda x: x.flip(0, -1) + x.roll(2, 0) + x.roll((1, 2), (0, 1)) + x.roll(3),
    "repeat": lambda x: x.repeat(2, 1, 1) + x.tile(1, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "pad": lambda x: F.pad(x, (1, 2), value=3.0) + F.pad(x, (1, 2), mode="reflect"),
    "gather": lambda x: x.gather(1, torch.tensor([[0, 1], [2, 3]])) * x.take(torch.tensor([0, 5])),
    "index_select": lambda x: x.index_select(1, torch.tensor([3, 3, 0])),
    "scatter_add": lambda x: x.scatter_add(0, torch.zeros(2, 33, dtype=torch.int64), x[:2] * 2),
    "index_add": lambda x: x.index_add(0, torch.tensor([0, 0]), x[:2] * x[:2]),
    "triangles": lambda x: x.tril() + x.triu(1) + torch.diag_embed(x[:, 0])[:, :1],
    "diagonal": lambda x: x.diagonal() * x.diagonal(1)[:7] + x.diagonal(-1).sum(),
    "unfold": lambda x: x.unfold(1, 4, 3),
    "dtypes": lambda x: x.to(torch.complex128).real + x.double().type(torch.float64),
    "clone": lambda x: x.clone() + x.clone(memory_format=torch.contiguous_format),
    "as_strided": lambda x: x.contiguous().as_strided((3, 2), (2, 1), 1),
    "swap": lambda x: x.swapaxes(0, 1) + x.adjoint(),
    "meshgrid": lambda x: torch.meshgrid(x[0, :3], x[:2, 0], indexing="ij"),
    "rot90": lambda x: x.rot90(),
}


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "k=1"])
def test_moves(name, layout):
    x = {"transposed": draw(33, 7).t(), "strided": draw(14, 66)[::2, ::2]}.get(layout, draw(7, 33))
    check(MOVES[name], x, k=1 if layout == "k=1" else 3)


def test_empty_batch():
    check(lambda x: x.reshape(0, 3, 11).transpose(1, 2) * 2, draw(0, 33))
    check(lambda x: torch.cat([x, x])[:, 1:], draw(0, 33))


def test_scalar_views():
    check(lambda x: x.reshape(1).view(()) + x.unsqueeze(0).squeeze() + x.expand(3) + x.t(), draw())


def test_embedding_gathers_rows_of_the_tangents():
    check(lambda w: F.embedding(torch.tensor([[0, 3], [3, 1]]), w), draw(5, 4))


def test_a_view_made_of_copied_tangents_refuses_to_be_written():
    x = DualTensor(draw(4, 6), draw(2, 6, 4).transpose(1, 2))  # tangents laid out in another way than the value
    view = x.view(24)
    assert torch.equal(view.tangents, x.tangents.reshape(2, 24))
    with pytest.raises(RuntimeError, match="in-place operation on a view"):
        view.add_(1)


def _channels_last(x):
    return F.conv2d(x, torch.ones(3, 3, 1, 1, dtype=x.dtype)).contiguous(memory_format=torch.channels_last)


MISSED = {
    "view": lambda x: (y := _channels_last(x), y.permute(0, 2, 3, 1).view(-1, 3)),
    "view of it": lambda x: (y := _channels_last(x), y.permute(0, 2, 3, 1).view(-1, 3)[1:]),
    "conj": lambda x: (y := torch.complex(x, x), y.conj()),
}


@pytest.mark.parametrize("name", MISSED)
def test_what_a_view_with_copied_tangents_views_refuses_to_be_written(name):
    base, view = MISSED[name](dual(draw(2, 3, 2, 2)))
    before = base.tangents.clone()
    with pytest.raises(RuntimeError, match=r"aten\.mul_.* would be missed by a view"):
        base.mul_(3)
    with pytest.raises(RuntimeError, match="missed by a view"):
        base[0].mul_(3)
    del view
    base.mul_(3)  # nobody would miss it
    assert torch.equal(base.tangents, 3 * before)


@pytest.mark.parametrize("ruled", [True, False], ids=["rule", "fallback"])
@pytest.mark.parametrize("name", ["imag", "view_as_real"])
@pytest.mark.parametrize("size", [4, 3])
def test_complex_numbers_and_their_parts_see_what_is_written_into_the_other(size, name, ruled, monkeypatch):
    """Pairs of the tangents of three elements begin at odd places and must be copied: then a write is refused."""
    if not ruled:
        for overload in (torch.ops.aten.view_as_real.default, torch.ops.aten.view_as_complex.default):
            monkeypatch.setitem(ATEN_RULES, overload, lambda *args: NotImplemented)

    def part(base):
        pairs = torch.view_as_complex(base[:2].view(-1, 2))
        return pairs.imag if name == "imag" else torch.view_as_real(pairs)

    def write_part(x):
        base = x * 1
        part(base).mul_(3)
        return base * 1

    def write_base(x):
        base = x * 1
        seen = part(base)
        base.mul_(3)
        return seen * 1

    for fn in (write_part, write_base):
        if ruled and size == 4:
            check(fn, draw(size))
        else:
            with pytest.raises(RuntimeError, match="in-place operation on a view|missed by a view"):
                fn(dual(draw(size)))


def test_a_view_with_copied_tangents_leaves_the_rest_of_its_base_writable():
    base = DualTensor(draw(2, 4, 6), draw(2, 2, 6, 4).transpose(2, 3))
    view = base[0].view(24)
    base[1].mul_(2)
    with pytest.raises(RuntimeError, match="missed by a view"):
        base[0, 3].mul_(2)
    assert torch.equal(view.tangents, base.tangents[:, 0].reshape(2, 24))


def test_views_of_sampled_parameters():
    parameter = DualTensor.sampled_from(draw(3), SampledTangents(torch.tensor([1, 0]), 2, 0, 0, "normal"))
    tangents = parameter.tangents
    view = parameter.view(3, 1)
    with pytest.raises(RuntimeError, match="missed by a view .*: a view of a parameter"):
        parameter.mul_(2)
    assert torch.equal(view.tangents, tangents[..., None])
    del view
    assert torch.equal(parameter.unsqueeze_(0).mul_(2).tangents, 2 * tangents[:, None])


WRITTEN = {
    "as_strided": lambda v: v.as_strided((2, 2), (1, 2), 1),
    "part as_strided": lambda v: v[1].as_strided((2, 2), (2, 1), 4),
    "view_as_complex": lambda v: torch.view_as_complex(v.view(2, 2, 2)),
    "positive": lambda v: +v,
    "transpose": lambda v: v[0, 1].transpose(0, 0),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_views_and_their_base_see_what_is_written_into_the_other(name):
    def fn(x):
        v = x * 1
        view = WRITTEN[name](v)
        v.mul_(x)
        read = view * 2
        view.mul_(3)
        buffer = x.new_zeros(2, 4)  # its zero tangents are not stored yet
        other = WRITTEN[name](buffer)
        buffer.copy_(x)
        return torch.view_as_real(read) if read.is_complex() else read, v, other * 1 if name != "view_as_complex" else buffer

    check(fn, draw(2, 4))


def test_parts_of_unsafe_split_see_their_base():
    """Recurrent cells write into them. PyTorch's forward mode takes them for copies, and zeros for their tangents here."""
    x = dual(draw(2, 4))
    buffer = torch.zeros_like(x)
    first, second = buffer.unsafe_split(2, 1)
    buffer.copy_(x)
    second.mul_(2)
    assert torch.equal(first.tangents, x.tangents[..., :2])
    assert torch.equal(buffer.tangents[..., 2:], 2 * x.tangents[..., 2:])


def test_dropout_of_feature_maps_that_does_not_drop_is_the_tensor_itself():
    x = dual(draw(2, 3, 4))
    for y in (F.dropout1d(x, 0.5, training=False), torch.feature_alpha_dropout(x, 0.5, False), F.alpha_dropout(x, 0.5)):
        assert y is x


def test_memory_formats():
    x = dual(draw(2, 3, 4, 5))
    y = x.to(memory_format=torch.channels_last)
    assert y.is_contiguous(memory_format=torch.channels_last) and torch.equal(y.tangents, x.tangents)
    assert y.contiguous().is_contiguous()


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_embedding_bag(mode):
    """PyTorch has no forward mode for it: compared with a gather and a sum."""
    indices, offsets = torch.tensor([1, 4, 4, 0, 2, 3]), torch.tensor([0, 2, 5])
    ends = [(0, 2), (2, 5), (5, 6)]

    def by_hand(w, s):
        rows = [(w[indices[a:b]] * s[a:b, None]).sum(0) / (b - a if mode == "mean" else 1) for a, b in ends]
        return torch.stack(rows)

    w, s = draw(6, 3), draw(6, seed=2)
    ones = torch.ones(6, dtype=torch.float64)
    (value,), (moved,) = expected(lambda w: by_hand(w, ones), [w], [dual(w).tangents])
    compare(F.embedding_bag(indices, dual(w), offsets, mode=mode), value, moved)
    if mode == "sum":
        (value,), (moved,) = expected(by_hand, [w, s], [dual(w).tangents, dual(s, seed=5).tangents])
        out = F.embedding_bag(indices, dual(w), offsets, mode=mode, per_sample_weights=dual(s, seed=5))
        compare(out, value, moved)
