"""Recurrent cells and packed sequences, composed out of place: PyTorch's own compositions write into tensors that are plain
where the hidden state has no tangents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..dual import aten
from .helpers import low_dtype, parts, wrap

_aten = torch.ops.aten

#: one step: (what the input gives to the gates, what the state gives, state) -> state, whose first entry is the output
Cell = Callable[[Any, Any, tuple[Any, ...]], tuple[Any, ...]]


def _lstm(given: Any, own: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
    i, f, g, o = (given + own).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(given: Any, own: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
    (r, z, n), (hr, hz, hn) = given.chunk(3, -1), own.chunk(3, -1)
    new = (n + (r + hr).sigmoid() * hn).tanh()
    return (new + (z + hz).sigmoid() * (state[0] - new),)


def _tanh(given: Any, own: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
    return ((given + own).tanh(),)


def _relu(given: Any, own: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
    return ((given + own).relu(),)


@aten(_aten.lstm_cell.default)
def lstm_cell(func: Any, x: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
    return _lstm(F.linear(x, w_ih, b_ih), F.linear(hx[0], w_hh, b_hh), tuple(hx))


def _cell(step: Cell) -> Callable[..., Any]:
    def body(func: Any, x: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
        return step(F.linear(x, w_ih, b_ih), F.linear(hx, w_hh, b_hh), (hx,))[0]

    return body


aten(_aten.gru_cell.default)(_cell(_gru))
aten(_aten.rnn_tanh_cell.default)(_cell(_tanh))
aten(_aten.rnn_relu_cell.default)(_cell(_relu))


def _packed(step: Cell) -> Callable[..., Any]:
    def body(
        func: Any,
        data: Any,
        batch_sizes: Any,
        hx: Any,
        params: Any,
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
    ) -> Any:
        """data: (N, in), the steps of all sequences; hx: (num_layers * directions, B, hidden), two of them for an LSTM."""
        start = tuple(hx) if isinstance(hx, (list, tuple)) else (hx,)
        projected = len(start) == 2 and start[0].shape[2] != start[1].shape[2]
        each = 2 + 2 * has_biases + projected
        directions = 1 + bidirectional
        sizes, ends = batch_sizes.tolist(), []
        for layer in range(num_layers):
            outs = []
            for way in range(directions):
                at = layer * directions + way
                own = list(params[at * each : (at + 1) * each])
                projection = own.pop() if projected else None
                out, end = _along(step, data, sizes, tuple(h[at] for h in start), own, projection, way == 1)
                outs.append(out)
                ends.append(end)
            data = outs[0] if len(outs) == 1 else torch.cat(outs, -1)
            if dropout and train and layer < num_layers - 1:
                data = torch.dropout(data, dropout, True)
        return (data, *(torch.stack(column) for column in zip(*ends, strict=True)))

    return body


def _along(
    step: Cell, data: Any, sizes: list[int], start: tuple[Any, ...], weights: list[Any], projection: Any, backward: bool
) -> tuple[Any, tuple[Any, ...]]:
    """Outputs (N, hidden) and last states of one layer in one direction. The first ``sizes[t]`` sequences have a step t."""
    w_ih, w_hh, b_ih, b_hh = (*weights, None, None)[:4]
    gates = F.linear(data, w_ih, b_ih).split(sizes)
    state, outs = start, []
    ended: list[tuple[Any, ...]] = []  # states of sequences that have no further step, the shortest first
    have = len(start[0])
    if backward:
        have = sizes[-1]
        state = tuple(h[:have] for h in start)
    for t in reversed(range(len(sizes))) if backward else range(len(sizes)):
        n = sizes[t]
        if n < have:
            ended.append(tuple(h[n:] for h in state))
            state = tuple(h[:n] for h in state)
        elif n > have:  # backward, a longer sequence begins sooner
            state = tuple(torch.cat([h, first[have:n]]) for h, first in zip(state, start, strict=True))
        have = n
        state = step(gates[t], F.linear(state[0], w_hh, b_hh), state)
        if projection is not None:
            state = (F.linear(state[0], projection), *state[1:])
        outs.append(state[0])
    if ended:
        state = tuple(torch.cat(column) for column in zip(state, *reversed(ended), strict=True))
    return torch.cat(outs[::-1] if backward else outs), state


aten(_aten.lstm.data)(_packed(_lstm))
aten(_aten.gru.data)(_packed(_gru))
aten(_aten.rnn_tanh.data)(_packed(_tanh))
aten(_aten.rnn_relu.data)(_packed(_relu))


@aten(_aten._pack_padded_sequence.default)
def pack(func: Any, x: Any, lengths: Any, batch_first: bool) -> Any:
    """Steps and sequences are the first two axes, in either order; the tangents' k is one of the rest for a while."""
    value, tangents = parts(x)
    data, sizes = func(value, lengths, batch_first)
    if tangents is None:
        return data, sizes
    moved = func(tangents.movedim(0, 2), lengths, batch_first)[0]
    return wrap(data, moved.movedim(1, 0).contiguous(), low_dtype(x)), sizes


@aten(_aten._pad_packed_sequence.default)
def pad(func: Any, data: Any, batch_sizes: Any, batch_first: bool, padding_value: Any, total_length: int) -> Any:
    value, tangents = parts(data)
    padded, lengths = func(value, batch_sizes, batch_first, padding_value, total_length)
    if tangents is None:
        return padded, lengths
    moved = func(tangents.movedim(0, 1), batch_sizes, batch_first, 0, total_length)[0]
    return wrap(padded, moved.movedim(2, 0).contiguous(), low_dtype(data)), lengths
