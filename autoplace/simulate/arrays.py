"""The simulator's view of a problem: a handful of flat record arrays that the kernels read and write.

Built once per problem; the kernels allocate nothing. One record holds all that concerns one op, device or tensor, both
what is given and what a run fills in, so that a step touches few cache lines. Node D, one past the last device, stands
for host memory, which only `route: host` uses.

A pass that is split into microbatches is the graph repeated (→ `expand`): the kernels then see M ops, and `source` maps
each to the op of the unsplit graph whose device it shares.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoplace.errors import InputError
from autoplace.hardware.cluster import Cluster
from autoplace.problem import Problem

__all__ = ["Arrays", "build_arrays", "link_matrices"]

RULES = np.dtype(
    [("throughput", "?"), ("blocking", "?"), ("host", "?"), ("contended", "?"), ("ranked", "?"), ("by_part", "?"),
     ("any_frees", "?"), ("may_not_talk", "?"), ("energy_weight", "f8"), ("finished", "i8"), ("waiting", "i8"),
     ("lines", "i8")],
    align=True,
)  # fmt: skip
"""Semantics and objective; `may_not_talk` says that some pair of nodes has no link. Then the counters of a run."""

OPS = np.dtype(
    [("source", "i4"), ("num_inputs", "i4"), ("first_edge", "i4"), ("last_edge", "i4"), ("first_output", "i4"),
     ("last_output", "i4"), ("first_input", "i4"), ("last_input", "i4"), ("frees", "?"), ("epoch", "i4"),
     ("weight_bytes", "f8"), ("activation_bytes", "f8"), ("device", "i4"), ("missing", "i4"), ("uses_left", "i4"),
     ("step", "i4"), ("ready_ms", "f8"), ("start_ms", "f8"), ("finish_ms", "f8"), ("rank_ms", "f8")],
    align=True,
)  # fmt: skip
"""Given: ranges into `edges`, `outputs` and `inputs`. Filled: from `device` on; by `restart`, `epoch` and `step`."""

DEVICES = np.dtype(
    [("stays", "?"), ("memory_bytes", "f8"), ("idle_watts", "f8"), ("extra_watts", "f8"),
     ("queue_base", "i4"), ("queue_size", "i4"), ("urgent_size", "i4"), ("leg_size", "i4"), ("running", "i4"),
     ("leg_running", "i4"), ("stamp", "i4"), ("held", "?"), ("until_ms", "f8"), ("leg_until_ms", "f8"),
     ("next_ms", "f8"), ("arrival_ms", "f8"), ("busy_ms", "f8"), ("held_bytes", "f8"), ("peak_bytes", "f8")],
    align=True,
)  # fmt: skip
"""Given: `stays` = of kind `cpu` under `route: host`; busy less idle watts; NaN watts when unknown.

