"""The partial schedule behind the policy's features: numba kernels over `Tables` and `State`.

Each decided op is scheduled as soon as its producers are, in order of decision, on the device's first free moment
after its data is there; transfers queue per link. That is list scheduling without insertion: near the simulator, not
equal to it, and good enough to look at. The memory rule is exact, see → `mask.fill_mask`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoplace.jit import inline
from autoplace.policy._compile import TINY, total
from autoplace.policy.packing import pack
from autoplace.policy.tables import Tables

__all__ = ["State", "certified", "commit", "estimate", "new_state", "repack", "reset", "try_placing"]

RECENT = 0.875
"""What a decision counts in `State.recent` over the one after it."""

(
    STEP, HORIZON, MAKESPAN, REMAINING, MAX_LOAD, MAX_LINK, ENERGY, REMAINING_ENERGY, LAST, WORK, CERTIFIED, MASKED,
) = range(12)  # fmt: skip
"""Places in `State.numbers`."""


class State(NamedTuple):
    """A partial placement. Scratch arrays, the last ones, carry nothing from step to step."""

    numbers: NDArray[np.float64]
    """Step; horizon, makespan, remaining least work, highest device load, highest link load (ms); dynamic energy so
    far, least remaining (mJ); last device; look-ahead work; whether the certificate holds; whether masks are hard."""
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
    sent: NDArray[np.float64]
    """float64[D] ms of transfers out of a device."""
    recent: NDArray[np.float64]
    """float64[D], shares of the last decisions."""
    level_load: NDArray[np.float64]
    """float64[levels, D] ms of least work decided, by depth."""
    arrival: NDArray[np.float64]
    """float64[T, D] ms at which a tensor is on a device, -1 = not sent."""
    queue: NDArray[np.int64]
    """int64[N] scratch: ops to schedule."""
    scratch: NDArray[np.float64]
    """float64[12, D] scratch: start, finish, data ready, transfer, log J, load after, horizon after, link queue..."""
    trial: NDArray[np.int32]
    """int32[C] scratch: a packing on trial."""


def new_state(tables: Tables, *, masks: bool = True) -> State:
    """Return room for a placement; → `reset` empties it.

    Args:
        tables: Of the problem.
        masks: Whether masks are hard; False = they only ask whether the device can run the class.
    """
    classes, devices = tables.can_run.shape
    ops, tensors = tables.latency.shape[0], len(tables.tensor_bytes)
    state = State(
        numbers=np.zeros(12),
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
        sent=np.empty(devices),
        recent=np.empty(devices),
        level_load=np.empty((len(tables.level_work), devices)),
        arrival=np.empty((tensors, devices)),
        queue=np.empty(ops, np.int64),
        scratch=np.empty((12, devices)),
        trial=np.empty(classes, np.int32),
    )
    state.numbers[MASKED] = float(masks)
    return state


@inline
def reset(tables, state):
    """Empty the placement."""
    masked = state.numbers[MASKED]
    state.numbers[:] = 0.0
    state.numbers[MASKED] = masked
    state.numbers[HORIZON] = tables.numbers[1]
    state.numbers[REMAINING] = tables.numbers[2]
    state.numbers[REMAINING_ENERGY] = tables.numbers[3]
    state.numbers[LAST] = -1
    state.finish[:] = -1.0
    for op in range(state.pending.shape[0]):
        state.pending[op] = tables.in_offsets[op + 1] - tables.in_offsets[op]
    for array in (state.free, state.load, state.reserved, state.sent, state.recent):
        array[:] = 0.0
    for d in range(state.left.shape[0]):
        state.left[d] = tables.capacity[d]
    state.numbers[CERTIFIED] = masked
    for c in range(tables.need.shape[0]):
        state.device_of[c] = -1
        state.certificate[c] = tables.certificate[c]
        if tables.certificate[c] >= 0:
            state.reserved[tables.certificate[c]] += tables.need[c]
        else:
            state.numbers[CERTIFIED] = 0.0
    for array in (state.link_free, state.link_load, state.level_load):
        array[:] = 0.0
    state.arrival[:] = -1.0


@inline
def estimate(tables, horizon, max_load, max_link, work, energy, devices):
    """Return log J of a guess at the finished placement.

    J = time^(1-w) * energy^w; time is the horizon (latency) or the highest load (throughput), and in both cases at
    least the balanced work; energy is idle power over that time, what is spent, and the least that is to come.
    """
    time = max(work / devices, TINY)
    if tables.flags[0]:
        time = max(time, max_load)
        if tables.flags[2]:
            time = max(time, max_link)
    else:
        time = max(time, horizon)
    weight = tables.numbers[0]
    value = (1.0 - weight) * math.log(time)
    if weight > 0.0:
        value += weight * math.log(max(total(tables.idle_watts) * time + energy, TINY))
    return value


@inline
def current_estimate(tables, state):
    """Return → `estimate` of the placement as it stands."""
    numbers = state.numbers
    work = total(state.load) + numbers[REMAINING]
    energy = numbers[ENERGY] + numbers[REMAINING_ENERGY]
    devices = state.load.shape[0]
    return estimate(tables, numbers[HORIZON], numbers[MAX_LOAD], numbers[MAX_LINK], work, energy, devices)


@inline
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
    if tables.flags[2]:
        for d in range(link_queue.shape[0]):
            link_queue[d] = state.link_free[d, device]
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


@inline
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
            state.sent[source] += cost
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


@inline
def certified(tables, state, current, device):
    """Whether the known packing of the rest still fits with the current class on this device."""
    if not tables.flags[4]:
        return True
    if state.certificate[current] == device:
        return True
    return tables.need[current] + state.reserved[device] <= state.left[device]


@inline
def repack(tables, state, current, device, keep):
    """Look for another packing of the rest with the current class on this device; `keep` makes it the certificate."""
    left = state.scratch[11]
    for d in range(left.shape[0]):
        left[d] = state.left[d]
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


@inline
def commit(tables, state, device):
    """Decide the current class: memory, then every op that can now be scheduled, and go to the next step."""
    numbers = state.numbers
    current = int(numbers[STEP])
    if (
        numbers[CERTIFIED] > 0.0
        and not certified(tables, state, current, device)
        and not repack(tables, state, current, device, True)
    ):
        numbers[CERTIFIED] = 0.0
    if numbers[CERTIFIED] > 0.0:
        state.reserved[state.certificate[current]] -= tables.need[current]
    state.left[device] -= tables.need[current]
    state.device_of[current] = device
    state.level_load[tables.level_of[current], device] += tables.class_min[current]
    for d in range(state.recent.shape[0]):
        state.recent[d] *= RECENT
    state.recent[device] += 1.0 - RECENT
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


@inline
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
