"""Multi-tangent forward gradients: train a network without a backward pass.

Flügel et al., "Beyond Backpropagation: Optimization with Multi-Tangent Forward Gradients", arXiv 2410.17764.
"""

from __future__ import annotations

from . import aggregate, nn, ops, tangents
from .convert import convert, coverage
from .dual import DualTensor
from .forward_gradient import ForwardGradient, forward_gradient
from .functional import jvp
from .seed_log import SeedLog
from .simulated import simulate

__version__ = "0.1.0"

__all__ = [
    "DualTensor",
    "ForwardGradient",
    "SeedLog",
    "__version__",
    "aggregate",
    "build_info",
    "convert",
    "coverage",
    "forward_gradient",
    "jvp",
    "nn",
    "ops",
    "simulate",
    "tangents",
]


def build_info() -> dict[str, object]:
    """What this installation consists of: versions, compiler, whether CUDA kernels were built, threads.

    Returns:
        a plain dict; keys of the compiled part come from the build itself.
    """
    import torch

    from . import _host  # type: ignore[attr-defined]

    info: dict[str, object] = {"version": __version__, "torch": torch.__version__}
    info.update(_host.build_info())
    info["threads"] = torch.get_num_threads()
    return info
