"""The features of one decision, filled by kernels over `Tables` and `State`; their meaning: → `policy.columns`."""

from __future__ import annotations

import math

import numpy as np

from autoplace.jit import inline
from autoplace.policy._compile import TINY, clip, scaled, slog, total
from autoplace.policy.columns import (
    ALLOWED,
    BALANCE,
    BYTES_HERE,
    DATA_WAIT,
    DEMAND,
    EXISTS,
    FINISH_BEST,
    FINISH_GAP,
    FLUID,
    FLUID_GAP,
    FREE_GAP,
    HORIZON_PUSH,
    IDLE,
    LEVEL_DONE,
    LEVEL_HERE,
    LINK_PRESSURE,
    LINK_PUSH,
    LOAD_GAP,
    LOAD_PUSH,
    LOAD_SHARE,
    MAKESPAN_PUSH,
    MEMORY_AFTER,
    MEMORY_NEED,
    MEMORY_PRESSURE,
    MEMORY_SHARE,
    NUM_PAIR,
    NUM_PAIR_MOVING,
    NUM_SHARED_MOVING,
    OBJECTIVE_BEST,
    OBJECTIVE_GAP,
    PATH_BEST,
    PATH_GAP,
    PREVIOUS_HERE,
    PRODUCERS_HERE,
    PROGRESS,
    RECENT_HERE,
    REST_HERE,
    ROOM,
    SENT_SHARE,
    SIBLINGS_HERE,
    START_GAP,
    TAIL,
    TRAFFIC,
    TRANSFER,
    USE,
)
from autoplace.policy.partial import (
    ENERGY,
    HORIZON,
    LAST,
    MAKESPAN,
    MAX_LINK,
    MAX_LOAD,
    REMAINING,
    REMAINING_ENERGY,
    STEP,
    estimate,
    try_placing,
)

__all__ = ["fill_features", "fill_moving"]

MAX_FANOUT = 8
"""Consumers, and producers of each, that `siblings_here` visits."""
START, FINISH, READY, WAY, GUESS, LOAD, PATH, LINK, QUEUE, FLUID_AFTER = range(10)
"""Rows of `State.scratch`."""


@inline
def fill_features(tables, state, mask, out):
    """Fill all features of the current decision.

    Args:
        tables, state: The problem and the placement, not finished.
        mask: bool[D] from `fill_mask`.
        out: float32[D, F], filled; rows of devices in the cluster's order.
    """
    fill_moving(tables, state, mask, out)
    current = int(state.numbers[STEP])
    own, whole = tables.op_static[current], tables.global_static
    for d in range(mask.shape[0]):
        for j in range(tables.pair_static.shape[2]):
            out[d, NUM_PAIR_MOVING + j] = tables.pair_static[current, d, j]
        column = NUM_PAIR + NUM_SHARED_MOVING
        for j in range(NUM_PAIR, column):
            out[d, j] = out[0, j]
        for j in range(own.shape[0]):
            out[d, column + j] = own[j]
        column += own.shape[0]
        for j in range(whole.shape[0]):
            out[d, column + j] = whole[j]


@inline
def fill_moving(tables, state, mask, out):
    """Fill the features that change from decision to decision; of those that all devices share the first row alone."""
    current = int(state.numbers[STEP])
    op = _lead(tables, state, current)
    fluid = _fluid(tables, state, current, 0)
    _try_all(tables, state, current, op)
    for d in range(mask.shape[0]):
        out[d, EXISTS] = 1.0
        out[d, ALLOWED] = 1.0 if mask[d] else 0.0
    _fill_times(tables, state, current, mask, out)
    _fill_loads(tables, state, current, mask, fluid, out)
    _fill_neighbours(tables, state, op, out)
    _fill_memory(tables, state, current, out)
    _fill_shared(tables, state, current, op, fluid, out)


@inline
def _lead(tables, state, current):
    """Return the first op of the class whose producers are scheduled; the class's first op always is one."""
    for k in range(tables.class_offsets[current], tables.class_offsets[current + 1]):
        if state.pending[tables.class_members[k]] == 0:
            return tables.class_members[k]
    return tables.class_members[tables.class_offsets[current]]


@inline
def _fluid(tables, state, current, done):
    """Return T at which all work from class `current + done` on, poured over the devices, is used up, ms.

    Water filling: sum over devices of max(0, T - load) / (time of all that work there) = 1. With `done` 1 the work of
    the current class is taken to be in the loads.
    """
    devices, last = state.load.shape[0], tables.need.shape[0]
    highest = 0.0
    for d in range(devices):
        highest = max(highest, state.load[d])
    if current + done >= last:
        return highest
    level = np.inf
    for _ in range(devices):
        rate, amount = 0.0, 1.0
        for d in range(devices):
            if state.load[d] < level:
                speed = 1.0 / max(tables.fluid_latency[current + done, d], TINY)
                rate += speed
                amount += state.load[d] * speed
        lower = amount / rate
        if lower >= level:
            break
        level = lower
    return level


