"""Checks the data of a problem file place by place and builds the Problem.

Whatever is wrong gets one sentence that names the place, such as `ops[3].latency_ms[1]`. Ops and tensors are first
looked at whole columns at a time (→ `problem_columns`), which is several times as quick and says only that something
needs a second look; the readers here look again, one by one, and have the words.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoplace.errors import AutoplaceError, InputError, ProblemFileError
from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.problem import Objective, Problem, Semantics
from autoplace.problem_columns import MOST_BYTES, Ops, read_ops, read_tensors

__all__ = ["FORMAT", "ProblemReader"]

FORMAT = "autoplace.problem/1"
MOST_DEVICES = 1024
MOST_MICROBATCHES = 4096


class ProblemReader:
    """Checks JSON data place by place and builds the Problem; the first thing wrong ends it."""

    def __init__(self, where: str) -> None:
        self.where = where

    def fail(self, message: str, *place: str | int) -> ProblemFileError:
        """Return the error that says what is wrong at a place, such as `"ops", 3, "name"`."""
        text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
        return ProblemFileError(f"{self.where}: {text.removeprefix('.')} {message}")

    def problem(self, data: Any) -> Problem:
        """Read the whole file."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ProblemFileError(f'{self.where} is not a problem file: its "format" must be {FORMAT!r}')
        optional = ("name", "links", "default_link", "tensors", "objective", "semantics", "batch_size")
        self.keys(data, ("format", "devices", "ops"), optional, "the file")
        cluster = self.cluster(data)
        objective = self.objective(data, cluster)
        semantics = self.semantics(data)
        graph, latency, overhead = self.graph(data, cluster)
        return Problem(
            graph=graph,
            cluster=cluster,
            latency_ms=latency,
            overhead_ms=overhead,
            objective=objective,
            semantics=semantics,
            name=self.text(data.get("name", "problem"), "name"),
            batch_size=int(self.number(data.get("batch_size", 1), "batch_size", whole=True, least=1)),
        )

    def cluster(self, data: dict[str, Any]) -> Cluster:
        """Read `devices`, `links` and `default_link`."""
        devices: list[Device] = []
        rows = self.items(data["devices"], "devices", least=1)
        if len(rows) > MOST_DEVICES:
            raise self.fail(f"lists {len(rows)}; {MOST_DEVICES} is the most", "devices")
        names: dict[str, int] = {}
        for i, row in enumerate(rows):
            self.keys(row, ("name", "kind"), ("memory_bytes", "idle_watts", "busy_watts"), "devices", i)
            name = self.new_name(row["name"], names, "devices", i)
            known: dict[str, Any] = {
                key: self.number(row[key], "devices", i, key)
                for key in ("memory_bytes", "idle_watts", "busy_watts")
                if row.get(key) is not None
            }
            devices.append(Device(name=name, kind=self.text(row["kind"], "devices", i, "kind"), **known))
        links: dict[tuple[str, str], Link] = {}
        for i, row in enumerate(self.items(data.get("links") or [], "links")):
            self.keys(row, ("source", "target", "latency_ms", "bytes_per_ms"), (), "links", i)
            ends = (
                devices[self.known_name(row["source"], names, "device", "links", i, "source")].name,
                devices[self.known_name(row["target"], names, "device", "links", i, "target")].name,
            )
            if ends[0] == ends[1]:
                raise self.fail(f"joins {_short(ends[0])} to itself; leave it out, no device needs one", "links", i)
            if ends in links:
                raise self.fail(f"repeats the link from {_short(ends[0])} to {_short(ends[1])}; keep one", "links", i)
            links[ends] = self.link(row, "links", i)
        default = data.get("default_link")
        if default is not None:
            self.keys(default, ("latency_ms", "bytes_per_ms"), (), "default_link")
        joined = None if default is None else self.link(default, "default_link")
        return Cluster(devices=tuple(devices), links=links, default_link=joined)

    def link(self, row: dict[str, Any], *place: str | int) -> Link:
        """Read the two figures of a link."""
        bandwidth = self.number(row["bytes_per_ms"], *place, "bytes_per_ms")
        if bandwidth < 1e-12:
            raise self.fail("is 0; leave the link out where a pair cannot talk", *place, "bytes_per_ms")
        return Link(latency_ms=self.number(row["latency_ms"], *place, "latency_ms"), bytes_per_ms=bandwidth)

    def graph(
        self, data: dict[str, Any], cluster: Cluster
    ) -> tuple[OpGraph, NDArray[np.float64], NDArray[np.float64] | None]:
        """Read `ops` and `tensors`; return graph, latency_ms and overhead_ms."""
        rows = self.items(data["ops"], "ops", least=1)
        quick = read_ops(rows, cluster.num_devices)
        names, columns, latency, overhead = self.ops(rows, cluster) if quick is None else quick
        edges = read_tensors(data.get("tensors") or [], names)
        if edges is None:
            edges = self.tensors(data, names)
        try:
            graph = OpGraph.build(names=list(names), edges=edges, **columns)
        except AutoplaceError:
            cycle = " -> ".join(_short(name) for name in _cycle(list(names), edges))
            raise self.fail(f"form a cycle: {cycle}; remove a tensor that closes it", "tensors") from None
        return graph, latency, overhead

    def ops(self, rows: list[Any], cluster: Cluster) -> Ops:
        """Read `ops` one by one, in the form of → `problem_columns.read_ops`."""
        optional = ("kind", "weight_bytes", "activation_bytes", "colocate", "overhead_ms", "frees")
        names: dict[str, int] = {}
        groups: dict[str, int] = {}
        kinds, weights, activations, frees, colocate, latency, overhead = [], [], [], [], [], [], []
        for i, row in enumerate(rows):
            self.keys(row, ("name", "latency_ms"), optional, "ops", i)
            self.new_name(row["name"], names, "ops", i)
            kinds.append(self.text(row.get("kind", "op"), "ops", i, "kind"))
            latency.append(self.latencies(row["latency_ms"], cluster.num_devices, "ops", i, "latency_ms"))
            overhead.append(self.overheads(row.get("overhead_ms"), latency[-1], "ops", i, "overhead_ms"))
            weights.append(self.count(row.get("weight_bytes"), "ops", i, "weight_bytes"))
            activations.append(self.count(row.get("activation_bytes"), "ops", i, "activation_bytes"))
            frees.append(self.flag(row.get("frees"), "ops", i, "frees"))
            key = row.get("colocate")
            if key is not None:
                key = groups.setdefault(self.text(key, "ops", i, "colocate"), len(groups))
            colocate.append(-1 if key is None else key)
        any_overhead = any(row.get("overhead_ms") is not None for row in rows)
        columns = {
            "kinds": kinds, "weight_bytes": weights, "activation_bytes": activations, "frees": frees,
            "colocate": colocate,
        }  # fmt: skip
        return names, columns, np.asarray(latency), np.asarray(overhead) if any_overhead else None

    def tensors(self, data: dict[str, Any], names: dict[str, int]) -> list[tuple[int, list[int], float]]:
        """Read `tensors` as (producer, consumers, bytes)."""
        edges = []
        for i, row in enumerate(self.items(data.get("tensors") or [], "tensors")):
            self.keys(row, ("producer", "consumers"), ("bytes",), "tensors", i)
            producer = self.known_name(row["producer"], names, "op", "tensors", i, "producer")
            consumers = [
                self.known_name(name, names, "op", "tensors", i, "consumers", k)
                for k, name in enumerate(self.items(row["consumers"], "tensors", i, "consumers"))
            ]
            size = row.get("bytes")
            edges.append((producer, consumers, 0.0 if size is None else self.number(size, "tensors", i, "bytes")))
        return edges

    def latencies(self, value: Any, devices: int, *place: str | int) -> list[float]:
        """Read one latency per device; inf where null."""
        row = self.items(value, *place)
        if len(row) != devices:
            raise self.fail(f"has {len(row)} entries; give one per device, that is {devices}", *place)
        return [math.inf if v is None else self.number(v, *place, d) for d, v in enumerate(row)]

    def overheads(self, value: Any, latency: list[float], *place: str | int) -> list[float]:
        """Read one overhead per device, no more than the latency; 0 where absent."""
        if value is None:
            return [0.0] * len(latency)
        row = [0.0 if math.isinf(v) else v for v in self.latencies(value, len(latency), *place)]
        for d, (over, whole) in enumerate(zip(row, latency, strict=True)):
            if over > whole:
                raise self.fail(f"is {over:g}, more than the op's latency of {whole:g}", *place, d)
        return row

    def objective(self, data: dict[str, Any], cluster: Cluster) -> Objective:
        """Read `objective`."""
        row = self.options(data, "objective", ("goal", "energy_weight"))
        if "energy_weight" in row:
            row["energy_weight"] = self.number(row["energy_weight"], "objective", "energy_weight")
            for i, device in enumerate(cluster.devices):
                if row["energy_weight"] > 0 and None in (device.idle_watts, device.busy_watts):
                    raise self.fail("needs idle_watts and busy_watts, as the objective weighs energy", "devices", i)
        try:
            return Objective(**row)
        except (InputError, TypeError) as error:
            raise self.fail(f"is wrong: {error}", "objective") from None

    def semantics(self, data: dict[str, Any]) -> Semantics:
        """Read `semantics`."""
        row = self.options(data, "semantics", ("transfers", "route", "contention", "queue", "microbatches"))
        if "microbatches" in row:
            count = self.number(row["microbatches"], "semantics", "microbatches", whole=True, least=1)
            if count > MOST_MICROBATCHES:
                raise self.fail(f"is {count:.0f}; {MOST_MICROBATCHES} is the most", "semantics", "microbatches")
            row["microbatches"] = int(count)
        try:
            return Semantics(**row)
        except (InputError, TypeError) as error:
            raise self.fail(f"is wrong: {error}", "semantics") from None

    def options(self, data: dict[str, Any], key: str, known: tuple[str, ...]) -> dict[str, Any]:
        """Read an optional object of optional keys, nulls left out."""
        row = data.get(key)
        if row is None:
            return {}
        self.keys(row, (), known, key)
        return {name: value for name, value in row.items() if value is not None}

    def keys(self, row: Any, required: tuple[str, ...], optional: tuple[str, ...], *place: str | int) -> None:
        """Check that a value is an object with all required and no unknown keys."""
        if type(row) is not dict:
            raise self.fail(f"is {_short(row)}; it must be an object", *place)
        for key in required:
            if key not in row:
                raise self.fail(f"lacks the key {key!r}", *place)
        for key in row:
            if key not in required and key not in optional:
                known = ", ".join((*required, *optional))
                raise self.fail(f"has the unknown key {_short(key)}; known keys are {known}", *place)

    def items(self, value: Any, *place: str | int, least: int = 0) -> list[Any]:
        """Check that a value is a list."""
        if type(value) is not list:
            raise self.fail(f"is {_short(value)}; it must be a list", *place)
        if len(value) < least:
            raise self.fail(f"is empty; list at least {least}", *place)
        return value

    def text(self, value: Any, *place: str | int) -> str:
        """Check that a value is a string that is not empty."""
        if type(value) is not str or not value:
            raise self.fail(f"is {_short(value)}; it must be a string that is not empty", *place)
        if not value.isascii() and value != value.encode("utf-8", "replace").decode("utf-8"):
            raise self.fail(f"is {_short(value)}, which holds half a surrogate pair and is no text", *place)
        return value

    def new_name(self, value: Any, names: dict[str, int], what: str, row: int) -> str:
        """Check that a name is new, and number it."""
        name = self.text(value, what, row, "name")
        if name in names:
            other = f"{what}[{names[name]}].name"
            raise self.fail(f"is {_short(name)}, as is {other}; give each its own name", what, row, "name")
        names[name] = len(names)
        return name

    def known_name(self, value: Any, names: dict[str, int], what: str, *place: str | int) -> int:
        """Return the number of a name."""
        index = names.get(value) if type(value) is str else None
        if index is None:
            raise self.fail(f"is {_short(value)}, which names no {what} of this file", *place)
        return index

    def number(self, value: Any, *place: str | int, whole: bool = False, least: float = 0.0) -> float:
        """Check that a value is a finite number, `least` or more."""
        if type(value) is not float and type(value) is not int:
            raise self.fail(f"is {_short(value)}; it must be a number", *place)
        if not least <= value < math.inf or (type(value) is int and value > 10**300):
            raise self.fail(f"is {_short(value)}; it must be a finite number, {least:g} or more", *place)
        if whole and value != int(value):
            raise self.fail(f"is {_short(value)}; it must be a whole number", *place)
        return float(value)

    def count(self, value: Any, *place: str | int) -> int:
        """Read a number of bytes; 0 where absent."""
        if value is None:
            return 0
        if (size := self.number(value, *place, whole=True)) > MOST_BYTES:
            raise self.fail(f"is {_short(value)}; {MOST_BYTES} bytes is the most", *place)
        return int(size)

    def flag(self, value: Any, *place: str | int) -> bool:
        """Read true or false; false where absent."""
        if value is not None and type(value) is not bool:
            raise self.fail(f"is {_short(value)}; it must be true or false", *place)
        return bool(value)


