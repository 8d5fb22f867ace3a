"""`cluster.yaml` in and out: devices, links and the default link of a Cluster, format `autoplace.cluster/1`.

Reading trusts nothing: plain YAML without aliases and doubled keys, known keys only, right types, finite numbers; what
is wrong gets one sentence that names the place. An absent `memory_bytes` is unlimited.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from autoplace.errors import ClusterFileError
from autoplace.files import read_text, write_text_atomically
from autoplace.hardware.cluster import Cluster, Device, Link

__all__ = ["CLUSTER_FORMAT", "load_cluster", "save_cluster"]

CLUSTER_FORMAT = "autoplace.cluster/1"
_MAX_CHARACTERS = 4 << 20  # some 40,000 links; more is no cluster file, and YAML is slow to read
_TOP_KEYS = ("format", "devices", "links", "default_link")
_DEVICE_KEYS = ("name", "kind", "memory_bytes", "idle_watts", "busy_watts", "watts_source", "cores", "model")
_LINK_KEYS = ("source", "target", "latency_ms", "bytes_per_ms")


def load_cluster(path: str | Path) -> Cluster:
    """Return the cluster that a YAML file describes.

    Raises:
        ClusterFileError: If the file is missing, unreadable, no YAML, or describes no usable cluster.
    """
    text = read_text(path, ClusterFileError)
    if len(text) > _MAX_CHARACTERS:
        raise ClusterFileError(f"{path} holds {len(text):,} characters, too many for a cluster file; check the path")
    try:
        return _cluster(_parse(text))
    except ClusterFileError as cause:
        raise ClusterFileError(f"{path}: {cause}") from None


def save_cluster(cluster: Cluster, path: str | Path) -> None:
    """Write a cluster as YAML; nothing half-written is ever seen.

    Raises:
        ClusterFileError: If the file cannot be written.
    """
    data: dict[str, Any] = {"format": CLUSTER_FORMAT, "devices": [_device_data(d) for d in cluster.devices]}
    if cluster.links:
        data["links"] = [
            {"source": source, "target": target, **_link_data(link)} for (source, target), link in cluster.links.items()
        ]
    if cluster.default_link is not None:
        data["default_link"] = _link_data(cluster.default_link)
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)
    try:
        write_text_atomically(path, text)
    except OSError as cause:
        raise ClusterFileError(f"{path} cannot be written: {cause}; choose another path") from None


class _Loader(yaml.SafeLoader):
    """Plain YAML: no aliases (a few hundred bytes can stand for gigabytes), no doubled keys, 1e6 is a number."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark
            raise ClusterFileError(f"line {mark.line + 1} uses an alias (*name); write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in getattr(node, "value", ()):
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise ClusterFileError(f"line {key.start_mark.line + 1} gives {key.value!r} a second time; keep one")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 takes 1e6 for text, since it wants a dot and a signed exponent; people write 1e6.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as cause:
        mark = cause.problem_mark or cause.context_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ClusterFileError(f"this is not YAML: {cause.problem or 'it cannot be parsed'}{place}") from None
    except (yaml.YAMLError, ValueError, TypeError) as cause:
        raise ClusterFileError(f"this is not YAML: {' '.join(str(cause).split())[:200]}") from None
    except RecursionError:
        raise ClusterFileError("this is nested too deeply to be a cluster file") from None


def _cluster(data: Any) -> Cluster:
    top = _mapping(data, "the file", _TOP_KEYS, required=("format", "devices"))
    if top["format"] != CLUSTER_FORMAT:
        raise ClusterFileError(f"format is {_short(top['format'])}; this version reads {CLUSTER_FORMAT!r}")
    devices = [_device(entry, f"devices[{i}]") for i, entry in enumerate(_list(top["devices"], "devices"))]
    owners: dict[tuple[str, int], str] = {}
    for device in devices:
        for core in device.cores:
            owner = owners.setdefault((device.host, core), device.name)
            if owner != device.name:
                raise ClusterFileError(f"core {core} belongs to {owner!r} and to {device.name!r}; give it to one")
    links: dict[tuple[str, str], Link] = {}
    for i, entry in enumerate(_list(top.get("links") or [], "links")):
        place = f"links[{i}]"
        fields = _mapping(entry, place, _LINK_KEYS, required=_LINK_KEYS)
        pair = (_text(fields, "source", place), _text(fields, "target", place))
        if pair[0] == pair[1]:
            raise ClusterFileError(f"{place} leads from {pair[0]!r} to itself; leave it out")
        if pair in links:
            raise ClusterFileError(f"{place} gives {pair[0]!r} -> {pair[1]!r} a second time; keep one")
        links[pair] = _link(fields, place)
    default = top.get("default_link")
    if default is not None:
        default = _link(_mapping(default, "default_link", _LINK_KEYS[2:], required=_LINK_KEYS[2:]), "default_link")
    return Cluster(devices=tuple(devices), links=links, default_link=default)


def _device(entry: Any, place: str) -> Device:
    fields = _mapping(entry, place, _DEVICE_KEYS, required=("name", "kind"))
    memory_bytes = _number(fields, "memory_bytes", place)
    idle_watts, busy_watts = (_number(fields, key, place) for key in ("idle_watts", "busy_watts"))
    if idle_watts is not None and busy_watts is not None and busy_watts < idle_watts:
        raise ClusterFileError(f"{place} draws {busy_watts} W busy and {idle_watts} W idle; busy must not be less")
    return Device(
        name=_text(fields, "name", place),
        kind=_text(fields, "kind", place),
        memory_bytes=math.inf if memory_bytes is None else memory_bytes,
        idle_watts=idle_watts,
        busy_watts=busy_watts,
        watts_source=None if fields.get("watts_source") is None else _text(fields, "watts_source", place),
        cores=_cores(fields.get("cores"), place),
        model="" if not fields.get("model") else _text(fields, "model", place),
    )


def _cores(value: Any, place: str) -> tuple[int, ...]:
    cores = _list([] if value is None else value, f"{place}.cores")
    for i, core in enumerate(cores):
        if isinstance(core, bool) or not isinstance(core, int) or core < 0:
            raise ClusterFileError(f"{place}.cores[{i}] is {_short(core)}; use a CPU id, 0 or more")
    if len(set(cores)) < len(cores):
        raise ClusterFileError(f"{place}.cores names a core twice; keep one")
    return tuple(cores)


def _link(fields: Mapping[str, Any], place: str) -> Link:
    latency_ms, bytes_per_ms = _number(fields, "latency_ms", place), _number(fields, "bytes_per_ms", place)
    if latency_ms is None or not bytes_per_ms:
        raise ClusterFileError(f"{place} needs a latency_ms of 0 or more and a bytes_per_ms above 0")
    return Link(latency_ms=latency_ms, bytes_per_ms=bytes_per_ms)


def _mapping(value: Any, place: str, known: Sequence[str], required: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ClusterFileError(f"{place} is {_short(value)}; expected keys and values: {', '.join(known)}")
    for key in value:
        if key not in known:
            raise ClusterFileError(f"{place} has an unknown key {_short(key)}; known are {', '.join(known)}")
    for key in required:
        if key not in value:
            raise ClusterFileError(f"{place} lacks {key!r}; add it")
    return value


def _list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise ClusterFileError(f"{place} is {_short(value)}; expected a list")
    return value


def _text(fields: Mapping[str, Any], key: str, place: str) -> str:
    value = fields[key]
    if not isinstance(value, str) or not value.strip():
        raise ClusterFileError(f"{place}.{key} is {_short(value)}; expected a text that is not empty")
    return value


def _number(fields: Mapping[str, Any], key: str, place: str) -> float | None:
    """Return a finite number of 0 or more; None when absent or null."""
    value = fields.get(key)
    if value is None:
        return None
    # An int of hundreds of digits compares well but does not convert.
    good = not isinstance(value, bool) and isinstance(value, int | float) and 0 <= value < 1e300
    if not good:
        raise ClusterFileError(f"{place}.{key} is {_short(value)}; use a finite number, 0 or more")
    return float(value)


def _short(value: Any) -> str:
    """Return a scalar as it is and anything deeper by its type, so that no message grows with the file."""
    if value is None:
        return "empty"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**18 else "a huge number"
    return text if len(text) <= 60 else text[:57] + "..."


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
