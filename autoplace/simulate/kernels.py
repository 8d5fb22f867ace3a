"""The simulator's numba kernels: one event loop for all semantics, batched over plans, allocating nothing.

Rules, so that every figure has exactly one value (DESIGN section 5 says the rest):

1. Time advances in rounds. A round takes the earliest moment at which anything ends or becomes ready, first ends all
   that ends then, device by device, and then starts all that can start. What takes no time ends in a further round of the
   same moment.
2. An op is ready when the last of its inputs is on its device. A free device takes, by `queue: fifo`, the ready op with
   the least (ready time, op index); by `queue: priority`, the ready op with the longest path to the end, then the least
   index. A path's length is the op latencies on the devices assigned and the transfers between them, uncontended.
3. A transfer is requested when its producer finishes: one per (tensor, receiving device), none for the producer's own
   device. It takes the link's latency + bytes / bandwidth; a tensor of no bytes still takes the latency.
4. `route: host`: the tensor goes once from the sender to host memory (out leg) and from there once to each receiver (in
   leg, requested when the out leg ends). Host memory is one place: devices of kind `cpu` live in it, have no legs and
   pay nothing, so a way between hosts costs nothing here; use `direct` where it matters. → `arrays.link_matrices`
5. `contention: link`, overlapped: a link carries one transfer at a time, first come, first served; the out leg of a
   device and the in leg of a device are links. Requests of one moment are served in the order in which their sender
   finished the producers, then by tensor index; on an in leg by (request time, tensor index).
6. `transfers: blocking`: a transfer keeps its two devices busy (a leg: the one that is not host memory) and waits until
   both are free. Waiting transfers start before ops, in the order of (request time, tensor index, target device), each as
   soon as its own devices are free; a device with a waiting transfer starts no op. The link is then never contended.
7. Memory: weights always; activations from the op's start, until its last consumer on any device finishes if the op
   frees, else to the end. Received copies are not counted. What ends in a round is freed before what starts in it is
   held. Both goals use the schedule of one pass.
8. Throughput: the load of a device is its ops, and with `blocking` its transfers; a link's load its transfers.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

__all__ = ["CANNOT_RUN", "CANNOT_TALK", "COLOCATION", "FEASIBLE", "MEMORY", "evaluate_plans"]

FEASIBLE, CANNOT_RUN, COLOCATION, MEMORY, CANNOT_TALK = 0, 1, 2, 3, 4
IDLE, SENDING, RECEIVING = -1, -2, -3
WAITING, FINISHED, LINES = 0, 1, 2
INF = math.inf


def _compile(function):  # type: ignore[no-untyped-def]
    """Compile with a cache on disk where there is a place for one, else without."""
    try:
        return njit(cache=True)(function)
    except RuntimeError:
        return njit(function)


@_compile
def _push(keys, items, base, size, key, item):
    """Add to the heap that begins at `base`, ordered by (key, item)."""
    i = size
    while i > 0:
        up = (i - 1) >> 1
        other = keys[base + up]
        if other < key or (other == key and items[base + up] < item):
            break
        keys[base + i] = other
        items[base + i] = items[base + up]
        i = up
    keys[base + i] = key
    items[base + i] = item


@_compile
def _pop(keys, items, base, size):
    """Take the least item off a heap of `size`; the caller lowers the size."""
    least = items[base]
    last = size - 1
    key, item = keys[base + last], items[base + last]
    i = 0
    while True:
        down = 2 * i + 1
        if down >= last:
            break
        a, b = base + down, base + down + 1
        if down + 1 < last and (keys[b] < keys[a] or (keys[b] == keys[a] and items[b] < items[a])):
            down += 1
            a = b
        if key < keys[a] or (key == keys[a] and item < items[a]):
            break
        keys[base + i] = keys[a]
        items[base + i] = items[a]
        i = down
    keys[base + i] = key
    items[base + i] = item
    return least


@_compile
def _cost(a, source, target, size):
    """Return the time of a transfer between two nodes, ms."""
    if size == 0.0:
        return a.link_ms[source, target]
    return a.link_ms[source, target] + size * a.ms_per_byte[source, target]


@_compile
def _log(w, tensor, source, target, start, end):
    line = w.counters[LINES]
    if line < len(w.log_ms):
        w.log_ends[line, 0] = tensor
        w.log_ends[line, 1] = source
        w.log_ends[line, 2] = target
        w.log_ms[line, 0] = start
        w.log_ms[line, 1] = end
        w.counters[LINES] = line + 1


@_compile
def _supply(w, op, when):
    """Note that one input of `op` is on its device at `when`; queue the op after its last one."""
    if when > w.ready_ms[op]:
        w.ready_ms[op] = when
    w.missing[op] -= 1
    if w.missing[op] == 0:
        d = w.device[op]
        _push(w.queue_key, w.queue_op, w.queue_base[d], w.queue_size[d], w.ready_ms[op], op)
        w.queue_size[d] += 1


@_compile
def _deliver(a, w, tensor, target, when):
    """Supply the consumers of a tensor on one device."""
    for k in range(a.consumer_offsets[tensor], a.consumer_offsets[tensor + 1]):
        if w.device[a.consumers[k]] == target:
            _supply(w, a.consumers[k], when)


@_compile
def _carry(a, w, tensor, source, target, now):
    """Put a transfer on a link, overlapped, and return when it arrives."""
    start = now
    if a.contended and w.link_free_ms[source, target] > now:
        start = w.link_free_ms[source, target]
    end = start + _cost(a, source, target, a.tensor_bytes[tensor])
    w.link_free_ms[source, target] = end
    _log(w, tensor, source, target, start, end)
    return end


@_compile
def _send_overlapped(a, w, tensor, s, now):
    """Send a tensor that device `s` has just produced; transfers occupy links alone."""
    host = len(a.memory_bytes)
    out_end = -1.0
    for k in range(a.consumer_offsets[tensor], a.consumer_offsets[tensor + 1]):
        op = a.consumers[k]
        d = w.device[op]
        if d == s:
            _supply(w, op, now)
            continue
        if w.stamp[d] != tensor:
            w.stamp[d] = tensor
            if not a.host:
                w.arrival_ms[d] = _carry(a, w, tensor, s, d, now)
            else:
                if out_end < 0.0:
                    out_end = now if a.stays[s] else _carry(a, w, tensor, s, host, now)
                if a.stays[d]:
                    w.arrival_ms[d] = out_end
                elif not a.contended:
                    w.arrival_ms[d] = _carry(a, w, tensor, host, d, out_end)
                else:
                    w.arrival_ms[d] = INF
                    _push(w.leg_key[d], w.leg_tensor[d], 0, w.leg_size[d], out_end, tensor)
                    w.leg_size[d] += 1
        if w.arrival_ms[d] < INF:
            _supply(w, op, w.arrival_ms[d])


@_compile
def _request_blocking(a, w, tensor, target, now):
    """Queue a direct transfer by (request time, tensor, target)."""
    i = w.counters[WAITING]
    while i > 0:
        if w.wait_ms[i - 1] < now or w.wait_tensor[i - 1] < tensor:
            break
        if w.wait_tensor[i - 1] == tensor and w.wait_target[i - 1] < target:
            break
        w.wait_ms[i] = w.wait_ms[i - 1]
        w.wait_tensor[i] = w.wait_tensor[i - 1]
        w.wait_target[i] = w.wait_target[i - 1]
        i -= 1
    w.wait_ms[i] = now
    w.wait_tensor[i] = tensor
    w.wait_target[i] = target
    w.counters[WAITING] += 1


@_compile
def _spread_blocking(a, w, tensor, s, now):
    """Request what brings a tensor to every receiver: in legs from host memory, or direct transfers."""
    for k in range(a.consumer_offsets[tensor], a.consumer_offsets[tensor + 1]):
        d = w.device[a.consumers[k]]
        if d == s or w.stamp[d] == tensor:
            continue
        w.stamp[d] = tensor
        if not a.host:
            _request_blocking(a, w, tensor, d, now)
        elif a.stays[d]:
            _deliver(a, w, tensor, d, now)
        else:
            _push(w.leg_key[d], w.leg_tensor[d], 0, w.leg_size[d], now, tensor)
            w.leg_size[d] += 1


@_compile
def _send_blocking(a, w, tensor, s, now):
    """Send a tensor that device `s` has just produced; transfers occupy devices."""
    remote = False
    for k in range(a.consumer_offsets[tensor], a.consumer_offsets[tensor + 1]):
        op = a.consumers[k]
        if w.device[op] == s:
            _supply(w, op, now)
        else:
            remote = True
    if not remote:
        return
    if a.host and not a.stays[s]:
        _push(w.leg_key[s], w.leg_tensor[s], 0, w.leg_size[s], now, tensor)
        w.leg_size[s] += 1
    else:
        _spread_blocking(a, w, tensor, s, now)


@_compile
def _finish_op(a, w, op, now):
    s = w.device[op]
    w.counters[FINISHED] += 1
    for k in range(a.output_offsets[op], a.output_offsets[op + 1]):
        if a.blocking:
            _send_blocking(a, w, a.outputs[k], s, now)
        else:
            _send_overlapped(a, w, a.outputs[k], s, now)
    if a.any_frees:
        for k in range(a.input_offsets[op], a.input_offsets[op + 1]):
            p = a.inputs[k]
            w.uses_left[p] -= 1
            if w.uses_left[p] == 0 and a.frees[p]:
                w.held_bytes[w.device[p]] -= a.activation_bytes[p]


@_compile
def _end(a, w, now):
    """End everything that ends now."""
    for d in range(len(w.running)):
        if w.until_ms[d] == now and w.running[d] != IDLE:
            what = w.running[d]
            w.running[d] = IDLE
            w.until_ms[d] = INF
            if what >= 0:
                _finish_op(a, w, what, now)
            elif what <= RECEIVING:
                tensor = RECEIVING - what
                s = w.device[a.producer[tensor]]
                if s == d:
                    _spread_blocking(a, w, tensor, s, now)
                else:
                    _deliver(a, w, tensor, d, now)
        if w.leg_running[d] != IDLE and w.leg_until_ms[d] == now:
            tensor = w.leg_running[d]
            w.leg_running[d] = IDLE
            w.leg_until_ms[d] = INF
            _deliver(a, w, tensor, d, now)


@_compile
def _start_direct_blocking(a, w, now):
    """Start the waiting transfers whose two devices are free; the others hold their devices."""
    w.held[:] = False
    kept = 0
    for i in range(w.counters[WAITING]):
        tensor, d = w.wait_tensor[i], w.wait_target[i]
        s = w.device[a.producer[tensor]]
        if w.running[s] == IDLE and w.running[d] == IDLE:
            cost = _cost(a, s, d, a.tensor_bytes[tensor])
            w.running[s] = SENDING
            w.running[d] = RECEIVING - tensor
            w.until_ms[s] = w.until_ms[d] = now + cost
            w.busy_ms[s] += cost
            w.busy_ms[d] += cost
            _log(w, tensor, s, d, now, now + cost)
        else:
            w.held[s] = w.held[d] = True
            w.wait_ms[kept] = w.wait_ms[i]
            w.wait_tensor[kept] = tensor
            w.wait_target[kept] = d
            kept += 1
    w.counters[WAITING] = kept


@_compile
def _start_leg(a, w, d, now):
    """Start a waiting leg of `route: host` on device `d` (blocking) or on its link from host memory."""
    if w.leg_size[d] == 0 or w.leg_key[d, 0] > now:
        return
    if w.leg_running[d] != IDLE or (a.blocking and w.running[d] != IDLE):
        return
    tensor = _pop(w.leg_key[d], w.leg_tensor[d], 0, w.leg_size[d])
    w.leg_size[d] -= 1
    host = len(a.memory_bytes)
    source, target = host, d
    if w.device[a.producer[tensor]] == d:
        source, target = d, host
    cost = _cost(a, source, target, a.tensor_bytes[tensor])
    _log(w, tensor, source, target, now, now + cost)
    if a.blocking:
        w.running[d] = RECEIVING - tensor
        w.until_ms[d] = now + cost
        w.busy_ms[d] += cost
    else:
        w.leg_running[d] = tensor
        w.leg_until_ms[d] = now + cost


@_compile
def _start_op(a, w, d, now):
    """Start the next op of a free device, if one is ready."""
    base = w.queue_base[d]
    if a.priority:
        while w.queue_size[d] > 0 and w.queue_key[base] <= now:
            op = _pop(w.queue_key, w.queue_op, base, w.queue_size[d])
            w.queue_size[d] -= 1
            _push(w.urgent_key, w.urgent_op, base, w.urgent_size[d], -w.rank_ms[op], op)
            w.urgent_size[d] += 1
        if w.urgent_size[d] == 0:
            return
        op = _pop(w.urgent_key, w.urgent_op, base, w.urgent_size[d])
        w.urgent_size[d] -= 1
    else:
        if w.queue_size[d] == 0 or w.queue_key[base] > now:
            return
        op = _pop(w.queue_key, w.queue_op, base, w.queue_size[d])
        w.queue_size[d] -= 1
    took = a.latency_ms[op, d]
    w.running[d] = op
    w.until_ms[d] = now + took
    w.start_ms[op] = now
    w.finish_ms[op] = now + took
    w.busy_ms[d] += took
    if a.any_frees:
        w.held_bytes[d] += a.activation_bytes[op]
        if w.held_bytes[d] > w.peak_bytes[d]:
            w.peak_bytes[d] = w.held_bytes[d]


@_compile
def _next_moment(a, w, now):
    """Return the earliest moment from `now` on at which something ends, or after it at which something becomes ready."""
    moment = INF
    for d in range(len(w.running)):
        if w.running[d] != IDLE:
            moment = min(moment, w.until_ms[d])
        elif w.queue_size[d] > 0 and w.queue_key[w.queue_base[d]] > now:
            moment = min(moment, w.queue_key[w.queue_base[d]])
        if a.host:
            if w.leg_running[d] != IDLE:
                moment = min(moment, w.leg_until_ms[d])
            elif w.leg_size[d] > 0 and w.leg_key[d, 0] > now:
                moment = min(moment, w.leg_key[d, 0])
    return moment


@_compile
def _rank(a, w):
    """Fill `rank_ms` with the longest path from each op to the end under the assignment."""
    host = len(a.memory_bytes)
    for j in range(len(a.order) - 1, -1, -1):
        op = a.order[j]
        s = w.device[op]
        longest = 0.0
        for k in range(a.output_offsets[op], a.output_offsets[op + 1]):
            tensor = a.outputs[k]
            size = a.tensor_bytes[tensor]
            for c in range(a.consumer_offsets[tensor], a.consumer_offsets[tensor + 1]):
                d = w.device[a.consumers[c]]
                path = w.rank_ms[a.consumers[c]]
                if d != s and not a.host:
                    path += _cost(a, s, d, size)
                elif d != s:
                    way = 0.0 if a.stays[s] else _cost(a, s, host, size)
                    path += way + (0.0 if a.stays[d] else _cost(a, host, d, size))
                longest = max(longest, path)
        w.rank_ms[op] = a.latency_ms[op, s] + longest


@_compile
def _simulate(a, w):
    """Run one pass; return its makespan, ms."""
    ops, devices = len(a.source), len(a.memory_bytes)
    w.link_free_ms[:] = 0.0
    w.counters[:] = 0
    for d in range(devices):
        w.running[d] = w.leg_running[d] = w.stamp[d] = IDLE
        w.until_ms[d] = w.leg_until_ms[d] = INF
        w.busy_ms[d] = 0.0
        w.queue_size[d] = w.urgent_size[d] = w.leg_size[d] = 0
        w.held[d] = False
    if a.priority:
        _rank(a, w)
    for i in range(ops):
        w.ready_ms[i] = 0.0
        w.missing[i] = a.num_inputs[i]
        if a.any_frees:
            w.uses_left[i] = a.num_uses[i]
        if w.missing[i] == 0:
            w.missing[i] = 1
            _supply(w, i, 0.0)
    now = -1.0
    makespan = 0.0
    while w.counters[FINISHED] < ops:
        now = _next_moment(a, w, now)
        if now == INF:
            return INF
        makespan = now
        _end(a, w, now)
        if a.blocking and not a.host:
            _start_direct_blocking(a, w, now)
        for d in range(devices):
            if a.host:
                _start_leg(a, w, d, now)
            if w.running[d] == IDLE and not w.held[d]:
                _start_op(a, w, d, now)
    return makespan


@_compile
def _load(a, w):
    """Return the load of the busiest resource, ms; fills `busy_ms` and, in `link_free_ms`, the links' loads."""
    host = len(a.memory_bytes)
    w.busy_ms[:] = 0.0
    w.link_free_ms[:] = 0.0
    w.stamp[:] = -1
    for i in range(len(a.source)):
        w.busy_ms[w.device[i]] += a.latency_ms[i, w.device[i]]
    for tensor in range(len(a.producer)):
        s = w.device[a.producer[tensor]]
        sent = False
        for k in range(a.consumer_offsets[tensor], a.consumer_offsets[tensor + 1]):
            d = w.device[a.consumers[k]]
            if d == s or w.stamp[d] == tensor:
                continue
            w.stamp[d] = tensor
            if not a.host:
                w.link_free_ms[s, d] += _cost(a, s, d, a.tensor_bytes[tensor])
                continue
            if not a.stays[s] and not sent:
                w.link_free_ms[s, host] += _cost(a, s, host, a.tensor_bytes[tensor])
                sent = True
            if not a.stays[d]:
                w.link_free_ms[host, d] += _cost(a, host, d, a.tensor_bytes[tensor])
    if a.blocking:
        for d in range(host):
            w.busy_ms[d] += w.link_free_ms[d, :].sum() + w.link_free_ms[:, d].sum()
    busiest = w.busy_ms.max()
    if a.contended:
        busiest = max(busiest, w.link_free_ms.max())
    return busiest


