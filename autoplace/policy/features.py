"""What the policy sees of one decision: float32[D, F], one row per device, for the current co-location class.

Every feature is a ratio, a flag or a log ratio, so that one set of weights fits any unit, number of ops and number of
devices. "Gap" is the distance to the best allowed device, "push" the distance beyond the present value, both in units
of the class's mean latency and squeezed by slog(x) = sign(x) log(1 + |x|). The first `NUM_PAIR` features differ by
device, the others are the same in every row. Meaning and order belong to `FEATURE_VERSION`: change one, raise it.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from numpy.typing import NDArray

from autoplace.errors import InfeasibleError
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
    commit,
    current_estimate,
    estimate,
    fill_mask,
    new_state,
    reset,
    try_placing,
)
from autoplace.policy.tables import TINY, Tables, build_tables
from autoplace.problem import Problem

__all__ = ["FEATURES", "FEATURE_LIMIT", "FEATURE_VERSION", "NUM_FEATURES", "NUM_PAIR", "PartialPlacement"]

FEATURE_VERSION = 1
"""Policies are bound to it."""
FEATURE_LIMIT = 10.0
"""Every feature lies in [-10, 10]."""

PAIR_FEATURES = (
    ("exists", "1 for a device, 0 for padding"),
    ("allowed", "1 where the mask allows the device"),
    ("latency_log", "log of latency over the fastest device's, at most 5"),
    ("latency_mean", "latency over the mean, less 1"),
    ("slowness", "mean over all classes of latency_log, less the best device's"),
    ("energy_log", "log of energy above idle over the least device's; 0 when energy does not count"),
    ("affinity", "mean latency_log of the consumers: how badly the device suits what comes next"),
    ("start_gap", "earliest start, gap"),
    ("finish_gap", "earliest finish, gap"),
    ("finish_best", "1 where the finish is the earliest"),
    ("makespan_push", "finish beyond the makespan so far"),
    ("path_gap", "finish plus optimistic tail (PEFT), gap"),
    ("path_best", "1 where that is the least"),
    ("horizon_push", "finish plus optimistic tail beyond the horizon so far"),
    ("objective_gap", "guess at the final log J, gap in units of the class's share of the whole"),
    ("objective_best", "1 where that is the least"),
    ("transfer", "log(1 + incoming transfer time / mean latency)"),
    ("data_wait", "data ready less device free"),
    ("producers_here", "fraction of the decided producers that are here"),
    ("bytes_here", "fraction of the incoming bytes that are here"),
    ("siblings_here", "fraction of the decided producers of the consumers that are here"),
    ("previous_here", "1 where the last class went"),
    ("free_gap", "time at which the device is free, gap"),
    ("load_share", "load over the balanced load of the finished placement"),
    ("load_gap", "load after, gap"),
    ("load_push", "load after beyond the highest so far"),
    ("link_push", "highest incoming link load after beyond the highest so far"),
    ("memory_after", "fraction of memory left after; 1 when unlimited"),
    ("memory_need", "need of the class over memory left; 0 when unlimited"),
    ("memory_share", "slog of memory left after over a fair share of what is still needed, less 1; 5 when unlimited"),
    ("send_cost", "log(1 + mean time to send the output to another device / mean latency)"),
    ("rest_here", "log of load plus this and all later classes, all here, over the present guess at the whole time"),
)
SHARED_FEATURES = (
    ("progress", "fraction of the least work decided"),
    ("tail", "least optimistic tail over the horizon"),
    ("balance", "log of horizon over balanced load"),
    ("memory_pressure", "bytes still needed over bytes left; 0 when unlimited"),
    ("link_pressure", "highest link load over balanced load"),
    ("critical", "longest path through the op over the critical path, everything at its fastest"),
    ("weight", "log of mean latency over the mean of all classes"),
    ("out_time", "log(1 + mean transfer time of the outputs / mean latency)"),
    ("fan_out", "log(1 + consumers) / 2"),
    ("fan_in", "log(1 + incoming tensors) / 2"),
    ("runnable", "fraction of devices that can run it"),
    ("throughput", "1 for the goal throughput"),
    ("blocking", "1 for blocking transfers"),
    ("host", "1 for the route over host memory"),
    ("contention", "1 when a link carries one transfer at a time"),
    ("priority", "1 for the priority queue"),
    ("energy_weight", "w of the objective"),
    ("microbatches", "log2 / 2"),
    ("devices", "log2 / 2"),
    ("classes", "log / 4"),
    ("parallelism", "log of least work over the critical path"),
    ("communication", "log(1 + all mean transfer times / least work)"),
    ("heterogeneity", "slowness of the slowest device"),
)
FEATURES = PAIR_FEATURES + SHARED_FEATURES
"""(name, meaning) of every feature, in order."""
NUM_PAIR = len(PAIR_FEATURES)
NUM_FEATURES = len(FEATURES)
MAX_FANOUT = 8
"""Consumers, and producers of each, that `siblings_here` visits."""


@numba.njit(cache=True, inline="always")
def _slog(value):
    return math.log1p(value) if value >= 0.0 else -math.log1p(-value)


@numba.njit(cache=True, inline="always")
def _clip(value, limit):
    return min(max(value, -limit), limit)


@numba.njit(cache=True)
def fill_features(tables, state, mask, out):
    """Fill the features of the current decision.

    Args:
        tables, state: The problem and the placement, not finished.
        mask: bool[D] from `fill_mask`.
        out: float32[D, F], filled; rows of devices in the cluster's order.
    """
    current = int(state.numbers[STEP])
    op = _lead(tables, state, current)
    _try_all(tables, state, current, op)
    out[:, 0] = 1.0
    out[:, 18:21] = 0.0
    for d in range(mask.shape[0]):
        out[d, 1] = 1.0 if mask[d] else 0.0
        for k in range(5):
            out[d, 2 + k] = tables.pair_static[current, d, k]
    _fill_times(tables, state, current, mask, out)
    _fill_loads(tables, state, current, mask, out)
    _fill_neighbours(tables, state, op, out)
    _fill_memory(tables, state, current, out)
    _fill_shared(tables, state, current, op, out)


@numba.njit(cache=True)
def _lead(tables, state, current):
    """Return the first op of the class whose producers are scheduled; the class's first op always is one."""
    for k in range(tables.class_offsets[current], tables.class_offsets[current + 1]):
        if state.pending[tables.class_members[k]] == 0:
            return tables.class_members[k]
    return tables.class_members[tables.class_offsets[current]]


