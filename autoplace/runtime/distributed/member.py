"""Which device a started process is before it joins the group: by the cluster file, or by what its host has.

torchrun says how many processes a host has and which of them this one is; the host's devices are given out in order.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
from pathlib import Path

import torch

from autoplace.hardware.cgroups import cpu_quota_cores, memory_limit_bytes
from autoplace.hardware.cluster import Cluster, Device
from autoplace.hardware.cores import available_cores, cpu_model
from autoplace.hardware.gpus import cuda_devices
from autoplace.hardware.nvml import open_nvml
from autoplace.hardware.power import cpu_watts

__all__ = [
    "CLUSTER_VARIABLE",
    "HOST_VARIABLE",
    "MIN_HOSTS_VARIABLE",
    "assigned",
    "gpu_index",
    "host_name",
    "own_device",
    "take_cores",
]

CLUSTER_VARIABLE = "AUTOPLACE_CLUSTER"
"""Environment variable with the path of the cluster file."""
HOST_VARIABLE = "AUTOPLACE_HOST"
"""Environment variable with the name that the cluster file gives this host."""
MIN_HOSTS_VARIABLE = "AUTOPLACE_MIN_HOSTS"
"""Environment variable with the number of the cluster file's hosts without which nothing runs; unset = all of them."""


def host_name(cluster: Cluster | None = None) -> str:
    """Return this host's name: what the environment says, the file's only one, or the machine's own.

    Without a file, hosts are named by torchrun's node rank.
    """
    if given := os.environ.get(HOST_VARIABLE):
        return given
    if cluster is None:
        return f"host{os.environ.get('GROUP_RANK', '0')}"
    hosts = {d.host for d in cluster.devices}
    return next(iter(hosts)) if len(hosts) == 1 else socket.gethostname()


def assigned(cluster: Cluster, local_rank: int) -> Device | None:
    """Return the device that a process of this host runs; None where the file has none for it."""
    devices = cluster.on(host_name(cluster))
    return devices[local_rank] if local_rank < len(devices) else None


def own_device(host: str, local_rank: int, local_ranks: int) -> Device:
    """Describe what a process has: a GPU while there are any, then its part of the cores and of the memory.

    Args:
        host: Name of this host.
        local_rank: Of the process, from 0.
        local_ranks: Processes on this host.
    """
    gpus = cuda_devices(host, open_nvml())
    if local_rank < len(gpus):
        return gpus[local_rank]
    groups, index = max(1, local_ranks - len(gpus)), local_rank - len(gpus)
    cores = available_cores(quota_cores=cpu_quota_cores())
    # More processes than cores share them.
    own = cores[len(cores) * index // groups : len(cores) * (index + 1) // groups] or cores
    watts, memory_bytes = cpu_watts(len(own)), memory_limit_bytes()
    return Device(
        name=f"{host}/cpu:{index}",
        kind="cpu",
        memory_bytes=memory_bytes if math.isinf(memory_bytes) else float(memory_bytes // groups),
        idle_watts=watts.idle_w,
        busy_watts=watts.busy_w,
        watts_source=watts.source,
        cores=own,
        model=cpu_model(),
    )


def take_cores(device: Device | None, *, local_ranks: int = 1) -> None:
    """Keep this process on its device's cores, with a thread for each.

    Nothing is pinned where the device has no cores or the process may not use them all; whoever joins a group then says
    so. A process without cores of its own gets its part of the number of threads.

    Args:
        device: That the process runs.
        local_ranks: Processes on this host.
    """
    allowed = os.sched_getaffinity(0)
    pinned = device is not None and bool(device.cores) and set(device.cores) <= allowed
    if device is not None and pinned:
        # Threads that libraries have started on being imported stay where they are unless told.
        for thread in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):
                os.sched_setaffinity(int(thread.name), device.cores)
    threads = len(device.cores) if device is not None and pinned else max(1, len(allowed) // max(1, local_ranks))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def gpu_index(device: Device) -> int:
    """Return the number in `cuda:0`; -1 where the name has none."""
    number = device.name.rsplit(":", 1)[-1]
    return int(number) if number.isdecimal() else -1
