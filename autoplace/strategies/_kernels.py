"""The inner loops of the constructive strategies, compiled by numba: upward rank, HEFT, m-ETF and a sliding minimum.

They see flat arrays only (→ `_support.View`) and return -1 for ops that found no device. Costs: O(N log N + E D) for
m-ETF, the same plus the gaps looked at for HEFT.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoplace.jit import compiled

__all__ = ["Flat", "heft", "metf", "sliding_minimum", "stage_within", "upward_rank"]


class Flat(NamedTuple):
    """What list scheduling reads. N ops, C inputs, K classes, D devices."""

    order: NDArray[np.int64]
    """int64[N], ops by falling priority, producers first."""
    latency: NDArray[np.float64]
    """float64[N, D], ms."""
    offsets: NDArray[np.int64]
    """int64[N + 1] into `producers` and `sizes`, by consumer."""
    producers: NDArray[np.int32]
    """int32[C]."""
    sizes: NDArray[np.float64]
    """float64[C], bytes."""
    latency_ms: NDArray[np.float64]
    """float64[D, D], of a transfer; inf where a pair cannot talk."""
    ms_per_byte: NDArray[np.float64]
    """float64[D, D], of a transfer."""
    op_class: NDArray[np.int32]
    """int32[N]."""
    allowed: NDArray[np.bool_]
    """bool[K, D]."""
    class_bytes: NDArray[np.float64]
    """float64[K]."""
    capacity: NDArray[np.float64]
    """float64[D], bytes."""


class State(NamedTuple):
    """What list scheduling writes."""

    assignment: NDArray[np.int32]
    """int32[N], -1 while not placed."""
    finish: NDArray[np.float64]
    """float64[N], ms."""
    class_device: NDArray[np.int32]
    """int32[K], -1 while not placed."""
    free: NDArray[np.float64]
    """float64[D], memory left, bytes."""


_MAX_GAPS = 512
"""Gaps of a device that HEFT looks at for one op before it appends; bounds the cost of very large graphs."""


_compile = partial(compiled, allocates=True)


@_compile
def upward_rank(
    order: NDArray[np.int32],
    mean_ms: NDArray[np.float64],
    offsets: NDArray[np.int64],
    producers: NDArray[np.int32],
    transfer_ms: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return the longest path from each op to the end, its own latency included, ms."""
    tail = np.zeros(len(order))
    rank = np.zeros(len(order))
    for position in range(len(order) - 1, -1, -1):
        op = order[position]
        rank[op] = mean_ms[op] + tail[op]
        for edge in range(offsets[op], offsets[op + 1]):
            through = rank[op] + transfer_ms[edge]
            if through > tail[producers[edge]]:
                tail[producers[edge]] = through
    return rank