@numba.njit(cache=True)
def _try_all(tables, state, current, op):
    """Fill the scratch rows: start, finish, ready, transfer, log J, load after, path, link after; can't run = inf."""
    scratch, numbers = state.scratch, state.numbers
    devices = state.load.shape[0]
    total = state.load.sum() + numbers[REMAINING] - tables.class_min[current]
    energy = numbers[ENERGY] + numbers[REMAINING_ENERGY] - tables.class_min_energy[current]
    for d in range(devices):
        if not tables.can_run[current, d]:
            scratch[:8, d] = np.inf
            continue
        start, ready, transfer, link = try_placing(tables, state, op, d, scratch[8])
        finish = start + tables.latency[op, d]
        work = tables.class_latency[current, d]
        blocked = transfer if tables.flags[1] else 0.0
        after = state.load[d] + work + blocked
        path = finish + tables.tail[op, d]
        scratch[0, d], scratch[1, d], scratch[2, d], scratch[3, d] = start, finish, ready, transfer
        scratch[4, d] = estimate(
            tables,
            max(numbers[HORIZON], path),
            max(numbers[MAX_LOAD], after),
            max(numbers[MAX_LINK], link),
            total + work + 2.0 * blocked,
            energy + work * tables.dynamic_watts[d],
            devices,
        )
        scratch[5, d], scratch[6, d], scratch[7, d] = after, path, link


@numba.njit(cache=True)
def _least(row, mask):
    """Return the least finite value where allowed, else the least finite value anywhere, else 0."""
    best, anywhere = np.inf, np.inf
    for d in range(row.shape[0]):
        anywhere = min(anywhere, row[d])
        if mask[d]:
            best = min(best, row[d])
    if np.isfinite(best):
        return best
    return anywhere if np.isfinite(anywhere) else 0.0


@numba.njit(cache=True, inline="always")
def _scaled(value, unit):
    """Return slog(value / unit) within the limit."""
    return _clip(_slog(_clip(value / unit, 1e6)), 10.0)


