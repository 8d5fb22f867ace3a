"""`Device`, `Link`, `Host` and `Cluster`: what a model can be placed on. Plain data; `hardware.discover` finds it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoplace.errors import ClusterFileError

__all__ = ["Cluster", "Device", "Host", "Link"]


@dataclass(frozen=True, kw_only=True)
class Device:
    """One place that runs ops: a GPU, or a group of CPU cores."""

    name: str
    """`host/kind:index`, for example `host0/cuda:0` or `host0/cpu:1`."""
    kind: str
    """`cuda`, `cpu`, or any other word in a problem file."""
    memory_bytes: float = math.inf
    """Bytes that ops may use; infinite when unlimited."""
    idle_watts: float | None = None
    """Power at rest, W; None when unknown."""
    busy_watts: float | None = None
    """Power under load, W; None when unknown."""
    watts_source: str | None = None
    """Where the two figures come from, in words."""
    cores: tuple[int, ...] = ()
    """CPU ids of a core group; empty for a GPU."""
    model: str = ""
    """What the hardware calls itself: GPU or CPU model name."""

    @property
    def host(self) -> str:
        """The part of the name before the slash."""
        return self.name.split("/", 1)[0]


@dataclass(frozen=True, kw_only=True)
class Link:
    """A directed way from one device to another."""

    latency_ms: float
    """Time before the first byte arrives, ms."""
    bytes_per_ms: float
    """Bandwidth, bytes per ms."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """One machine of the cluster: how a process is started on it, and how the others reach it."""

    name: str
    """What the devices' names have before the slash."""
    address: str = ""
    """Name or IP address by which other hosts reach it; empty = the name, or 127.0.0.1 when all hosts are local."""
    launch: tuple[str, ...] = ()
    """Words that go before a command to run it there, for example `ssh`, `user@node1`; empty = on this machine."""
    interface: str = ""
    """Network interface that gloo and NCCL use there; empty = the one that has the address, else their choice."""
    directory: str = ""
    """Working directory there; empty = the same as here."""
    python: str = ""
    """Interpreter there that has autoplace; empty = the same as here."""

    @property
    def is_local(self) -> bool:
        """Whether its processes are started on this machine as they are."""
        return not self.launch


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Devices in a fixed order, and the bandwidth and latency between any two."""

    devices: tuple[Device, ...]
    links: dict[tuple[str, str], Link] = field(default_factory=dict)
    """(source name, target name) to link; directed."""
    default_link: Link | None = None
    """Used where `links` has none; None means that such a pair cannot talk."""
    hosts: tuple[Host, ...] = ()
    """How to start processes on the devices' hosts; the first is where ranks meet. Empty = this machine alone."""

    def __post_init__(self) -> None:
        names = [d.name for d in self.devices]
        if not names:
            raise ClusterFileError("the cluster has no devices; name at least one")
        if len(set(names)) < len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise ClusterFileError(f"device {twice!r} is listed twice; give each device its own name")
        for pair in self.links:
            for end in pair:
                if end not in names:
                    raise ClusterFileError(f"a link names device {end!r}, which is not in the cluster")
        hosts = [host.name for host in self.hosts]
        if len(set(hosts)) < len(hosts):
            twice = next(n for n in hosts if hosts.count(n) > 1)
            raise ClusterFileError(f"host {twice!r} is listed twice; give each host its own name")

    @staticmethod
    def discover(*, measure_links: bool = True, host: str = "host0") -> Cluster:
        """Return this machine's GPUs and CPU core groups, with memory, watts and links → `hardware.discover`.

        Args:
            measure_links: Whether to measure the links by real copies (under two seconds) or to assume them.
            host: Name of this machine in the devices' names.
        """
        from autoplace.hardware.discover import discover

        return discover(measure_links=measure_links, host=host)

    @staticmethod
    def load(path: str | Path) -> Cluster:
        """Return the cluster that a YAML file describes → `hardware.cluster_file`.

        Raises:
            ClusterFileError: If the file is missing, unreadable, or describes no usable cluster.
        """
        from autoplace.hardware.cluster_file import load_cluster

        return load_cluster(path)

    def save(self, path: str | Path) -> None:
        """Write the cluster as a YAML file → `hardware.cluster_file`.

        Raises:
            ClusterFileError: If the file cannot be written.
        """
        from autoplace.hardware.cluster_file import save_cluster

        save_cluster(self, path)

    def on(self, host: str) -> tuple[Device, ...]:
        """Return the devices of one host, in order: its first process runs the first of them, and so on."""
        return tuple(d for d in self.devices if d.host == host)

    def part(self, names: Collection[str]) -> Cluster:
        """Return the named devices, in this cluster's order, with the links between them and their hosts."""
        devices = tuple(d for d in self.devices if d.name in names)
        used = {d.host for d in devices}
        return Cluster(
            devices=devices,
            links={pair: link for pair, link in self.links.items() if set(pair) <= set(names)},
            default_link=self.default_link,
            hosts=tuple(host for host in self.hosts if host.name in used),
        )

    @property
    def num_devices(self) -> int:
        """Number of devices D."""
        return len(self.devices)

    @cached_property
    def index(self) -> dict[str, int]:
        """Device name to position."""
        return {d.name: i for i, d in enumerate(self.devices)}

    @cached_property
    def link_latency_ms(self) -> NDArray[np.float64]:
        """float64[D, D], row = source; 0 on the diagonal, inf where a pair cannot talk."""
        return self._matrix("latency_ms", 0.0, math.inf)

    @cached_property
    def link_bytes_per_ms(self) -> NDArray[np.float64]:
        """float64[D, D], row = source; inf on the diagonal, 0 where a pair cannot talk."""
        return self._matrix("bytes_per_ms", math.inf, 0.0)

    def _matrix(self, attribute: str, same: float, missing: float) -> NDArray[np.float64]:
        matrix = np.full((self.num_devices, self.num_devices), missing)
        for i, source in enumerate(self.devices):
            for j, target in enumerate(self.devices):
                link = self.links.get((source.name, target.name), self.default_link)
                if i == j:
                    matrix[i, j] = same
                elif link is not None:
                    matrix[i, j] = getattr(link, attribute)
        return matrix

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 (first 16 hex digits) of the devices' names, kinds, models, cores and memory.

        Measured figures (links, watts) and how hosts are reached are left out, so that profiling twice gives the same
        fingerprint.
        """
        facts = [
            (d.name, d.kind, d.model, list(d.cores), None if math.isinf(d.memory_bytes) else int(d.memory_bytes))
            for d in self.devices
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
