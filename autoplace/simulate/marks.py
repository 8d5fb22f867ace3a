"""What is kept of the current plan's run so that another can begin in its middle, or end where the two are alike.

A mark is all that the rest of a run depends on, at the beginning of a round (→ `kernels`): what devices do, what is
queued, what has some of its inputs, when links are free. It does not know plans or limits (→ `restart`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoplace.jit import inline
from autoplace.simulate.arrays import HEAP, Arrays
from autoplace.simulate.primitives import IDLE, INF

__all__ = ["EPOCH", "MARKS", "OPEN", "POOL", "Runs", "build_runs", "close_marks", "mark_before", "set_mark",
           "shift_since", "start_at", "steps_by_mark"]  # fmt: skip

EPOCH, MARKS, POOL, OPEN, COUNTERS = 0, 1, 2, 3, 4
"""Number of the run; marks set; entries used in `pool`; ops that have some of their inputs, while recording."""

MARKS_BY_RUN, STEPS_BY_MARK, POOL_BY_OP = 1024, 8, 8
"""At most so many marks a run, at least so many ops from mark to mark, so many entries an op to keep the marks in."""

LONG_QUEUE = 16
"""Longer ones are compared by their moments alone, shorter ones by their order as well."""

MARK = np.dtype(
    [("steps", "i4"), ("first", "i4"), ("last", "i4"), ("now_ms", "f8"), ("makespan_ms", "f8"), ("span_ms", "f8"),
     ("later_ms", "f8")],
    align=True,
)  # fmt: skip
"""Ops started before; range in `pool`; the round's moment; last finish before, from here to the next mark, and on."""

MARK_DEVICE = np.dtype(
    [("queue_size", "i4"), ("urgent_size", "i4"), ("until_ms", "f8"), ("next_ms", "f8"), ("busy_ms", "f8")], align=True
)
POOLED = np.dtype([("key", "f8"), ("item", "i4"), ("missing", "i4")], align=True)
"""Per mark: for each device its `queue` and its `urgent`, as they lie; then ops that have some of their inputs."""


class Runs(NamedTuple):
    """The state of runs, and what was recorded of the current plan's. M ops, D devices, K marks."""

    rules: NDArray[np.void]
    """RULES[1]."""
    ops: NDArray[np.void]
    """OPS[M]; `device`, between trials, is the current plan's and `step` the place in its order of starts."""
    devices: NDArray[np.void]
    """DEVICES[D]; `queue_base` leaves room for all ops on one device."""
    links: NDArray[np.void]
    """LINKS[D + 1, D + 1]."""
    queue: NDArray[np.void]
    """HEAP[D * M]."""
    urgent: NDArray[np.void]
    """HEAP[D * M], or empty."""
    counters: NDArray[np.int64]
    """int64[4]."""
    marks: NDArray[np.void]
    """MARK[K]."""
    mark_devices: NDArray[np.void]
    """MARK_DEVICE[K, D]."""
    mark_links_ms: NDArray[np.float64]
    """float64[K, D + 1, D + 1], when links are free."""
    pool: NDArray[np.void]
    """POOLED."""
    open: NDArray[np.int32]
    """int32[2, M], ops that have some of their inputs, and the place of each in there."""
    place: NDArray[np.int32]
    """int32[M], of each op in the topological order."""
    path_ms: NDArray[np.float64]
    """float64[M], longest path from an op's start to the end under the current plan, uncontended."""
    least_ms: NDArray[np.float64]
    """float64[M], a bound below the longest path from an op's finish to the end under any plan."""