@_compile
def _prepare(a, w, plan):
    """Spread a plan over the ops, hold weights and activations; return whether it can be simulated."""
    devices = len(a.memory_bytes)
    for i in range(len(plan)):
        if not a.can_run[i, plan[i]]:
            return CANNOT_RUN
        if plan[i] != plan[a.colocate_first[i]]:
            return COLOCATION
    for d in range(devices):
        w.queue_base[d] = 0
        w.held_bytes[d] = 0.0
        w.peak_bytes[d] = 0.0
    for i in range(len(a.source)):
        d = plan[a.source[i]]
        w.device[i] = d
        w.queue_base[d] += 1
        w.held_bytes[d] += a.weight_bytes[i]
        w.peak_bytes[d] += a.activation_bytes[i]
    base = 0
    fits = True
    for d in range(devices):
        count = w.queue_base[d]
        w.queue_base[d] = base
        base += count
        w.peak_bytes[d] += w.held_bytes[d]
        fits = fits and w.peak_bytes[d] <= a.memory_bytes[d]
        if w.held_bytes[d] > a.memory_bytes[d]:
            return MEMORY
    if not fits and not a.any_frees:
        return MEMORY
    if a.may_not_talk and not _talks(a, w):
        return CANNOT_TALK
    return FEASIBLE


