"""The partial schedule behind the policy's features: numba kernels over `Tables` and `State`.

Each decided op is scheduled as soon as its producers are, in order of decision, on the device's first free moment
after its data is there; transfers queue per link. That is list scheduling without insertion: near the simulator, not
equal to it, and good enough to look at. The memory rule is exact, see → `fill_mask`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from autoplace.policy.tables import TINY, Tables, pack

__all__ = ["State", "commit", "estimate", "fill_mask", "new_state", "reset", "try_placing"]

REPACK_WORK = 20_000_000
"""Steps of → `pack` that one placement may spend on its look-ahead; then only the certificate counts."""

STEP, HORIZON, MAKESPAN, REMAINING, MAX_LOAD, MAX_LINK, ENERGY, REMAINING_ENERGY, LAST, WORK, CERTIFIED = range(11)
"""Places in `State.numbers`."""


class State(NamedTuple):
    """A partial placement. Scratch arrays, the last ones, carry nothing from step to step."""

    numbers: NDArray[np.float64]
    """Step; horizon, makespan, remaining least work, highest device load, highest link load (ms); dynamic energy so
    far, least remaining (mJ); last device; look-ahead work; whether the certificate holds."""
    device_of: NDArray[np.int32]
    """int32[C], -1 = undecided."""
    finish: NDArray[np.float64]
    """float64[N] ms, -1 = not scheduled."""
    pending: NDArray[np.int64]
    """int64[N] incoming tensors not scheduled yet."""
    free: NDArray[np.float64]
    """float64[D] ms at which a device is free."""
    load: NDArray[np.float64]
    """float64[D] ms of work on a device."""
    left: NDArray[np.float64]
    """float64[D] bytes."""
    reserved: NDArray[np.float64]
    """float64[D] bytes of undecided classes by the certificate."""
    certificate: NDArray[np.int32]
    """int32[C]."""
    link_free: NDArray[np.float64]
    """float64[D, D] ms at which a link is free."""
    link_load: NDArray[np.float64]
    """float64[D, D] ms of transfers on a link."""
    arrival: NDArray[np.float64]
    """float64[T, D] ms at which a tensor is on a device, -1 = not sent."""
    queue: NDArray[np.int64]
    """int64[N] scratch: ops to schedule."""
    scratch: NDArray[np.float64]
    """float64[12, D] scratch: start, finish, data ready, transfer, log J, load after, horizon after, link queue..."""
    trial: NDArray[np.int32]
    """int32[C] scratch: a packing on trial."""


def new_state(tables: Tables) -> State:
    """Return an empty placement, ready for the first decision."""
    classes, devices = tables.can_run.shape
    ops, tensors = tables.latency.shape[0], len(tables.tensor_bytes)
    state = State(
        numbers=np.zeros(11),
        device_of=np.empty(classes, np.int32),
        finish=np.empty(ops),
        pending=np.empty(ops, np.int64),
        free=np.empty(devices),
        load=np.empty(devices),
        left=np.empty(devices),
        reserved=np.empty(devices),
        certificate=np.empty(classes, np.int32),
        link_free=np.empty((devices, devices)),
        link_load=np.empty((devices, devices)),
        arrival=np.empty((tensors, devices)),
        queue=np.empty(ops, np.int64),
        scratch=np.empty((12, devices)),
        trial=np.empty(classes, np.int32),
    )
    reset(tables, state)
    return state


@numba.njit(cache=True)
def reset(tables, state):
    """Empty the placement."""
    state.numbers[:] = 0.0
    state.numbers[HORIZON] = tables.numbers[1]
    state.numbers[REMAINING] = tables.numbers[2]
    state.numbers[REMAINING_ENERGY] = tables.numbers[3]
    state.numbers[LAST] = -1
    state.device_of[:] = -1
    state.finish[:] = -1.0
    for op in range(state.pending.shape[0]):
        state.pending[op] = tables.in_offsets[op + 1] - tables.in_offsets[op]
    state.free[:] = 0.0
    state.load[:] = 0.0
    state.left[:] = tables.capacity
    state.reserved[:] = 0.0
    state.certificate[:] = tables.certificate
    state.numbers[CERTIFIED] = 1.0
    for c in range(tables.need.shape[0]):
        if tables.certificate[c] >= 0:
            state.reserved[tables.certificate[c]] += tables.need[c]
        else:
            state.numbers[CERTIFIED] = 0.0
    state.link_free[:] = 0.0
    state.link_load[:] = 0.0
    state.arrival[:] = -1.0


@numba.njit(cache=True)
def estimate(tables, horizon, max_load, max_link, total, energy, devices):
    """Return log J of a guess at the finished placement.

    J = time^(1-w) * energy^w; time is the horizon (latency) or the highest load (throughput), and in both cases at
    least the balanced work; energy is idle power over that time, what is spent, and the least that is to come.
    """
    time = max(total / devices, TINY)
    if tables.flags[0]:
        time = max(time, max_load)
        if tables.flags[2]:
            time = max(time, max_link)
    else:
        time = max(time, horizon)
    weight = tables.numbers[0]
    value = (1.0 - weight) * math.log(time)
    if weight > 0.0:
        value += weight * math.log(max(tables.idle_watts.sum() * time + energy, TINY))
    return value


@numba.njit(cache=True)
def current_estimate(tables, state):
    """Return → `estimate` of the placement as it stands."""
    numbers = state.numbers
    total = state.load.sum() + numbers[REMAINING]
    energy = numbers[ENERGY] + numbers[REMAINING_ENERGY]
    devices = state.load.shape[0]
    return estimate(tables, numbers[HORIZON], numbers[MAX_LOAD], numbers[MAX_LINK], total, energy, devices)


@numba.njit(cache=True)
def try_placing(tables, state, op, device, link_queue):
    """Schedule one op on one device without keeping it.

    Args:
        tables, state: The problem and the placement.
        op: An op whose producers are scheduled.
        device: Where.
        link_queue: float64[D] scratch.

    Returns:
        (start, data ready, transfer time, highest link load after), ms.
    """
    ready, transfer, highest = 0.0, 0.0, 0.0
    link_queue[:] = state.link_free[:, device]
    for k in range(tables.in_offsets[op], tables.in_offsets[op + 1]):
        tensor = tables.in_tensors[k]
        producer = tables.tensor_producer[tensor]
        source = state.device_of[tables.class_of[producer]]
        if source < 0 or state.finish[producer] < 0.0:
            continue
        if source == device:
            ready = max(ready, state.finish[producer])
        elif state.arrival[tensor, device] >= 0.0:
            ready = max(ready, state.arrival[tensor, device])
        elif tables.connected[source, device]:
            cost = (
                tables.link_latency[source, device] + tables.tensor_bytes[tensor] * tables.link_inverse[source, device]
            )
            begin = state.finish[producer]
            if tables.flags[2]:
                begin = max(begin, link_queue[source])
                link_queue[source] = begin + cost
            highest = max(highest, state.link_load[source, device] + cost)
            ready = max(ready, begin + cost)
            transfer += cost
    start = max(ready, state.free[device] + (transfer if tables.flags[1] else 0.0))
    return start, ready, transfer, highest


@numba.njit(cache=True)
def _schedule(tables, state, op, device):
    """Keep one op on its device: its transfers, its time, the loads."""
    numbers, ready = state.numbers, 0.0
    for k in range(tables.in_offsets[op], tables.in_offsets[op + 1]):
        tensor = tables.in_tensors[k]
        producer = tables.tensor_producer[tensor]
        source = state.device_of[tables.class_of[producer]]
        if source == device:
            ready = max(ready, state.finish[producer])
            continue
        if state.arrival[tensor, device] < 0.0:
            cost = tables.link_latency[source, device]
            if tables.connected[source, device]:
                cost += tables.tensor_bytes[tensor] * tables.link_inverse[source, device]
            begin = state.finish[producer]
            if tables.flags[2]:
                begin = max(begin, state.link_free[source, device])
                state.link_free[source, device] = begin + cost
            state.arrival[tensor, device] = begin + cost
            state.link_load[source, device] += cost
            numbers[MAX_LINK] = max(numbers[MAX_LINK], state.link_load[source, device])
            if tables.flags[1]:
                for end in (source, device):
                    state.load[end] += cost
                    state.free[end] = max(state.free[end], begin) + cost
                    numbers[MAX_LOAD] = max(numbers[MAX_LOAD], state.load[end])
        ready = max(ready, state.arrival[tensor, device])
    latency = tables.latency[op, device]
    end = max(ready, state.free[device]) + latency
    state.finish[op] = end
    state.free[device] = end
    state.load[device] += latency
    numbers[MAX_LOAD] = max(numbers[MAX_LOAD], state.load[device])
    numbers[MAKESPAN] = max(numbers[MAKESPAN], end)
    numbers[HORIZON] = max(numbers[HORIZON], end + tables.tail[op, device])
    numbers[ENERGY] += latency * tables.dynamic_watts[device]


@numba.njit(cache=True)
def commit(tables, state, device):
    """Decide the current class: memory, then every op that can now be scheduled, and go to the next step."""
    numbers = state.numbers
    current = int(numbers[STEP])
    if (
        numbers[CERTIFIED] > 0.0
        and not _certified(tables, state, current, device)
        and not _repack(tables, state, current, device, True)
    ):
        numbers[CERTIFIED] = 0.0
    if numbers[CERTIFIED] > 0.0:
        state.reserved[state.certificate[current]] -= tables.need[current]
    state.left[device] -= tables.need[current]
    state.device_of[current] = device
    numbers[REMAINING] = max(numbers[REMAINING] - tables.class_min[current], 0.0)
    numbers[REMAINING_ENERGY] = max(numbers[REMAINING_ENERGY] - tables.class_min_energy[current], 0.0)
    head, tail = 0, 0
    for k in range(tables.class_offsets[current], tables.class_offsets[current + 1]):
        op = tables.class_members[k]
        if state.pending[op] == 0 and state.finish[op] < 0.0:
            state.queue[tail] = op
            tail += 1
            while head < tail:
                tail = _settle(tables, state, state.queue[head], tail)
                head += 1
            head, tail = 0, 0
    numbers[LAST] = device
    numbers[STEP] = current + 1


@numba.njit(cache=True)
def _settle(tables, state, op, tail):
    """Schedule an op and queue the decided consumers for which it was the last producer; return the queue's new end."""
    _schedule(tables, state, op, state.device_of[tables.class_of[op]])
    for k in range(tables.out_offsets[op], tables.out_offsets[op + 1]):
        tensor = tables.out_tensors[k]
        for j in range(tables.consumer_offsets[tensor], tables.consumer_offsets[tensor + 1]):
            consumer = tables.consumers[j]
            state.pending[consumer] -= 1
            if state.pending[consumer] == 0 and state.device_of[tables.class_of[consumer]] >= 0:
                state.queue[tail] = consumer
                tail += 1
    return tail


