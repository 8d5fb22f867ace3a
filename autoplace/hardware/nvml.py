"""NVIDIA's management library behind a border: names, memory, power and energy of GPUs.

The one file of the project that imports pynvml, inside functions only: where it or the driver is missing there are no
GPUs, and nothing breaks. Vendor codes become None or our errors in one table, → `_MEANING`. Beside the real library
stand `NullNvml` (no GPUs) and `ReplayNvml` (a recording), so that no test needs a GPU.
Source: https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoplace.errors import ExecutionError, InputError
from autoplace.files import read_json

__all__ = ["GpuInfo", "NullNvml", "Nvml", "RealNvml", "ReplayNvml", "open_nvml"]

REPLAY_FORMAT = "autoplace.nvml-replay/1"
_LOST = "has fallen off the bus or needs a reset; reset it or restart the machine, then profile again"
_NO_FIGURE = None
# What each vendor code means where a figure was asked for: no figure, or a sentence about the GPU. Any code that is not
# here is told with the vendor's own words.
_MEANING: Mapping[int, str | None] = {
    2: _NO_FIGURE,  # INVALID_ARGUMENT: old drivers say so of newer questions
    3: _NO_FIGURE,  # NOT_SUPPORTED
    4: _NO_FIGURE,  # NO_PERMISSION
    6: _NO_FIGURE,  # NOT_FOUND
    10: _NO_FIGURE,  # TIMEOUT
    13: _NO_FIGURE,  # FUNCTION_NOT_FOUND: the driver is older than the question
    15: _LOST,  # GPU_IS_LOST
    16: _LOST,  # RESET_REQUIRED
    21: _NO_FIGURE,  # NO_DATA
    26: _NO_FIGURE,  # DEPRECATED
    27: _NO_FIGURE,  # NOT_READY
}


@dataclass(frozen=True, kw_only=True)
class GpuInfo:
    """What the driver says of one GPU."""

    uuid: str
    """For example `GPU-5f1c...`."""
    pci_bus_id: str = ""
    """`domain:bus:device.function` in lower-case hexadecimal, the domain with eight digits."""
    name: str = ""
    memory_bytes: float | None = None
    """All of the GPU's memory, bytes."""
    power_limit_w: float | None = None
    """Enforced power limit, W."""
    utilization: float | None = None
    """Share of the last sample period in which a kernel ran, 0 to 1."""
    sliced: bool = False
    """Whether the GPU is cut into instances (MIG), whose power nobody measures apart."""


class Nvml(ABC):
    """What autoplace asks of NVIDIA's management library."""

    @abstractmethod
    def gpus(self) -> tuple[GpuInfo, ...]:
        """Return every GPU that the driver shows, in the driver's order."""

    @abstractmethod
    def power_w(self, uuid: str) -> float | None:
        """Return what the GPU draws now, W; None when unknown."""

    @abstractmethod
    def energy_j(self, uuid: str) -> float | None:
        """Return the GPU's energy since the driver was loaded, J; None when it keeps no such counter."""


class NullNvml(Nvml):
    """A machine without NVIDIA GPUs."""

    def gpus(self) -> tuple[GpuInfo, ...]:
        """Return no GPUs."""
        return ()

    def power_w(self, uuid: str) -> float | None:
        """Return None."""
        return None

    def energy_j(self, uuid: str) -> float | None:
        """Return None."""
        return None


