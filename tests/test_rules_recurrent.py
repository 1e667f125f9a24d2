from __future__ import annotations

import pytest
import torch
from against_func import check_with_differences, draw
from helpers import assert_close64
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

import frog_cuda as frog

K = 2
CELLS = {
    "lstm": lambda **options: nn.LSTMCell(3, 4, **options),
    "gru": lambda **options: nn.GRUCell(3, 4, **options),
    "tanh": lambda **options: nn.RNNCell(3, 4, **options),
    "relu": lambda **options: nn.RNNCell(3, 4, nonlinearity="relu", **options),
}


def check(fn, *primals):
    """Against torch.func.jvp, one tangent at a time."""
    tangents = tuple(draw(K, *p.shape, seed=20 + i) for i, p in enumerate(primals))
    out, moved = frog.jvp(fn, primals, tangents)
    rows = [torch.func.jvp(fn, primals, tuple(t[i] for t in tangents)) for i in range(K)]
    for o, value in zip(tree_leaves(out), tree_leaves(rows[0][0]), strict=True):
        assert_close64(o, value)
    for d, *column in zip(tree_leaves(moved), *(tree_leaves(r[1]) for r in rows), strict=True):
        assert_close64(d, torch.stack(column))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CELLS)
def test_cells_with_tangents_anywhere(name, bias):
    torch.manual_seed(0)
    cell = CELLS[name](bias=bias, dtype=torch.float64)
    x, h = draw(2, 3), draw(2, 4, seed=1)
    state = (h, draw(2, 4, seed=2)) if name == "lstm" else h
    check(lambda x: cell(x), x)
    check(lambda x: cell(x, state), x)
    check(lambda h: cell(x, (h, h * 2) if name == "lstm" else h), h)
    check(lambda x, h: cell(x, (h, state[1]) if name == "lstm" else h), x, h)
    for key, weight in cell.named_parameters():
        check(lambda w, key=key: functional_call(cell, {key: w}, (x, state)), weight.detach())
    check(lambda x: cell(x), x[0])


def test_a_cell_along_a_sequence():
    cell = nn.LSTMCell(3, 3, dtype=torch.float64)

    def fn(x):
        state = None
        for step in x:
            state = cell(step, state)
        return state

    check(fn, draw(4, 2, 3))


LAYERS = {
    "lstm": (nn.LSTM, {}),
    "gru": (nn.GRU, {}),
    "tanh": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
    "projected": (nn.LSTM, {"proj_size": 2}),
}
LENGTHS = torch.tensor([5, 3, 3, 1])


@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True}, {"num_layers": 2, "bidirectional": True, "bias": False}], ids=str
)
@pytest.mark.parametrize("name", LAYERS)
def test_packed_sequences(name, options):
    """PyTorch has no forward mode for packed sequences: against each sequence alone, and differences."""
    torch.manual_seed(0)
    kind, more = LAYERS[name]
    layer = kind(3, 4, batch_first=True, dtype=torch.float64, **more, **options)

    def packed(x, **parameters):
        out, state = functional_call(layer, parameters, (pack_padded_sequence(x, LENGTHS, batch_first=True),))
        return pad_packed_sequence(out, batch_first=True)[0], state

    def alone(x, **parameters):
        outs, states = [], []
        for row, n in zip(x, LENGTHS.tolist(), strict=True):
            out, state = functional_call(layer, parameters, (row[:n],))
            outs.append(torch.cat([out, out.new_zeros(5 - n, out.shape[1])]))
            states.append(state)
        if isinstance(states[0], tuple):
            return torch.stack(outs), tuple(torch.stack(column, 1) for column in zip(*states, strict=True))
        return torch.stack(outs), torch.stack(states, 1)

    x, v = draw(4, 5, 3), draw(K, 4, 5, 3, seed=1)
    (out, state), moved = frog.jvp(packed, (x,), (v,))
    for value, right in zip(tree_leaves((out, state)), tree_leaves(packed(x)), strict=True):
        assert_close64(value, right.detach())
    for i in range(K):
        right = torch.func.jvp(alone, (x,), (v[i],))[1]
        for tangent, expected in zip(tree_leaves(moved), tree_leaves(right), strict=True):
            assert_close64(tangent[i], expected)
    for key, weight in layer.named_parameters():
        check_with_differences(lambda w, key=key: packed(x, **{key: w})[0], weight.detach())


def test_packed_sequences_in_any_order_and_from_a_state():
    layer = nn.GRU(3, 4, dtype=torch.float64)
    lengths = torch.tensor([2, 4, 1])

    def fn(x, h):
        out, h = layer(pack_padded_sequence(x, lengths, enforce_sorted=False), h)
        return torch.cat([pad_packed_sequence(out, padding_value=2.0, total_length=6)[0], h])

    check_with_differences(fn, draw(4, 3, 3), draw(1, 3, 4, seed=3))


def test_dropout_between_layers_draws_pytorchs_mask():
    layer = nn.LSTM(3, 4, num_layers=2, dropout=0.5, dtype=torch.float64)
    x = draw(5, 4, 3)

    def fn(x):
        return layer(pack_padded_sequence(x, LENGTHS))[0].data

    torch.manual_seed(3)
    value = fn(x).detach()
    torch.manual_seed(3)
    assert_close64(frog.jvp(fn, (x,), (draw(K, 5, 4, 3, seed=1),))[0], value)


def test_a_model_with_packed_sequences_trains_on_its_weights():
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.LSTM(3, 2, bidirectional=True, batch_first=True, dtype=torch.float64)

        def forward(self, x):
            out, _ = self.layer(pack_padded_sequence(x, LENGTHS, batch_first=True))
            return pad_packed_sequence(out, batch_first=True)[0]

    model, x = Model(), draw(4, 5, 3)
    n = sum(p.numel() for p in model.parameters())
    fg = frog.ForwardGradient(model, lambda y, _: y.square().sum(), k=n, perturb="weight")
    fg(x, None)
    estimate = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        assert_close64(estimate[name], p.grad, 1e-8)  # one linear solve of the size of n
