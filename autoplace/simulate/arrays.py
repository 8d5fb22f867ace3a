"""The simulator's view of a problem, as flat arrays, and the memory that its kernels work in.

Built once per problem; the kernels allocate nothing. Node D, one past the last device, stands for host memory, which
only `route: host` uses. Named tuples, because numba compiles them as they are.

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

__all__ = ["Arrays", "Workspace", "build_arrays", "build_workspace"]


class Arrays(NamedTuple):
    """What the kernels read. M ops, T tensors, C (tensor, consumer) pairs, D devices, N ops of the unsplit graph."""

    source: NDArray[np.int32]
    """int32[M], op of the unsplit graph, the index into an assignment."""
    can_run: NDArray[np.bool_]
    """bool[N, D]."""
    colocate_first: NDArray[np.int32]
    """int32[N], first op of the same co-location group; itself when free."""
    latency_ms: NDArray[np.float64]
    """float64[M, D]."""
    weight_bytes: NDArray[np.float64]
    """float64[M]."""
    activation_bytes: NDArray[np.float64]
    """float64[M]."""
    frees: NDArray[np.bool_]
    """bool[M]."""
    order: NDArray[np.int32]
    """int32[M], a topological order."""
    num_inputs: NDArray[np.int32]
    """int32[M], (tensor, consumer) pairs of which the op is the consumer."""
    num_uses: NDArray[np.int32]
    """int32[M], (tensor, consumer) pairs of which the op is the producer."""
    output_offsets: NDArray[np.int32]
    """int32[M + 1] into `outputs`."""
    outputs: NDArray[np.int32]
    """int32[T], tensors by producer, ascending within it."""
    input_offsets: NDArray[np.int32]
    """int32[M + 1] into `inputs`."""
    inputs: NDArray[np.int32]
    """int32[C], producers by consumer."""
    producer: NDArray[np.int32]
    """int32[T]."""
    tensor_bytes: NDArray[np.float64]
    """float64[T]."""
    consumer_offsets: NDArray[np.int32]
    """int32[T + 1] into `consumers`."""
    consumers: NDArray[np.int32]
    """int32[C]."""
    link_ms: NDArray[np.float64]
    """float64[D + 1, D + 1], latency; inf where a pair cannot talk."""
    ms_per_byte: NDArray[np.float64]
    """float64[D + 1, D + 1]."""
    stays: NDArray[np.bool_]
    """bool[D], kind `cpu`: its memory is the host's, so `route: host` costs it nothing."""
    memory_bytes: NDArray[np.float64]
    """float64[D]."""
    idle_watts: NDArray[np.float64]
    """float64[D]; NaN when unknown."""
    extra_watts: NDArray[np.float64]
    """float64[D], busy less idle watts; NaN when unknown."""
    energy_weight: float
    throughput: bool
    blocking: bool
    host: bool
    contended: bool
    priority: bool
    any_frees: bool
    may_not_talk: bool
    """Whether some pair of nodes cannot talk, so that every plan must be looked at for it."""


