from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from against_func import check, check_with_differences, compare, draw, dual, expected

import frog_cuda as frog

REDUCTIONS = ["none", "mean", "sum"]
CLASSES = torch.tensor([0, 4, 2, -100, 1, 1, 3])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_of_class_indices(reduction, smoothing, weighted):
    options = {
        "reduction": reduction,
        "label_smoothing": smoothing,
        "weight": torch.linspace(0.5, 2, 5, dtype=torch.float64) if weighted else None,
    }
    check(lambda x: F.cross_entropy(x, CLASSES, **options), draw(7, 5))
    check(lambda x: F.cross_entropy(x, CLASSES, **options), draw(5, 7).t(), k=1)
    check(lambda x: F.cross_entropy(x, CLASSES.clamp(0), ignore_index=1, **options), draw(7, 5))
    check(lambda x: F.cross_entropy(x, CLASSES[0], **options), draw(5))
    check(lambda x: F.cross_entropy(x, CLASSES[:6].view(3, 2), **options), draw(3, 5, 2))
    check(lambda x: F.cross_entropy(x, CLASSES[:4].view(1, 2, 2), **options), draw(1, 5, 2, 2))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy_of_class_probabilities(reduction):
    target = torch.softmax(draw(7, 5, seed=4), 1)
    check(lambda x: F.cross_entropy(x, target, reduction=reduction), draw(7, 5))
    check(lambda x, t: F.cross_entropy(x, t, reduction=reduction, label_smoothing=0.1), draw(7, 5), target)


