"""Plans over several hosts: torchrun's processes, one a device, run stages and shares of the batch."""

from __future__ import annotations

from .session import Session

__all__ = ["Session"]