@numba.njit(cache=True)
def _fill_times(tables, state, current, mask, out):
    scratch, numbers = state.scratch, state.numbers
    unit = tables.class_scale[current]
    start, finish = _least(scratch[0], mask), _least(scratch[1], mask)
    path, goal = _least(scratch[6], mask), _least(scratch[4], mask)
    total = (state.load.sum() + numbers[REMAINING]) / state.load.shape[0]
    share = max(max(numbers[HORIZON], total), TINY) / unit
    for d in range(mask.shape[0]):
        out[d, 7] = _scaled(scratch[0, d] - start, unit)
        out[d, 8] = _scaled(scratch[1, d] - finish, unit)
        out[d, 9] = 1.0 if scratch[1, d] <= finish else 0.0
        out[d, 10] = _scaled(scratch[1, d] - numbers[MAKESPAN], unit)
        out[d, 11] = _scaled(scratch[6, d] - path, unit)
        out[d, 12] = 1.0 if scratch[6, d] <= path else 0.0
        out[d, 13] = _scaled(scratch[6, d] - numbers[HORIZON], unit)
        out[d, 14] = _clip(_slog(_clip((scratch[4, d] - goal) * share, 1e6)), 10.0)
        out[d, 15] = 1.0 if scratch[4, d] <= goal + 1e-9 else 0.0
        out[d, 16] = _scaled(scratch[3, d], unit)
        out[d, 17] = _scaled(scratch[2, d] - state.free[d], unit)


@numba.njit(cache=True)
def _fill_loads(tables, state, current, mask, out):
    scratch, numbers = state.scratch, state.numbers
    unit, devices = tables.class_scale[current], mask.shape[0]
    balanced = max((state.load.sum() + numbers[REMAINING]) / devices, TINY)
    whole = max(balanced, numbers[MAX_LOAD] if tables.flags[0] else numbers[HORIZON])
    free, load = _least(state.free, mask), _least(scratch[5], mask)
    for d in range(devices):
        out[d, 21] = 1.0 if int(numbers[LAST]) == d else 0.0
        out[d, 22] = _scaled(state.free[d] - free, unit)
        out[d, 23] = _clip(state.load[d] / balanced, 10.0)
        out[d, 24] = _scaled(scratch[5, d] - load, unit)
        out[d, 25] = _scaled(scratch[5, d] - numbers[MAX_LOAD], unit)
        out[d, 26] = _scaled(scratch[7, d] - numbers[MAX_LINK], unit)
        rest = state.load[d] + tables.rest_latency[current, d]
        out[d, 31] = _clip(math.log(max(min(rest, 1e6 * whole), TINY) / whole), 5.0)


@numba.njit(cache=True)
def _fill_neighbours(tables, state, op, out):
    producers, size = 0.0, 0.0
    for k in range(tables.in_offsets[op], tables.in_offsets[op + 1]):
        tensor = tables.in_tensors[k]
        source = state.device_of[tables.class_of[tables.tensor_producer[tensor]]]
        if source >= 0:
            producers += 1.0
            size += tables.tensor_bytes[tensor]
            out[source, 18] += 1.0
            for d in range(out.shape[0]):
                if d == source or state.arrival[tensor, d] >= 0.0:
                    out[d, 19] += tables.tensor_bytes[tensor]
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
                    out[other, 20] += 1.0
    for d in range(out.shape[0]):
        out[d, 18] /= max(producers, 1.0)
        out[d, 19] /= max(size, 1.0)
        out[d, 20] /= max(siblings, 1.0)


@numba.njit(cache=True)
def _fill_memory(tables, state, current, out):
    devices = state.left.shape[0]
    needed = tables.need_after[current]
    unit = tables.class_scale[current]
    for d in range(devices):
        if np.isfinite(state.left[d]):
            after = state.left[d] - tables.need[current]
            out[d, 27] = _clip(after / max(tables.capacity[d], 1.0), 1.0)
            out[d, 28] = _clip(tables.need[current] / max(state.left[d], 1.0), 2.0)
            out[d, 29] = _clip(_slog(_clip(after * devices / max(needed, 1.0), 1e3) - 1.0), 5.0)
        else:
            out[d, 27], out[d, 28], out[d, 29] = 1.0, 0.0, 5.0
        cost, others = 0.0, 0.0
        for e in range(devices):
            if e != d and tables.connected[d, e]:
                others += 1.0
                cost += tables.link_latency[d, e] + tables.class_bytes[current] * tables.link_inverse[d, e]
        sends = tables.class_bytes[current] > 0.0
        out[d, 30] = _scaled(cost / max(others, 1.0), unit) if sends else 0.0


