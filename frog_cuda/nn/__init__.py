"""Drop-in layers: the names and signatures of :mod:`torch.nn`, without autograd recording.

Each class subclasses its original, so isinstance checks, state_dicts and checkpoints go on working. Plain tensors give what the
original gives, DualTensors go through the fused operators, and neither records anything for backward: parameters may require
grad (optimizers want that) at no cost in memory. ``frog_cuda.convert`` turns the layers of an existing model into these.

>>> import torch
>>> layer = Linear(3, 2)
>>> isinstance(layer, torch.nn.Linear), layer(torch.ones(3)).requires_grad
(True, False)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .._recording import is_recording
from ..local import share_rule

#: layers whose calls have a fused operator or a rule of their own
_NAMES = [
    *("Linear", "Bilinear", "Embedding", "EmbeddingBag", "Flatten", "Unflatten", "Identity"),
    *(f"{kind}{d}d" for kind in ("Conv", "ConvTranspose") for d in (1, 2, 3)),
    *(f"{kind}{d}d" for kind in ("BatchNorm", "InstanceNorm") for d in (1, 2, 3)),
    *("LayerNorm", "RMSNorm", "GroupNorm", "LocalResponseNorm"),
    *(f"{kind}{d}d" for kind in ("MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool") for d in (1, 2, 3)),
    *("ReLU", "ReLU6", "LeakyReLU", "PReLU", "ELU", "SELU", "CELU", "GELU", "SiLU", "Mish", "Tanh", "Sigmoid", "Softplus"),
    *("Hardtanh", "Hardswish", "Hardsigmoid", "LogSigmoid", "Softsign", "Tanhshrink", "Threshold", "GLU"),
    *("Softmax", "LogSoftmax", "Softmin"),
    *("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout"),
    *("Upsample", "PixelShuffle", "PixelUnshuffle", "Fold", "Unfold", "ZeroPad2d", "ReflectionPad2d", "ReplicationPad2d"),
    *("MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer"),
    *("CrossEntropyLoss", "NLLLoss", "MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss", "BCELoss", "BCEWithLogitsLoss"),
]

#: class of torch.nn -> its drop-in class
DROP_IN: dict[type[nn.Module], type[nn.Module]] = {}


def _drop_in(original: type[nn.Module]) -> type[nn.Module]:
    inner = original.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_recording():
            return inner(self, *args, **kwargs)
        with torch.no_grad():
            return inner(self, *args, **kwargs)

    forward.__doc__ = inner.__doc__
    name = original.__name__
    doc = f":class:`torch.nn.{name}` that records nothing for backward; same arguments."
    made = type(name, (original,), {"__module__": __name__, "__doc__": doc, "forward": forward})
    share_rule(original, made)
    return made


for _name in _NAMES:
    _original = getattr(nn, _name)
    globals()[_name] = DROP_IN[_original] = _drop_in(_original)

__all__ = ["DROP_IN", *_NAMES]
