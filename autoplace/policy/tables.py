"""`Tables`: everything about a Problem that the policy's kernels read, computed once per problem.

Placement is a sequence of decisions, one co-location class a step. Classes are numbered in the order of decision:
descending upward rank (Topcuoglu et al. 2002, "HEFT"), which is topological, a class ranking as high as its first op.
Knows nothing of the network, nor of how plans are evaluated.

The look-ahead is the optimistic cost table of PEFT (Arabnejad and Barbosa 2014): the least time from an op's end on a
device to the end of the graph, every later op on the device that suits it best → `_tails`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from autoplace.problem import Problem
from autoplace.simulate.arrays import link_matrices

__all__ = ["Tables", "build_tables", "pack"]

TINY = 1e-12
"""Guards divisions; far below any latency (ms) or energy (J) that occurs."""


class Tables(NamedTuple):
    """Arrays of one problem: N ops, T tensors, C classes in order of decision, D devices."""

    class_offsets: NDArray[np.int64]
    """C + 1 offsets into `class_members`."""
    class_members: NDArray[np.int32]
    """N ops, by class, producers first."""
    class_of: NDArray[np.int32]
    """N classes."""
    in_offsets: NDArray[np.int64]
    """N + 1 offsets into `in_tensors`."""
    in_tensors: NDArray[np.int32]
    """Tensors that an op reads."""
    out_offsets: NDArray[np.int64]
    """N + 1 offsets into `out_tensors`."""
    out_tensors: NDArray[np.int32]
    """Tensors that an op makes."""
    tensor_producer: NDArray[np.int32]
    tensor_bytes: NDArray[np.float64]
    consumer_offsets: NDArray[np.int32]
    consumers: NDArray[np.int32]
    latency: NDArray[np.float64]
    """float64[N, D], ms; inf = cannot run there."""
    tail: NDArray[np.float64]
    """float64[N, D], ms from the op's end there to the end of the graph, at best."""
    class_latency: NDArray[np.float64]
    """float64[C, D], ms; inf = cannot run there."""
    rest_latency: NDArray[np.float64]
    """float64[C, D], ms of this class and all later ones on one device; inf when one of them cannot run there."""
    class_scale: NDArray[np.float64]
    """float64[C], ms: mean latency over the devices that can run the class, the unit of its local features."""
    class_min: NDArray[np.float64]
    """float64[C], ms on the fastest device."""
    class_min_energy: NDArray[np.float64]
    """float64[C], least energy above idle, mJ."""
    can_run: NDArray[np.bool_]
    """bool[C, D]."""
    need: NDArray[np.float64]
    """float64[C] bytes."""
    need_after: NDArray[np.float64]
    """float64[C] bytes of this class and all later ones."""
    class_bytes: NDArray[np.float64]
    """float64[C] bytes of all tensors that the class makes and somebody reads."""
    capacity: NDArray[np.float64]
    """float64[D] bytes; inf when unlimited."""
    pack_order: NDArray[np.int32]
    """Classes by descending need, for → `pack`."""
    certificate: NDArray[np.int32]
    """int32[C], a packing of all classes into memory; all -1 when none was found or memory is unlimited."""
    link_latency: NDArray[np.float64]
    """float64[D, D], ms."""
    link_inverse: NDArray[np.float64]
    """float64[D, D], ms per byte; inf where a pair cannot talk."""
    connected: NDArray[np.bool_]
    """bool[D, D]."""
    idle_watts: NDArray[np.float64]
    dynamic_watts: NDArray[np.float64]
    """float64[D], busy less idle."""
    pair_static: NDArray[np.float32]
    """float32[C, D, P]: features of a (class, device) pair that never change."""
    op_static: NDArray[np.float32]
    """float32[C, O]: features of a class that never change."""
    global_static: NDArray[np.float32]
    """float32[G]: features of the problem."""
    flags: NDArray[np.bool_]
    """throughput, blocking, contention, all pairs connected, memory limited."""
    numbers: NDArray[np.float64]
    """energy weight, first estimate of the horizon (ms), total least work (ms), total least energy (mJ)."""


