"""`hosts.yaml` in: machines that nobody has profiled yet, format `autoplace.hosts/1`. Cluster files serve too.

    format: autoplace.hosts/1
    hosts:
    - {name: node0}
    - {name: node1, address: 10.0.0.2, launch: [ssh, user@node1], interface: eth0, processes: 2}

`processes` is how many are started there: one per GPU, the others share the cores in groups. Absent: one per GPU, or
one for all cores where there is none. The rest of an entry is what a cluster file says of a host → `cluster_file`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoplace.errors import ClusterFileError
from autoplace.hardware._fields import items, mapping, parse, read, short
from autoplace.hardware.cluster import Cluster, Host
from autoplace.hardware.cluster_file import CLUSTER_FORMAT, HOST_KEYS, HOSTS_FORMAT, cluster_from_text, host_of

__all__ = ["HostProcesses", "load_hosts", "processes_of"]


@dataclass(frozen=True, kw_only=True)
class HostProcesses:
    """A host, and how many processes are started there."""

    host: Host
    processes: int | None = None
    """None = one per GPU, or one where there is none."""


def load_hosts(path: str | Path) -> tuple[HostProcesses, ...]:
    """Return the hosts that a hosts file or a cluster file names.

    Raises:
        ClusterFileError: If the file is missing, unreadable, no YAML, or names no usable hosts.
    """
    content = read(path)
    try:
        data = parse(content)
        if isinstance(data, dict) and data.get("format") == CLUSTER_FORMAT:
            return processes_of(cluster_from_text(content, where="the cluster"))
        return _hosts(data)
    except ClusterFileError as cause:
        raise ClusterFileError(f"{path}: {cause}") from None


def processes_of(cluster: Cluster) -> tuple[HostProcesses, ...]:
    """Return the hosts of a cluster with one process per device; hosts without devices are left out.

    A cluster without hosts whose devices are all on one is this machine.

    Raises:
        ClusterFileError: If devices are on a host of which nobody says how to start a process there.
    """
    used = tuple(dict.fromkeys(d.host for d in cluster.devices))
    hosts = cluster.hosts or (tuple(Host(name=name) for name in used) if len(used) == 1 else ())
    known = {host.name for host in hosts}
    for name in used:
        if name not in known:
            raise ClusterFileError(
                f"devices are on host {name!r} and `hosts` does not say how to start processes there; "
                "add {name, address, launch} for it"
            )
    return tuple(HostProcesses(host=h, processes=len(cluster.on(h.name))) for h in hosts if h.name in used)


def _hosts(data: Any) -> tuple[HostProcesses, ...]:
    top = mapping(data, "the file", ("format", "hosts"), required=("format", "hosts"))
    if top["format"] != HOSTS_FORMAT:
        raise ClusterFileError(f"format is {short(top['format'])}; this version reads {HOSTS_FORMAT!r}")
    found = [_host(entry, f"hosts[{i}]") for i, entry in enumerate(items(top["hosts"], "hosts"))]
    if not found:
        raise ClusterFileError("there are no hosts; name at least one")
    names = [one.host.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise ClusterFileError(f"host {name!r} is listed twice; give each host its own name")
    return tuple(found)


def _host(entry: Any, place: str) -> HostProcesses:
    fields = mapping(entry, place, (*HOST_KEYS, "processes"), required=("name",))
    processes = fields.get("processes")
    if processes is not None and (isinstance(processes, bool) or not isinstance(processes, int) or processes < 1):
        raise ClusterFileError(f"{place}.processes is {short(processes)}; use a whole number, 1 or more")
    if processes is not None and processes > 4096:
        raise ClusterFileError(f"{place}.processes is {short(processes)}, more than a host can run; use less")
    return HostProcesses(host=host_of(fields, place), processes=processes)
