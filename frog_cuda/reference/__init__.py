"""What every operator of :mod:`frog_cuda.ops` means, in plain float64 PyTorch: same names, same arguments, same results.

Slow, stored in full, and written to be read: the compiled kernels are tested against it. All arithmetic and all floating
results are float64; a ``dtype`` argument is accepted and has no effect. Tangents are drawn by an implementation of its own with
exact logarithm, sine and cosine: a kernel's float32 normals differ by a few units of float32 rounding, its signs not at all.

Needs none of the compiled libraries. The modules are those of :mod:`frog_cuda.ops`.
"""

from __future__ import annotations

from .attention import attention_jvp
from .convolution import convolution_jvp, narrow_convolution, sampled_convolution_
from .embedding import embedding_jvp
from .linear import linear_gradient, linear_jvp, linear_rows
from .losses import bce_jvp, cross_entropy_jvp, mse_jvp
from .low_rank import low_rank_combine
from .normalization import normalization_jvp
from .pointwise import POINTWISE, pointwise_jvp
from .pooling import max_pool_jvp
from .projection import cholesky_project
from .softmax import log_softmax_jvp, softmax_jvp
from .sum import tangent_sum
from .tangents import (
    combine_blocks,
    gram,
    gram_blocks,
    philox4x32_10,
    sample_blocks,
    sample_tangents,
    tangent_axpy_,
    tangent_combine,
    tangent_combine_samples,
    tangent_gram,
    tangent_sgd_,
)

__all__ = [
    "POINTWISE",
    "attention_jvp",
    "bce_jvp",
    "cholesky_project",
    "combine_blocks",
    "convolution_jvp",
    "cross_entropy_jvp",
    "embedding_jvp",
    "gram",
    "gram_blocks",
    "linear_gradient",
    "linear_jvp",
    "linear_rows",
    "log_softmax_jvp",
    "low_rank_combine",
    "max_pool_jvp",
    "mse_jvp",
    "narrow_convolution",
    "normalization_jvp",
    "philox4x32_10",
    "pointwise_jvp",
    "sample_blocks",
    "sample_tangents",
    "sampled_convolution_",
    "softmax_jvp",
    "tangent_axpy_",
    "tangent_combine",
    "tangent_combine_samples",
    "tangent_gram",
    "tangent_sgd_",
    "tangent_sum",
]