@inline
def _try_all(tables, state, current, op):
    """Fill the scratch rows, `START` to `FLUID_AFTER`; a device that can't run the class has inf."""
    scratch, numbers = state.scratch, state.numbers
    devices = state.load.shape[0]
    work = total(state.load) + numbers[REMAINING] - tables.class_min[current]
    energy = numbers[ENERGY] + numbers[REMAINING_ENERGY] - tables.class_min_energy[current]
    for d in range(devices):
        if not tables.can_run[current, d]:
            for row in range(10):
                scratch[row, d] = np.inf
            continue
        start, ready, transfer, link = try_placing(tables, state, op, d, scratch[QUEUE])
        finish = start + tables.latency[op, d]
        here = tables.class_latency[current, d]
        blocked = transfer if tables.flags[1] else 0.0
        after = state.load[d] + here + blocked
        path = finish + tables.tail[op, d]
        scratch[START, d], scratch[FINISH, d], scratch[READY, d], scratch[WAY, d] = start, finish, ready, transfer
        scratch[GUESS, d] = estimate(
            tables,
            max(numbers[HORIZON], path),
            max(numbers[MAX_LOAD], after),
            max(numbers[MAX_LINK], link),
            work + here + 2.0 * blocked,
            energy + here * tables.dynamic_watts[d],
            devices,
        )
        scratch[LOAD, d], scratch[PATH, d], scratch[LINK, d] = after, path, link
        before = state.load[d]
        state.load[d] = after
        scratch[FLUID_AFTER, d] = _fluid(tables, state, current, 1)
        state.load[d] = before


@inline
def _least(row, mask):
    """Return the least finite value where allowed, else the least finite value anywhere, else 0."""
    best, anywhere = np.inf, np.inf
    for d in range(mask.shape[0]):
        anywhere = min(anywhere, row[d])
        if mask[d]:
            best = min(best, row[d])
    if best < np.inf:
        return best
    return anywhere if anywhere < np.inf else 0.0


@inline
def _fill_times(tables, state, current, mask, out):
    scratch, numbers = state.scratch, state.numbers
    unit = tables.class_scale[current]
    start, finish = _least(scratch[START], mask), _least(scratch[FINISH], mask)
    path, goal = _least(scratch[PATH], mask), _least(scratch[GUESS], mask)
    balanced = (total(state.load) + numbers[REMAINING]) / mask.shape[0]
    share = max(max(numbers[HORIZON], balanced), TINY) / unit
    for d in range(mask.shape[0]):
        out[d, START_GAP] = scaled(scratch[START, d] - start, unit)
        out[d, FINISH_GAP] = scaled(scratch[FINISH, d] - finish, unit)
        out[d, FINISH_BEST] = 1.0 if scratch[FINISH, d] <= finish else 0.0
        out[d, MAKESPAN_PUSH] = scaled(scratch[FINISH, d] - numbers[MAKESPAN], unit)
        out[d, PATH_GAP] = scaled(scratch[PATH, d] - path, unit)
        out[d, PATH_BEST] = 1.0 if scratch[PATH, d] <= path else 0.0
        out[d, HORIZON_PUSH] = scaled(scratch[PATH, d] - numbers[HORIZON], unit)
        out[d, OBJECTIVE_GAP] = clip(slog(clip((scratch[GUESS, d] - goal) * share, 1e6)), 10.0)
        out[d, OBJECTIVE_BEST] = 1.0 if scratch[GUESS, d] <= goal + 1e-9 else 0.0
        out[d, TRANSFER] = scaled(scratch[WAY, d], unit)
        out[d, DATA_WAIT] = scaled(scratch[READY, d] - state.free[d], unit)


@inline
def _fill_loads(tables, state, current, mask, fluid, out):
    scratch, numbers = state.scratch, state.numbers
    unit, devices = tables.class_scale[current], mask.shape[0]
    balanced = max((total(state.load) + numbers[REMAINING]) / devices, TINY)
    whole = max(balanced, numbers[MAX_LOAD] if tables.flags[0] else numbers[HORIZON])
    free, load, after = _least(state.free, mask), _least(scratch[LOAD], mask), _least(scratch[FLUID_AFTER], mask)
    top, demand = max(fluid, numbers[MAX_LOAD]), 0.0
    for d in range(devices):
        demand += (state.load[d] + tables.suited[current, d]) / devices
    for d in range(devices):
        out[d, PREVIOUS_HERE] = 1.0 if int(numbers[LAST]) == d else 0.0
        out[d, RECENT_HERE] = state.recent[d]
        out[d, FREE_GAP] = scaled(state.free[d] - free, unit)
        out[d, LOAD_SHARE] = clip(state.load[d] / balanced, 10.0)
        out[d, LOAD_GAP] = scaled(scratch[LOAD, d] - load, unit)
        out[d, LOAD_PUSH] = scaled(scratch[LOAD, d] - numbers[MAX_LOAD], unit)
        out[d, LINK_PUSH] = scaled(scratch[LINK, d] - numbers[MAX_LINK], unit)
        rest = state.load[d] + tables.rest_latency[current, d]
        out[d, REST_HERE] = clip(math.log(max(min(rest, 1e6 * whole), TINY) / whole), 5.0)
        out[d, IDLE] = clip(1.0 - state.load[d] / max(state.free[d], TINY), 1.0) if state.free[d] > 0.0 else 0.0
        out[d, ROOM] = scaled(top - scratch[LOAD, d], unit)
        out[d, FLUID_GAP] = scaled((scratch[FLUID_AFTER, d] - after) * devices, unit)
        wanted = state.load[d] + tables.suited[current, d]
        out[d, DEMAND] = clip(math.log(max(wanted, TINY) / max(demand, TINY)), 5.0)
        out[d, SENT_SHARE] = clip(state.sent[d] / balanced, 10.0)
        level = tables.level_of[current]
        out[d, LEVEL_HERE] = clip(state.level_load[level, d] / max(tables.level_work[level], TINY), 1.0)


