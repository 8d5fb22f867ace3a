"""The loop of `ahead`, begun anew in the middle: what a local move does not change is not run again.

While a plan is recorded, marks are set every few ops: all that the rest of the run depends on. An op that moves changes
nothing before the first of its producers starts, since that is when it is known where their results go; the run then
begins at the last mark before. It ends

- once no schedule of the changed plan can meet the limit: an op's finish and the longest path after it, or the load
  that its device still has, exceed it;
- where its state is the one that the recorded run had at a mark after the moved ops: the rest is then the same. If all
  moments are shifted by one amount, so is the end, which may then be beyond the limit. Moments are compared up to
  rounding there: where rounding decides a tie differently later on, the move is refused although it might be usable.

With `queue: priority` a move changes the order of what comes before it, so nothing is recorded and every run is whole.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoplace.simulate.ahead import begin_op, foresee, spreading
from autoplace.simulate.arrays import HEAP, Arrays
from autoplace.simulate.primitives import IDLE, INF, clear, compiled, inline, sources_version, transfer_ms

__all__ = ["COLD", "Runs", "build_runs", "fill_least", "fill_paths", "mark_before", "run"]

COLD = -1
"""Begin at the beginning."""

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


_steps_by_mark_compiled = inline(_steps_by_mark)


@inline
def fill_least(arrays, runs):
    """Fill `least_ms`."""
    for j in range(len(arrays.order) - 1, -1, -1):
        op = arrays.order[j]
        longest = 0.0
        for k in range(arrays.ops[op].first_edge, arrays.ops[op].last_edge):
            consumer = arrays.edges[k].consumer
            least = INF
            for d in range(len(arrays.devices)):
                least = min(least, arrays.latency_ms[consumer, d])
            longest = max(longest, least + runs.least_ms[consumer])
        runs.least_ms[op] = longest


@inline
def fill_paths(arrays, runs, latency_ms, last_place):
    """Fill `path_ms` of the ops up to a place in the topological order; what comes after it is as it was."""
    host = len(arrays.devices)
    for j in range(last_place, -1, -1):
        op = arrays.order[j]
        s = runs.ops[op].device
        longest = 0.0
        for k in range(arrays.ops[op].first_edge, arrays.ops[op].last_edge):
            consumer, size = arrays.edges[k].consumer, arrays.tensors[arrays.edges[k].tensor].bytes
            d = runs.ops[consumer].device
            path = runs.path_ms[consumer]
            if d != s and not arrays.rules[0].host:
                path += transfer_ms(arrays.links, s, d, size)
            elif d != s:
                way = 0.0 if arrays.devices[s].stays else transfer_ms(arrays.links, s, host, size)
                path += way + (0.0 if arrays.devices[d].stays else transfer_ms(arrays.links, host, d, size))
            longest = max(longest, path)
        runs.path_ms[op] = latency_ms[op, s] + longest


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
def _arrive(context, ops, devices, queue, op, when):
    """Do as `foresee` does; what an op was left with by another run is forgotten when its first input comes."""
    epoch, record, counters, opened = context
    if ops[op].epoch != epoch:
        ops[op].epoch = epoch
        ops[op].missing = ops[op].num_inputs
        ops[op].ready_ms = 0.0
        if record:
            opened[0, counters[OPEN]] = op
            opened[1, op] = counters[OPEN]
            counters[OPEN] += 1
    if record and ops[op].missing == 1:
        counters[OPEN] -= 1
        last = opened[0, counters[OPEN]]
        opened[0, opened[1, op]] = last
        opened[1, last] = opened[1, op]
    foresee(ops, devices, queue, op, when)


_spread = spreading(_arrive)


@inline
def _new_epoch(runs):
    if runs.counters[EPOCH] > 2_000_000_000:
        runs.counters[EPOCH] = 0
        for i in range(len(runs.ops)):
            runs.ops[i].epoch = 0
    runs.counters[EPOCH] += 1
    return runs.counters[EPOCH]


@inline
def _start_cold(arrays, runs, epoch):
    clear(runs.devices, runs.links)
    for k in range(len(arrays.sources)):
        op = arrays.sources[k]
        runs.ops[op].epoch = epoch
        runs.ops[op].missing = 1
        runs.ops[op].ready_ms = 0.0
        foresee(runs.ops, runs.devices, runs.queue, op, 0.0)


@inline
def _set_mark(runs, steps, now, makespan_ms):
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
def _start_at(runs, mark, epoch):
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
    return found == wanted or abs(found - wanted - shift) <= slack


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
def _shift_since(runs, mark, epoch, now):
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
def _hopeless(runs, sums, op, last_place, limit_ms):
    """Return whether a run in which `op` has just begun must end after the limit."""
    d, end = runs.ops[op].device, runs.ops[op].finish_ms
    if end + (sums[0, d].busy_ms - runs.devices[d].busy_ms) > limit_ms:
        return True
    if runs.rules[0].ranked and not runs.rules[0].by_part:
        return runs.ops[op].start_ms + runs.ops[op].rank_ms > limit_ms
    if runs.place[op] > last_place:
        return runs.ops[op].start_ms + runs.path_ms[op] > limit_ms
    return end + runs.least_ms[op] > limit_ms


@inline
def _close_marks(runs, span_ms):
    """Note with every mark the last finish after it."""
    last = runs.counters[MARKS] - 1
    runs.marks[last].span_ms = span_ms
    later = 0.0
    for mark in range(last, -1, -1):
        later = max(later, runs.marks[mark].span_ms)
        runs.marks[mark].later_ms = later


def _entry(version):  # type: ignore[no-untyped-def]
    """Build the entry for one version of the sources: what it closes over is part of its key in the cache."""

    @compiled
    def run(arrays, runs, sums, latency_ms, mark, settled, last_place, limit_ms, record):
        """Run the pass that `runs.ops` places, from a mark on.

        Args:
            arrays: `Arrays`, of which only what is given is read.
            runs: `Runs`; `rank_ms` filled where ops are ranked.
            sums: `loads.SUMS`[2, D]; the first row holds what each device has to do in all, ms.
            latency_ms: float64[M, D].
            mark: Where to begin, or COLD.
            settled: Steps of the recorded run after which nothing moved is left to start; M or more when unknown.
            last_place: The last place in the topological order from which `path_ms` does not hold.
            limit_ms: The makespan that the caller can still use, may be inf.
            record: Whether this is the current plan, whose marks are to be kept.

        Returns:
            The makespan, ms; inf where the run cannot end, or not before the limit.
        """
        epoch = _new_epoch(runs) if version else 0
        ops, devices, count = runs.ops, runs.devices, len(runs.ops)
        every = _steps_by_mark_compiled(count)
        runs.rules[0].lines = 0
        steps, makespan, span, next_mark = 0, 0.0, 0.0, 0
        runs.counters[OPEN] = 0
        if mark < 0:
            _start_cold(arrays, runs, epoch)
        else:
            _start_at(runs, mark, epoch)
            steps, makespan = runs.marks[mark].steps, runs.marks[mark].makespan_ms
            next_mark = steps + every
        if record:
            runs.counters[MARKS] = mark + 1
            runs.counters[POOL] = runs.marks[mark].last if mark >= 0 else 0
        watched = count if record else mark_before(runs, settled) + 1
        watched_steps = runs.marks[watched].steps if watched < runs.counters[MARKS] else count
        context = (epoch, record, runs.counters, runs.open)
        while steps < count:
            now, first, alone = INF, 0, True
            for d in range(len(devices)):
                moment = devices[d].next_ms
                if moment < now:
                    now, first, alone = moment, d, True
                elif moment == now:
                    alone = False
            if now == INF:
                return INF
            if record and steps >= next_mark:
                if _set_mark(runs, steps, now, makespan):
                    if runs.counters[MARKS] > 1:
                        runs.marks[runs.counters[MARKS] - 2].span_ms = span
                    span = 0.0
                next_mark = steps + every
            elif steps >= watched_steps:
                if steps == watched_steps:
                    shift = _shift_since(runs, watched, epoch, now)
                    if shift == 0.0:
                        return max(makespan, runs.marks[watched].later_ms)
                    if shift < INF and runs.marks[watched].later_ms + shift > limit_ms:
                        return INF
                while watched < runs.counters[MARKS] and runs.marks[watched].steps <= steps:
                    watched += 1
                watched_steps = runs.marks[watched].steps if watched < runs.counters[MARKS] else count
            op = begin_op(runs.rules, ops, devices, latency_ms, runs.queue, runs.urgent, first, now)
            hopeless = _hopeless(runs, sums, op, last_place, limit_ms)
            makespan, span = max(makespan, ops[op].finish_ms), max(span, ops[op].finish_ms)
            if record:
                ops[op].step = steps
            steps += 1
            if not alone:
                for d in range(first + 1, len(devices)):
                    devices[d].running = IDLE
                    if devices[d].next_ms == now:
                        other = begin_op(runs.rules, ops, devices, latency_ms, runs.queue, runs.urgent, d, now)
                        hopeless = hopeless or _hopeless(runs, sums, other, last_place, limit_ms)
                        makespan, span = max(makespan, ops[other].finish_ms), max(span, ops[other].finish_ms)
                        devices[d].running = other
                        if record:
                            ops[other].step = steps
                        steps += 1
            if hopeless:
                return INF
            _spread(
                context, runs.rules, ops, devices, arrays.tensors, arrays.edges, runs.links, runs.queue, arrays.log, op
            )
            if not alone:
                for d in range(first + 1, len(devices)):
                    if devices[d].running != IDLE:
                        _spread(
                            context, runs.rules, ops, devices, arrays.tensors, arrays.edges, runs.links, runs.queue,
                            arrays.log, devices[d].running,
                        )  # fmt: skip
        if record:
            _close_marks(runs, span)
        return makespan

    return run


run = _entry(sources_version())
