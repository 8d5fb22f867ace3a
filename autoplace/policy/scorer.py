"""The network's forward pass in numba kernels. Knows the columns, no problem; → `policy.network` is its original."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoplace.jit import inline, inline_loose
from autoplace.policy.columns import CLASS_OWN, CLASS_SPREAD, NUM_PAIR, NUM_PAIR_MOVING, NUM_SHARED_MOVING
from autoplace.policy.tables import Tables

__all__ = ["Weights", "Workspace", "fill_static", "new_workspace", "pack_weights", "score_devices"]

CACHE_NUMBERS = 16_000_000
"""Numbers that the cache of the first layer may hold; larger problems compute a class's part when they come to it."""


class Weights(NamedTuple):
    """Weights of the scorer, inputs first, float32; H is the hidden width. The first layer by groups of columns."""

    pair_moving: NDArray[np.float32]
    """[NUM_PAIR_MOVING, H]."""
    pair_static: NDArray[np.float32]
    """[NUM_PAIR - NUM_PAIR_MOVING, H]."""
    shared_moving: NDArray[np.float32]
    """[NUM_SHARED_MOVING, H]: its part of the sum is the same for all devices and computed once."""
    class_static: NDArray[np.float32]
    """[CS, H]."""
    whole: NDArray[np.float32]
    """[G, H]."""
    embed1_bias: NDArray[np.float32]
    embed2: NDArray[np.float32]
    """[H, H]."""
    embed2_bias: NDArray[np.float32]
    score1_own: NDArray[np.float32]
    """[H, H]."""
    score1_pooled: NDArray[np.float32]
    """[2 H, H]."""
    score1_bias: NDArray[np.float32]
    score2: NDArray[np.float32]
    """[H]."""


class Workspace(NamedTuple):
    """What the forward pass writes, float32."""

    static: NDArray[np.float32]
    """[C, D, H], or [1, D, H]: what the columns that never change, and the bias, add to the first layer."""
    static_class: NDArray[np.int64]
    """[C] or [1]: the class whose part stands in the row, -1 = none."""
    embedding: NDArray[np.float32]
    """[D, H]."""
    first: NDArray[np.float32]
    """[H]."""
    shared: NDArray[np.float32]
    """[H]."""
    pooled: NDArray[np.float32]
    """[2 H]."""


def pack_weights(tensors: Mapping[str, NDArray[np.float32]]) -> Weights:
    """Return the weights of a policy as the kernels read them."""
    hidden = len(tensors["embed1.bias"])

    def turned(array: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.ascontiguousarray(array.T, np.float32)

    first, score = tensors["embed1.weight"], tensors["score1.weight"]
    ends = np.cumsum([NUM_PAIR, NUM_SHARED_MOVING, len(CLASS_OWN) + len(CLASS_SPREAD)])
    return Weights(
        pair_moving=turned(first[:, :NUM_PAIR_MOVING]),
        pair_static=turned(first[:, NUM_PAIR_MOVING:NUM_PAIR]),
        shared_moving=turned(first[:, NUM_PAIR : ends[1]]),
        class_static=turned(first[:, ends[1] : ends[2]]),
        whole=turned(first[:, ends[2] :]),
        embed1_bias=np.ascontiguousarray(tensors["embed1.bias"], np.float32),
        embed2=turned(tensors["embed2.weight"]),
        embed2_bias=np.ascontiguousarray(tensors["embed2.bias"], np.float32),
        score1_own=turned(score[:, :hidden]),
        score1_pooled=turned(score[:, hidden:]),
        score1_bias=np.ascontiguousarray(tensors["score1.bias"], np.float32),
        score2=np.ascontiguousarray(tensors["score2.weight"][0], np.float32),
    )


def new_workspace(tables: Tables, weights: Weights, *, keep: bool) -> Workspace:
    """Return room for the forward pass.

    Args:
        tables: Of the problem.
        weights: Of the policy.
        keep: Whether the problem is placed more than once, so that what never changes is worth keeping.
    """
    classes, devices = tables.can_run.shape
    hidden = len(weights.embed1_bias)
    rows = classes if keep and classes * devices * hidden <= CACHE_NUMBERS else 1
    return Workspace(
        static=np.empty((rows, devices, hidden), np.float32),
        static_class=np.full(rows, -1, np.int64),
        embedding=np.empty((devices, hidden), np.float32),
        first=np.empty(hidden, np.float32),
        shared=np.empty(hidden, np.float32),
        pooled=np.empty(2 * hidden, np.float32),
    )


@inline_loose
def _add_product(vector, start, matrix, out):
    """Add vector @ matrix to out; `start` is where the vector begins."""
    for i in range(matrix.shape[0]):
        x = vector[start + i]
        if x != 0.0:
            for j in range(out.shape[0]):
                out[j] += x * matrix[i, j]


@inline
def fill_static(tables, weights, work, current):
    """Make the static part of the first layer of a class, float32[D, H], and return its row in the workspace."""
    row = current if work.static.shape[0] > 1 else 0
    if work.static_class[row] != current:
        work.static_class[row] = current
        for j in range(work.shared.shape[0]):
            work.shared[j] = weights.embed1_bias[j]
        _add_product(tables.global_static, 0, weights.whole, work.shared)
        _add_product(tables.op_static[current], 0, weights.class_static, work.shared)
        for d in range(work.static.shape[1]):
            own = work.static[row, d]
            for j in range(work.shared.shape[0]):
                own[j] = work.shared[j]
            _add_product(tables.pair_static[current, d], 0, weights.pair_static, own)
    return row


@inline_loose
def score_devices(weights, work, row, features, scores):
    """Fill float32[D] scores.

    Args:
        weights, work: Of the policy; the static part of the class stands in the workspace.
        row: Of that part.
        features: float32[D, F], the moving columns filled, of those that devices share the first row.
        scores: Filled.
    """
    devices, hidden = scores.shape[0], weights.embed1_bias.shape[0]
    first, shared, pooled = work.first, work.shared, work.pooled
    for j in range(hidden):
        shared[j] = np.float32(0.0)
        pooled[j] = pooled[hidden + j] = np.float32(0.0)
    _add_product(features[0], NUM_PAIR, weights.shared_moving, shared)
    share = np.float32(1.0) / np.float32(devices)
    for d in range(devices):
        for j in range(hidden):
            first[j] = shared[j] + work.static[row, d, j]
        _add_product(features[d], 0, weights.pair_moving, first)
        own = work.embedding[d]
        for j in range(hidden):
            first[j] = max(first[j], np.float32(0.0))
            own[j] = weights.embed2_bias[j]
        _add_product(first, 0, weights.embed2, own)
        for j in range(hidden):
            own[j] = max(own[j], np.float32(0.0))
            pooled[j] += own[j] * share
            pooled[hidden + j] = max(pooled[hidden + j], own[j])
    for j in range(hidden):
        shared[j] = weights.score1_bias[j]
    _add_product(pooled, 0, weights.score1_pooled, shared)
    for d in range(devices):
        for j in range(hidden):
            first[j] = shared[j]
        _add_product(work.embedding[d], 0, weights.score1_own, first)
        score = np.float32(0.0)
        for j in range(hidden):
            score += max(first[j], np.float32(0.0)) * weights.score2[j]
        scores[d] = score
