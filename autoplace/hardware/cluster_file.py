"""`cluster.yaml` in and out: devices, links, the default link and the hosts of a Cluster, format `autoplace.cluster/1`.

Reading trusts nothing: what is wrong gets one sentence that names the place (→ `_fields`). An absent `memory_bytes` is
unlimited; absent `hosts` are this machine alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoplace.errors import ClusterFileError
from autoplace.files import write_text_atomically
from autoplace.hardware._fields import dump, items, mapping, number, optional_text, parse, read, short, text
from autoplace.hardware.cluster import Cluster, Device, Host, Link

__all__ = [
    "CLUSTER_FORMAT",
    "HOSTS_FORMAT",
    "HOST_KEYS",
    "cluster_from_text",
    "cluster_to_text",
    "host_of",
    "load_cluster",
    "save_cluster",
]

CLUSTER_FORMAT = "autoplace.cluster/1"
HOSTS_FORMAT = "autoplace.hosts/1"
"""What people write before profiling → `hosts_file`."""
HOST_KEYS = ("name", "address", "launch", "interface", "directory", "python")
_TOP_KEYS = ("format", "devices", "links", "default_link", "hosts")
_DEVICE_KEYS = ("name", "kind", "memory_bytes", "idle_watts", "busy_watts", "watts_source", "cores", "model")
_LINK_KEYS = ("source", "target", "latency_ms", "bytes_per_ms")


def load_cluster(path: str | Path) -> Cluster:
    """Return the cluster that a YAML file describes.

    Raises:
        ClusterFileError: If the file is missing, unreadable, no YAML, or describes no usable cluster.
    """
    return cluster_from_text(read(path), where=path)


def cluster_from_text(content: str, *, where: str | Path) -> Cluster:
    """Return the cluster that a YAML text describes.

    Args:
        content: The text.
        where: It comes from, for messages.

    Raises:
        ClusterFileError: If it is no YAML, or describes no usable cluster.
    """
    try:
        return _cluster(parse(content))
    except ClusterFileError as cause:
        raise ClusterFileError(f"{where}: {cause}") from None


def save_cluster(cluster: Cluster, path: str | Path) -> None:
    """Write a cluster as YAML; nothing half-written is ever seen.

    Raises:
        ClusterFileError: If the file cannot be written.
    """
    try:
        write_text_atomically(path, cluster_to_text(cluster))
    except OSError as cause:
        raise ClusterFileError(f"{path} cannot be written: {cause}; choose another path") from None


def cluster_to_text(cluster: Cluster) -> str:
    """Return a cluster as YAML."""
    data: dict[str, Any] = {"format": CLUSTER_FORMAT, "devices": [_device_data(d) for d in cluster.devices]}
    if cluster.links:
        data["links"] = [
            {"source": source, "target": target, **_link_data(link)} for (source, target), link in cluster.links.items()
        ]
    if cluster.default_link is not None:
        data["default_link"] = _link_data(cluster.default_link)
    if cluster.hosts:
        data["hosts"] = [_host_data(host) for host in cluster.hosts]
    return dump(data)


def host_of(fields: Mapping[str, Any], place: str) -> Host:
    """Return the host that a mapping of `HOST_KEYS` describes.

    Raises:
        ClusterFileError: Naming the place of what is wrong.
    """
    launch = items([] if fields.get("launch") is None else fields["launch"], f"{place}.launch")
    words = {f"launch[{i}]": word for i, word in enumerate(launch)}
    for key in words:
        text(words, key, place)
    host = Host(
        name=text(fields, "name", place),
        address=optional_text(fields, "address", place),
        launch=tuple(launch),
        interface=optional_text(fields, "interface", place),
        directory=optional_text(fields, "directory", place),
        python=optional_text(fields, "python", place),
    )
    if "/" in host.name:
        raise ClusterFileError(f"{place}.name is {short(host.name)}; a host's name has no slash")
    for key, value in {**fields, **words}.items():
        if isinstance(value, str) and not value.isprintable():
            raise ClusterFileError(f"{place}.{key} has characters that cannot be printed; leave them out")
    return host


def _cluster(data: Any) -> Cluster:
    if isinstance(data, dict) and data.get("format") == HOSTS_FORMAT:
        raise ClusterFileError("this names hosts only; make a cluster file of it by `autoplace profile --cluster`")
    top = mapping(data, "the file", _TOP_KEYS, required=("format", "devices"))
    if top["format"] != CLUSTER_FORMAT:
        raise ClusterFileError(f"format is {short(top['format'])}; this version reads {CLUSTER_FORMAT!r}")
    devices = [_device(entry, f"devices[{i}]") for i, entry in enumerate(items(top["devices"], "devices"))]
    owners: dict[tuple[str, int], str] = {}
    for device in devices:
        for core in device.cores:
            owner = owners.setdefault((device.host, core), device.name)
            if owner != device.name:
                raise ClusterFileError(f"core {core} belongs to {owner!r} and to {device.name!r}; give it to one")
    links: dict[tuple[str, str], Link] = {}
    for i, entry in enumerate(items(top.get("links") or [], "links")):
        place = f"links[{i}]"
        fields = mapping(entry, place, _LINK_KEYS, required=_LINK_KEYS)
        pair = (text(fields, "source", place), text(fields, "target", place))
        if pair[0] == pair[1]:
            raise ClusterFileError(f"{place} leads from {pair[0]!r} to itself; leave it out")
        if pair in links:
            raise ClusterFileError(f"{place} gives {pair[0]!r} -> {pair[1]!r} a second time; keep one")
        links[pair] = _link(fields, place)
    default = top.get("default_link")
    if default is not None:
        default = _link(mapping(default, "default_link", _LINK_KEYS[2:], required=_LINK_KEYS[2:]), "default_link")
    entries = items([] if top.get("hosts") is None else top["hosts"], "hosts")
    hosts = [host_of(mapping(e, f"hosts[{i}]", HOST_KEYS, ("name",)), f"hosts[{i}]") for i, e in enumerate(entries)]
    return Cluster(devices=tuple(devices), links=links, default_link=default, hosts=tuple(hosts))


def _device(entry: Any, place: str) -> Device:
    fields = mapping(entry, place, _DEVICE_KEYS, required=("name", "kind"))
    memory_bytes = number(fields, "memory_bytes", place)
    idle_watts, busy_watts = (number(fields, key, place) for key in ("idle_watts", "busy_watts"))
    if idle_watts is not None and busy_watts is not None and busy_watts < idle_watts:
        raise ClusterFileError(f"{place} draws {busy_watts} W busy and {idle_watts} W idle; busy must not be less")
    return Device(
        name=text(fields, "name", place),
        kind=text(fields, "kind", place),
        memory_bytes=math.inf if memory_bytes is None else memory_bytes,
        idle_watts=idle_watts,
        busy_watts=busy_watts,
        watts_source=None if fields.get("watts_source") is None else text(fields, "watts_source", place),
        cores=_cores(fields.get("cores"), place),
        model="" if not fields.get("model") else text(fields, "model", place),
    )


def _cores(value: Any, place: str) -> tuple[int, ...]:
    cores = items([] if value is None else value, f"{place}.cores")
    for i, core in enumerate(cores):
        if isinstance(core, bool) or not isinstance(core, int) or core < 0:
            raise ClusterFileError(f"{place}.cores[{i}] is {short(core)}; use a CPU id, 0 or more")
    if len(set(cores)) < len(cores):
        raise ClusterFileError(f"{place}.cores names a core twice; keep one")
    return tuple(cores)


def _link(fields: Mapping[str, Any], place: str) -> Link:
    latency_ms, bytes_per_ms = number(fields, "latency_ms", place), number(fields, "bytes_per_ms", place)
    if latency_ms is None or not bytes_per_ms:
        raise ClusterFileError(f"{place} needs a latency_ms of 0 or more and a bytes_per_ms above 0")
    return Link(latency_ms=latency_ms, bytes_per_ms=bytes_per_ms)


def _device_data(device: Device) -> dict[str, Any]:
    data: dict[str, Any] = {"name": device.name, "kind": device.kind}
    if not math.isinf(device.memory_bytes):
        data["memory_bytes"] = int(device.memory_bytes)
    for key in ("idle_watts", "busy_watts"):
        if (value := getattr(device, key)) is not None:
            data[key] = float(value)
    if device.watts_source:
        data["watts_source"] = device.watts_source
    if device.cores:
        data["cores"] = [int(core) for core in device.cores]
    if device.model:
        data["model"] = device.model
    return data


def _link_data(link: Link) -> dict[str, float]:
    return {"latency_ms": float(link.latency_ms), "bytes_per_ms": float(link.bytes_per_ms)}


def _host_data(host: Host) -> dict[str, Any]:
    data: dict[str, Any] = {"name": host.name}
    for key in HOST_KEYS[1:]:
        if value := getattr(host, key):
            data[key] = list(value) if key == "launch" else value
    return data