Filled: heap sizes; the op that runs, or what transfer, and until when; the leg that its link from host memory carries;
the last tensor sent there and when it arrives; whether a waiting transfer holds it.
"""

TENSORS = np.dtype([("producer", "i4"), ("first", "i4"), ("last", "i4"), ("bytes", "f8")], align=True)
"""`first` and `last` are a range into `consumers`."""

EDGES = np.dtype([("consumer", "i4"), ("tensor", "i4")], align=True)
"""(tensor, consumer) pairs by (producer, tensor, consumer)."""

LINKS = np.dtype([("latency_ms", "f8"), ("ms_per_byte", "f8"), ("free_ms", "f8")], align=True)
"""`free_ms` = when the link is free again, or its load where only loads are asked for."""

HEAP = np.dtype([("key", "f8"), ("item", "i4")], align=True)
"""Ordered by (key, item)."""

WAITS = np.dtype([("request_ms", "f8"), ("tensor", "i4"), ("target", "i4")], align=True)
LOG = np.dtype([("tensor", "i4"), ("source", "i4"), ("target", "i4"), ("start_ms", "f8"), ("end_ms", "f8")], align=True)


class Arrays(NamedTuple):
    """All that the kernels work on. M ops, T tensors, C (tensor, consumer) pairs, D devices, N unsplit ops.

    Two threads must not share one.
    """

    can_run: NDArray[np.bool_]
    """bool[N, D]."""
    colocate_first: NDArray[np.int32]
    """int32[N], first op of the same co-location group; itself when free."""
    latency_ms: NDArray[np.float64]
    """float64[M, D]."""
    order: NDArray[np.int32]
    """int32[M], a topological order."""
    sources: NDArray[np.int32]
    """Ops without inputs."""
    outputs: NDArray[np.int32]
    """int32[T], tensors by producer, ascending within it."""
    inputs: NDArray[np.int32]
    """int32[C], producers by consumer."""
    consumers: NDArray[np.int32]
    """int32[C], by tensor."""
    rules: NDArray[np.void]
    """RULES[1]."""
    ops: NDArray[np.void]
    """OPS[M]."""
    devices: NDArray[np.void]
    """DEVICES[D]."""
    tensors: NDArray[np.void]
    """TENSORS[T]."""
    edges: NDArray[np.void]
    """EDGES[C]."""
    links: NDArray[np.void]
    """LINKS[D + 1, D + 1], row = source."""
    queue: NDArray[np.void]
    """HEAP[M]: per device, from `queue_base` on, ops by (ready time, op)."""
    urgent: NDArray[np.void]
    """HEAP[M]: per device, ready ops by (- longest path, op) or (part, op); empty where neither counts."""
    legs: NDArray[np.void]
    """HEAP[D, T]: transfer legs that wait, by (request time, tensor); empty unless `route: host`."""
    waits: NDArray[np.void]
    """WAITS[C]: blocking transfers that wait, by (request time, tensor, target)."""
    log: NDArray[np.void]
    """LOG[L]: a line per transfer or leg; L = 0 keeps none."""


def link_matrices(cluster: Cluster, *, host: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return latency (ms) and ms per byte between all nodes, float64[D + 1, D + 1]; inf where a pair cannot talk.

    With `host`, the legs of a device to and from host memory (node D) are its links to and from its staging device:
    the first device of kind `cpu` on its host, else the first one anywhere, else whatever the default link is. Devices
    of kind `cpu` are host memory themselves.
    """
    count = cluster.num_devices
    latency, per_byte = np.zeros((count + 1, count + 1)), np.zeros((count + 1, count + 1))
    latency[:count, :count] = cluster.link_latency_ms
    with np.errstate(divide="ignore"):
        per_byte[:count, :count] = 1.0 / cluster.link_bytes_per_ms
    if not host:
        return latency, per_byte
    cpus = [i for i, d in enumerate(cluster.devices) if d.kind == "cpu"]
    for i, device in enumerate(cluster.devices):
        if device.kind == "cpu":
            continue
        near = [c for c in cpus if cluster.devices[c].host == device.host] or cpus
        if near:
            latency[i, count], per_byte[i, count] = latency[i, near[0]], per_byte[i, near[0]]
            latency[count, i], per_byte[count, i] = latency[near[0], i], per_byte[near[0], i]
        else:
            link = cluster.default_link
            latency[i, count] = latency[count, i] = link.latency_ms if link else np.inf
            per_byte[i, count] = per_byte[count, i] = 1.0 / link.bytes_per_ms if link else np.inf
    return latency, per_byte


