from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from against_func import check, draw

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
