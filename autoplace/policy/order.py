"""The order of decision: co-location classes by descending upward rank (Topcuoglu et al. 2002, "HEFT"), and levels."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoplace.jit import compiled
from autoplace.policy.times import mean_link, pass_latency
from autoplace.problem import Problem

__all__ = ["decision_order", "group_by", "levels"]


def decision_order(problem: Problem, topological: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return the ops by co-location class in order of decision, producers first, int32[N], and offsets int64[C + 1]."""
    ops = problem.num_ops
    position = np.empty(ops, np.int64)
    position[topological] = np.arange(ops)
    key = problem.graph.colocate.astype(np.int64)
    key = np.where(key >= 0, key, -1 - np.arange(ops))
    _, group = np.unique(key, return_inverse=True)
    rank, first = np.full(group.max() + 1, -np.inf), np.full(group.max() + 1, ops)
    np.maximum.at(rank, group, _upward_rank(problem, topological))
    np.minimum.at(first, group, position)
    order = np.lexsort((first, -rank))
    number = np.empty(len(order), np.int64)
    number[order] = np.arange(len(order))
    members = np.lexsort((position, number[group])).astype(np.int32)
    offsets = np.zeros(len(order) + 1, np.int64)
    np.cumsum(np.bincount(number[group]), out=offsets[1:])
    return members, offsets


def _upward_rank(problem: Problem, topological: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return mean latency plus mean transfer plus the highest rank of a consumer, ms, float64[N]."""
    latency = np.where(problem.can_run, pass_latency(problem), 0.0).sum(axis=1)
    latency = latency / np.maximum(problem.can_run.sum(axis=1), 1)
    mean_latency, mean_inverse = mean_link(problem)
    upward = latency.copy()
    graph = problem.graph
    out_offsets, out_tensors = group_by(graph.tensor_producer, graph.num_ops)
    _ranks(
        topological, out_offsets, out_tensors, graph.tensor_bytes, graph.consumer_offsets, graph.consumers,
        mean_latency, mean_inverse, upward,
    )  # fmt: skip
    return upward


@partial(compiled, allocates=True)
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


def group_by(keys: NDArray[np.int32], count: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return offsets int64[count + 1] and the positions of every key in turn."""
    offsets = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(keys, minlength=count), out=offsets[1:])
    return offsets, np.argsort(keys, kind="stable").astype(np.int32)


def levels(
    topological: NDArray[np.int64], graph: dict[str, Any], least: NDArray[np.float64]
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Return the level of each class, int32[C], that of its first op, and the least work of each level, ms."""
    depth = np.zeros(len(topological), np.int32)
    _hop_depths(topological, graph["in_offsets"], graph["in_tensors"], graph["tensor_producer"], depth)
    level_of = depth[graph["class_members"][graph["class_offsets"][:-1]]]
    return level_of, np.bincount(level_of, least).astype(np.float64)


@partial(compiled, allocates=True)
def _hop_depths(topological, in_offsets, in_tensors, tensor_producer, depth):
    for op in topological:
        for k in range(in_offsets[op], in_offsets[op + 1]):
            depth[op] = max(depth[op], depth[tensor_producer[in_tensors[k]]] + 1)
