"""The whole model on one device, with a thread count of its own; in microbatches when the plan says so."""

from __future__ import annotations

from typing import ClassVar

from .parts import PartsExecutor

__all__ = ["SingleDevice"]


class SingleDevice(PartsExecutor):
    """Sends the whole call to one device's worker."""

    shapes: ClassVar[tuple[str, ...]] = ("single",)
