"""The device workers of one executor, and what they were busy with."""

from __future__ import annotations

from collections.abc import Iterable

from autoplace.errors import ExecutionError
from autoplace.hardware.cluster import Cluster
from autoplace.plan import Plan

from .worker import DeviceWorker, Ledger, spread_busy

__all__ = ["Workers"]


class Workers:
    """One worker per device that a plan uses.

    Args:
        plan: Gives the threads per device.
        cluster: Where the devices are described.
        used: Names of the devices.

    Raises:
        ExecutionError: If a device is unknown or not on this machine, or they are of several hosts.
    """

    def __init__(self, plan: Plan, cluster: Cluster, used: Iterable[str]) -> None:
        self._cluster = cluster
        self.ledger = Ledger()
        self.by_name: dict[str, DeviceWorker] = {}
        devices = {device.name: device for device in cluster.devices}
        names = list(dict.fromkeys(used))
        if unknown := [name for name in names if name not in devices]:
            raise ExecutionError(f"the plan names device {unknown[0]!r}, which the cluster does not have; tune again")
        if len({devices[name].host for name in names}) > 1:
            raise ExecutionError(
                "the plan uses devices of more than one host; one process runs the devices of one host"
            )
        try:
            for name in names:
                device = devices[name]
                host_cores = [c for d in cluster.devices if d.host == device.host for c in d.cores]
                self.by_name[name] = DeviceWorker(device, plan.threads.get(name), host_cores)
        except BaseException:
            self.close()
            raise

    def busy_ms(self) -> dict[str, float]:
        """Return device name to busy milliseconds since the last call.

        A worker that may use all cores of its host keeps all its core groups busy, by the part of the cores that its
        threads can fill.
        """
        busy = dict.fromkeys(self.by_name, 0.0)
        for name, busy_ms in self.ledger.take().items():
            worker = self.by_name[name]
            filled = (worker.threads or 1) / max(1, len(worker.cores)) if worker.wide else None
            for device, device_ms in spread_busy(self._cluster, worker.device, busy_ms, filled).items():
                busy[device] = busy.get(device, 0.0) + device_ms
        return busy

    def close(self) -> None:
        """End the threads; calling it twice does nothing more."""
        for worker in self.by_name.values():
            worker.close()