def test_cross_entropy_of_an_empty_batch():
    check(lambda x: F.cross_entropy(x, CLASSES[:0], reduction="none"), draw(0, 5))
    check(lambda x: F.cross_entropy(x, CLASSES[:0], reduction="sum"), draw(0, 5))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_squared_error(reduction):
    y = draw(7, 5, seed=3)
    check(lambda a, b: F.mse_loss(a, b, reduction=reduction), draw(7, 5), y)
    check(lambda a: F.mse_loss(a, y, reduction=reduction), draw(7, 5))
    check(lambda b: F.mse_loss(y, b, reduction=reduction), draw(7, 5))
    check(lambda a: F.mse_loss(a, y, reduction=reduction, weight=y.abs()), draw(7, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch advises against broadcasting
        check(lambda a: F.mse_loss(a, y[0], reduction=reduction), draw(7, 5))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_absolute_error(reduction):
    x, y, w = draw(7, 5), draw(7, 5, seed=3), draw(7, 5, seed=4).abs()
    check(lambda a, b: F.l1_loss(a, b, reduction=reduction), x, y)

    def weighted(a, b, w):  # not F.l1_loss itself, whose weight PyTorch's forward mode keeps
        errors = (a - b).abs() * w
        return errors if reduction == "none" else errors.sum() / (w.sum() if reduction == "mean" else 1)

    for perturbed in ((0,), (1,), (2,), (0, 1, 2)):
        given = [t if i in perturbed else None for i, t in enumerate((x, y, w))]
        primals = [t for t in given if t is not None]

        def loss(fn, *moved, given=given):
            rest = iter(moved)
            return fn(*(next(rest) if g is not None else t for g, t in zip(given, (x, y, w), strict=True)))

        (value,), (moved,) = expected(lambda *m: loss(weighted, *m), primals, [dual(p).tangents for p in primals])
        compare(loss(lambda a, b, w: F.l1_loss(a, b, reduction=reduction, weight=w), *map(dual, primals)), value, moved)
    with pytest.raises(ValueError, match="same size"):
        F.l1_loss(dual(x), y, weight=w[0])


@pytest.mark.parametrize("loss", [F.mse_loss, F.binary_cross_entropy, F.binary_cross_entropy_with_logits])
def test_means_of_losses_whose_sum_is_no_float16(loss):
    x, y, dx = torch.full((1 << 18,), 0.1), torch.full((1 << 18,), 0.9), torch.full((2, 1 << 18), 0.5)
    wide = loss(frog.DualTensor(x, dx), y)
    low = loss(frog.DualTensor(x.half(), dx.half()), y.half())
    assert low.primal.dtype == low.tangents.dtype == torch.float16
    torch.testing.assert_close(low.primal.float(), wide.primal, rtol=4e-3, atol=0)
    torch.testing.assert_close(low.tangents.float(), wide.tangents, rtol=4e-3, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_binary_cross_entropy(reduction):
    y, w = torch.sigmoid(draw(7, 5, seed=3)), draw(7, 1, seed=4).abs()
    p = torch.linspace(0.5, 2, 5, dtype=torch.float64)
    logits, probabilities = F.binary_cross_entropy_with_logits, F.binary_cross_entropy
    check(lambda x: logits(x, y, reduction=reduction), draw(7, 5))
    check(lambda x: logits(x, y, weight=w, pos_weight=p, reduction=reduction), draw(7, 5))
    check(lambda x, t: logits(x, t, reduction=reduction), draw(7, 5), y)
    check(lambda x: probabilities(x, y, reduction=reduction), torch.sigmoid(draw(7, 5)))
    check(lambda x: probabilities(x, y, weight=w.expand(7, 5), reduction=reduction), torch.sigmoid(draw(7, 5)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_losses_without_a_rule(reduction):
    y = draw(7, 5, seed=3)
    log_p = torch.log_softmax(draw(7, 5), 1)
    check(lambda x: F.nll_loss(x, CLASSES, reduction=reduction), log_p)
    check(lambda x: F.l1_loss(x, y, reduction=reduction), draw(7, 5))
    check(lambda x: F.smooth_l1_loss(x, y, reduction=reduction), draw(7, 5))
    check(lambda x: F.huber_loss(x, y, reduction=reduction), draw(7, 5))
    check(lambda x: F.kl_div(x, y.softmax(1), reduction=reduction), log_p)
    check(lambda x: F.poisson_nll_loss(x, y.abs(), reduction=reduction), draw(7, 5))
    check(lambda x, v: F.gaussian_nll_loss(x, y, v, reduction=reduction), draw(7, 5), draw(7, 5).abs() + 0.1)
    check(lambda a, b: F.cosine_embedding_loss(a, b, torch.ones(7), reduction=reduction), draw(7, 5), y)
    check(lambda a, b: F.triplet_margin_loss(a, b, y * 2, reduction=reduction), draw(7, 5), y)


def test_old_style_reductions():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls size_average and reduce deprecated
        check(lambda x: F.cross_entropy(x, CLASSES, size_average=False), draw(7, 5))
        check(lambda x: F.mse_loss(x, x * x, reduce=False), draw(7, 5))


def test_pytorchs_own_errors():
    from against_func import dual

    with pytest.raises(ValueError, match="reduction|Reduction|valid value"):
        F.mse_loss(dual(draw(3)), draw(3), reduction="all")
    with pytest.raises(RuntimeError, match="between 0 and 1"):
        F.binary_cross_entropy(dual(draw(3) + 5), draw(3).sigmoid())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_tangents_of_class_weights(reduction, smoothing):
    """torch.func.jvp takes them as zero."""
    weight = torch.linspace(0.5, 2, 5, dtype=torch.float64)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    check_with_differences(lambda x, w: F.cross_entropy(x, CLASSES, w, **options), draw(7, 5), weight)
    check_with_differences(lambda w: F.cross_entropy(draw(3, 5, 2), CLASSES[:6].view(3, 2), w, **options), weight)
    check_with_differences(lambda w: F.nll_loss(draw(2, 5, 1, 2), CLASSES[:4].view(2, 1, 2), w, reduction=reduction), weight)
    check_with_differences(lambda w: F.nll_loss(draw(5), CLASSES[0], w, reduction=reduction), weight)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_margin_losses(reduction):
    x, target = draw(7, 5), torch.tensor([0, 4, 2, 1, 1, 1, 3])
    several = torch.tensor([[0, 2, -1, 0, 0]]).expand(7, 5).contiguous()
    for p in (1, 2):
        check_with_differences(lambda x, p=p: F.multi_margin_loss(x, target, p=p, reduction=reduction), x)
    check_with_differences(lambda x: F.multi_margin_loss(x, target[0], reduction=reduction), x[0])
    check_with_differences(lambda x: F.multi_margin_loss(x, target[:1], reduction=reduction), x[0])
    check_with_differences(lambda x: F.multilabel_margin_loss(x, several, reduction=reduction), x)
    check_with_differences(lambda x: F.multilabel_margin_loss(x, several[0], reduction=reduction), x[0])
    with pytest.raises(NotImplementedError, match="multi_margin_loss"):
        frog.jvp(lambda w: F.multi_margin_loss(x, target, weight=w), (x[0],), (draw(3, 5),))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("zero_infinity", [False, True])
def test_ctc_loss_of_any_scores(reduction, zero_infinity):
    """Without log_softmax, and with a sequence too short for its target; PyTorch's backward mode is wrong here."""
    targets, targets_length = torch.tensor([[1, 2, 3], [2, 2, 1], [3, 1, 0]]), torch.tensor([3, 3, 2])
    lengths = torch.tensor([9, 7, 1 if zero_infinity else 4])
    for given in ((lengths, targets_length), (tuple(lengths.tolist()), tuple(targets_length.tolist()))):
        check_with_differences(
            lambda x, given=given: F.ctc_loss(x, targets, *given, reduction=reduction, zero_infinity=zero_infinity),
            draw(9, 3, 5),
        )
