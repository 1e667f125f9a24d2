"""What a direct call ``torch.ops.frog_cuda.x(...)`` does above autograd: it raises where PyTorch would lose a derivative.

Without these kernels PyTorch's own default applies: a result that says it requires grad and fails in backward, a forward-mode
tangent of None or zeros, and under vmap a silent loop. The faces in :mod:`frog_cuda.ops` and the rules call below autograd and
never come here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _after_autograd_keyset, _dispatch_get_all_op_names
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version


def _above_autograd(op: Any) -> Callable[..., Any]:
    name = op._schema.name.replace("::", ".")
    written = [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]

    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        for t in (*args, *kwargs.values()):
            if isinstance(t, Tensor):
                if torch.is_grad_enabled() and t.requires_grad:
                    raise RuntimeError(
                        f"{name}: got a tensor that requires grad, but no gradient is recorded through it; call it under "
                        "torch.no_grad() or pass tensor.detach()"
                    )
                if forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None:
                    raise RuntimeError(
                        f"{name}: got a forward-mode dual tensor (torch.autograd.forward_ad or torch.func.jvp), whose tangent "
                        "would be lost; pass primal and tangents as separate arguments, or use frog_cuda.jvp"
                    )
        out = op.redispatch(keys & _after_autograd_keyset, *args, **kwargs)
        for i in written:
            if args[i] is not None:
                increment_version(args[i])
        return out

    return kernel


def _under_vmap(op: Any) -> Callable[..., Any]:
    name = op._schema.name.replace("::", ".")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{name}: got a tensor batched by torch.func.vmap, which it has no rule for; call it outside vmap")

    return kernel


def register(namespace: str) -> torch.library.Library:
    """Adds both kernels to every operator of the namespace; they last as long as what is returned."""
    library = torch.library.Library(namespace, "IMPL")
    for full in _dispatch_get_all_op_names():
        if full.startswith(f"{namespace}::"):
            name = full.split("::")[1]
            packet, _, overload = name.partition(".")
            op = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
            library.impl(name, _above_autograd(op), "Autograd", with_keyset=True)
            library.impl(name, _under_vmap(op), "FuncTorchBatched")
    return library