def build_runs(arrays: Arrays, *, used: bool) -> Runs:
    """Lay out the state of runs, with arrays of its own; empty where none will be."""
    ops, devices = len(arrays.ops) if used else 0, len(arrays.devices)
    every = _steps_by_mark(ops)
    count = ops // every + 2
    own = arrays.devices.copy()
    own["queue_base"] = np.arange(devices) * ops
    place = np.empty(ops, np.int32)
    if used:
        place[arrays.order] = np.arange(ops, dtype=np.int32)
    return Runs(
        rules=arrays.rules.copy(),
        ops=arrays.ops[:ops].copy(),
        devices=own,
        links=arrays.links.copy(),
        queue=np.zeros(devices * ops, HEAP),
        urgent=np.zeros(devices * ops if arrays.rules["ranked"][0] else 0, HEAP),
        counters=np.zeros(COUNTERS, np.int64),
        marks=np.zeros(count, MARK),
        mark_devices=np.zeros((count, devices), MARK_DEVICE),
        mark_links_ms=np.zeros((count, devices + 1, devices + 1)),
        pool=np.zeros(POOL_BY_OP * ops, POOLED),
        open=np.zeros((2, ops), np.int32),
        place=place,
        path_ms=np.zeros(ops),
        least_ms=np.zeros(ops),
    )