@_compile
def sliding_minimum(
    values: NDArray[np.float64], left: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return for every j the minimum and its index of values[left[j] : j]; inf and -1 where that is empty or all inf.

    `left` never falls.
    """
    count = len(left)
    best = np.full(count, np.inf)
    where = np.full(count, -1, np.int64)
    queue = np.empty(count, np.int64)
    head = 0
    size = 0
    for j in range(1, count):
        entry = j - 1
        while size > head and values[queue[size - 1]] > values[entry]:
            size -= 1
        queue[size] = entry
        size += 1
        while head < size and queue[head] < left[j]:
            head += 1
        if head < size and values[queue[head]] < np.inf:
            best[j] = values[queue[head]]
            where[j] = queue[head]
    return best, where


@_compile
def stage_within(
    able: NDArray[np.bool_],
    receive_ms: NDArray[np.float64],
    link_ms: NDArray[np.float64],
    send_ms: NDArray[np.float64],
    total_ms: NDArray[np.float64],
    left: NDArray[np.int64],
    limit_ms: float,
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Return at which positions a further stage can end with no load above a limit, and where it then begins.

    Args:
        able: bool[K + 1], positions at which the stages before it can end.
        receive_ms, link_ms, send_ms: float64[K + 1], what a border at each position adds to the stage behind it, to
            the link, and to the stage before it.
        total_ms: float64[K + 1], running sum of the stage's latencies.
        left: int64[K + 1], first position from which the stage may reach each position; never falls.
        limit_ms: Largest load, finite.

    Returns:
        bool[K + 1]; and int64[K + 1], -1 where no start is possible.
    """
    count = len(left)
    ends = np.zeros(count, np.bool_)
    where = np.full(count, -1, np.int64)
    queue = np.empty(count, np.int64)
    start_ms = np.empty(count)
    head = 0
    size = 0
    for j in range(count):
        # As in `sliding_minimum`, of what a stage's load lacks when it begins at each position.
        if j > 0 and able[j - 1] and link_ms[j - 1] <= limit_ms:
            entry = j - 1
            start_ms[entry] = receive_ms[entry] - total_ms[entry]
            while size > head and start_ms[queue[size - 1]] > start_ms[entry]:
                size -= 1
            queue[size] = entry
            size += 1
        while head < size and queue[head] < left[j]:
            head += 1
        if head < size and start_ms[queue[head]] < np.inf:
            where[j] = queue[head]
            ends[j] = start_ms[queue[head]] + total_ms[j] + send_ms[j] <= limit_ms
    return ends, where


@_compile
def _begin(flat):
    """Place the classes that have one choice, so that no other class takes their memory."""
    ops = len(flat.op_class)
    state = State(
        np.full(ops, -1, np.int32), np.zeros(ops), np.full(len(flat.class_bytes), -1, np.int32), flat.capacity.copy()
    )
    for index in range(len(flat.class_bytes)):
        if flat.allowed[index].sum() == 1:
            only = flat.allowed[index].argmax()
            state.class_device[index] = only
            state.free[only] -= flat.class_bytes[index]
    return state


@_compile
def _arrival_ms(flat, state, op, device):
    """Return when all inputs of an op are on a device, ms; inf where one cannot get there."""
    arrival = 0.0
    for edge in range(flat.offsets[op], flat.offsets[op + 1]):
        producer = flat.producers[edge]
        source = state.assignment[producer]
        there = state.finish[producer]
        if source != device:
            there += flat.latency_ms[source, device] + flat.sizes[edge] * flat.ms_per_byte[source, device]
        arrival = max(arrival, there)
    return arrival


@_compile
def _may_go(flat, state, op, device):
    index = flat.op_class[op]
    if state.class_device[index] >= 0:
        return state.class_device[index] == device
    return flat.allowed[index, device] and flat.class_bytes[index] <= state.free[device]


@_compile
def _put(flat, state, op, device, finish_ms):
    index = flat.op_class[op]
    if state.class_device[index] < 0:
        state.class_device[index] = device
        state.free[device] -= flat.class_bytes[index]
    state.assignment[op] = device
    state.finish[op] = finish_ms


@_compile
def _earliest_slot(starts, ends, count, ready, length):
    """Return the earliest start at or after `ready` in a gap that is long enough, and its place in the lists."""
    low = 0
    high = count
    while low < high:
        middle = (low + high) // 2
        if ends[middle] <= ready:
            low = middle + 1
        else:
            high = middle
    start = ready
    for slot in range(low, min(count, low + _MAX_GAPS)):
        if start + length <= starts[slot]:
            return start, slot
        start = max(start, ends[slot])
    if count - low > _MAX_GAPS:
        start = max(ready, ends[count - 1])
    return start, count


@_compile
def heft(flat: Flat) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Place ops in the given order, each where it finishes earliest, gaps included.

    Returns:
        int32[N] device of every op, -1 from the first op on that fits nowhere; float64[N] finish times, ms.
    """
    ops, devices = flat.latency.shape
    state = _begin(flat)
    starts, ends = np.empty((devices, ops)), np.empty((devices, ops))
    counts = np.zeros(devices, np.int64)
    for op in flat.order:
        best_finish, best_start, best_slot, best = np.inf, 0.0, 0, -1
        for device in range(devices):
            if not _may_go(flat, state, op, device):
                continue
            ready, length = _arrival_ms(flat, state, op, device), flat.latency[op, device]
            if ready == np.inf:
                continue
            start, slot = _earliest_slot(starts[device], ends[device], counts[device], ready, length)
            if start + length < best_finish:
                best_finish, best_start, best_slot, best = start + length, start, slot, device
        if best < 0:
            break
        for slot in range(counts[best], best_slot, -1):
            starts[best, slot] = starts[best, slot - 1]
            ends[best, slot] = ends[best, slot - 1]
        starts[best, best_slot] = best_start
        ends[best, best_slot] = best_finish
        counts[best] += 1
        _put(flat, state, op, best, best_finish)
    return state.assignment, state.finish


class Heaps(NamedTuple):
    """One binary heap a device, of ops by (key, place in the order)."""

    size: NDArray[np.int64]
    """int64[D]."""
    key: NDArray[np.float64]
    """float64[D, N]."""
    place: NDArray[np.int64]
    """int64[D, N]."""


@_compile
def _heaps(devices, ops):
    return Heaps(np.zeros(devices, np.int64), np.empty((devices, ops)), np.empty((devices, ops), np.int64))


@_compile
def _before(key, place, other_key, other_place):
    return key < other_key or (key == other_key and place < other_place)


@_compile
def _push(heaps, device, key, place):
    keys, places = heaps.key[device], heaps.place[device]
    at = heaps.size[device]
    heaps.size[device] += 1
    while at > 0:
        parent = (at - 1) // 2
        if not _before(key, place, keys[parent], places[parent]):
            break
        keys[at], places[at] = keys[parent], places[parent]
        at = parent
    keys[at], places[at] = key, place


@_compile
def _pop(heaps, device):
    keys, places = heaps.key[device], heaps.place[device]
    heaps.size[device] -= 1
    last = heaps.size[device]
    key, place = keys[last], places[last]
    at = 0
    while 2 * at + 1 < last:
        child = 2 * at + 1
        if child + 1 < last and _before(keys[child + 1], places[child + 1], keys[child], places[child]):
            child += 1
        if not _before(keys[child], places[child], key, place):
            break
        keys[at], places[at] = keys[child], places[child]
        at = child
    keys[at], places[at] = key, place


@_compile
def _drop_overtaken(flat, state, heaps, device):
    """Drop entries from the top that memory or another device has overtaken; neither is ever undone."""
    while heaps.size[device] > 0:
        op = flat.order[heaps.place[device, 0]]
        if state.assignment[op] < 0 and _may_go(flat, state, op, device):
            return
        _pop(heaps, device)


@_compile
def _first(flat, state, waiting, here, device, free_ms):
    """Return start (ms) and place in the order of the op that the device could start first; -1 when there is none."""
    while waiting.size[device] > 0 and waiting.key[device, 0] <= free_ms:
        _push(here, device, 0.0, waiting.place[device, 0])
        _pop(waiting, device)
    _drop_overtaken(flat, state, here, device)
    if here.size[device] > 0:
        return free_ms, here.place[device, 0]
    _drop_overtaken(flat, state, waiting, device)
    if waiting.size[device] > 0:
        return waiting.key[device, 0], waiting.place[device, 0]
    return np.inf, -1


@_compile
def _successors(flat):
    """Return offsets int64[N + 1] and consumers int64[C] by producer."""
    ops = len(flat.op_class)
    starts = np.zeros(ops + 1, np.int64)
    for producer in flat.producers:
        starts[producer + 1] += 1
    starts = np.cumsum(starts)
    consumers = np.empty(len(flat.producers), np.int64)
    fill = starts.copy()
    for op in range(ops):
        for edge in range(flat.offsets[op], flat.offsets[op + 1]):
            consumers[fill[flat.producers[edge]]] = op
            fill[flat.producers[edge]] += 1
    return starts, consumers


@_compile
def metf(flat: Flat) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Place the (ready op, device) pair that can start earliest, again and again.

    Ties go to the op that comes first in the order, then to the device where it ends first. Each device has two heaps
    of ready ops: `here`, whose inputs arrive before the device is free, by their place in the order; and `waiting`, by
    arrival.

    Returns:
        int32[N] device of every op, -1 for those that fit nowhere; float64[N] finish times, ms.
    """
    ops, devices = flat.latency.shape
    state = _begin(flat)
    starts, consumers = _successors(flat)
    missing = flat.offsets[1:] - flat.offsets[:-1]
    place = np.empty(ops, np.int64)
    place[flat.order] = np.arange(ops)
    waiting, here = _heaps(devices, ops), _heaps(devices, ops)
    free_ms = np.zeros(devices)
    fresh = np.empty(ops, np.int64)
    count = 0
    for op in flat.order:
        if missing[op] == 0:
            fresh[count] = op
            count += 1
    for _ in range(ops):
        for op in fresh[:count]:
            for device in range(devices):
                arrival = _arrival_ms(flat, state, op, device) if _may_go(flat, state, op, device) else np.inf
                if arrival < np.inf:
                    _push(waiting, device, arrival, place[op])
        best_start, best_place, best_finish, best = np.inf, -1, np.inf, -1
        for device in range(devices):
            start, at = _first(flat, state, waiting, here, device, free_ms[device])
            if at < 0:
                continue
            finish = start + flat.latency[flat.order[at], device]
            if best < 0 or (start, at, finish) < (best_start, best_place, best_finish):
                best_start, best_place, best_finish, best = start, at, finish, device
        if best < 0:
            break
        op = flat.order[best_place]
        _put(flat, state, op, best, best_finish)
        free_ms[best] = best_finish
        count = 0
        for consumer in consumers[starts[op] : starts[op + 1]]:
            missing[consumer] -= 1
            if missing[consumer] == 0:
                fresh[count] = consumer
                count += 1
    return state.assignment, state.finish
