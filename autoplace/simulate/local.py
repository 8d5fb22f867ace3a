"""Local moves: what a changed plan costs, asked by compiled search loops one move at a time.

The figures are those of `SimulatedEvaluator.score`. A search fills `Local.plan`, calls `begin`, then `trial` for every
move it thinks of and `keep` for those it takes. All three are compiled, allocate nothing, and may be called from
compiled code of other rooms; what does so and is cached on disk closes over `local_version()`, since a cache notices
changes of its own file only.

What a move costs:

- Loads, memory and faults are kept up to date op by op (→ `loads`). They answer for `goal: throughput`, unless memory
  that is freed decides, and refuse in all modes what cannot run, does not fit, or cannot meet the limit.
- The schedules of `ahead` run from the move on, and only as long as they can meet the limit (→ `restart`).
- All other schedules run in full.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoplace.jit import compiled, digest, inline
from autoplace.simulate.arrays import Arrays
from autoplace.simulate.evaluator import SimulatedEvaluator
from autoplace.simulate.kernels import evaluate_plans
from autoplace.simulate.loads import (
    APART,
    CANNOT,
    MISSING_LINKS,
    Loads,
    build_loads,
    busiest_ms,
    fits,
    recount,
    remember,
    restore,
    shift,
    unshift,
    value,
    weights_fit,
)
from autoplace.simulate.marks import Runs, build_runs, mark_before
from autoplace.simulate.primitives import INF, rank, sources_version
from autoplace.simulate.restart import COLD, fill_least, fill_paths, run

__all__ = ["Local", "begin", "keep", "local_version", "new_local", "trial"]

MOVED, SPREAD, RECORDED, KEPT, COUNTERS = 0, 1, 2, 3, 4
"""Length of the last trial; whether the sums are of a plan on several devices whose latencies are others; whether
`runs` knows the current plan's run; plans kept since the sums were counted."""

BY_LOADS, AHEAD, RANKED, WHOLE = 0, 1, 2, 3
"""How a plan is evaluated: no schedule; from a mark on; from the beginning, up to the limit; in full."""

KEEPS_BY_COUNT = 4096
"""Plans kept before the sums are counted anew. Each adds rounding errors of 1e-16 of the largest sum."""

LEAST_SHARE = 1e-3
"""Where J's time is a smaller part of what the sums were, they have lost too many digits and a plan runs in full."""

MARGIN = 1.0 + 1e-9
"""A bound refuses a plan only beyond the limit by more than rounding explains."""


class Local(NamedTuple):
    """A plan, and all that its changes are evaluated with. N ops, D devices. Two threads must not share one."""

    plan: NDArray[np.int32]
    """int32[1, N], the current plan: device index of every op. Filled by the caller before `begin`, then by `keep`."""
    arrays: Arrays
    """With the latencies of plans on one device; its own, written to when a plan runs in full."""
    spread_ms: NDArray[np.float64]
    """float64[M, D], latencies of plans on several devices."""
    switches: NDArray[np.bool_]
    """bool[1], whether these two differ."""
    loads: Loads
    """Sums of the current plan."""
    runs: Runs
    """The current plan's run; of one op where no run is begun in the middle."""
    mode: NDArray[np.int64]
    """int64[1], `BY_LOADS`, `AHEAD`, `RANKED` or `WHOLE`."""
    largest_ms: NDArray[np.float64]
    """float64[1], the largest sum since they were counted."""
    moved: NDArray[np.int32]
    """int32[3, N]: ops of the last trial, where they go, and where they were."""
    counters: NDArray[np.int64]
    """int64[4], of this module."""
    figures: NDArray[np.float64]
    """float64[4, 1], scratch of `evaluate_plans`."""
    status: NDArray[np.int8]
    """int8[1], scratch of `evaluate_plans`."""


_WRITTEN = ("rules", "ops", "devices", "tensors", "edges", "links", "queue", "urgent", "legs", "waits")
"""The arrays that a run writes to, or that are small."""


