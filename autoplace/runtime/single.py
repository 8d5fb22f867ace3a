"""The whole model on one device, by a worker that is pinned to it; in microbatches when the plan says so.

For core groups that are a part of the machine, and for models that do not live on the device. The others need no
worker. → `inline`
"""

from __future__ import annotations

from typing import ClassVar

from .parts import PartsExecutor

__all__ = ["SingleDevice"]


class SingleDevice(PartsExecutor):
    """Sends the whole call to one device's worker."""

    shapes: ClassVar[tuple[str, ...]] = ("single",)