def _short(value: Any) -> str:
    """Return a value as JSON would show it, cut to a readable length."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**30:
        return "a number of more than 30 digits"
    text = json.dumps(value[:60] if isinstance(value, str) else value, ensure_ascii=False)
    return (text if len(text) <= 62 else text[:60] + "…").encode("utf-8", "backslashreplace").decode("utf-8")


def _cycle(names: list[str], edges: list[tuple[int, list[int], float]]) -> list[str]:
    """Return the names along one cycle of a graph that has one, the first repeated at the end."""
    producers: list[list[int]] = [[] for _ in names]
    consumers: list[list[int]] = [[] for _ in names]
    for producer, targets, _ in edges:
        for target in targets:
            producers[target].append(producer)
            consumers[producer].append(target)
    missing = [len(p) for p in producers]
    free = [i for i, count in enumerate(missing) if count == 0]
    while free:
        for target in consumers[free.pop()]:
            missing[target] -= 1
            if missing[target] == 0:
                free.append(target)
    op = next(i for i, count in enumerate(missing) if count > 0)
    seen: dict[int, int] = {}
    while op not in seen:  # every op left has a producer left; going back must come round
        seen[op] = len(seen)
        op = next(p for p in producers[op] if missing[p] > 0)
    path = [i for i, step in seen.items() if step >= seen[op]][::-1]
    shown = [*path, path[0]] if len(path) <= 8 else [*path[:4], *path[-3:], path[0]]
    return [names[i] for i in shown]
