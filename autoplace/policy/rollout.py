"""Whole placements by the policy, without torch: the network's forward pass in numba, fused with the features.

Agrees with `policy.network` to float32 rounding; a test holds it. One core, hundreds of placements a second at 200 ops
and 4 devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from autoplace.policy.features import NUM_FEATURES, NUM_PAIR, advance, begin
from autoplace.policy.partial import STEP, new_state
from autoplace.policy.tables import Tables

__all__ = ["Weights", "follow", "pack_weights", "roll", "score_devices"]


class Weights(NamedTuple):
    """Weights of the scorer, inputs first, float32; H is the hidden width."""

    embed1_pair: NDArray[np.float32]
    """[NUM_PAIR, H]."""
    embed1_shared: NDArray[np.float32]
    """[F - NUM_PAIR, H]: its part of the sum is the same for all devices and computed once."""
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


def pack_weights(tensors: Mapping[str, NDArray[np.float32]]) -> Weights:
    """Return the weights of a policy as the kernels read them."""
    hidden = len(tensors["embed1.bias"])

    def turned(array: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.ascontiguousarray(array.T, np.float32)

    first, score = tensors["embed1.weight"], tensors["score1.weight"]
    return Weights(
        embed1_pair=turned(first[:, :NUM_PAIR]),
        embed1_shared=turned(first[:, NUM_PAIR:]),
        embed1_bias=np.ascontiguousarray(tensors["embed1.bias"], np.float32),
        embed2=turned(tensors["embed2.weight"]),
        embed2_bias=np.ascontiguousarray(tensors["embed2.bias"], np.float32),
        score1_own=turned(score[:, :hidden]),
        score1_pooled=turned(score[:, hidden:]),
        score1_bias=np.ascontiguousarray(tensors["score1.bias"], np.float32),
        score2=np.ascontiguousarray(tensors["score2.weight"][0], np.float32),
    )


@numba.njit(cache=True, fastmath={"contract", "reassoc", "nsz"}, inline="always")
def _add_product(vector, matrix, first, out):
    """Add vector @ matrix to out; `first` is where the vector starts."""
    for i in range(matrix.shape[0]):
        x = vector[first + i]
        if x != 0.0:
            for j in range(out.shape[0]):
                out[j] += x * matrix[i, j]


@numba.njit(cache=True, fastmath={"contract", "reassoc", "nsz"})
def score_devices(weights, features, scores):
    """Fill float32[D] scores from float32[D, F] features; every row is a device."""
    devices, hidden = features.shape[0], weights.embed1_bias.shape[0]
    shared, first = weights.embed1_bias.copy(), np.empty(hidden, np.float32)
    _add_product(features[0], weights.embed1_shared, weights.embed1_pair.shape[0], shared)
    embedding = np.empty((devices, hidden), np.float32)
    pooled = np.zeros(2 * hidden, np.float32)
    for d in range(devices):
        first[:] = shared
        _add_product(features[d], weights.embed1_pair, 0, first)
        for j in range(hidden):
            first[j] = max(first[j], np.float32(0.0))
        row = embedding[d]
        row[:] = weights.embed2_bias
        _add_product(first, weights.embed2, 0, row)
        for j in range(hidden):
            row[j] = max(row[j], np.float32(0.0))
            pooled[j] += row[j] / np.float32(devices)
            pooled[hidden + j] = max(pooled[hidden + j], row[j])
    common = weights.score1_bias.copy()
    _add_product(pooled, weights.score1_pooled, 0, common)
    for d in range(devices):
        first[:] = common
        _add_product(embedding[d], weights.score1_own, 0, first)
        total = np.float32(0.0)
        for j in range(hidden):
            total += max(first[j], np.float32(0.0)) * weights.score2[j]
        scores[d] = total


@numba.njit(cache=True)
def _uniform(random):
    """Return a float in [0, 1) and step the generator, uint64[1] (xorshift64*, Vigna 2016)."""
    x = random[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    random[0] = x
    return float((x * np.uint64(2685821657736338717)) >> np.uint64(11)) / 9007199254740992.0


@numba.njit(cache=True)
def _choose(scores, mask, temperature, random):
    """Return the best allowed device, or one drawn from softmax(scores / temperature)."""
    best = -1
    for d in range(mask.shape[0]):
        if mask[d] and (best < 0 or scores[d] > scores[best]):
            best = d
    if temperature <= 0.0:
        return best
    total = 0.0
    for d in range(mask.shape[0]):
        if mask[d]:
            total += np.exp((scores[d] - scores[best]) / temperature)
    point = _uniform(random) * total
    for d in range(mask.shape[0]):
        if mask[d]:
            point -= np.exp((scores[d] - scores[best]) / temperature)
            if point < 0.0:
                return d
    return best


@numba.njit(cache=True)
def _roll(tables, state, weights, temperature, forced, random, features, out):
    classes, devices = tables.can_run.shape
    mask = np.zeros(devices, np.bool_)
    scores = np.empty(devices, np.float32)
    whole = 0
    for _ in range(out.shape[0]):
        found = begin(tables, state, mask, features)
        while found and int(state.numbers[STEP]) < classes:
            device = forced[int(state.numbers[STEP])]
            if device < 0 or not mask[device]:
                score_devices(weights, features, scores)
                device = _choose(scores, mask, temperature, random)
            found = advance(tables, state, device, mask, features)
        if found:
            for op in range(tables.class_of.shape[0]):
                out[whole, op] = state.device_of[tables.class_of[op]]
            whole += 1
    return whole


def roll(
    tables: Tables,
    weights: Weights,
    *,
    count: int,
    temperature: float,
    seed: int,
    forced: NDArray[np.int32] | None = None,
) -> NDArray[np.int32]:
    """Place a problem by the policy.

    Args:
        tables: Of the problem.
        weights: Of the policy.
        count: Placements to make.
        temperature: Of the softmax that devices are drawn from; 0 = always the best device.
        seed: Of the draws; the same seed gives the same placements.
        forced: int32[C] device of each class, kept wherever the mask allows it; -1 = the policy decides. None = it
            decides all.

    Returns:
        int32[P, N] device indices, P <= count: placements in which some op had no allowed device are left out.
    """
    classes, devices = tables.can_run.shape
    out = np.empty((count, tables.latency.shape[0]), np.int32)
    random = np.random.SeedSequence(seed).generate_state(1, np.uint64) | np.uint64(1)
    features = np.zeros((devices, NUM_FEATURES), np.float32)
    if forced is None:
        forced = np.full(classes, -1, np.int32)
    whole = _roll(tables, new_state(tables), weights, float(temperature), forced, random, features, out)
    return out[:whole]


@numba.njit(cache=True)
def _softmax(scores, mask, allowed, row):
    """Fill probabilities: softmax over the mask; where it is empty, uniform over what is allowed, else over all."""
    best, choices = -np.inf, 0
    for d in range(mask.shape[0]):
        choices += allowed[d]
        if mask[d]:
            best = max(best, scores[d])
    total = 0.0
    for d in range(mask.shape[0]):
        if best > -np.inf:
            row[d] = np.exp(scores[d] - best) if mask[d] else 0.0
        else:
            row[d] = 1.0 if choices == 0 or allowed[d] else 0.0
        total += row[d]
    for d in range(mask.shape[0]):
        row[d] /= total


@numba.njit(cache=True)
def _follow(tables, state, weights, actions, features, out):
    classes, devices = tables.can_run.shape
    mask = np.zeros(devices, np.bool_)
    scores = np.zeros(devices, np.float32)
    begin(tables, state, mask, features)
    alive = True
    for step in range(classes):
        if alive:
            score_devices(weights, features, scores)
        else:
            mask[:] = False
        _softmax(scores, mask, tables.can_run[step], out[step])
        # Past the mask the schedule still has a meaning, on a device that can't run the class it has none.
        alive = alive and tables.can_run[step, actions[step]]
        if alive:
            advance(tables, state, actions[step], mask, features)


def follow(tables: Tables, weights: Weights, actions: NDArray[np.int32]) -> NDArray[np.float32]:
    """Return the policy's probabilities of every device at every decision along given decisions.

    Args:
        tables: Of the problem.
        weights: Of the policy.
        actions: int32[C], device of each class. One that the mask forbids is taken all the same while the device can
            run the class.

    Returns:
        float32[C, D]; rows sum to 1. Rows in which no device is allowed, and all rows after a class is on a device that
        cannot run it, are uniform over the devices that can.
    """
    out = np.empty(tables.can_run.shape, np.float32)
    features = np.zeros((tables.can_run.shape[1], NUM_FEATURES), np.float32)
    _follow(tables, new_state(tables), weights, actions, features, out)
    return out
