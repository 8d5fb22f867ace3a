"""Whole placements by the policy, without torch: the network's forward pass in numba, fused with the features.

Agrees with `policy.network` to float32 rounding; a test holds it. One core, hundreds of placements a second at 200 ops
and 4 devices. What the columns that never change add to the first layer is computed once per class and device, so that
they cost a rollout nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoplace.jit import compiled, inline, new_random, uniform
from autoplace.policy._compile import sources_version
from autoplace.policy.columns import NUM_FEATURES
from autoplace.policy.fill import fill_moving
from autoplace.policy.mask import fill_mask
from autoplace.policy.partial import STEP, commit, new_state, reset
from autoplace.policy.scorer import Weights, fill_static, new_workspace, score_devices
from autoplace.policy.tables import Tables

__all__ = ["follow", "roll"]


@inline
def _choose(scores, mask, temperature, random):
    """Return the best allowed device, or one drawn from softmax(scores / temperature)."""
    best = -1
    for d in range(mask.shape[0]):
        if mask[d] and (best < 0 or scores[d] > scores[best]):
            best = d
    if temperature <= 0.0:
        return best
    weight = 0.0
    for d in range(mask.shape[0]):
        if mask[d]:
            weight += np.exp((scores[d] - scores[best]) / temperature)
    point = uniform(random) * weight
    for d in range(mask.shape[0]):
        if mask[d]:
            point -= np.exp((scores[d] - scores[best]) / temperature)
            if point < 0.0:
                return d
    return best


@inline
def _softmax(scores, mask, allowed, row):
    """Fill probabilities: softmax over the mask; where it is empty, uniform over what is allowed, else over all."""
    best, choices = -np.inf, 0
    for d in range(mask.shape[0]):
        choices += 1 if allowed[d] else 0
        if mask[d]:
            best = max(best, scores[d])
    weight = 0.0
    for d in range(mask.shape[0]):
        if best > -np.inf:
            row[d] = np.exp(scores[d] - best) if mask[d] else 0.0
        else:
            row[d] = 1.0 if choices == 0 or allowed[d] else 0.0
        weight += row[d]
    for d in range(mask.shape[0]):
        row[d] /= weight


@inline
def _look(tables, state, weights, work, mask, features, scores):
    """Score the devices for the current class."""
    row = fill_static(tables, weights, work, int(state.numbers[STEP]))
    fill_moving(tables, state, mask, features)
    score_devices(weights, work, row, features, scores)


def _entries(version: int) -> Any:
    """Compile the entries for one version of the sources: what they close over is part of their key in the cache."""

    @compiled
    def roll(tables, state, weights, work, temperature, forced, random, mask, features, scores, out):
        """→ `roll` below; returns how many rows of out are whole."""
        classes, whole = tables.can_run.shape[0], 0
        for _ in range(out.shape[0] if version else 0):
            reset(tables, state)
            found = True
            for step in range(classes):
                found = fill_mask(tables, state, mask)
                if not found:
                    break
                device = forced[step]
                if device < 0 or not mask[device]:
                    _look(tables, state, weights, work, mask, features, scores)
                    device = _choose(scores, mask, temperature, random)
                commit(tables, state, device)
            if found:
                for op in range(tables.class_of.shape[0]):
                    out[whole, op] = state.device_of[tables.class_of[op]]
                whole += 1
        return whole

    @compiled
    def follow(tables, state, weights, work, actions, mask, features, scores, out):
        """→ `follow` below."""
        reset(tables, state)
        alive = bool(version)
        for step in range(tables.can_run.shape[0]):
            mask[:] = False
            if alive and fill_mask(tables, state, mask):
                _look(tables, state, weights, work, mask, features, scores)
            _softmax(scores, mask, tables.can_run[step], out[step])
            # Past the mask the schedule still has a meaning; on a device that can't run the class it has none.
            alive = alive and tables.can_run[step, actions[step]]
            if alive:
                commit(tables, state, actions[step])

    return roll, follow


_roll, _follow = _entries(sources_version())


def _room(tables: Tables) -> tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.float32]]:
    """Return mask, features and scores to fill."""
    devices = tables.can_run.shape[1]
    return np.zeros(devices, np.bool_), np.zeros((devices, NUM_FEATURES), np.float32), np.zeros(devices, np.float32)


def roll(
    tables: Tables,
    weights: Weights,
    *,
    count: int,
    temperature: float,
    seed: int,
    forced: NDArray[np.int32] | None = None,
    masks: bool = True,
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
        masks: Whether masks are hard, see → `PartialPlacement`.

    Returns:
        int32[P, N] device indices, P <= count: placements in which some op had no allowed device are left out.
    """
    out = np.empty((count, tables.latency.shape[0]), np.int32)
    random = new_random(seed)
    if forced is None:
        forced = np.full(tables.can_run.shape[0], -1, np.int32)
    state, work = new_state(tables, masks=masks), new_workspace(tables, weights, keep=count > 1)
    whole = _roll(tables, state, weights, work, float(temperature), forced, random, *_room(tables), out)
    return out[:whole]


def follow(tables: Tables, weights: Weights, actions: NDArray[np.int32], *, masks: bool = True) -> NDArray[np.float32]:
    """Return the policy's probabilities of every device at every decision along given decisions.

    Args:
        tables: Of the problem.
        weights: Of the policy.
        actions: int32[C], device of each class. One that the mask forbids is taken all the same while the device can
            run the class.
        masks: Whether masks are hard, see → `PartialPlacement`.

    Returns:
        float32[C, D]; rows sum to 1. Rows in which no device is allowed, and all rows after a class is on a device that
        cannot run it, are uniform over the devices that can.
    """
    out = np.empty(tables.can_run.shape, np.float32)
    state, work = new_state(tables, masks=masks), new_workspace(tables, weights, keep=False)
    _follow(tables, state, weights, work, actions, *_room(tables), out)
    return out
