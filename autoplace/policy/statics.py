"""Features that never change during a placement: hardware against ops, shape of the graph, the problem as a whole.

Their meaning stands in the table of `policy.features`.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from numpy.typing import NDArray

from autoplace.policy.tables import TINY, Tables, mean_link
from autoplace.problem import Problem

__all__ = ["static_features"]

Floats = NDArray[np.float32]


def static_features(problem: Problem, tables: Tables, topological: NDArray[np.int64]) -> tuple[Floats, Floats, Floats]:
    """Return the static features of pairs float32[C, D, 5], of classes float32[C, 6], of the problem float32[12].

    Args:
        problem: What is placed.
        tables: Its tables, these features excepted.
        topological: int64[N], producers first.
    """
    latency = np.where(tables.can_run, tables.class_latency, 0.0)
    least = np.maximum(tables.class_min, 1e-3 * tables.class_scale)[:, None]
    ratio = np.where(tables.can_run, np.log(np.maximum(latency, least) / least), 5.0)
    lat, inverse = mean_link(problem)
    transfer = np.where(tables.class_bytes > 0, lat + tables.class_bytes * inverse, 0.0)
    pair = _pair_features(problem, tables, latency, ratio)
    op = _op_features(tables, topological, transfer)
    return pair, op, _global_features(problem, tables, ratio, transfer)


def _pair_features(problem: Problem, tables: Tables, latency: NDArray, ratio: NDArray) -> Floats:
    """Fill latency_log, latency_mean, slowness, energy_log, affinity."""
    can_run, scale = tables.can_run, tables.class_scale[:, None]
    pair = np.zeros((*ratio.shape, 5), np.float32)
    pair[:, :, 0] = np.minimum(ratio, 5.0)
    pair[:, :, 1] = np.where(can_run, np.clip(latency / scale - 1.0, -1.0, 5.0), 5.0)
    slowness = ratio.mean(axis=0)
    pair[:, :, 2] = np.minimum(slowness - slowness.min(), 5.0)
    if problem.objective.energy_weight > 0:
        energy = np.log(np.maximum(latency * tables.dynamic_watts, TINY))
        gap = energy - np.where(can_run, energy, np.inf).min(axis=1, keepdims=True)
        pair[:, :, 3] = np.where(can_run & np.isfinite(gap), np.clip(gap, 0.0, 5.0), 5.0)
    pair[:, :, 4] = _affinity(tables, ratio)
    return pair


def _op_features(tables: Tables, topological: NDArray[np.int64], transfer: NDArray) -> Floats:
    """Fill critical, weight, out_time, fan_out, fan_in, runnable."""
    lead = tables.class_members[tables.class_offsets[:-1]]
    whole = tables.latency + tables.tail
    to_end = np.where(np.isfinite(whole), whole, np.inf).min(axis=1)
    to_end[~np.isfinite(to_end)] = 0.0
    critical = max(float(tables.numbers[1]), TINY)
    edges = np.repeat(tables.tensor_producer, np.diff(tables.consumer_offsets))
    fan_out = np.bincount(edges, minlength=len(tables.class_of))[lead]
    op = np.zeros((len(lead), 6), np.float32)
    op[:, 0] = np.clip((_depths(topological, tables)[lead] + to_end[lead]) / critical, 0.0, 2.0)
    op[:, 1] = np.clip(np.log(tables.class_scale / max(float(tables.class_scale.mean()), TINY)), -5.0, 5.0)
    op[:, 2] = np.clip(np.log1p(transfer / tables.class_scale), 0.0, 8.0)
    op[:, 3] = np.clip(np.log1p(fan_out) / 2.0, 0.0, 3.0)
    op[:, 4] = np.clip(np.log1p(np.diff(tables.in_offsets)[lead]) / 2.0, 0.0, 3.0)
    op[:, 5] = tables.can_run.mean(axis=1)
    return op


def _global_features(problem: Problem, tables: Tables, ratio: NDArray, transfer: NDArray) -> Floats:
    semantics, work = problem.semantics, max(float(tables.numbers[2]), TINY)
    slowness = ratio.mean(axis=0)
    critical = max(float(tables.numbers[1]), TINY)
    return np.asarray(
        [
            problem.objective.goal == "throughput",
            semantics.transfers == "blocking",
            semantics.route == "host",
            semantics.contention == "link",
            semantics.queue == "priority",
            problem.objective.energy_weight,
            min(math.log2(semantics.microbatches), 6.0) / 2.0,
            min(math.log2(problem.num_devices), 6.0) / 2.0,
            min(math.log(len(ratio)), 12.0) / 4.0,
            float(np.clip(math.log(work / critical), -5.0, 5.0)),
            float(np.clip(math.log1p(float(transfer.sum()) / work), 0.0, 8.0)),
            min(float(slowness.max() - slowness.min()), 5.0),
        ],
        np.float32,
    )


def _affinity(tables: Tables, ratio: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how badly each device suits the consumers of a class, mean of log(latency / least), float64[C, D]."""
    producers = tables.class_of[tables.tensor_producer]
    per_tensor = np.diff(tables.consumer_offsets)
    sources = np.repeat(producers, per_tensor)
    total, count = np.zeros_like(ratio), np.zeros(len(ratio))
    np.add.at(total, sources, np.minimum(ratio, 5.0)[tables.class_of[tables.consumers]])
    np.add.at(count, sources, 1.0)
    return total / np.maximum(count, 1.0)[:, None]


def _depths(topological: NDArray[np.int64], tables: Tables) -> NDArray[np.float64]:
    """Return the earliest start of each op when every op runs where it is fastest and transfers are free, ms."""
    least = tables.latency.min(axis=1)
    least[~np.isfinite(least)] = 0.0
    depth = np.zeros(len(least))
    _longest_paths(topological, tables.in_offsets, tables.in_tensors, tables.tensor_producer, least, depth)
    return depth


@numba.njit(cache=True)
def _longest_paths(topological, in_offsets, in_tensors, tensor_producer, least, depth):
    for op in topological:
        for k in range(in_offsets[op], in_offsets[op + 1]):
            producer = tensor_producer[in_tensors[k]]
            depth[op] = max(depth[op], depth[producer] + least[producer])