@numba.njit(cache=True)
def _certified(tables, state, current, device):
    """Whether the known packing of the rest still fits with the current class on this device."""
    if not tables.flags[4]:
        return True
    if state.certificate[current] == device:
        return True
    return tables.need[current] + state.reserved[device] <= state.left[device]


@numba.njit(cache=True)
def _repack(tables, state, current, device, keep):
    """Look for another packing of the rest with the current class on this device; `keep` makes it the certificate."""
    left = state.scratch[11]
    left[:] = state.left
    left[device] -= tables.need[current]
    if left[device] < 0.0:
        return False
    if not pack(tables.pack_order, tables.need, tables.can_run, left, current + 1, current, state.trial):
        return False
    if keep:
        state.reserved[:] = 0.0
        state.certificate[current] = device
        state.reserved[device] += tables.need[current]
        for c in range(current + 1, tables.need.shape[0]):
            state.certificate[c] = state.trial[c]
            state.reserved[state.trial[c]] += tables.need[c]
    return True


@numba.njit(cache=True)
def _reaches(tables, state, current, device, ahead):
    """Whether every decided neighbour of the class can talk to the device; `ahead`: and each open one keeps a place."""
    for k in range(tables.class_offsets[current], tables.class_offsets[current + 1]):
        op = tables.class_members[k]
        for i in range(tables.in_offsets[op], tables.in_offsets[op + 1]):
            source = state.device_of[tables.class_of[tables.tensor_producer[tables.in_tensors[i]]]]
            if source >= 0 and not tables.connected[source, device]:
                return False
        for i in range(tables.out_offsets[op], tables.out_offsets[op + 1]):
            tensor = tables.out_tensors[i]
            for j in range(tables.consumer_offsets[tensor], tables.consumer_offsets[tensor + 1]):
                consumer = tables.consumers[j]
                target = state.device_of[tables.class_of[consumer]]
                if target >= 0 and not tables.connected[device, target]:
                    return False
                if target < 0 and ahead and not _keeps_a_place(tables, state, consumer, device, current):
                    return False
    return True


