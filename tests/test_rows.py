"""Layers whose rows are no samples, although they are as many."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import frog_cuda as frog

T = 5


class Positions(nn.Module):
    """(B, T) tokens -> (B, 3), with an embedding of the positions, (T, 6) and the same for all samples."""

    def __init__(self, single_row: bool = False) -> None:
        super().__init__()
        self.single_row = single_row
        self.tokens, self.places, self.last = nn.Embedding(9, 6), nn.Embedding(T, 6), nn.Linear(6, 3)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        place = self.places(torch.arange(T).unsqueeze(0) if self.single_row else torch.arange(T))
        return self.last(torch.tanh(self.tokens(x) + place).mean(1))


class SequenceFirst(nn.Module):
    """(B, T, 4) -> (B, 3), by layers of (T, B, *)."""

    def __init__(self, samples_first: bool) -> None:
        super().__init__()
        self.samples_first = samples_first
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=samples_first)
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        if self.samples_first:
            return self.last(self.encoder(x).mean(1))
        return self.last(self.encoder(x.transpose(0, 1)).mean(0))


def losses(output, target):
    return F.cross_entropy(output, target, reduction="none")


def tokens(rows=T):
    return torch.randint(0, 9, (rows, T)), torch.randint(0, 3, (rows,))


@pytest.mark.parametrize("options", [dict(), dict(shared_across_batch=False), dict(chunk_size=1)], ids=str)
def test_positions_as_many_as_samples(options):
    model = Positions()
    fg = frog.ForwardGradient(model, losses, k=2, **options)
    with pytest.raises(ValueError, match="layers: the loss of sample 0 depends on rows of the output of places that"):
        fg(*tokens())
    assert fg.last is None
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("rows", [T - 1, T + 1])
def test_positions_are_counted_otherwise(rows):
    with pytest.raises(ValueError, match=f"the output of places has {T} rows, but there are {rows} losses"):
        frog.ForwardGradient(Positions(), losses, k=2)(*tokens(rows))


@pytest.mark.parametrize(
    ("model", "options"), [(Positions(True), dict()), (Positions(), dict(per_sample=False))], ids=["row", "batch"]
)
def test_accepted(model, options):
    frog.ForwardGradient(model, losses, k=2, **options)(*tokens())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sequence_first(dtype):
    x, y = torch.randn(T, T, 4, dtype=dtype), torch.randint(0, 3, (T,))
    frog.ForwardGradient(SequenceFirst(True).to(dtype), losses, k=2)(x, y)
    fg = frog.ForwardGradient(SequenceFirst(False).to(dtype), losses, k=2)
    with pytest.raises(ValueError, match="depends on rows of the output of encoder"):
        fg(x, y)


def test_a_feature_per_sample_is_no_sequence():
    """Ids (B,) are as doubtful as positions; the loss of a sample depends on its own alone."""
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3))
    frog.ForwardGradient(model, losses, k=2)(torch.arange(T), torch.randint(0, 3, (T,)))


def test_leaves_no_trace():
    """The pass that checks moves neither random numbers nor the estimate, and comes once."""

    class Dropping(Positions):
        def forward(self, x):
            return super().forward(F.dropout(x.float(), 0.5).long().clamp(max=8))

    def run(known: set[str]):
        torch.manual_seed(0)
        model = Dropping(single_row=True)
        fg = frog.ForwardGradient(model, losses, k=2)
        fg._method._samples_first = known
        x, y = tokens()
        for _ in range(3):
            fg(x, y)
        return model, torch.rand(3)

    checked, after = run(set())
    other, expected = run({"tokens"})
    assert (checked.calls, other.calls) == (4, 3)
    assert torch.equal(after, expected)
    for p, q in zip(checked.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_batch_statistics_say_nothing():
    """Samples depend on one another through them whatever the rows are; the README says so of them."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(T), nn.Flatten(), nn.Linear(6 * T, 3))
    x, y = torch.randn(T, T, 4), torch.randint(0, 3, (T,))
    frog.ForwardGradient(model, losses, k=2)(x, y)
    frog.ForwardGradient(model.eval(), losses, k=2)(x, y)


def batch_normalised():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def test_shared_tangents_are_lost_in_batch_statistics():
    """The reason for the warning: a shift of all samples changes nothing behind the mean over the batch."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 4, dtype=torch.float64), torch.randint(0, 3, (64,))
    state = batch_normalised().double().state_dict()

    def share(**options):
        """How much of the true gradient an estimate from more tangents than activities holds."""
        model = batch_normalised().double()
        model.load_state_dict(state)
        fg = frog.ForwardGradient(model, losses, k=64, **options)
        true = frog.simulate(fg, x, y).true_gradients["0.weight"]
        fg(x, y)
        return (model[0].weight.grad * true).sum() / true.norm() ** 2

    with pytest.warns(UserWarning, match="1 normalise over the batch, which takes out what all samples share"):
        assert abs(share()) < 1e-6
    assert share(shared_across_batch=False) > 0.7  # 0.99 on average over seeds, with a spread of 0.09


def test_the_warning_of_batch_statistics(recwarn):
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
    frog.ForwardGradient(batch_normalised(), losses, k=2, shared_across_batch=False)(x, y)
    frog.ForwardGradient(batch_normalised().eval(), losses, k=2)(x, y)
    frog.ForwardGradient(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)), losses, k=2)(x, y)
    frog.ForwardGradient(batch_normalised(), losses, k=2, perturb="weight")(x, y)
    assert not recwarn.list
    fg = frog.ForwardGradient(batch_normalised(), losses, k=2, per_sample=False)
    for _ in range(2):
        fg(x, y)
    assert len(recwarn.list) == 1


@pytest.mark.parametrize("per_sample", [False, True])
def test_more_orthonormal_tangents_than_a_sample_has_elements(per_sample):
    """Rows that are repeated over the batch add no dimensions."""
    model = nn.Sequential(nn.Linear(4, 2))
    fg = frog.ForwardGradient(
        model, lambda out, _: out.square().sum(1), k=3, tangents="orthonormal", per_sample=per_sample, aggregate="mean"
    )
    with pytest.raises(ValueError, match="k is 3, but only 2 orthonormal tangents fit into 2 dimensions"):
        fg(torch.randn(5, 4), None)