class Workspace(NamedTuple):
    """What the kernels write. One per evaluator: two threads must not share it."""

    device: NDArray[np.int32]
    """int32[M], device of every op."""
    missing: NDArray[np.int32]
    """int32[M], inputs not yet arrived."""
    uses_left: NDArray[np.int32]
    """int32[M], consumers not yet finished."""
    ready_ms: NDArray[np.float64]
    start_ms: NDArray[np.float64]
    finish_ms: NDArray[np.float64]
    rank_ms: NDArray[np.float64]
    """float64[M] each."""
    queue_base: NDArray[np.int32]
    """int32[D], where each device's part of the queues begins."""
    queue_size: NDArray[np.int32]
    queue_key: NDArray[np.float64]
    queue_op: NDArray[np.int32]
    """Heaps of ops by (ready time, op)."""
    urgent_size: NDArray[np.int32]
    urgent_key: NDArray[np.float64]
    urgent_op: NDArray[np.int32]
    """Heaps of ops that are ready by (- longest path, op); used by `queue: priority`."""
    running: NDArray[np.int32]
    """int32[D], the op on each device; IDLE, SENDING, or RECEIVING less a tensor's index."""
    until_ms: NDArray[np.float64]
    """float64[D], when what runs ends; inf when idle."""
    leg_size: NDArray[np.int32]
    leg_key: NDArray[np.float64]
    leg_tensor: NDArray[np.int32]
    """Heaps of transfer legs that wait, [D, T], by (request time, tensor); used by `route: host`."""
    leg_running: NDArray[np.int32]
    leg_until_ms: NDArray[np.float64]
    """[D], the leg that the link from the host's memory carries."""
    wait_ms: NDArray[np.float64]
    wait_tensor: NDArray[np.int32]
    wait_target: NDArray[np.int32]
    """[C], direct transfers that wait for two devices, by (request time, tensor, target)."""
    held: NDArray[np.bool_]
    """bool[D], whether a waiting transfer keeps the device from its ops."""
    link_free_ms: NDArray[np.float64]
    """float64[D + 1, D + 1], when each link is free again; the link's load in the throughput kernel."""
    stamp: NDArray[np.int32]
    """int32[D], the last tensor sent to each device."""
    arrival_ms: NDArray[np.float64]
    """float64[D], when that tensor arrives."""
    busy_ms: NDArray[np.float64]
    held_bytes: NDArray[np.float64]
    peak_bytes: NDArray[np.float64]
    """float64[D] each."""
    counters: NDArray[np.int64]
    """int64[3]: waiting transfers, finished ops, lines in the log."""
    log_ends: NDArray[np.int32]
    """int32[L, 3]: tensor, source node, target node of every transfer; L = 0 keeps no log."""
    log_ms: NDArray[np.float64]
    """float64[L, 2]: start and end."""


def _offsets(keys: NDArray[np.int32], count: int) -> NDArray[np.int32]:
    offsets = np.zeros(count + 1, np.int32)
    np.cumsum(np.bincount(keys, minlength=count), out=offsets[1:])
    return offsets


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