@_compile
def _talks(a, w):
    host = len(a.memory_bytes)
    for tensor in range(len(a.producer)):
        s = w.device[a.producer[tensor]]
        for k in range(a.consumer_offsets[tensor], a.consumer_offsets[tensor + 1]):
            d = w.device[a.consumers[k]]
            if d == s:
                continue
            if not a.host and a.link_ms[s, d] == INF:
                return False
            if a.host and not a.stays[s] and a.link_ms[s, host] == INF:
                return False
            if a.host and not a.stays[d] and a.link_ms[host, d] == INF:
                return False
    return True


@_compile
def _fits(a, w):
    for d in range(len(a.memory_bytes)):
        if w.peak_bytes[d] > a.memory_bytes[d]:
            return False
    return True


@_compile
def evaluate_plans(a, w, plans, full, objective, status, time_ms, makespan_ms, energy_j):
    """Evaluate plans one after the other; the workspace then holds the details of the last.

    Args:
        a, w: Arrays and Workspace.
        plans: int32[P, N], device of every op of the unsplit graph; indices are not checked.
        full: Whether to simulate the schedule even where the objective does not need it.
        objective: float64[P], filled with J; inf when infeasible.
        status: int8[P], filled with FEASIBLE or why not.
        time_ms: float64[P], filled with makespan or steady-state time, by goal.
        makespan_ms: float64[P], filled with the makespan where it was simulated, else inf.
        energy_j: float64[P], filled with the energy; NaN when a device states no watts.
    """
    for p in range(len(plans)):
        objective[p] = time_ms[p] = makespan_ms[p] = energy_j[p] = INF
        status[p] = _prepare(a, w, plans[p])
        if status[p] != FEASIBLE:
            continue
        tight = a.any_frees and (full or not _fits(a, w))
        if full or tight or not a.throughput:
            if a.any_frees:
                w.peak_bytes[:] = w.held_bytes
            makespan_ms[p] = time_ms[p] = _simulate(a, w)
            if tight and not _fits(a, w):
                status[p] = MEMORY
                continue
        if a.throughput:
            time_ms[p] = _load(a, w)
        idle = busy = 0.0
        for d in range(len(a.memory_bytes)):
            idle += a.idle_watts[d]
            busy += a.extra_watts[d] * w.busy_ms[d]
        energy_j[p] = (idle * time_ms[p] + busy) / 1000.0
        if a.energy_weight == 0.0:
            objective[p] = time_ms[p]
        else:
            objective[p] = time_ms[p] ** (1.0 - a.energy_weight) * energy_j[p] ** a.energy_weight