def _steps_by_mark(ops: int) -> int:
    return max(STEPS_BY_MARK, ops // MARKS_BY_RUN + 1)


steps_by_mark = inline(_steps_by_mark)


@inline
def mark_before(runs, step):
    """Return the last mark set before the op of a step started; COLD when there is none."""
    low, high = 0, runs.counters[MARKS]
    while low < high:
        middle = (low + high) // 2
        if runs.marks[middle].steps <= step:
            low = middle + 1
        else:
            high = middle
    return low - 1


@inline
def set_mark(runs, steps, now, makespan_ms):
    """Keep the state at the beginning of a round; return whether there was room for it."""
    mark, at, size = runs.counters[MARKS], runs.counters[POOL], runs.counters[OPEN]
    for d in range(len(runs.devices)):
        size += runs.devices[d].queue_size + runs.devices[d].urgent_size
    if mark == len(runs.marks) or at + size > len(runs.pool):
        return False
    runs.marks[mark].steps = steps
    runs.marks[mark].now_ms = now
    runs.marks[mark].makespan_ms = makespan_ms
    runs.marks[mark].first = at
    for d in range(len(runs.devices)):
        base = runs.devices[d].queue_base
        runs.mark_devices[mark, d].queue_size = runs.devices[d].queue_size
        runs.mark_devices[mark, d].urgent_size = runs.devices[d].urgent_size
        runs.mark_devices[mark, d].until_ms = runs.devices[d].until_ms
        runs.mark_devices[mark, d].next_ms = runs.devices[d].next_ms
        runs.mark_devices[mark, d].busy_ms = runs.devices[d].busy_ms
        for k in range(base, base + runs.devices[d].queue_size):
            runs.pool[at].key = runs.queue[k].key
            runs.pool[at].item = runs.queue[k].item
            at += 1
        for k in range(base, base + runs.devices[d].urgent_size):
            runs.pool[at].key = runs.urgent[k].key
            runs.pool[at].item = runs.urgent[k].item
            at += 1
    for k in range(runs.counters[OPEN]):
        op = runs.open[0, k]
        runs.pool[at].key = runs.ops[op].ready_ms
        runs.pool[at].item = op
        runs.pool[at].missing = runs.ops[op].missing
        at += 1
    for s in range(len(runs.links)):
        for d in range(len(runs.links)):
            runs.mark_links_ms[mark, s, d] = runs.links[s, d].free_ms
    runs.marks[mark].last = at
    runs.counters[POOL] = at
    runs.counters[MARKS] = mark + 1
    return True


@inline
def start_at(runs, mark, epoch):
    """Return to the state of a mark."""
    at = runs.marks[mark].first
    for d in range(len(runs.devices)):
        base = runs.devices[d].queue_base
        runs.devices[d].running = runs.devices[d].stamp = IDLE
        runs.devices[d].queue_size = runs.mark_devices[mark, d].queue_size
        runs.devices[d].urgent_size = runs.mark_devices[mark, d].urgent_size
        runs.devices[d].until_ms = runs.mark_devices[mark, d].until_ms
        runs.devices[d].next_ms = runs.mark_devices[mark, d].next_ms
        runs.devices[d].busy_ms = runs.mark_devices[mark, d].busy_ms
        for k in range(base, base + runs.devices[d].queue_size):
            runs.queue[k].key = runs.pool[at].key
            runs.queue[k].item = runs.pool[at].item
            at += 1
        for k in range(base, base + runs.devices[d].urgent_size):
            runs.urgent[k].key = runs.pool[at].key
            runs.urgent[k].item = runs.pool[at].item
            at += 1
    opened = 0
    while at < runs.marks[mark].last:
        op = runs.pool[at].item
        runs.ops[op].epoch = epoch
        runs.ops[op].ready_ms = runs.pool[at].key
        runs.ops[op].missing = runs.pool[at].missing
        runs.open[0, opened] = op
        runs.open[1, op] = opened
        opened += 1
        at += 1
    runs.counters[OPEN] = opened
    if runs.rules[0].contended:
        for s in range(len(runs.links)):
            for d in range(len(runs.links)):
                runs.links[s, d].free_ms = runs.mark_links_ms[mark, s, d]


@inline
def _alike(found, wanted, shift, slack, now):
    """Return whether a moment is that of the recorded run, shifted, or lies in the past of both."""
    if found < now and wanted < now - shift:
        return True
    if found == INF or wanted == INF:
        return found == wanted
    return abs(found - wanted - shift) <= slack


@inline
def _same_queue(runs, d, at, shift, slack, now):
    """Return whether a queue holds the recorded ops, to be taken in the same order."""
    base, size = runs.devices[d].queue_base, runs.devices[d].queue_size
    for i in range(size):
        key, wanted = runs.queue[base + i].key, runs.pool[at + i].key
        if runs.queue[base + i].item != runs.pool[at + i].item or not _alike(key, wanted, shift, slack, now):
            return False
        if abs(key - wanted - shift) <= slack:
            continue
        if size > LONG_QUEUE:
            return False
        for j in range(size):  # an old one: it keeps its place among the others
            if (key < runs.queue[base + j].key) != (wanted < runs.pool[at + j].key):
                return False
            if (key > runs.queue[base + j].key) != (wanted > runs.pool[at + j].key):
                return False
    return True


@inline
def shift_since(runs, mark, epoch, now):
    """Return by how much later than the recorded run, from a mark on, the rest of this one is, ms; inf if it differs.

    Equal queues mean that the same ops have started. What lies before `now` in both has no say in what follows. A
    shift of 0 is exact; another is one up to rounding.
    """
    at = runs.marks[mark].first
    shift = now - runs.marks[mark].now_ms
    slack = 0.0 if shift == 0.0 else 1e-12 * now
    for d in range(len(runs.devices)):
        queued, urgent = runs.devices[d].queue_size, runs.devices[d].urgent_size
        if queued != runs.mark_devices[mark, d].queue_size or urgent != runs.mark_devices[mark, d].urgent_size:
            return INF
        if not _alike(runs.devices[d].next_ms, runs.mark_devices[mark, d].next_ms, shift, slack, now):
            return INF
        if not _alike(runs.devices[d].until_ms, runs.mark_devices[mark, d].until_ms, shift, slack, now):
            return INF
        if not _same_queue(runs, d, at, shift, slack, now):
            return INF
        at += queued
        for k in range(urgent):
            entry = runs.devices[d].queue_base + k
            if runs.urgent[entry].item != runs.pool[at].item or runs.urgent[entry].key != runs.pool[at].key:
                return INF
            at += 1
    while at < runs.marks[mark].last:
        op = runs.pool[at].item
        if runs.ops[op].epoch != epoch or runs.ops[op].missing != runs.pool[at].missing:
            return INF
        if not _alike(runs.ops[op].ready_ms, runs.pool[at].key, shift, slack, now):
            return INF
        at += 1
    if runs.rules[0].contended:
        for s in range(len(runs.links)):
            for d in range(len(runs.links)):
                if not _alike(runs.links[s, d].free_ms, runs.mark_links_ms[mark, s, d], shift, slack, now):
                    return INF
    return shift


@inline
def close_marks(runs, span_ms):
    """Note with every mark the last finish after it."""
    last = runs.counters[MARKS] - 1
    runs.marks[last].span_ms = span_ms
    later = 0.0
    for mark in range(last, -1, -1):
        later = max(later, runs.marks[mark].span_ms)
        runs.marks[mark].later_ms = later
