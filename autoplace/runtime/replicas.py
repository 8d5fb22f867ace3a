"""Data parallelism on one host: every device runs the whole model on its share of the batch, at the same time.

CPU core groups share the parameters themselves; a GPU has a stand-in of the model. In training, backward runs on all
devices at once and the parts' gradients are added up in the parts' order.
"""

from __future__ import annotations

from typing import ClassVar

from .parts import PartsExecutor

__all__ = ["Replicas"]


class Replicas(PartsExecutor):
    """Splits the batch by the replicas' shares and merges the outputs."""

    shapes: ClassVar[tuple[str, ...]] = ("replicas",)
