"""`Tables`: everything about a Problem that the policy's kernels read, computed once per problem.

Placement is a sequence of decisions, one co-location class a step. Classes are numbered in the order of decision:
descending upward rank (Topcuoglu et al. 2002, "HEFT"), which is topological, a class ranking as high as its first op.
Knows nothing of the network, nor of how plans are evaluated.

The look-ahead is the optimistic cost table of PEFT (Arabnejad and Barbosa 2014): the least time from an op's end on a
device to the end of the graph, every later op on the device that suits it best → `_tails`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoplace.jit import compiled
from autoplace.policy._compile import TINY
from autoplace.policy.order import decision_order, group_by, levels
from autoplace.policy.packing import memory_arrays
from autoplace.policy.times import pass_latency, transfer_times
from autoplace.problem import Problem

__all__ = ["UNFIT", "Tables", "build_tables", "suiting"]

UNFIT = math.exp(5.0)
"""Where a class cannot run, what flows ahead counts it as so many times slower than on its fastest device."""


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
    fluid_latency: NDArray[np.float64]
    """float64[C, D], as `rest_latency`, with `UNFIT` times the least latency where a class cannot run."""
    suited: NDArray[np.float64]
    """float64[C, D], ms: the work of this class and all later ones, shared among the devices that suit it."""
    level_of: NDArray[np.int32]
    """int32[C], hops from the start of the graph."""
    level_work: NDArray[np.float64]
    """float64[levels], ms of least work."""
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
    """float32[C, D, PS]: features of a (class, device) pair that never change."""
    op_static: NDArray[np.float32]
    """float32[C, CS]: features of a class that never change."""
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
    graph = _graph_arrays(problem, topological)
    hardware = _hardware_arrays(problem)
    costs = _cost_arrays(problem, topological, graph, hardware)
    memory, limited = memory_arrays(problem, graph["class_members"], graph["class_offsets"], costs["can_run"])
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
    # Kernels are compiled for C order; sums and choices over a problem's arrays may come in Fortran's.
    tables = Tables(*map(np.ascontiguousarray, tables))
    pair, op, whole = static_features(problem, tables, topological)
    return tables._replace(pair_static=pair, op_static=op, global_static=whole)


def _graph_arrays(problem: Problem, topological: NDArray[np.int64]) -> dict[str, Any]:
    graph = problem.graph
    members, offsets = decision_order(problem, topological)
    classes = len(offsets) - 1
    class_of = np.empty(graph.num_ops, np.int32)
    class_of[members] = np.repeat(np.arange(classes, dtype=np.int32), np.diff(offsets))
    in_offsets, in_tensors = _incoming(problem)
    out_offsets, out_tensors = group_by(graph.tensor_producer, graph.num_ops)
    read = np.diff(graph.consumer_offsets) > 0
    made = np.bincount(class_of[graph.tensor_producer], graph.tensor_bytes * read, minlength=classes)
    return {
        "class_offsets": offsets,
        "class_members": members,
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
    topological: NDArray[np.int64],
    graph: dict[str, Any],
    hardware: dict[str, Any],
) -> dict[str, Any]:
    latency = pass_latency(problem)
    class_latency = np.add.reduceat(latency[graph["class_members"]], graph["class_offsets"][:-1], axis=0)
    can_run = np.isfinite(class_latency)
    mean = np.where(can_run, class_latency, 0.0).sum(axis=1) / np.maximum(can_run.sum(axis=1), 1)
    least = _finite_min(class_latency)
    # Ops of no cost would make every time infinite in their own unit.
    floor = max(1e-3 * float(mean.mean()), TINY)
    tail = _tails(
        topological, graph["out_offsets"], graph["out_tensors"], graph["tensor_bytes"], graph["consumer_offsets"],
        graph["consumers"], latency, hardware["link_latency"], hardware["link_inverse"],
    )  # fmt: skip
    fluid = np.where(can_run, class_latency, UNFIT * least[:, None])
    level_of, level_work = levels(topological, graph, least)
    return {
        "latency": latency,
        "tail": tail,
        "fluid_latency": _from_here_on(fluid),
        "suited": _from_here_on(fluid * suiting(fluid)),
        "level_of": level_of,
        "level_work": level_work,
        "class_latency": class_latency,
        "rest_latency": _from_here_on(class_latency),
        "class_scale": np.maximum(mean, floor),
        "class_min": least,
        "class_min_energy": _finite_min(class_latency * np.maximum(hardware["dynamic_watts"], TINY)),
        "can_run": can_run,
    }


def _from_here_on(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the sum over a class and all later ones, float64[C, D]."""
    return np.cumsum(values[::-1], axis=0)[::-1].copy()


def suiting(latency: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return shares of each row among the devices, float64[R, D]: as their speeds, and more where one suits the row.

    Share ~ speed * (relative speed here / relative speed on the whole)^4, with finite latencies float64[R, D] in ms.
    """
    floor = max(1e-3 * float(latency.mean()), TINY)
    speed = 1.0 / (latency.sum(axis=0) + floor)
    here = np.log(latency + floor).min(axis=1, keepdims=True) - np.log(latency + floor)
    advantage = np.clip(4.0 * (here - here.mean(axis=0)), -20.0, 20.0)
    share = speed * np.exp(advantage)
    return share / share.sum(axis=1, keepdims=True)


def _incoming(problem: Problem) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    edges = problem.graph.edge_list
    order = np.argsort(edges[:, 1], kind="stable")
    offsets = np.zeros(problem.num_ops + 1, np.int64)
    np.cumsum(np.bincount(edges[:, 1], minlength=problem.num_ops), out=offsets[1:])
    return offsets, np.ascontiguousarray(edges[order, 2])


def _finite_min(values: NDArray[np.float64]) -> NDArray[np.float64]:
    least = values.min(axis=1)
    return np.where(np.isfinite(least), least, 0.0)


@partial(compiled, allocates=True)
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
