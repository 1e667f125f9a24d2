"""The Python face of every compiled operator: argument checks, names instead of codes, guards against silent loss of tangents.

Tangents are explicit arguments and results; ``k`` is always their leading axis. No operator records autograd. A
``torch.autograd.forward_ad`` dual or a functorch-wrapped tensor (inside ``torch.func.jvp``, ``grad`` or ``vmap``) is refused:
PyTorch would drop its tangent without a word.

Floating tensors are float64, float32, bfloat16 or float16, of any strides, and may be empty. Primals of one call share a dtype,
tangents another or the same, and results are in the dtype of what they are the value or tangents of. Low precision is computed
in float32 and rounded once.

All of them raise:
    RuntimeError: a shape, dtype, device or number is not accepted; the message names operator and argument, what was given and
        what is accepted, and nothing has been written. Also for what is no tensor, for tensors that carry tangents of PyTorch's
        own, see above, and for those that require grad while autograd is on.
    ValueError: an unknown name of a function, distribution or reduction; lists the accepted ones.

Each function here has a float64 twin of the same name and signature in :mod:`frog_cuda.reference`. A module for each file of
kernels in csrc/cpu, named as that.
"""

from __future__ import annotations

from .. import _autograd, _load
from .attention import attention_jvp
from .convolution import convolution_jvp, narrow_convolution, sampled_convolution_
from .embedding import embedding_jvp
from .linear import linear_gradient, linear_jvp, linear_rows
from .losses import REDUCTIONS, bce_jvp, cross_entropy_jvp, mse_jvp
from .low_rank import low_rank_combine
from .normalization import normalization_jvp
from .pointwise import POINTWISE, pointwise_jvp
from .pooling import max_pool_jvp
from .projection import cholesky_project
from .softmax import log_softmax_jvp, softmax_jvp
from .sum import tangent_sum
from .tangents import (
    DISTRIBUTIONS,
    combine_blocks,
    gram,
    gram_blocks,
    sample_blocks,
    sample_tangents,
    tangent_axpy_,
    tangent_combine,
    tangent_combine_samples,
    tangent_gram,
    tangent_sgd_,
)

_load.load()
from .. import _fakes  # noqa: E402, F401  # needs the schemas

_above_autograd = _autograd.register("frog_cuda")

__all__ = [
    "DISTRIBUTIONS",
    "POINTWISE",
    "REDUCTIONS",
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
