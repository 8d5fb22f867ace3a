"""The problem file `autoplace.problem/1` and its answer `autoplace.placement/1`: read, written and checked.

Written for files that come from other people's tools: whatever is wrong gets one sentence that names the place, such
as `ops[3].latency_ms[1]`. Beyond the keys that the design lists, these are optional: `batch_size` at the top,
`overhead_ms` (one entry per device, the part of `latency_ms` that a smaller batch does not save) and `frees` of an op,
and `microbatches` in `semantics`. A `null` in an optional place means absent.

A file holds what planning needs and no more: modules, FLOPs, bytes moved, core ids, hardware names and thread scales of
a captured Problem are not written, so its fingerprint is another one after a round trip.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoplace.errors import AutoplaceError, InfeasibleError, InputError, ProblemFileError
from autoplace.files import read_json, write_text_atomically
from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.outcome import Outcome
from autoplace.plan import Plan
from autoplace.problem import Objective, Problem, Semantics

__all__ = [
    "check_feasible", "load_problem", "placement_to_json", "problem_from_json", "problem_to_json", "save_problem",
]  # fmt: skip

FORMAT = "autoplace.problem/1"
PLACEMENT_FORMAT = "autoplace.placement/1"
MOST_DEVICES = 1024
MOST_MICROBATCHES = 4096
MOST_BYTES = 2**53
"""Beyond it a float64 no longer counts single bytes."""


def load_problem(path: str | Path) -> Problem:
    """Read a problem file.

    Raises:
        ProblemFileError: With one sentence naming the place, if the file is missing, malformed or contradicts itself.
        InfeasibleError: If some op can be placed nowhere, → `check_feasible`.
    """
    return problem_from_json(read_json(path, ProblemFileError), where=str(path))


def problem_from_json(data: Any, *, where: str = "problem") -> Problem:
    """Read a problem from JSON data.

    Args:
        data: What `json.loads` returned.
        where: What messages call it, such as the file's path.

    Raises:
        ProblemFileError: With one sentence naming the place.
        InfeasibleError: If some op can be placed nowhere, → `check_feasible`.
    """
    return _Reader(where).problem(data)


def save_problem(problem: Problem, path: str | Path) -> None:
    """Write a problem file, one device, link, op and tensor a line; nothing half-written is ever left."""
    lines = []
    for key, value in problem_to_json(problem).items():
        if isinstance(value, list) and value:
            rows = ",\n".join("  " + json.dumps(row, allow_nan=False) for row in value)
            lines.append(f" {json.dumps(key)}: [\n{rows}]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value, allow_nan=False)}")
    write_text_atomically(path, "{\n" + ",\n".join(lines) + "\n}\n")


def problem_to_json(problem: Problem) -> dict[str, Any]:
    """Return a problem as JSON-ready data; reading it back gives the same scores."""
    cluster, graph, semantics = problem.cluster, problem.graph, problem.semantics
    data: dict[str, Any] = {
        "format": FORMAT,
        "name": problem.name,
        "devices": [_device_to_json(d) for d in cluster.devices],
        "links": [{"source": s, "target": t, **_link_to_json(link)} for (s, t), link in cluster.links.items()],
    }
    if cluster.default_link is not None:
        data["default_link"] = _link_to_json(cluster.default_link)
    data["ops"] = [_op_to_json(problem, i) for i in range(problem.num_ops)]
    ends = graph.consumer_offsets
    data["tensors"] = [
        {
            "producer": graph.names[producer],
            "consumers": [graph.names[c] for c in graph.consumers[ends[t] : ends[t + 1]]],
            "bytes": float(graph.tensor_bytes[t]),
        }
        for t, producer in enumerate(graph.tensor_producer)
    ]
    data["objective"] = {"goal": problem.objective.goal, "energy_weight": problem.objective.energy_weight}
    data["semantics"] = {
        "transfers": semantics.transfers,
        "route": semantics.route,
        "contention": semantics.contention,
        "queue": semantics.queue,
    }
    if semantics.microbatches != 1:
        data["semantics"]["microbatches"] = semantics.microbatches
    if problem.batch_size != 1:
        data["batch_size"] = problem.batch_size
    return data


def placement_to_json(
    problem: Problem, plan: Plan, outcome: Outcome, *, evaluations: int, seconds: float, seed: int
) -> dict[str, Any]:
    """Return the answer to a problem file as JSON-ready data, in the format `autoplace.placement/1`.

    Args:
        problem: What was asked.
        plan: The answer: one replica.
        outcome: What it costs.
        evaluations: Plans that were simulated to find it.
        seconds: Wall seconds that it took.
        seed: Seed of all randomness.

    Raises:
        InputError: If the plan has not exactly one replica.
    """
    if len(plan.replicas) != 1:
        raise InputError(f"a placement file holds one replica and the plan has {len(plan.replicas)}; save it as a plan")
    return {
        "format": PLACEMENT_FORMAT,
        "problem": problem.name,
        "strategy": plan.strategy,
        "assignment": {op: plan.replicas[0].assignment[op] for op in problem.graph.names},
        "outcome": outcome.to_json(),
        "evaluations": int(evaluations),
        "seconds": float(seconds),
        "seed": int(seed),
    }


def check_feasible(problem: Problem) -> None:
    """Look for an op that can be placed nowhere; cheap, so passing does not prove that a placement exists.

    Looks at each op, and each co-location group as a whole: devices where all of it runs, and the memory that those
    have left beside the ops that can run nowhere else. An op needs its weights and activations; of activations that are
    freed a group needs the largest. Last, all of them together must fit all memory together.

    Raises:
        InfeasibleError: Naming the op or the memory.
    """
    graph = problem.graph
    room = np.asarray([d.memory_bytes for d in problem.cluster.devices], np.float64)
    group = np.where(graph.colocate >= 0, graph.num_ops + graph.colocate, np.arange(graph.num_ops))
    _, first, inverse, sizes = np.unique(group, return_index=True, return_inverse=True, return_counts=True)
    held = (graph.weight_bytes + np.where(graph.frees, 0, graph.activation_bytes)).astype(np.float64)
    passing = np.zeros(len(first))
    np.maximum.at(passing, inverse, np.where(graph.frees, graph.activation_bytes, 0).astype(np.float64))
    stay = np.bincount(inverse, weights=held, minlength=len(first))
    allowed = problem.can_run[first]
    bound = allowed.sum(axis=1) == 1
    taken = np.zeros(len(room))
    np.add.at(taken, allowed[bound].argmax(axis=1), stay[bound])
    beside = taken[None, :] - np.where(bound, stay, 0.0)[:, None] * allowed
    fits = allowed & (stay[:, None] + passing[:, None] + beside <= room[None, :])
    nowhere = np.flatnonzero(~fits.any(axis=1))
    if len(nowhere):
        g = nowhere[np.argmin(first[nowhere])]
        name = f"op {graph.names[first[g]]!r}"
        if sizes[g] > 1:
            name += f" (with the {sizes[g] - 1} co-located with it)"
        if not allowed[g].any():
            raise InfeasibleError(f"{name} can run on no device; give a latency on at least one")
        left = max(0.0, float((room - beside[g])[allowed[g]].max()))
        raise InfeasibleError(
            f"{name} needs {stay[g] + passing[g]:.0f} bytes of memory, and where it can run at most {left:.0f} are "
            "left beside the ops that can run nowhere else; add memory or split ops"
        )
    if held.sum() > room.sum():
        raise InfeasibleError(
            f"all ops together hold {held.sum():.0f} bytes of weights and activations, and all devices together have "
            f"{room.sum():.0f}; add memory"
        )


def _device_to_json(device: Device) -> dict[str, Any]:
    data: dict[str, Any] = {"name": device.name, "kind": device.kind}
    if math.isfinite(device.memory_bytes):
        whole = float(device.memory_bytes).is_integer()
        data["memory_bytes"] = int(device.memory_bytes) if whole else float(device.memory_bytes)
    for key in ("idle_watts", "busy_watts"):
        if (value := getattr(device, key)) is not None:
            data[key] = float(value)
    return data


def _link_to_json(link: Link) -> dict[str, float]:
    return {"latency_ms": float(link.latency_ms), "bytes_per_ms": float(link.bytes_per_ms)}


def _op_to_json(problem: Problem, i: int) -> dict[str, Any]:
    graph, latency = problem.graph, problem.latency_ms[i].tolist()
    data: dict[str, Any] = {
        "name": graph.names[i],
        "kind": graph.kinds[i],
        "latency_ms": [value if math.isfinite(value) else None for value in latency],
        "weight_bytes": int(graph.weight_bytes[i]),
        "activation_bytes": int(graph.activation_bytes[i]),
    }
    if problem.overhead_ms is not None:
        pairs = zip(latency, problem.overhead_ms[i].tolist(), strict=True)
        data["overhead_ms"] = [min(over, whole) if math.isfinite(whole) else None for whole, over in pairs]
    if graph.colocate[i] >= 0:
        data["colocate"] = f"group{graph.colocate[i]}"
    if graph.frees[i]:
        data["frees"] = True
    return data


class _Reader:
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
        problem = Problem(
            graph=graph,
            cluster=cluster,
            latency_ms=latency,
            overhead_ms=overhead,
            objective=objective,
            semantics=semantics,
            name=self.text(data.get("name", "problem"), "name"),
            batch_size=int(self.number(data.get("batch_size", 1), "batch_size", whole=True, least=1)),
        )
        try:
            check_feasible(problem)
        except InfeasibleError as error:
            raise InfeasibleError(f"{self.where}: {error}") from None
        return problem

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
        edges = self.tensors(data, names)
        any_overhead = any(row.get("overhead_ms") is not None for row in rows)
        try:
            graph = OpGraph.build(
                names=list(names), kinds=kinds, edges=edges, weight_bytes=weights, activation_bytes=activations,
                frees=frees, colocate=colocate,
            )  # fmt: skip
        except AutoplaceError:
            cycle = " -> ".join(_short(name) for name in _cycle(list(names), edges))
            raise self.fail(f"form a cycle: {cycle}; remove a tensor that closes it", "tensors") from None
        return graph, np.asarray(latency, np.float64), np.asarray(overhead, np.float64) if any_overhead else None

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
