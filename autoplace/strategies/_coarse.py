"""Coarsening: a problem with fewer, larger ops, whose placements are placements of the whole problem.

→ `_cluster` says which ops make a group; coarse ops that have to share a device carry one co-location id.

What is exact: the load of every device, memory held to the end, and, where all links are equal, the loads of links.
What is not: a coarse op waits for all its inputs, delivers its outputs at its end, and frees no activation before its
last consumer ends.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from autoplace.errors import InputError
from autoplace.graph.opgraph import OpGraph
from autoplace.problem import Problem
from autoplace.strategies._cluster import Clustering, mean_link
from autoplace.strategies._support import View

__all__ = ["coarse_problem", "project", "restrict"]


def coarse_problem(problem: Problem, max_groups: int) -> tuple[Problem, NDArray[np.int32]]:
    """Join ops into groups.

    Args:
        problem: What to coarsen.
        max_groups: Groups wanted at most. Memory, devices that ops cannot run on and co-location may leave more.

    Returns:
        The coarse problem, one op a group, with summed latencies and memory; and the group of every op, int32[N].

    Raises:
        InputError: If `max_groups` is less than 1.
    """
    if max_groups < 1:
        raise InputError(f"{max_groups} groups cannot hold any op; ask for 1 or more")
    view = View.of(problem)
    clustering = Clustering.start(view, max_groups)
    clustering.contract(max_groups)
    group_of_op, colocate = clustering.result()
    return _contracted(view, group_of_op, colocate), group_of_op


def project(group_of_op: NDArray[np.int32], coarse_assignment: NDArray[np.integer]) -> NDArray[np.int32]:
    """Return the device of every op, int32[N], from the device of every group, int[G]."""
    return np.asarray(coarse_assignment, np.int32)[group_of_op]


def restrict(
    problem: Problem, coarse: Problem, group_of_op: NDArray[np.int32], assignment: NDArray[np.integer]
) -> NDArray[np.int32]:
    """Return the device of every group, int32[G], on which an assignment has most of its latency.

    Groups that share a device choose together, among the devices that can run them all.
    """
    latency = problem.latency_ms[np.arange(problem.num_ops), assignment] + 1e-12
    key = coarse.graph.colocate.astype(np.int64)
    _, cluster = np.unique(np.where(key >= 0, key, key.max(initial=-1) + 1 + np.arange(len(key))), return_inverse=True)
    count, devices = int(cluster.max()) + 1, problem.num_devices
    cell = cluster[group_of_op].astype(np.int64) * devices + assignment
    share = np.bincount(cell, weights=latency, minlength=count * devices).reshape(count, devices)[cluster]
    return np.where(coarse.can_run, share, -1.0).argmax(axis=1).astype(np.int32)


def _contracted(view: View, group: NDArray[np.int32], colocate: NDArray[np.int32]) -> Problem:
    """Return the problem whose ops are groups."""
    problem, graph, count = view.problem, view.problem.graph, len(colocate)

    def total(values: NDArray) -> NDArray[np.float64]:
        return np.bincount(group, weights=values, minlength=count).astype(np.float64)

    latency = np.stack([total(column) for column in problem.latency_ms.T], axis=1)
    extra = problem.dispatch_ms * np.bincount(group, minlength=count)[:, None]
    overhead = problem.overhead_ms
    if overhead is not None:
        known = np.where(np.isfinite(problem.latency_ms), np.minimum(overhead, problem.latency_ms), 0.0)
        overhead = np.stack([total(column) for column in known.T], axis=1) + extra
    elif problem.dispatch_ms > 0:
        overhead = np.broadcast_to(extra, latency.shape).copy()
    sizes, first = np.bincount(group, minlength=count), np.full(count, -1)
    backwards = graph.topological_order[::-1]
    first[group[backwards]] = backwards  # the last one written, the first op of the order, stays
    return replace(
        problem,
        graph=OpGraph.build(
            names=[
                graph.names[i] if n == 1 else f"{graph.names[i]} +{n - 1}" for i, n in zip(first, sizes, strict=True)
            ],
            kinds=[graph.kinds[i] if n == 1 else "group" for i, n in zip(first, sizes, strict=True)],
            edges=_tensors(view, group),
            flops=total(graph.flops),
            bytes_moved=total(graph.bytes_moved),
            weight_bytes=total(graph.weight_bytes).astype(np.int64),
            activation_bytes=total(graph.activation_bytes).astype(np.int64),
            frees=total(~graph.frees) == 0,
            colocate=colocate,
        ),
        latency_ms=latency + extra,
        overhead_ms=overhead,
        dispatch_ms=0.0,
        part=None,
    )


def _tensors(view: View, group: NDArray[np.int32]) -> list[tuple[int, list[int], float]]:
    """Return one tensor for all that leave a group for the same groups.

    Its bytes are theirs together, and for every tensor beyond the first those that the mean link could carry in its
    latency, so that one transfer takes as long as all of them on a link that carries one at a time. Where links carry
    any number at once, the largest is what counts.
    """
    graph = view.problem.graph
    at_once = view.problem.semantics.contention == "none" and view.problem.semantics.transfers == "overlapped"
    producer = group[graph.tensor_producer]
    edges = graph.edge_list
    consumer, tensor = group[edges[:, 1]].astype(np.int64), edges[:, 2].astype(np.int64)
    leaves = consumer != producer[tensor]
    keys = np.unique(tensor[leaves] * (len(group) + 1) + consumer[leaves])
    tensor, consumer = keys // (len(group) + 1), keys % (len(group) + 1)
    used, begin = np.unique(tensor, return_index=True)
    end = np.append(begin[1:], len(tensor))[: len(begin)]
    start_ms, ms_per_byte = mean_link(view)
    start = start_ms / ms_per_byte if ms_per_byte > 0 else 0.0
    merged: dict[tuple[int, bytes], list[float]] = {}
    for source, size, low, high in zip(
        producer[used].tolist(), graph.tensor_bytes[used].tolist(), begin.tolist(), end.tolist(), strict=True
    ):
        merged.setdefault((source, consumer[low:high].tobytes()), []).append(size)
    return [
        (source, np.frombuffer(targets, np.int64).tolist(), max(s) if at_once else sum(s) + (len(s) - 1) * start)
        for (source, targets), s in merged.items()
    ]
