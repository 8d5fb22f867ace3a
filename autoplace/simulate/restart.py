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

from autoplace.jit import compiled, inline
from autoplace.simulate.ahead import begin_op, foresee, next_round, spreading
from autoplace.simulate.marks import (
    EPOCH,
    MARKS,
    OPEN,
    POOL,
    close_marks,
    mark_before,
    set_mark,
    shift_since,
    start_at,
    steps_by_mark,
)  # fmt: skip
from autoplace.simulate.primitives import IDLE, INF, clear, sources_version, transfer_ms

__all__ = ["COLD", "fill_least", "fill_paths", "run"]

COLD = -1
"""Begin at the beginning."""


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
def _begin(runs, sums, latency_ms, d, now, last_place, limit_ms):
    """Start the next op of a device; return it, and whether the run must end after the limit."""
    op = begin_op(runs.rules, runs.ops, runs.devices, latency_ms, runs.queue, runs.urgent, d, now)
    return op, _hopeless(runs, sums, op, last_place, limit_ms)


@inline
def _send(arrays, runs, context, op):
    _spread(
        context,
        runs.rules,
        runs.ops,
        runs.devices,
        arrays.tensors,
        arrays.edges,
        runs.links,
        runs.queue,
        arrays.log,
        op,
    )


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
        every = steps_by_mark(count)
        runs.rules[0].lines = 0
        steps, makespan, span, next_mark = 0, 0.0, 0.0, 0
        runs.counters[OPEN] = 0
        if mark < 0:
            _start_cold(arrays, runs, epoch)
        else:
            start_at(runs, mark, epoch)
            steps, makespan = runs.marks[mark].steps, runs.marks[mark].makespan_ms
            next_mark = steps + every
        if record:
            runs.counters[MARKS] = mark + 1
            runs.counters[POOL] = runs.marks[mark].last if mark >= 0 else 0
        watched = count if record else mark_before(runs, settled) + 1
        watched_steps = runs.marks[watched].steps if watched < runs.counters[MARKS] else count
        context = (epoch, record, runs.counters, runs.open)
        while steps < count:
            now, first, alone = next_round(devices)
            if now == INF:
                return INF
            if record and steps >= next_mark:
                if set_mark(runs, steps, now, makespan):
                    if runs.counters[MARKS] > 1:
                        runs.marks[runs.counters[MARKS] - 2].span_ms = span
                    span = 0.0
                next_mark = steps + every
            elif steps >= watched_steps:
                if steps == watched_steps:
                    shift = shift_since(runs, watched, epoch, now)
                    if shift == 0.0:
                        return max(makespan, runs.marks[watched].later_ms)
                    if shift < INF and runs.marks[watched].later_ms + shift > limit_ms:
                        return INF
                while watched < runs.counters[MARKS] and runs.marks[watched].steps <= steps:
                    watched += 1
                watched_steps = runs.marks[watched].steps if watched < runs.counters[MARKS] else count
            op, hopeless = _begin(runs, sums, latency_ms, first, now, last_place, limit_ms)
            makespan, span = max(makespan, ops[op].finish_ms), max(span, ops[op].finish_ms)
            if record:
                ops[op].step = steps
            steps += 1
            if not alone:
                for d in range(first + 1, len(devices)):
                    devices[d].running = IDLE
                    if devices[d].next_ms == now:
                        other, vain = _begin(runs, sums, latency_ms, d, now, last_place, limit_ms)
                        hopeless = hopeless or vain
                        makespan, span = max(makespan, ops[other].finish_ms), max(span, ops[other].finish_ms)
                        devices[d].running = other
                        if record:
                            ops[other].step = steps
                        steps += 1
            if hopeless:
                return INF
            _send(arrays, runs, context, op)
            if not alone:
                for d in range(first + 1, len(devices)):
                    if devices[d].running != IDLE:
                        _send(arrays, runs, context, devices[d].running)
        if record:
            close_marks(runs, span)
        return makespan

    return run


run = _entry(sources_version())