@inline
def _fill_neighbours(tables, state, op, out):
    for d in range(out.shape[0]):
        out[d, PRODUCERS_HERE] = out[d, BYTES_HERE] = out[d, SIBLINGS_HERE] = 0.0
    producers, size = 0.0, 0.0
    for k in range(tables.in_offsets[op], tables.in_offsets[op + 1]):
        tensor = tables.in_tensors[k]
        source = state.device_of[tables.class_of[tables.tensor_producer[tensor]]]
        if source >= 0:
            producers += 1.0
            size += tables.tensor_bytes[tensor]
            out[source, PRODUCERS_HERE] += 1.0
            for d in range(out.shape[0]):
                if d == source or state.arrival[tensor, d] >= 0.0:
                    out[d, BYTES_HERE] += tables.tensor_bytes[tensor]
    siblings = 0.0
    for k in range(tables.out_offsets[op], min(tables.out_offsets[op + 1], tables.out_offsets[op] + MAX_FANOUT)):
        tensor = tables.out_tensors[k]
        last = min(tables.consumer_offsets[tensor + 1], tables.consumer_offsets[tensor] + MAX_FANOUT)
        for j in range(tables.consumer_offsets[tensor], last):
            consumer = tables.consumers[j]
            end = min(tables.in_offsets[consumer + 1], tables.in_offsets[consumer] + MAX_FANOUT)
            for i in range(tables.in_offsets[consumer], end):
                other = state.device_of[tables.class_of[tables.tensor_producer[tables.in_tensors[i]]]]
                if other >= 0:
                    siblings += 1.0
                    out[other, SIBLINGS_HERE] += 1.0
    for d in range(out.shape[0]):
        out[d, PRODUCERS_HERE] /= max(producers, 1.0)
        out[d, BYTES_HERE] /= max(size, 1.0)
        out[d, SIBLINGS_HERE] /= max(siblings, 1.0)


@inline
def _fill_memory(tables, state, current, out):
    devices = state.left.shape[0]
    needed = tables.need_after[current]
    for d in range(devices):
        if state.left[d] < np.inf:
            after = state.left[d] - tables.need[current]
            out[d, MEMORY_AFTER] = clip(after / max(tables.capacity[d], 1.0), 1.0)
            out[d, MEMORY_NEED] = clip(tables.need[current] / max(state.left[d], 1.0), 2.0)
            out[d, MEMORY_SHARE] = clip(slog(clip(after * devices / max(needed, 1.0), 1e3) - 1.0), 5.0)
        else:
            out[d, MEMORY_AFTER], out[d, MEMORY_NEED], out[d, MEMORY_SHARE] = 1.0, 0.0, 5.0


@inline
def _fill_shared(tables, state, current, op, fluid, out):
    numbers, devices = state.numbers, state.load.shape[0]
    horizon, work = max(numbers[HORIZON], TINY), total(state.load)
    balanced = max((work + numbers[REMAINING]) / devices, TINY)
    tail = np.inf
    for d in range(devices):
        if tables.can_run[current, d]:
            tail = min(tail, tables.tail[op, d])
    row, first = out[0], NUM_PAIR
    row[first + PROGRESS] = clip(1.0 - numbers[REMAINING] / max(tables.numbers[2], TINY), 1.0)
    row[first + TAIL] = clip(tail / horizon, 1.0) if tail < np.inf else 1.0
    row[first + BALANCE] = clip(math.log(horizon / balanced), 5.0)
    left = total(state.left)
    row[first + MEMORY_PRESSURE] = clip(tables.need_after[current] / max(left, 1.0), 2.0) if left < np.inf else 0.0
    row[first + LINK_PRESSURE] = clip(numbers[MAX_LINK] / balanced, 5.0)
    row[first + FLUID] = clip(math.log(max(fluid, TINY) / balanced), 5.0)
    span = numbers[MAKESPAN] * devices
    row[first + USE] = clip(work / span, 2.0) if span > 0.0 else 1.0
    row[first + TRAFFIC] = clip(math.log1p(total(state.sent) / max(work, TINY)), 8.0) if work > 0.0 else 0.0
    level, done = tables.level_of[current], 0.0
    for d in range(devices):
        done += state.level_load[level, d]
    row[first + LEVEL_DONE] = clip(done / max(tables.level_work[level], TINY), 1.0)
