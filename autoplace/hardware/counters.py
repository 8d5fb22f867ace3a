"""Meters that read the hardware's own energy counters: RAPL for CPU packages, NVML for GPUs.

A counter knows nothing of processes: it counts what others run on the same package or GPU too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from autoplace.errors import AutoplaceError, ExecutionError
from autoplace.hardware._meter import EnergyMeter, begun
from autoplace.hardware._sysfs import read_number
from autoplace.hardware.nvml import Nvml
from autoplace.hardware.power import rapl_packages

__all__ = ["NvmlMeter", "RaplMeter"]

_SAMPLE_EVERY_S = 0.02


class RaplMeter(EnergyMeter):
    """The energy counters of all CPU packages of this machine."""

    source = "rapl"

    def __init__(self, *, sys_root: str | Path = "/sys") -> None:
        self._packages = rapl_packages(sys_root)
        self._start: list[int] | None = None

    @property
    def readable(self) -> bool:
        """Whether there are packages and all their counters can be read (since 2020 by root alone)."""
        return bool(self._packages) and self._read() is not None

    def begin(self) -> None:
        """Read the counters."""
        self._start = self._read()
        if self._start is None:
            raise ExecutionError("the RAPL energy counters cannot be read; read them as root, or use another meter")

    def end(self, elapsed_ms: float, busy_ms: Mapping[str, float] | None = None) -> float | None:
        """Return the packages' energy since `begin`, J; None when a counter did not move or cannot be read.

        A counter that wrapped once in between (after some 20 minutes under full load) is told right.
        """
        start, now = begun(self._start), self._read()
        self._start = None
        if now is None:
            return None
        total_uj = 0
        for package, before, after in zip(self._packages, start, now, strict=True):
            if after < before:
                wrap_at = read_number(package / "max_energy_range_uj")
                if wrap_at is None:
                    return None
                after += wrap_at
            if after == before:
                return None
            total_uj += after - before
        return total_uj * 1e-6

    def _read(self) -> list[int] | None:
        counters = [read_number(package / "energy_uj") for package in self._packages]
        known = [c for c in counters if c is not None]
        return known if len(known) == len(counters) else None


class NvmlMeter(EnergyMeter):
    """The energy of some GPUs: their counters, or their power sampled by a thread where one has no counter."""

    source = "nvml"

    def __init__(self, nvml: Nvml, uuids: Sequence[str]) -> None:
        """Prepare to read.

        Args:
            nvml: The driver, or what stands in for it.
            uuids: The GPUs, as the driver names them.
        """
        self._nvml, self._uuids = nvml, tuple(uuids)
        self._counting = bool(uuids) and all(nvml.energy_j(uuid) is not None for uuid in uuids)
        self._start: list[float | None] | None = None
        self._samples: list[tuple[float, float | None]] = []
        self._stop: threading.Event | None = None
        self._sampler: threading.Thread | None = None

    @property
    def readable(self) -> bool:
        """Whether every GPU tells its energy or its power."""
        return self._counting or (bool(self._uuids) and self._power_w() is not None)

    def begin(self) -> None:
        """Read the counters, or start to sample."""
        self._join()
        self._start = self._counters()
        if not self._counting:
            self._samples, self._stop = [(time.perf_counter(), self._power_w())], threading.Event()
            self._sampler = threading.Thread(target=self._sample, args=(self._stop,), daemon=True)
            self._sampler.start()

    def end(self, elapsed_ms: float, busy_ms: Mapping[str, float] | None = None) -> float | None:
        """Return the GPUs' energy since `begin`, J; None when a counter did not move or a reading failed."""
        start = begun(self._start)
        self._start = None
        if not self._counting:
            self._join()
            self._samples.append((time.perf_counter(), self._power_w()))
            mean_w = _mean(self._samples)
            return None if mean_w is None else mean_w * elapsed_ms * 1e-3
        spent_j = 0.0
        for before, after in zip(start, self._counters(), strict=True):
            if before is None or after is None or after <= before:
                return None
            spent_j += after - before
        return spent_j

    def _counters(self) -> list[float | None]:
        return [self._nvml.energy_j(uuid) for uuid in self._uuids] if self._counting else []

    def _power_w(self) -> float | None:
        """Return the GPUs' power in all, W; None when one does not tell or is lost."""
        try:
            watts = [self._nvml.power_w(uuid) for uuid in self._uuids]
        except AutoplaceError:
            return None
        known = [w for w in watts if w is not None]
        return sum(known) if len(known) == len(watts) else None

    def _sample(self, stop: threading.Event) -> None:
        while not stop.wait(_SAMPLE_EVERY_S):
            self._samples.append((time.perf_counter(), self._power_w()))

    def _join(self) -> None:
        if self._stop and self._sampler:
            self._stop.set()
            self._sampler.join()
        self._stop = self._sampler = None


def _mean(samples: Sequence[tuple[float, float | None]]) -> float | None:
    """Return the time-weighted mean of (s, W) samples by the trapezoid rule, W; None when one is missing."""
    area, span = 0.0, 0.0
    for (t0, w0), (t1, w1) in pairwise(samples):
        if w0 is None or w1 is None:
            return None
        area += (w0 + w1) / 2 * (t1 - t0)
        span += t1 - t0
    return area / span if span > 0 else None
