"""Idle and busy watts of a device, and where each pair of figures comes from.

GPU: the driver's enforced power limit as busy, what the GPU draws while no kernel runs as idle.

CPU: the package power limit of RAPL (https://docs.kernel.org/power/powercap/powercap.html) where it can be read, shared
out by cores; else generic figures per vCPU from Cloud Carbon Footprint's methodology, which derives them from SPECpower
results: AWS's average over processor generations, 0.74 W at rest and 3.5 W under full load
(https://www.cloudcarbonfootprint.org/docs/methodology/, "Compute"). They leave memory, disks and cooling out. RAPL
states no limit for rest, so idle is taken there as the same share of busy as in those generic figures.

These are figures for a model of energy, not measurements; each device's `watts_source` says which it has.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from autoplace.hardware._sysfs import read_number, read_words
from autoplace.hardware.cores import parse_cpu_list
from autoplace.hardware.nvml import GpuInfo, Nvml

__all__ = [
    "GENERIC_BUSY_W_PER_CORE",
    "GENERIC_IDLE_W_PER_CORE",
    "Watts",
    "cpu_watts",
    "gpu_watts",
    "rapl_packages",
]

GENERIC_IDLE_W_PER_CORE = 0.74
"""Cloud Carbon Footprint, AWS average, minimum per vCPU."""
GENERIC_BUSY_W_PER_CORE = 3.5
"""Cloud Carbon Footprint, AWS average, maximum per vCPU."""
# Firmware writes 4095 W and the like where it means "no limit"; no socket sold comes near.
_NO_LIMIT_W = 2000.0
# A kernel that ran in more than this share of the last sample period: the draw is not that of rest.
_AT_REST_UTILIZATION = 0.1


@dataclass(frozen=True, kw_only=True)
class Watts:
    """Power at rest and under load."""

    idle_w: float | None = None
    busy_w: float | None = None
    source: str | None = None
    """In words; None when neither is known."""


def gpu_watts(info: GpuInfo | None, nvml: Nvml) -> Watts:
    """Return a GPU's watts: its power limit, and what it draws now if it is at rest.

    Args:
        info: What the driver says of the GPU; None when it shows no such GPU.
        nvml: The driver, or what stands in for it.

    Returns:
        Unknown figures are None: no power limit, a GPU that is busy with something now, an instance of a sliced GPU.
    """
    if info is None or info.sliced or info.power_limit_w is None:
        return Watts()
    at_rest = info.utilization is not None and info.utilization <= _AT_REST_UTILIZATION
    draw_w = nvml.power_w(info.uuid) if at_rest else None
    if draw_w is None:
        return Watts(busy_w=info.power_limit_w, source="nvml: power limit; no draw at rest to be had")
    idle_w = min(draw_w, info.power_limit_w)
    return Watts(idle_w=idle_w, busy_w=info.power_limit_w, source="nvml: power limit, draw at rest")


def cpu_watts(num_cores: int, *, sys_root: str | Path = "/sys") -> Watts:
    """Return the watts of a group of CPU cores.

    Args:
        num_cores: Logical cores in the group.
        sys_root: Where sysfs is.
    """
    limits = [_package_limit_w(package) for package in rapl_packages(sys_root)]
    online = len(parse_cpu_list(read_words(Path(sys_root) / "devices" / "system" / "cpu" / "online")))
    known = [limit for limit in limits if limit is not None]
    if known and len(known) == len(limits) and online:
        busy_w = sum(known) * num_cores / online
        share = GENERIC_IDLE_W_PER_CORE / GENERIC_BUSY_W_PER_CORE
        source = f"rapl: package power limit by cores; idle as {share:.0%} of it (Cloud Carbon Footprint)"
        return Watts(idle_w=busy_w * share, busy_w=busy_w, source=source)
    return Watts(
        idle_w=GENERIC_IDLE_W_PER_CORE * num_cores,
        busy_w=GENERIC_BUSY_W_PER_CORE * num_cores,
        source="generic: Cloud Carbon Footprint, AWS average per vCPU (SPECpower)",
    )


def rapl_packages(sys_root: str | Path = "/sys") -> list[Path]:
    """Return the powercap directories of the CPU packages, in order; none on most virtual machines.

    Some machines show a package a second time through memory-mapped registers (`intel-rapl-mmio`); those are left out.
    """
    zones = sorted((Path(sys_root) / "class" / "powercap").glob("intel-rapl:[0-9]*"))
    return [zone for zone in zones if read_words(zone / "name").startswith("package")]


def _package_limit_w(package: Path) -> float | None:
    """Return the package's thermal design power, else its long-term limit, W; None when neither is stated."""
    for index in range(4):
        if read_words(package / f"constraint_{index}_name") != "long_term":
            continue
        for kind in ("max_power_uw", "power_limit_uw"):
            microwatts = read_number(package / f"constraint_{index}_{kind}")
            if microwatts and microwatts * 1e-6 < _NO_LIMIT_W:
                return microwatts * 1e-6
    return None