def build_tables(problem: Problem) -> Tables:
    """Compute the tables of a problem.

    Args:
        problem: What to place.

    Returns:
        Tables; everything is a function of the problem alone.
    """
    from autoplace.policy.statics import static_features

    topological = problem.graph.topological_order.astype(np.int64)
    order = _classes(problem, topological)
    graph = _graph_arrays(problem, order)
    hardware = _hardware_arrays(problem)
    costs = _cost_arrays(problem, order, topological, graph, hardware)
    memory, limited = _memory(problem, order, costs["can_run"])
    flags = [
        problem.objective.goal == "throughput",
        problem.semantics.transfers == "blocking",
        problem.semantics.contention == "link",
        bool(hardware["connected"].all()),
        limited,
    ]
    horizon = _finite_min(costs["latency"] + costs["tail"]).max(initial=0.0)
    totals = [costs["class_min"].sum(), costs["class_min_energy"].sum()]
    numbers = [problem.objective.energy_weight, horizon, *totals]
    empty = np.zeros((0, 0), np.float32)
    tables = Tables(
        **graph, **hardware, **costs, **memory,
        pair_static=empty, op_static=empty, global_static=empty,
        flags=np.asarray(flags), numbers=np.asarray(numbers),
    )  # fmt: skip
    pair, op, whole = static_features(problem, tables, topological)
    return tables._replace(pair_static=pair, op_static=op, global_static=whole)


def _graph_arrays(problem: Problem, order: list[NDArray[np.int64]]) -> dict[str, Any]:
    graph = problem.graph
    class_of = np.empty(graph.num_ops, np.int32)
    for index, ops in enumerate(order):
        class_of[ops] = index
    in_offsets, in_tensors = _incoming(problem)
    out_offsets, out_tensors = _group_by(graph.tensor_producer, graph.num_ops)
    read = np.diff(graph.consumer_offsets) > 0
    made = np.bincount(class_of[graph.tensor_producer], graph.tensor_bytes * read, minlength=len(order))
    return {
        "class_offsets": np.concatenate([[0], np.cumsum([len(m) for m in order])]).astype(np.int64),
        "class_members": np.concatenate(order).astype(np.int32),
        "class_of": class_of,
        "in_offsets": in_offsets,
        "in_tensors": in_tensors,
        "out_offsets": out_offsets,
        "out_tensors": out_tensors,
        "tensor_producer": graph.tensor_producer,
        "tensor_bytes": graph.tensor_bytes,
        "consumer_offsets": graph.consumer_offsets,
        "consumers": graph.consumers,
        "class_bytes": made.astype(np.float64),
    }


def _hardware_arrays(problem: Problem) -> dict[str, Any]:
    devices = problem.cluster.devices
    link_latency, inverse = transfer_times(problem)
    return {
        "capacity": np.asarray([d.memory_bytes for d in devices], np.float64),
        "link_latency": link_latency,
        "link_inverse": inverse,
        "connected": np.isfinite(inverse),
        "idle_watts": np.asarray([d.idle_watts or 0.0 for d in devices]),
        "dynamic_watts": np.maximum([(d.busy_watts or 0.0) - (d.idle_watts or 0.0) for d in devices], 0.0),
    }


def _cost_arrays(
    problem: Problem,
    order: list[NDArray[np.int64]],
    topological: NDArray[np.int64],
    graph: dict[str, Any],
    hardware: dict[str, Any],
) -> dict[str, Any]:
    latency = pass_latency(problem)
    class_latency = np.stack([latency[m].sum(axis=0) for m in order])
    can_run = np.isfinite(class_latency)
    mean = np.where(can_run, class_latency, 0.0).sum(axis=1) / np.maximum(can_run.sum(axis=1), 1)
    # Ops of no cost would make every time infinite in their own unit.
    floor = max(1e-3 * float(mean.mean()), TINY)
    tail = _tails(
        topological, graph["out_offsets"], graph["out_tensors"], graph["tensor_bytes"], graph["consumer_offsets"],
        graph["consumers"], latency, hardware["link_latency"], hardware["link_inverse"],
    )  # fmt: skip
    return {
        "latency": latency,
        "tail": tail,
        "class_latency": class_latency,
        "rest_latency": np.cumsum(class_latency[::-1], axis=0)[::-1].copy(),
        "class_scale": np.maximum(mean, floor),
        "class_min": _finite_min(class_latency),
        "class_min_energy": _finite_min(class_latency * np.maximum(hardware["dynamic_watts"], TINY)),
        "can_run": can_run,
    }


