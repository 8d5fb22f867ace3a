"""The contract of an energy meter; `hardware.energy` lists the meters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TypeVar

from autoplace.errors import ExecutionError

__all__ = ["EnergyMeter", "begun"]

T = TypeVar("T")


class EnergyMeter(ABC):
    """Joules of all devices of a cluster between `begin` and `end`."""

    source: str
    """`nvml`, `rapl`, `nvml+rapl`, `model` or `none`."""

    @abstractmethod
    def begin(self) -> None:
        """Start counting; a second call starts afresh."""

    @abstractmethod
    def end(self, elapsed_ms: float, busy_ms: Mapping[str, float] | None = None) -> float | None:
        """Return the energy since `begin`.

        Args:
            elapsed_ms: Wall time since `begin`, ms, on the caller's clock.
            busy_ms: Device name to busy time since `begin`, ms, where measured.

        Returns:
            Joules, or None when there is no figure for every device.

        Raises:
            ExecutionError: If `begin` was not called before.
        """


def begun(start: T | None) -> T:
    """Return what `begin` read.

    Raises:
        ExecutionError: If there is nothing, that is, `begin` was not called.
    """
    if start is None:
        raise ExecutionError("the energy meter was not started; call begin() before end()")
    return start
