"""Signals of ops carried along the graph, without learned weights, once per problem.

Frasca et al. 2020, "SIGN: Scalable Inception Graph Neural Networks": powers of the row-normalised adjacency, here of
both directions, times the signals. Departure: in place of its personalised PageRank, → `discounted_sums` along the
direction of the graph, which has no cycles, in one pass. Knows ops and edges, no features.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoplace.jit import compiled
from autoplace.policy.tables import Tables

__all__ = ["Neighbours", "consumers_of", "discounted_sums", "hop_means", "producers_of"]

Signals = NDArray[np.float32]


class Neighbours(NamedTuple):
    """Edges of one direction, by op."""

    offsets: NDArray[np.int64]
    """N + 1 offsets into the others."""
    ops: NDArray[np.int32]
    """The op at the other end."""
    tensors: NDArray[np.int32]
    """The tensor that is handed over."""


def producers_of(tables: Tables) -> Neighbours:
    """Return the edges back from every op."""
    return Neighbours(tables.in_offsets, tables.tensor_producer[tables.in_tensors], tables.in_tensors)


def consumers_of(tables: Tables) -> Neighbours:
    """Return the edges on from every op."""
    per_tensor = np.diff(tables.consumer_offsets)
    tensors = np.repeat(np.arange(len(per_tensor), dtype=np.int32), per_tensor)
    sources = tables.tensor_producer[tensors]
    order = np.argsort(sources, kind="stable")
    offsets = np.zeros(len(tables.class_of) + 1, np.int64)
    np.cumsum(np.bincount(sources, minlength=len(tables.class_of)), out=offsets[1:])
    return Neighbours(offsets, tables.consumers[order], tensors[order])


def hop_means(
    edges: Neighbours, signals: Signals, hops: int, weights: NDArray[np.float64] | None = None
) -> list[Signals]:
    """Return the means of signals over 1, 2, 4, ... hops, up to `hops`.

    Args:
        edges: Of one direction.
        signals: float32[N, K].
        hops: A power of two.
        weights: float64[T] of the edges' tensors; None = equal. Ops without edges get zeros.

    Returns:
        float32[N, K] each.
    """
    found, current, step = [], signals, 0
    weights = np.ones(int(edges.tensors.max(initial=0)) + 1) if weights is None else weights
    while step < hops:
        mean = np.zeros_like(signals)
        _mean(edges.offsets, edges.ops, edges.tensors, weights, current, mean)
        current, step = mean, step + 1
        if step & (step - 1) == 0:
            found.append(mean)
    return found


def discounted_sums(edges: Neighbours, farthest_first: NDArray[np.int64], signals: Signals, discount: float) -> Signals:
    """Return S, float32[N, K], with S = discount * mean over the neighbours of (signal + S).

    Args:
        edges: Of one direction.
        farthest_first: int64[N], every op after all its neighbours.
        signals: float32[N, K].
        discount: Below 1.
    """
    sums = np.zeros_like(signals)
    _sums(farthest_first, edges.offsets, edges.ops, signals, np.float32(discount), sums)
    return sums


@partial(compiled, allocates=True)
def _mean(offsets, ops, tensors, weights, signals, mean):
    for op in range(len(offsets) - 1):
        total = 0.0
        for k in range(offsets[op], offsets[op + 1]):
            total += weights[tensors[k]]
        if total <= 0.0:
            continue
        for k in range(offsets[op], offsets[op + 1]):
            weight, other = np.float32(weights[tensors[k]] / total), ops[k]
            for j in range(signals.shape[1]):
                mean[op, j] += weight * signals[other, j]


@partial(compiled, allocates=True)
def _sums(farthest_first, offsets, ops, signals, discount, sums):
    for op in farthest_first:
        count = offsets[op + 1] - offsets[op]
        for k in range(offsets[op], offsets[op + 1]):
            weight, other = discount / np.float32(count), ops[k]
            for j in range(signals.shape[1]):
                sums[op, j] += weight * (signals[other, j] + sums[other, j])
