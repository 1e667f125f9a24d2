"""``t.data = d`` with a DualTensor d: t would take over the memory that d has not, and reading it would end the process.

The setter asks the tensor that it belongs to, not the value, whether a rule is to be called. For the time of passes the
attribute is therefore another one.
"""

from __future__ import annotations

from typing import Any

import torch

from . import dual, stopping

_original: Any = torch.Tensor.data


class _Data:
    """``torch.Tensor.data``, whose setter looks at the value."""

    def __get__(self, tensor: Any, owner: Any = None) -> Any:
        return _original if tensor is None else _original.__get__(tensor, owner)

    def __set__(self, tensor: Any, value: Any) -> None:
        if type(value) is dual.DualTensor and type(tensor) is not dual.DualTensor:
            if not stopping.stopped():
                raise RuntimeError(
                    f"data{dual.called_from()}: a DualTensor as the data of a plain tensor, where its tangents would be lost; "
                    "use the DualTensor in its place, or its .detach() if that is meant"
                )
            value = value._primal
        _original.__set__(tensor, value)


_checked = _Data()


def check() -> None:
    torch.Tensor.data = _checked  # type: ignore[assignment]


def stop_checking() -> None:
    del torch.Tensor.data