class ReplayNvml(Nvml):
    """A recording, replayed: each question gets the next recorded reading, and the last one is repeated.

    Format: `{"format": "autoplace.nvml-replay/1", "gpus": [{"uuid": ..., "power_w": [...], "energy_j": [...]}]}`, each
    GPU with the fields of `GpuInfo` and its readings, W and J, null for "does not tell".
    """

    def __init__(self, recording: Mapping[str, Any] | str | Path) -> None:
        data = read_json(recording, InputError) if isinstance(recording, str | Path) else recording
        if data.get("format") != REPLAY_FORMAT:
            raise InputError(f"the recording is of format {data.get('format')!r}; expected {REPLAY_FORMAT!r}")
        self._gpus: list[GpuInfo] = []
        self._readings: dict[tuple[str, str], Iterator[float | None]] = {}
        for entry in data["gpus"]:
            facts = dict(entry)
            power, energy = facts.pop("power_w", []), facts.pop("energy_j", [])
            info = GpuInfo(**facts)
            self._gpus.append(info)
            self._readings[info.uuid, "power"] = _then_last(power)
            self._readings[info.uuid, "energy"] = _then_last(energy)

    def gpus(self) -> tuple[GpuInfo, ...]:
        """Return the recorded GPUs."""
        return tuple(self._gpus)

    def power_w(self, uuid: str) -> float | None:
        """Return the next recorded power, W."""
        return self._next(uuid, "power")

    def energy_j(self, uuid: str) -> float | None:
        """Return the next recorded energy counter, J."""
        return self._next(uuid, "energy")

    def _next(self, uuid: str, what: str) -> float | None:
        readings = self._readings.get((uuid, what))
        return None if readings is None else next(readings)


class RealNvml(Nvml):
    """The driver's own figures; made by `open_nvml`."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._handles: dict[str, Any] = {}

    def gpus(self) -> tuple[GpuInfo, ...]:
        """Return every GPU that the driver shows, in the driver's order."""
        lib = self._library
        count = self._ask("the driver", lib.nvmlDeviceGetCount)
        handles = [self._ask(f"GPU {i}", lib.nvmlDeviceGetHandleByIndex, i) for i in range(count or 0)]
        return tuple(self._describe(handle) for handle in handles if handle is not None)

    def power_w(self, uuid: str) -> float | None:
        """Return what the GPU draws now, W; None when unknown."""
        return _scaled(self._figure(uuid, "nvmlDeviceGetPowerUsage"), 1e-3)

    def energy_j(self, uuid: str) -> float | None:
        """Return the GPU's energy since the driver was loaded, J; None before the Volta generation."""
        return _scaled(self._figure(uuid, "nvmlDeviceGetTotalEnergyConsumption"), 1e-3)

    def _describe(self, handle: Any) -> GpuInfo:
        lib = self._library
        uuid = _text(self._ask("a GPU", lib.nvmlDeviceGetUUID, handle) or "")
        self._handles[uuid] = handle
        pci = self._ask(uuid, lib.nvmlDeviceGetPciInfo, handle)
        memory = self._ask(uuid, lib.nvmlDeviceGetMemoryInfo, handle)
        rates = self._ask(uuid, lib.nvmlDeviceGetUtilizationRates, handle)
        mig = self._ask(uuid, lib.nvmlDeviceGetMigMode, handle)
        return GpuInfo(
            uuid=uuid,
            pci_bus_id=_text(pci.busId).lower() if pci else "",
            name=_text(self._ask(uuid, lib.nvmlDeviceGetName, handle) or ""),
            memory_bytes=float(memory.total) if memory else None,
            power_limit_w=_scaled(self._ask(uuid, lib.nvmlDeviceGetEnforcedPowerLimit, handle), 1e-3),
            utilization=_scaled(rates.gpu if rates else None, 1e-2),
            sliced=bool(mig and mig[0]),
        )

    def _figure(self, uuid: str, question: str) -> Any:
        if uuid not in self._handles:
            self.gpus()
        handle = self._handles.get(uuid)
        return None if handle is None else self._ask(uuid, getattr(self._library, question), handle)

    def _ask(self, whom: str, question: Callable[..., Any], *args: Any) -> Any:
        """Return the driver's answer; None where `_MEANING` says that there is no figure."""
        try:
            return question(*args)
        except self._library.NVMLError as cause:
            code = int(getattr(cause, "value", 999))
            meaning = _MEANING.get(code, f"cannot be asked for its state ({cause}); look at nvidia-smi")
            if meaning is None:
                return None
            raise ExecutionError(f"{whom} {meaning}") from None


def open_nvml() -> Nvml:
    """Return the driver's library, or a `NullNvml` where pynvml, the driver or the permission is missing."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # whatever is wrong with the vendor's library, a machine without GPUs still works
        return NullNvml()
    return RealNvml(pynvml)


def _then_last(readings: list[float | None]) -> Iterator[float | None]:
    yield from readings
    while True:
        yield readings[-1] if readings else None


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else float(value) * factor


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)
