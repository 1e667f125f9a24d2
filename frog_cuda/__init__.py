"""Multi-tangent forward gradients: train a network without a backward pass.

Flügel et al., "Beyond Backpropagation: Optimization with Multi-Tangent Forward Gradients", arXiv 2410.17764.
"""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = ["__version__", "build_info"]


def build_info() -> dict[str, object]:
    """What this installation consists of: versions, compiler, whether CUDA kernels were built, threads.

    Returns:
        a plain dict; keys of the compiled part come from the build itself.

    Raises:
        ImportError: the compiled libraries are missing or stale; the message names the fix.
    """
    import torch

    from . import _load

    _load.load()
    from . import _host  # type: ignore[attr-defined]

    info: dict[str, object] = {"version": __version__, "torch": torch.__version__}
    info.update(_host.build_info())
    info["threads"] = torch.get_num_threads()
    return info
