"""`discover`: the devices of this machine as a Cluster. Its parts know the details; this composes them.

GPUs first → `gpus.cuda_devices`, then CPU core groups → `cores.core_groups`, then the links between them
→ `links.measure_links`.

Memory of a core group: the core groups of a host share its memory, and a placement fills each device on its own. So
each group may hold an equal part of what the process may use in all; a plan that fills every group still fits the host.
It is a limit for placement only: nothing stops a group's ops from taking more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from autoplace.hardware.cgroups import cpu_quota_cores, memory_limit_bytes
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.hardware.cores import available_cores, core_groups, cpu_model
from autoplace.hardware.gpus import cuda_devices
from autoplace.hardware.links import measure_links as measure_all_links
from autoplace.hardware.nvml import Nvml, open_nvml
from autoplace.hardware.power import cpu_watts

__all__ = ["ASSUMED_LINK", "cpu_devices", "discover"]

ASSUMED_LINK = Link(latency_ms=0.05, bytes_per_ms=1e6)
"""Stands for every link when none is measured: an assumption, slow enough that no plan leans on it (1 GB/s)."""


def discover(
    *,
    measure_links: bool = True,
    host: str = "host0",
    nvml: Nvml | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Cluster:
    """Return this machine's GPUs and CPU core groups, with memory, watts and links.

    Args:
        measure_links: Whether to measure the links by real copies (under two seconds); otherwise every link is
            `ASSUMED_LINK`.
        host: Name of this machine in the devices' names.
        nvml: The driver, or what stands in for it; None = open it.
        progress: Called with (links done, links in all, what is measured).

    Returns:
        A cluster whose devices are `host/cuda:0`..., then `host/cpu:0`....
    """
    devices = (*cuda_devices(host, nvml or open_nvml()), *cpu_devices(host))
    if not measure_links:
        return Cluster(devices=devices, default_link=ASSUMED_LINK)
    return Cluster(devices=devices, links=measure_all_links(devices, progress=progress))


def cpu_devices(
    host: str,
    *,
    available: Sequence[int] | None = None,
    sys_root: str | Path = "/sys",
    proc_root: str | Path = "/proc",
) -> list[Device]:
    """Return this machine's core groups as devices `host/cpu:index`.

    Args:
        host: Name of the host.
        available: CPU ids that may be used; None = what the process's affinity and its cgroups' quota allow.
        sys_root: Where sysfs is.
        proc_root: Where procfs is.
    """
    if available is None:
        available = available_cores(quota_cores=cpu_quota_cores(sys_root=sys_root, proc_root=proc_root))
    groups = core_groups(available, sys_root=sys_root)
    memory_bytes = memory_limit_bytes(sys_root=sys_root, proc_root=proc_root)
    model = cpu_model(proc_root=proc_root)
    devices = []
    for index, cores in enumerate(groups):
        watts = cpu_watts(len(cores), sys_root=sys_root)
        devices.append(
            Device(
                name=f"{host}/cpu:{index}",
                kind="cpu",
                memory_bytes=memory_bytes if math.isinf(memory_bytes) else float(memory_bytes // len(groups)),
                idle_watts=watts.idle_w,
                busy_watts=watts.busy_w,
                watts_source=watts.source,
                cores=cores,
                model=model,
            )
        )
    return devices