def _mode(arrays: Arrays) -> int:
    rules = arrays.rules[0]
    if rules["throughput"]:
        return BY_LOADS
    if rules["blocking"] or (rules["host"] and rules["contended"]):
        return WHOLE
    return RANKED if rules["ranked"] and not rules["by_part"] else AHEAD


def new_local(evaluator: SimulatedEvaluator) -> Local:
    """Return the state of a search by local moves, with arrays of its own; the plan is all zeros."""
    arrays, spread = evaluator._arrays, evaluator._spread_ms
    own = arrays._replace(**{name: getattr(arrays, name).copy() for name in _WRITTEN})
    mode, ops = _mode(own), evaluator.problem.num_ops
    return Local(
        plan=np.zeros((1, ops), np.int32),
        arrays=own,
        spread_ms=own.latency_ms if spread is None else spread,
        switches=np.asarray([spread is not None]),
        loads=build_loads(own),
        runs=build_runs(own, used=mode in (AHEAD, RANKED)),
        mode=np.asarray([mode], np.int64),
        largest_ms=np.zeros(1),
        moved=np.zeros((3, ops), np.int32),
        counters=np.zeros(COUNTERS, np.int64),
        figures=np.zeros((4, 1)),
        status=np.zeros(1, np.int8),
    )


def local_version() -> int:
    """Return a number that changes with the sources of everything that a local move runs."""
    return sources_version() ^ digest(Path(__file__).with_name(f"{name}.py") for name in ("local", "loads", "restart"))


@inline
def _is_spread(local):
    """Return whether the latencies of plans on several devices count, and are others."""
    used = 0
    for d in range(len(local.arrays.devices)):
        used += local.loads.sums[0, d].ops > 0
    return local.switches[0] and used > 1


@inline
def _limit_ms(arrays, loads, limit):
    """Return a time at or above the one at which J is the limit, ms; Newton's steps come from above."""
    weight = arrays.rules[0].energy_weight
    if weight == 0.0 or limit == INF:
        return limit
    idle = busy = 0.0
    for d in range(len(arrays.devices)):
        idle += arrays.devices[d].idle_watts
        busy += arrays.devices[d].extra_watts * loads.sums[0, d].busy_ms
    time = busiest_ms(arrays, loads)
    if time <= 0.0 or busy < 0.0 or limit <= 0.0 or (weight == 1.0 and idle == 0.0):
        return INF
    log_time, wanted = math.log(time), math.log(limit)
    for _ in range(6):
        energy = (idle * math.exp(log_time) + busy) / 1000.0
        if energy <= 0.0:
            return INF
        slope = (1.0 - weight) + weight * idle * math.exp(log_time) / (1000.0 * energy)
        if slope < 1e-6:
            return INF
        log_time += min(50.0, (wanted - (1.0 - weight) * log_time - weight * math.log(energy)) / slope)
    return math.exp(log_time) * MARGIN


@inline
def _place(local, op, device):
    """Move the split ops of an unsplit one in the runs."""
    for c in range(local.loads.copy_offsets[op], local.loads.copy_offsets[op + 1]):
        local.runs.ops[local.loads.copies[c]].device = device


@inline
def _extent(local, count):
    """Return what moved ops concern: the first step that knows of them, the last that is one, the last place."""
    ops, inputs = local.runs.ops, local.arrays.inputs
    first, settled, last_place = len(ops), -1, -1
    for k in range(count):
        op = local.moved[0, k]
        for c in range(local.loads.copy_offsets[op], local.loads.copy_offsets[op + 1]):
            copy = local.loads.copies[c]
            settled, last_place = max(settled, ops[copy].step), max(last_place, local.runs.place[copy])
            if ops[copy].num_inputs == 0:
                first = -1
            for i in range(ops[copy].first_input, ops[copy].last_input):
                first = min(first, ops[inputs[i]].step)
    return first, settled, last_place