def pass_latency(problem: Problem) -> NDArray[np.float64]:
    """Return the time of every op on every device in one pass, all microbatches, ms; inf = cannot run there."""
    latency, overhead = problem.latency_ms, problem.overhead_ms
    if overhead is not None and problem.semantics.microbatches > 1:
        latency = latency + (problem.semantics.microbatches - 1) * np.minimum(overhead, latency)
    return np.where(problem.can_run, latency, np.inf).astype(np.float64)


def transfer_times(problem: Problem) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return latency (ms) and inverse bandwidth (ms per byte) between devices, float64[D, D], by the problem's route.

    Over the host's memory they are the sums of both legs. A pair that cannot talk has latency 0 and inverse inf.
    """
    devices, host = problem.num_devices, problem.semantics.route == "host"
    latency, inverse = link_matrices(problem.cluster, host=host)
    if host:
        apart = ~np.eye(devices, dtype=bool)
        up, down = latency[:devices, devices][:, None], latency[devices, :devices][None, :]
        latency = np.where(apart, up + down, 0.0)
        inverse = np.where(apart, inverse[:devices, devices][:, None] + inverse[devices, :devices][None, :], 0.0)
    latency, inverse = latency[:devices, :devices].copy(), inverse[:devices, :devices].copy()
    missing = ~np.isfinite(latency) | ~np.isfinite(inverse)
    latency[missing], inverse[missing] = 0.0, np.inf
    return latency, inverse


def _incoming(problem: Problem) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    edges = problem.graph.edge_list
    order = np.argsort(edges[:, 1], kind="stable")
    offsets = np.zeros(problem.num_ops + 1, np.int64)
    np.cumsum(np.bincount(edges[:, 1], minlength=problem.num_ops), out=offsets[1:])
    return offsets, np.ascontiguousarray(edges[order, 2])


def _group_by(keys: NDArray[np.int32], count: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    offsets = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(keys, minlength=count), out=offsets[1:])
    return offsets, np.argsort(keys, kind="stable").astype(np.int32)


def _finite_min(values: NDArray[np.float64]) -> NDArray[np.float64]:
    least = values.min(axis=1)
    return np.where(np.isfinite(least), least, 0.0)


def _classes(problem: Problem, topological: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Return the co-location classes in order of decision, each with its ops producers first."""
    position = np.empty(problem.num_ops, np.int64)
    position[topological] = np.arange(problem.num_ops)
    upward = _upward_rank(problem, topological)
    groups: dict[int, list[int]] = {}
    for op in topological:
        key = int(problem.graph.colocate[op])
        groups.setdefault(key if key >= 0 else -1 - int(op), []).append(int(op))
    keyed = [(-float(upward[ops].max()), int(position[ops[0]]), ops) for ops in groups.values()]
    return [np.asarray(ops, np.int64) for _, _, ops in sorted(keyed, key=lambda item: item[:2])]