def build_arrays(problem: Problem, base: Problem, source: NDArray[np.int32]) -> Arrays:
    """Lay out a problem for the kernels.

    Args:
        problem: What runs: the graph, repeated once a part when a pass is split.
        base: The unsplit problem that assignments speak of.
        source: int32[M], op of `base` for every op of `problem`.

    Raises:
        InputError: If energy counts and a device states no watts.
    """
    graph, cluster, semantics = problem.graph, problem.cluster, problem.semantics
    host = semantics.route == "host"
    link_ms, ms_per_byte = link_matrices(cluster, host=host)
    nan = float("nan")
    idle = np.asarray([nan if d.idle_watts is None else d.idle_watts for d in cluster.devices], np.float64)
    busy = np.asarray([nan if d.busy_watts is None else d.busy_watts for d in cluster.devices], np.float64)
    if problem.objective.energy_weight > 0 and np.isnan(idle + busy).any():
        silent = cluster.devices[int(np.flatnonzero(np.isnan(idle + busy))[0])].name
        raise InputError(
            f"the objective weighs energy and device {silent!r} states no idle_watts and busy_watts; add both"
        )
    first = np.arange(base.num_ops, dtype=np.int32)
    groups = base.graph.colocate
    if (groups >= 0).any():
        _, index, inverse = np.unique(groups, return_index=True, return_inverse=True)
        first = np.where(groups >= 0, index[inverse], first).astype(np.int32)
    edges = graph.edge_list
    legs = link_ms[:-1, -1] + link_ms[-1, :-1]
    return Arrays(
        source=np.ascontiguousarray(source, np.int32),
        can_run=np.ascontiguousarray(base.can_run),
        colocate_first=first,
        latency_ms=np.ascontiguousarray(problem.latency_ms, np.float64),
        weight_bytes=graph.weight_bytes.astype(np.float64),
        activation_bytes=graph.activation_bytes.astype(np.float64),
        frees=np.ascontiguousarray(graph.frees),
        order=np.ascontiguousarray(graph.topological_order, np.int32),
        num_inputs=np.bincount(edges[:, 1], minlength=graph.num_ops).astype(np.int32),
        num_uses=np.bincount(edges[:, 0], minlength=graph.num_ops).astype(np.int32),
        output_offsets=_offsets(graph.tensor_producer, graph.num_ops),
        outputs=np.argsort(graph.tensor_producer, kind="stable").astype(np.int32),
        input_offsets=_offsets(edges[:, 1], graph.num_ops),
        inputs=np.ascontiguousarray(edges[np.argsort(edges[:, 1], kind="stable"), 0], np.int32),
        producer=np.ascontiguousarray(graph.tensor_producer, np.int32),
        tensor_bytes=np.ascontiguousarray(graph.tensor_bytes, np.float64),
        consumer_offsets=np.ascontiguousarray(graph.consumer_offsets, np.int32),
        consumers=np.ascontiguousarray(graph.consumers, np.int32),
        link_ms=link_ms,
        ms_per_byte=ms_per_byte,
        stays=np.asarray([host and d.kind == "cpu" for d in cluster.devices], np.bool_),
        memory_bytes=np.asarray([d.memory_bytes for d in cluster.devices], np.float64),
        idle_watts=idle,
        extra_watts=busy - idle,
        energy_weight=float(problem.objective.energy_weight),
        throughput=problem.objective.goal == "throughput",
        blocking=semantics.transfers == "blocking",
        host=host,
        contended=semantics.contention == "link",
        priority=semantics.queue == "priority",
        any_frees=bool(graph.frees.any()),
        may_not_talk=bool(np.isinf(legs if host else link_ms[:-1, :-1]).any()),
    )


def build_workspace(arrays: Arrays, *, log: bool = False) -> Workspace:
    """Allocate what the kernels work in; with `log`, also room for a line per transfer leg."""
    ops, devices = arrays.latency_ms.shape
    tensors, pairs = len(arrays.producer), len(arrays.consumers)
    legs = tensors if arrays.host and (arrays.contended or arrays.blocking) else 0
    waits = pairs if arrays.blocking and not arrays.host else 0
    urgent = ops if arrays.priority else 0
    lines = pairs + tensors if log else 0

    def ints(*shape: int) -> NDArray[np.int32]:
        return np.zeros(shape, np.int32)

    def floats(*shape: int) -> NDArray[np.float64]:
        return np.zeros(shape, np.float64)

    return Workspace(
        device=ints(ops), missing=ints(ops), uses_left=ints(ops),
        ready_ms=floats(ops), start_ms=floats(ops), finish_ms=floats(ops), rank_ms=floats(urgent),
        queue_base=ints(devices), queue_size=ints(devices), queue_key=floats(ops), queue_op=ints(ops),
        urgent_size=ints(devices), urgent_key=floats(urgent), urgent_op=ints(urgent),
        running=ints(devices), until_ms=floats(devices),
        leg_size=ints(devices), leg_key=floats(devices, legs), leg_tensor=ints(devices, legs),
        leg_running=ints(devices), leg_until_ms=floats(devices),
        wait_ms=floats(waits), wait_tensor=ints(waits), wait_target=ints(waits),
        held=np.zeros(devices, np.bool_),
        link_free_ms=floats(devices + 1, devices + 1), stamp=ints(devices), arrival_ms=floats(devices),
        busy_ms=floats(devices), held_bytes=floats(devices), peak_bytes=floats(devices),
        counters=np.zeros(3, np.int64),
        log_ends=ints(lines, 3), log_ms=floats(lines, 2),
    )  # fmt: skip
