"""Energy meters: joules between `begin` and `end` for all devices of a cluster, and where the figure comes from.

| source | reads | covers |
|---|---|---|
| `nvml` | the GPUs' energy counters; where a GPU has none, its power 50 times a second | GPUs |
| `rapl` | the CPU packages' energy counters in `/sys/class/powercap` | CPU packages, whole |
| `nvml+rapl` | both of the above, each for its own devices | GPUs and CPU packages |
| `model` | idle and busy watts of each device, and its busy time | any device whose watts are known |
| none | nothing | nothing |

A counter knows nothing of processes: it counts what others run on the same GPU or package too. Counters tick at their
own pace (RAPL about every 1 ms, NVML every 20 to 100 ms): begin and end far apart, and count repeats between them. A
figure covers every device; where it can't, it is None. Figures of two sources are never added without saying so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from autoplace.hardware._meter import EnergyMeter, begun
from autoplace.hardware.cluster import Cluster, Device
from autoplace.hardware.counters import NvmlMeter, RaplMeter
from autoplace.hardware.gpus import match_gpu, torch_gpus
from autoplace.hardware.nvml import Nvml, open_nvml

__all__ = ["CombinedMeter", "EnergyMeter", "ModelMeter", "NullMeter", "NvmlMeter", "RaplMeter", "best_meter"]


class NullMeter(EnergyMeter):
    """Nothing is known, and nothing is told."""

    source = "none"

    def begin(self) -> None:
        """Do nothing."""

    def end(self, elapsed_ms: float, busy_ms: Mapping[str, float] | None = None) -> float | None:
        """Return None."""
        return None


class CombinedMeter(EnergyMeter):
    """Meters of different devices, added up under a source that names them all."""

    def __init__(self, meters: Sequence[EnergyMeter]) -> None:
        self._meters = tuple(meters)
        self.source = "+".join(m.source for m in self._meters)

    def begin(self) -> None:
        """Begin all."""
        for meter in self._meters:
            meter.begin()

    def end(self, elapsed_ms: float, busy_ms: Mapping[str, float] | None = None) -> float | None:
        """Return the sum, J; None when one has no figure."""
        parts = [meter.end(elapsed_ms, busy_ms) for meter in self._meters]
        known = [p for p in parts if p is not None]
        return sum(known) if len(known) == len(parts) else None


class ModelMeter(EnergyMeter):
    """Energy = sum over devices of idle_watts * T + (busy_watts - idle_watts) * busy time.

    T is the elapsed time. Busy time of this host's core groups is the process's CPU time → `_cpu_core_seconds`, each
    core-second at the groups' mean dynamic watts per core; threads that only wait are not counted. Busy time of every
    other device is `busy_ms`. CPU time of child processes is not seen.
    """

    source = "model"

    def __init__(
        self, cluster: Cluster, *, host: str | None = None, cpu_clock_s: Callable[[], float] = time.process_time
    ) -> None:
        """Prepare to count.

        Args:
            cluster: Devices with their watts.
            host: The host on which this process runs; None = the first device's.
            cpu_clock_s: Process's CPU time over all threads, s.
        """
        self._cluster, self._clock = cluster, cpu_clock_s
        host = host or cluster.devices[0].host
        self._groups = [d for d in cluster.devices if d.kind == "cpu" and d.cores and d.host == host]
        self._start: float | None = None

    def begin(self) -> None:
        """Read the process's CPU time."""
        self._start = self._clock()

    def end(self, elapsed_ms: float, busy_ms: Mapping[str, float] | None = None) -> float | None:
        """Return the modelled energy, J; None when a device's watts, or a busy time that is needed, are unknown."""
        core_seconds = self._cpu_core_seconds(begun(self._start), elapsed_ms)
        self._start = None
        total_j = 0.0
        for device in self._cluster.devices:
            if device.idle_watts is None or device.busy_watts is None:
                return None
            total_j += device.idle_watts * elapsed_ms * 1e-3
            if device in self._groups:
                continue
            if busy_ms is None or device.name not in busy_ms:
                return None
            total_j += (device.busy_watts - device.idle_watts) * min(busy_ms[device.name], elapsed_ms) * 1e-3
        return total_j + core_seconds * _dynamic_w_per_core(self._groups)

    def _cpu_core_seconds(self, start_s: float, elapsed_ms: float) -> float:
        """Return the process's CPU time since `begin`, s, at most all cores of the groups all the time."""
        return min(self._clock() - start_s, elapsed_ms * 1e-3 * sum(len(d.cores) for d in self._groups))


def best_meter(
    cluster: Cluster,
    *,
    host: str | None = None,
    nvml: Nvml | None = None,
    gpu_uuids: Mapping[str, str] | None = None,
    sys_root: str | Path = "/sys",
) -> EnergyMeter:
    """Return the best meter that covers every device: hardware counters, else the model, else none.

    Args:
        cluster: The devices to cover.
        host: The host on which this process runs; None = the first device's. Other hosts' counters can't be read here.
        nvml: The driver, or what stands in for it; None = open it where the cluster has GPUs.
        gpu_uuids: Device name to the driver's name of the GPU; None = ask torch and the driver.
        sys_root: Where sysfs is.
    """
    host = host or cluster.devices[0].host
    local = all(d.host == host and d.kind in ("cpu", "cuda") for d in cluster.devices)
    counters = _counters_of(cluster, nvml, gpu_uuids, sys_root) if local else None
    if counters:
        return counters[0] if len(counters) == 1 else CombinedMeter(counters)
    if all(d.idle_watts is not None and d.busy_watts is not None for d in cluster.devices):
        return ModelMeter(cluster, host=host)
    return NullMeter()


def _counters_of(
    cluster: Cluster, nvml: Nvml | None, gpu_uuids: Mapping[str, str] | None, sys_root: str | Path
) -> list[EnergyMeter] | None:
    """Return meters that together cover every device, or None when a device has no readable counter."""
    meters: list[EnergyMeter] = []
    gpus = [d for d in cluster.devices if d.kind == "cuda"]
    if gpus:
        nvml = nvml or open_nvml()
        uuids = _local_gpu_uuids(gpus, nvml) if gpu_uuids is None else gpu_uuids
        if not all(d.name in uuids for d in gpus):
            return None
        gpu_meter = NvmlMeter(nvml, [uuids[d.name] for d in gpus])
        if not gpu_meter.readable:
            return None
        meters.append(gpu_meter)
    if len(gpus) < cluster.num_devices:
        cpu_meter = RaplMeter(sys_root=sys_root)
        if not cpu_meter.readable:
            return None
        meters.append(cpu_meter)
    return meters


def _local_gpu_uuids(devices: Sequence[Device], nvml: Nvml) -> dict[str, str]:
    """Return device name to the driver's UUID; slices are left out: a GPU's counter counts all of them."""
    infos = nvml.gpus()
    found = {}
    for gpu in torch_gpus():
        info = match_gpu(gpu, infos)
        for device in devices:
            if info and not info.sliced and device.name.split("/", 1)[-1] == f"cuda:{gpu.index}":
                found[device.name] = info.uuid
    return found


def _dynamic_w_per_core(groups: Sequence[Device]) -> float:
    cores = sum(len(d.cores) for d in groups)
    dynamic_w = sum((d.busy_watts or 0.0) - (d.idle_watts or 0.0) for d in groups)
    return dynamic_w / cores if cores else 0.0