def _upward_rank(problem: Problem, topological: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return mean latency plus mean transfer plus the highest rank of a consumer, ms, float64[N]."""
    latency = np.where(problem.can_run, pass_latency(problem), 0.0).sum(axis=1)
    latency = latency / np.maximum(problem.can_run.sum(axis=1), 1)
    mean_latency, mean_inverse = mean_link(problem)
    upward = latency.copy()
    graph = problem.graph
    out_offsets, out_tensors = _group_by(graph.tensor_producer, graph.num_ops)
    _ranks(
        topological, out_offsets, out_tensors, graph.tensor_bytes, graph.consumer_offsets, graph.consumers,
        mean_latency, mean_inverse, upward,
    )  # fmt: skip
    return upward


def mean_link(problem: Problem) -> tuple[float, float]:
    """Return the mean latency (ms) and mean inverse bandwidth (ms per byte) over connected pairs; 0, 0 without any."""
    latency, inverse = transfer_times(problem)
    usable = np.isfinite(inverse) & ~np.eye(problem.num_devices, dtype=bool)
    if not usable.any():
        return 0.0, 0.0
    return float(latency[usable].mean()), float(inverse[usable].mean())


@numba.njit(cache=True)
def _ranks(topological, out_offsets, out_tensors, tensor_bytes, consumer_offsets, consumers, lat, inverse, upward):
    for i in range(len(topological) - 1, -1, -1):
        op = topological[i]
        best = 0.0
        for k in range(out_offsets[op], out_offsets[op + 1]):
            tensor = out_tensors[k]
            transfer = lat + tensor_bytes[tensor] * inverse
            for j in range(consumer_offsets[tensor], consumer_offsets[tensor + 1]):
                best = max(best, transfer + upward[consumers[j]])
        upward[op] += best


@numba.njit(cache=True)
def _tails(
    topological, out_offsets, out_tensors, tensor_bytes, consumer_offsets, consumers, latency, link_latency, inverse
):
    ops, devices = latency.shape
    tail = np.zeros((ops, devices))
    for i in range(ops - 1, -1, -1):
        op = topological[i]
        for k in range(out_offsets[op], out_offsets[op + 1]):
            tensor = out_tensors[k]
            size = tensor_bytes[tensor]
            for j in range(consumer_offsets[tensor], consumer_offsets[tensor + 1]):
                consumer = consumers[j]
                for d in range(devices):
                    best = np.inf
                    for e in range(devices):
                        way = tail[consumer, e] + latency[consumer, e]
                        if e != d:
                            if not np.isfinite(inverse[d, e]):
                                continue
                            way += link_latency[d, e] + size * inverse[d, e]
                        best = min(best, way)
                    if np.isfinite(best):
                        tail[op, d] = max(tail[op, d], best)
    return tail


@numba.njit(cache=True)
def pack(pack_order, need, can_run, left, first, skip, assignment):
    """Try to fit the classes from `first` on into the memory left, largest first, each where most is left.

    Args:
        pack_order: int32[C], classes by descending need.
        need: float64[C] bytes.
        can_run: bool[C, D].
        left: float64[D] bytes; changed.
        first: Classes before this one are placed already.
        skip: A class to leave out.
        assignment: int32[C]; filled for the classes that are packed.

    Returns:
        Whether all fit.
    """
    for index in pack_order:
        if index < first or index == skip:
            continue
        best = -1
        for d in range(left.shape[0]):
            if can_run[index, d] and need[index] <= left[d] and (best < 0 or left[d] > left[best]):
                best = d
        if best < 0:
            return False
        left[best] -= need[index]
        assignment[index] = best
    return True


def _memory(
    problem: Problem, order: list[NDArray[np.int64]], can_run: NDArray[np.bool_]
) -> tuple[dict[str, Any], bool]:
    """Return need, order of packing and certificate, and whether memory is limited.

    Activations that are freed early count in full where everything fits that way; else not at all, and the evaluator,
    which knows what lives when, has the last word.
    """
    graph = problem.graph
    capacity = np.asarray([d.memory_bytes for d in problem.cluster.devices], np.float64)
    limited = bool(np.isfinite(capacity).any())
    held = graph.weight_bytes + np.where(graph.frees, 0, graph.activation_bytes)
    for amounts in (graph.weight_bytes + graph.activation_bytes, held):
        need = np.asarray([amounts[m].sum() for m in order], np.float64)
        pack_order = np.argsort(-need, kind="stable").astype(np.int32)
        certificate = np.full(len(order), -1, np.int32)
        packed = limited and pack(pack_order, need, can_run, capacity.copy(), 0, -1, certificate)
        if packed or not limited:
            break
        certificate[:] = -1
    arrays = {
        "need": need,
        "need_after": np.cumsum(need[::-1])[::-1].copy(),
        "pack_order": pack_order,
        "certificate": certificate,
    }
    return arrays, limited
