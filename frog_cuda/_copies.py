"""Views whose tangents had to be copied: a write to what they view would not reach them, and is refused while they live."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor


class _Copy:
    """What a living view sees of the memory of its base. Keeps that memory, so that no other takes its address."""

    def __init__(self, view: Any, seen: Tensor) -> None:
        self.storage = seen.untyped_storage()
        self.begin, self.end = extent(seen)
        key = self.storage._cdata
        self.view = weakref.ref(view, lambda _: _forget(key, self))


#: by the storage they view; empty but for rare layouts, so that writes need look no further
_living: dict[int, list[_Copy]] = {}


def remember(view: Any, seen: Tensor) -> None:
    """``view`` is a DualTensor with copied tangents, ``seen`` the memory whose later changes it would miss."""
    copy = _Copy(view, seen)
    _living.setdefault(copy.storage._cdata, []).append(copy)


def _forget(key: int, copy: _Copy) -> None:
    others = _living.get(key)
    if others is not None and copy in others:
        others.remove(copy)
        if not others:
            _living.pop(key, None)


def missing(target: Any, value: Tensor) -> str | None:
    """What a living view, other than ``target``, is that would miss a write to ``value``; or None."""
    if not _living:
        return None
    copies = _living.get(value.untyped_storage()._cdata, ())
    if not copies:
        return None
    begin, end = extent(value)
    for copy in list(copies):
        view = copy.view()
        if view is not None and view is not target and copy.begin < end and begin < copy.end:
            return view._readonly
    return None


def extent(t: Tensor) -> tuple[int, int]:
    """Bytes between which the elements of ``t`` lie in its storage."""
    if t.numel() == 0:
        return 0, 0
    begin = int(t.storage_offset())
    end = begin + sum(int(n - 1) * int(stride) for n, stride in zip(t.shape, t.stride(), strict=True)) + 1
    return begin * t.element_size(), end * t.element_size()