@numba.njit(cache=True)
def _fill_shared(tables, state, current, op, out):
    numbers, devices = state.numbers, state.load.shape[0]
    horizon = max(numbers[HORIZON], TINY)
    balanced = max((state.load.sum() + numbers[REMAINING]) / devices, TINY)
    tail = np.inf
    for d in range(devices):
        if tables.can_run[current, d]:
            tail = min(tail, tables.tail[op, d])
    row = out[0]
    row[32] = _clip(1.0 - numbers[REMAINING] / max(tables.numbers[2], TINY), 1.0)
    row[33] = _clip(tail / horizon, 1.0) if np.isfinite(tail) else 1.0
    row[34] = _clip(math.log(horizon / balanced), 5.0)
    left = state.left.sum()
    row[35] = _clip(tables.need_after[current] / max(left, 1.0), 2.0) if np.isfinite(left) else 0.0
    row[36] = _clip(numbers[MAX_LINK] / balanced, 5.0)
    row[37:43] = tables.op_static[current]
    row[43:55] = tables.global_static
    for d in range(1, devices):
        out[d, 32:] = row[32:]


@numba.njit(cache=True)
def begin(tables, state, mask, out):
    """Empty the placement and look at its first decision; return whether any device is allowed."""
    reset(tables, state)
    found = fill_mask(tables, state, mask)
    fill_features(tables, state, mask, out)
    return found


@numba.njit(cache=True)
def advance(tables, state, device, mask, out):
    """Decide the current class and look at the next; return whether any device is allowed for it."""
    commit(tables, state, device)
    if int(state.numbers[STEP]) >= tables.need.shape[0]:
        mask[:] = False
        return True
    found = fill_mask(tables, state, mask)
    fill_features(tables, state, mask, out)
    return found


class PartialPlacement:
    """A placement being built, one co-location class after another."""

    def __init__(self, problem: Problem, tables: Tables | None = None) -> None:
        """Prepare an empty placement.

        Args:
            problem: What to place.
            tables: Its tables, where they are known already.
        """
        self.problem = problem
        self.tables = build_tables(problem) if tables is None else tables
        self.state = new_state(self.tables)
        classes, devices = self.tables.can_run.shape
        self.num_steps = classes
        """Decisions in a whole placement."""
        self.features = np.zeros((devices, NUM_FEATURES), np.float32)
        """float32[D, F] of the current decision."""
        self.mask = np.zeros(devices, np.bool_)
        """bool[D]: the devices allowed; all false when the placement has failed or is done."""
        self.stuck = False
        """Whether no device is allowed for the current class."""
        self.reset()

    def reset(self) -> None:
        """Take every decision back."""
        self.stuck = not begin(self.tables, self.state, self.mask, self.features)

    def place(self, device: int) -> None:
        """Decide the current class.

        Raises:
            InfeasibleError: If the placement is done or the mask forbids the device.
        """
        if self.done or not self.mask[device]:
            raise InfeasibleError(
                f"device {device} is not allowed at step {self.step}; choose one that the mask allows"
            )
        self.stuck = not advance(self.tables, self.state, device, self.mask, self.features)

    @property
    def step(self) -> int:
        """Number of decisions taken."""
        return int(self.state.numbers[STEP])

    @property
    def done(self) -> bool:
        """Whether every class is decided."""
        return self.step >= self.num_steps

    @property
    def log_estimate(self) -> float:
        """Guess at the final log J (J in the problem's units), from what is decided and optimism about the rest."""
        return float(current_estimate(self.tables, self.state))

    @property
    def current_ops(self) -> NDArray[np.int32]:
        """The ops of the current class."""
        offsets = self.tables.class_offsets
        return self.tables.class_members[offsets[self.step] : offsets[self.step + 1]]

    @property
    def assignment(self) -> NDArray[np.int32]:
        """int32[N], device index of every op; -1 where undecided."""
        return self.state.device_of[self.tables.class_of]

    def actions(self, assignment: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the decisions, int32[C], that lead to an assignment, int32[N]."""
        return np.asarray(assignment, np.int32)[self.tables.class_members[self.tables.class_offsets[:-1]]]