def _entries(version):  # type: ignore[no-untyped-def]
    """Build the entries for one version of the sources: what they close over is part of their key in the cache.

    They call each other by their global names: a compiled function closed over has another key in every process. What
    they pass on is no literal, for which the callee would be compiled once more: `version` is more than 0.
    """

    @compiled
    def _evaluate(local, spread):
        """Return J of the current plan by running it in full."""
        a = local.arrays
        latency_ms = local.spread_ms if spread else a.latency_ms
        whole = (
            a.can_run, a.colocate_first, latency_ms, a.order, a.sources, a.outputs, a.inputs, a.consumers, a.rules,
            a.ops, a.devices, a.tensors, a.edges, a.links, a.queue, a.urgent, a.legs, a.waits, a.log,
        )  # fmt: skip
        evaluate_plans(whole, local.plan, version < 0, local.figures, local.status)
        return local.figures[0, 0]

    @compiled
    def _recorded(local, mark, last_place):
        """Run the current plan from a mark on and set marks; return the makespan."""
        a, runs = local.arrays, local.runs
        latency_ms = local.spread_ms if local.counters[SPREAD] else a.latency_ms
        fill_paths(a, runs, latency_ms, last_place)
        return run(a, runs, local.loads.sums, latency_ms, mark, len(runs.ops), last_place, INF, version > 0)

    @compiled
    def _count_sums(local):
        """Count the sums of the current plan anew."""
        for d in range(len(local.arrays.devices)):
            local.loads.sums[0, d].ops = 0
        for i in range(local.plan.shape[1]):
            local.loads.sums[0, local.plan[0, i]].ops += 1 if version else 0
        spread = _is_spread(local)
        local.counters[SPREAD] = spread
        local.counters[KEPT] = 0
        recount(local.arrays, local.loads, local.spread_ms if spread else local.arrays.latency_ms, local.plan)
        local.largest_ms[0] = busiest_ms(local.arrays, local.loads)

    @compiled
    def _begin(local):
        """Evaluate `local.plan` in full and make it the plan that moves start from; return J, inf if infeasible."""
        local.counters[MOVED] = 0
        local.counters[RECORDED] = False
        count_sums(local)
        if local.mode[0] == AHEAD or local.mode[0] == RANKED:
            for i in range(local.plan.shape[1]):
                _place(local, i, local.plan[0, i])
            fill_least(local.arrays, local.runs)
            if local.mode[0] == AHEAD and local.loads.faults[0, CANNOT] + local.loads.faults[0, MISSING_LINKS] == 0:
                recorded(local, np.int64(COLD), len(local.runs.ops) - 1)
                local.counters[RECORDED] = True
        return evaluate(local, local.counters[SPREAD] > 0) if version else INF

    @compiled
    def _scheduled(local, limit):
        """Return J of the changed plan by running it as far as the limit allows."""
        a, runs, moved = local.arrays, local.runs, local.moved
        latency_ms = local.spread_ms if local.counters[SPREAD] else a.latency_ms
        for k in range(local.counters[MOVED]):
            _place(local, moved[0, k], moved[1, k])
        mark, settled, last_place = COLD, len(runs.ops), len(runs.ops)
        if local.counters[RECORDED]:
            first, settled, last_place = _extent(local, local.counters[MOVED])
            mark = mark_before(runs, first)
        if local.mode[0] == RANKED:
            rank(runs.rules, runs.ops, a.devices, a.tensors, a.edges, a.links, latency_ms, a.order)
        most_ms = _limit_ms(a, local.loads, limit) * MARGIN
        time = run(a, runs, local.loads.sums, latency_ms, mark, settled, last_place, most_ms, version < 0)
        for k in range(local.counters[MOVED] - 1, -1, -1):
            _place(local, moved[0, k], moved[2, k])
        return time if time == INF else value(a, local.loads, time)

    @compiled
    def _judge(local, limit):
        """Return J of the changed plan, for which plan and sums stand; inf where it may be more than the limit."""
        a, loads = local.arrays, local.loads
        if loads.faults[0, CANNOT] + loads.faults[0, APART] + loads.faults[0, MISSING_LINKS] > 0:
            return INF
        fit = fits(a, loads)
        if not fit and not (a.rules[0].any_frees and weights_fit(a, loads)):
            return INF
        spread = _is_spread(local)
        if spread != (local.counters[SPREAD] > 0):
            return evaluate(local, spread)
        busiest = busiest_ms(a, loads)
        if busiest < LEAST_SHARE * local.largest_ms[0]:
            return evaluate(local, spread)
        least = value(a, loads, busiest)
        if least > limit * MARGIN:
            return INF
        if local.mode[0] == BY_LOADS and fit:
            return least
        if fit and (local.mode[0] == AHEAD or local.mode[0] == RANKED):
            return scheduled(local, limit)
        return evaluate(local, spread) if version else INF

    @compiled
    def _trial(local, ops, devices, count, limit):
        """Return what the current plan would cost with some ops on other devices; it stays as it is.

        Args:
            local: `Local`, begun.
            ops: int32[K], ops to move; K at least `count`. One named twice goes to the last of its devices.
            devices: int32[K], where each goes; neither is checked.
            count: How many of them, at most N.
            limit: What the caller can still use, may be inf.

        Returns:
            J of the changed plan; inf where it is infeasible or J exceeds the limit.
        """
        arrays, loads, plan, moved = local.arrays, local.loads, local.plan, local.moved
        latency_ms = local.spread_ms if local.counters[SPREAD] else arrays.latency_ms
        remember(loads)
        for k in range(count):
            moved[0, k] = ops[k]
            moved[1, k] = devices[k]
            moved[2, k] = plan[0, ops[k]]
            shift(arrays, loads, latency_ms, plan, ops[k], devices[k])
        local.counters[MOVED] = count if version else 0
        objective = judge(local, limit)
        for k in range(count - 1, -1, -1):
            unshift(arrays, loads, plan, moved[0, k], moved[2, k])
        restore(loads)
        return INF if objective > limit else objective

    @compiled
    def _keep(local):
        """Make the plan of the last trial, which returned a finite J, the current one."""
        arrays, loads, moved = local.arrays, local.loads, local.moved
        latency_ms = local.spread_ms if local.counters[SPREAD] else arrays.latency_ms
        changes = False
        for k in range(local.counters[MOVED]):
            changes = changes or moved[1, k] != local.plan[0, moved[0, k]]
            shift(arrays, loads, latency_ms, local.plan, moved[0, k], moved[1, k])
        if not changes:
            local.counters[MOVED] = 0
            return
        busiest = busiest_ms(arrays, loads)
        local.largest_ms[0] = max(local.largest_ms[0], busiest)
        local.counters[KEPT] += 1 if version else 0
        switched = _is_spread(local) != (local.counters[SPREAD] > 0)
        if switched or local.counters[KEPT] >= KEEPS_BY_COUNT or busiest < LEAST_SHARE * local.largest_ms[0]:
            count_sums(local)
        if local.mode[0] == AHEAD or local.mode[0] == RANKED:
            mark, last_place = COLD, len(local.runs.ops) - 1
            if local.counters[RECORDED] and not switched:
                first, _, last_place = _extent(local, local.counters[MOVED])
                mark = mark_before(local.runs, first)
            for k in range(local.counters[MOVED]):
                _place(local, moved[0, k], moved[1, k])
            if local.mode[0] == AHEAD:
                recorded(local, mark, last_place)
                local.counters[RECORDED] = True
        local.counters[MOVED] = 0

    return _evaluate, _recorded, _count_sums, _begin, _scheduled, _judge, _trial, _keep


evaluate, recorded, count_sums, begin, scheduled, judge, trial, keep = _entries(local_version())
