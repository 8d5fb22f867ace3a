"""The problem file `autoplace.problem/1` and its answer `autoplace.placement/1`: read, written and checked.

Written for files that come from other people's tools: whatever is wrong gets one sentence that names the place, such
as `ops[3].latency_ms[1]`. Beyond the keys that the design lists, these are optional: `batch_size` at the top,
`overhead_ms` (one entry per device, the part of `latency_ms` that a smaller batch does not save) and `frees` of an op,
and `microbatches` in `semantics`. A `null` in an optional place means absent.

A file holds what planning needs and no more: modules, FLOPs, bytes moved, core ids, hardware names and thread scales of
a captured Problem are not written, so its fingerprint is another one after a round trip.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoplace.errors import InfeasibleError, InputError, ProblemFileError
from autoplace.files import read_json, write_text_atomically
from autoplace.hardware.cluster import Device, Link
from autoplace.outcome import Outcome
from autoplace.plan import Plan
from autoplace.problem import Problem
from autoplace.problem_reader import FORMAT, ProblemReader

__all__ = [
    "check_feasible", "load_problem", "placement_to_json", "problem_from_json", "problem_to_json", "save_problem",
]  # fmt: skip

PLACEMENT_FORMAT = "autoplace.placement/1"


def load_problem(path: str | Path) -> Problem:
    """Read a problem file.

    Raises:
        ProblemFileError: With one sentence naming the place, if the file is missing, malformed or contradicts itself.
        InfeasibleError: If some op can be placed nowhere, → `check_feasible`.
    """
    with _uncollected():
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
    problem = ProblemReader(where).problem(data)
    try:
        check_feasible(problem)
    except InfeasibleError as error:
        raise InfeasibleError(f"{where}: {error}") from None
    return problem


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
    data["ops"] = _ops_to_json(problem)
    names = graph.names
    data["tensors"] = [
        {"producer": names[producer], "consumers": [names[c] for c in consumers], "bytes": size}
        for producer, consumers, size in graph.tensors()
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


@contextmanager
def _uncollected() -> Iterator[None]:
    """Hold garbage collection off: JSON data has no cycles, and going over it again and again takes the most time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


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


def _ops_to_json(problem: Problem) -> list[dict[str, Any]]:
    graph = problem.graph
    rows: list[dict[str, Any]] = [
        {"name": name, "kind": kind, "latency_ms": latency, "weight_bytes": weight, "activation_bytes": activation}
        for name, kind, latency, weight, activation in zip(
            graph.names,
            graph.kinds,
            _nulls(problem.latency_ms),
            graph.weight_bytes.tolist(),
            graph.activation_bytes.tolist(),
            strict=True,
        )
    ]
    if problem.overhead_ms is not None:
        usable = np.where(np.isfinite(problem.latency_ms), np.minimum(problem.overhead_ms, problem.latency_ms), np.inf)
        for row, overhead in zip(rows, _nulls(usable), strict=True):
            row["overhead_ms"] = overhead
    for i in np.flatnonzero(graph.colocate >= 0).tolist():
        rows[i]["colocate"] = f"group{graph.colocate[i]}"
    for i in np.flatnonzero(graph.frees).tolist():
        rows[i]["frees"] = True
    return rows


def _nulls(values: NDArray[np.float64]) -> list[list[float | None]]:
    """Return rows of numbers, None where one is not finite."""
    rows: list[list[float | None]] = values.tolist()
    for i, j in np.argwhere(~np.isfinite(values)).tolist():
        rows[i][j] = None
    return rows