@numba.njit(cache=True)
def _keeps_a_place(tables, state, op, device, current):
    """Whether an undecided op can still go somewhere when the current class, which it reads, is on this device."""
    own = tables.class_of[op]
    if own == current:
        return True
    for place in range(state.load.shape[0]):
        fits = tables.can_run[own, place] and tables.connected[device, place]
        for i in range(tables.in_offsets[op], tables.in_offsets[op + 1]):
            if not fits:
                break
            source = state.device_of[tables.class_of[tables.tensor_producer[tables.in_tensors[i]]]]
            fits = source < 0 or tables.connected[source, place]
        if fits:
            return True
    return False


@numba.njit(cache=True)
def fill_mask(tables, state, mask):
    """Fill the hard mask of the current class and say whether any device is allowed.

    A device is allowed when the class (1) can run there, (2) can talk to its decided neighbours, (3) fits into the
    memory left, (4) leaves every undecided consumer a device that reaches its decided producers, and (5) leaves a
    packing of all undecided classes into memory. For (5) a packing is carried along and repaired by largest-first
    packing; where none is known, (5) is not asked. When no device satisfies all five, (4) and then (5) are dropped;
    when none satisfies (1) to (3), the mask is all false and the placement has failed.

    Args:
        tables, state: The problem and the placement.
        mask: bool[D], filled.
    """
    current = int(state.numbers[STEP])
    devices = mask.shape[0]
    for lenient in range(4):
        ahead = lenient in (0, 2) and not tables.flags[3]
        packing = lenient < 2 and tables.flags[4] and state.numbers[CERTIFIED] > 0.0
        if (lenient in (1, 3) and tables.flags[3]) or (lenient >= 2 and not tables.flags[4]):
            continue
        found = False
        for d in range(devices):
            mask[d] = tables.can_run[current, d] and tables.need[current] <= state.left[d]
            if mask[d] and not tables.flags[3]:
                mask[d] = _reaches(tables, state, current, d, ahead)
            if mask[d] and packing and not _certified(tables, state, current, d):
                state.numbers[WORK] += tables.need.shape[0]
                mask[d] = state.numbers[WORK] < REPACK_WORK and _repack(tables, state, current, d, False)
            found = found or mask[d]
        if found:
            return True
    return False
