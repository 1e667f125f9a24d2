"""Tangents in parallel: processes that exchange k numbers a step, not gradients. See docs/distributed.md."""

from __future__ import annotations

from .channel import RankLost
from .checkpoints import Checkpoints
from .parallel import TangentParallel

__all__ = ["Checkpoints", "RankLost", "TangentParallel"]
