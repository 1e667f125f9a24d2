"""The handwritten digits that scikit-learn brings along: 1797 grey images of 8 x 8 pixels, no download.

E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import require

__all__ = ["Digits", "batches", "load"]

PIXELS, CLASSES = 64, 10
TEST_SHARE = 0.2
SPLIT_SEED = 0  # the split is the same in every run, whatever the seed of the weights


@dataclass(frozen=True, eq=False)
class Digits:
    """Images float32 ``(B, 64)``, pixels scaled to [-1, 1]; labels int64 ``(B,)``."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load(device: torch.device | str = "cpu") -> Digits:
    """1437 images to train on and 360 held out, each class with the same share in both.

    Raises:
        MissingPackages: scikit-learn is not installed.
    """
    datasets, selection = require("sklearn.datasets", "sklearn.model_selection")
    images, labels = datasets.load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = selection.train_test_split(
        images, labels, test_size=TEST_SHARE, stratify=labels, random_state=SPLIT_SEED
    )
    train_x, test_x = (torch.tensor(x / 8.0 - 1.0, dtype=torch.float32, device=device) for x in (train_x, test_x))
    train_y, test_y = (torch.tensor(y, dtype=torch.int64, device=device) for y in (train_y, test_y))
    return Digits(train_x, train_y, test_x, test_y)


def batches(x: Tensor, y: Tensor, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order, in batches of ``size``; what is left over at the end is dropped.

    Arguments:
        generator: on the CPU; two of the same state give the same batches on any device.
    """
    order = torch.randperm(x.shape[0], generator=generator).to(x.device)
    for start in range(0, x.shape[0] - size + 1, size):
        chosen = order[start : start + size]
        yield x[chosen], y[chosen]
