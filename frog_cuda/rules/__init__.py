"""JVP rules, one file per family. Importing this package registers all of them with :mod:`frog_cuda.dual`."""

from . import (
    arithmetic,
    attention,
    composed,
    convolution,
    creation,
    fallback,
    in_place,
    linear,
    losses,
    matmul,
    normalization,
    pointwise,
    reductions,
    softmax,
    spatial,
    structural,
)

__all__ = [
    "arithmetic",
    "attention",
    "composed",
    "convolution",
    "creation",
    "fallback",
    "in_place",
    "linear",
    "losses",
    "matmul",
    "normalization",
    "pointwise",
    "reductions",
    "softmax",
    "spatial",
    "structural",
]