def _ranges(keys: NDArray[np.int32], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return how often each key below `count` occurs, and where its range begins and ends when sorted."""
    sizes = np.bincount(keys, minlength=count)
    ends = np.cumsum(sizes)
    return sizes, ends - sizes, ends


def _rules(problem: Problem, links: NDArray[np.float64]) -> NDArray[np.void]:
    semantics, rules = problem.semantics, np.zeros(1, RULES)
    rules["throughput"] = problem.objective.goal == "throughput"
    rules["energy_weight"] = problem.objective.energy_weight
    rules["blocking"] = semantics.transfers == "blocking"
    rules["host"] = semantics.route == "host"
    rules["contended"] = semantics.contention == "link"
    rules["ranked"] = semantics.queue == "priority" or problem.part is not None
    rules["by_part"] = semantics.queue == "fifo" and problem.part is not None
    rules["any_frees"] = problem.graph.frees.any()
    rules["may_not_talk"] = np.isinf(links[:-1, -1] + links[-1, :-1] if rules["host"][0] else links[:-1, :-1]).any()
    return rules


def _devices(problem: Problem) -> NDArray[np.void]:
    cluster, nan = problem.cluster, float("nan")
    devices = np.zeros(cluster.num_devices, DEVICES)
    devices["stays"] = [problem.semantics.route == "host" and d.kind == "cpu" for d in cluster.devices]
    devices["memory_bytes"] = [d.memory_bytes for d in cluster.devices]
    devices["idle_watts"] = [nan if d.idle_watts is None else d.idle_watts for d in cluster.devices]
    devices["extra_watts"] = [nan if d.busy_watts is None else d.busy_watts for d in cluster.devices]
    devices["extra_watts"] -= devices["idle_watts"]
    silent = np.flatnonzero(np.isnan(devices["extra_watts"]))
    if problem.objective.energy_weight > 0 and len(silent):
        raise InputError(
            f"the objective weighs energy and device {cluster.devices[silent[0]].name!r} does not state its watts; "
            "add idle_watts and busy_watts"
        )
    return devices


def _ops(problem: Problem, source: NDArray[np.int32]) -> NDArray[np.void]:
    graph, edges = problem.graph, problem.graph.edge_list
    ops = np.zeros(graph.num_ops, OPS)
    ops["source"] = source
    ops["weight_bytes"], ops["activation_bytes"] = graph.weight_bytes, graph.activation_bytes
    ops["frees"] = graph.frees
    ops["num_inputs"], ops["first_input"], ops["last_input"] = _ranges(edges[:, 1], graph.num_ops)
    _, ops["first_edge"], ops["last_edge"] = _ranges(edges[:, 0], graph.num_ops)
    _, ops["first_output"], ops["last_output"] = _ranges(graph.tensor_producer, graph.num_ops)
    return ops


def _first_of_group(groups: NDArray[np.int32]) -> NDArray[np.int32]:
    first = np.arange(len(groups), dtype=np.int32)
    if (groups >= 0).any():
        _, index, inverse = np.unique(groups, return_index=True, return_inverse=True)
        first = np.where(groups >= 0, index[inverse], first).astype(np.int32)
    return first


def build_arrays(problem: Problem, base: Problem, source: NDArray[np.int32]) -> Arrays:
    """Lay out a problem for the kernels.

    Args:
        problem: What runs: the graph, repeated once a part when a pass is split.
        base: The unsplit problem that assignments speak of.
        source: int32[M], op of `base` for every op of `problem`.

    Raises:
        InputError: If energy counts and a device states no watts.
    """
    graph, edges = problem.graph, problem.graph.edge_list
    host, blocking = problem.semantics.route == "host", problem.semantics.transfers == "blocking"
    contended = problem.semantics.contention == "link"
    devices, ops = _devices(problem), _ops(problem, source)
    links = np.zeros((len(devices) + 1, len(devices) + 1), LINKS)
    links["latency_ms"], links["ms_per_byte"] = link_matrices(problem.cluster, host=host)
    rules = _rules(problem, links["latency_ms"])
    if problem.part is not None and rules["by_part"][0]:
        ops["rank_ms"] = -problem.part
    tensors = np.zeros(graph.num_tensors, TENSORS)
    tensors["producer"], tensors["bytes"] = graph.tensor_producer, graph.tensor_bytes
    pairs = np.zeros(len(edges), EDGES)
    pairs["consumer"], pairs["tensor"] = edges[np.argsort(edges[:, 0], kind="stable"), 1:].T
    tensors["first"], tensors["last"] = graph.consumer_offsets[:-1], graph.consumer_offsets[1:]
    return Arrays(
        can_run=np.ascontiguousarray(base.can_run),
        colocate_first=_first_of_group(base.graph.colocate),
        latency_ms=np.ascontiguousarray(problem.latency_ms, np.float64),
        order=np.ascontiguousarray(graph.topological_order, np.int32),
        sources=np.flatnonzero(ops["num_inputs"] == 0).astype(np.int32),
        outputs=np.argsort(graph.tensor_producer, kind="stable").astype(np.int32),
        inputs=np.ascontiguousarray(edges[np.argsort(edges[:, 1], kind="stable"), 0], np.int32),
        consumers=np.ascontiguousarray(graph.consumers, np.int32),
        rules=rules,
        ops=ops,
        devices=devices,
        tensors=tensors,
        edges=pairs,
        links=links,
        queue=np.zeros(graph.num_ops, HEAP),
        urgent=np.zeros(graph.num_ops if rules["ranked"][0] else 0, HEAP),
        legs=np.zeros((len(devices), graph.num_tensors if host and (contended or blocking) else 0), HEAP),
        waits=np.zeros(len(graph.consumers) if blocking and not host else 0, WAITS),
        log=np.zeros(0, LOG),
    )


def with_log(arrays: Arrays) -> Arrays:
    """Return the same arrays with room for a line per transfer or leg."""
    return arrays._replace(log=np.zeros(len(arrays.consumers) + len(arrays.tensors), LOG))
