"""The simulator's numba kernels: one event loop for all semantics, batched over plans, allocating nothing.

Rules, so that every figure has exactly one value (DESIGN section 5 says the rest):

1. Time advances in rounds. A round takes the earliest moment at which anything ends or becomes ready, first ends all
   that ends then, device by device, and then starts all that can start. An op or a blocking transfer that takes no time
   ends in a further round of the same moment; an overlapped one arrives in the round that requests it.
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
   both are free. Waiting transfers start before ops, by (request time, tensor index, target device), each as soon as its
   own devices are free; a device with a waiting transfer starts no op. The link is then never contended.
7. Memory: weights always; activations from the op's start, until its last consumer on any device finishes if the op
   frees, else to the end. Received copies are not counted. What ends in a round is freed before what starts in it is
   held. Both goals use the schedule of one pass.
8. Throughput: the load of a device is its ops, and with `blocking` its transfers; a link's load its transfers.
"""

from __future__ import annotations

import math

from numba import njit

__all__ = ["CANNOT_RUN", "CANNOT_TALK", "COLOCATION", "FEASIBLE", "MEMORY", "evaluate_plans"]

FEASIBLE, CANNOT_RUN, COLOCATION, MEMORY, CANNOT_TALK = 0, 1, 2, 3, 4
IDLE, SENDING, RECEIVING = -1, -2, -3
WAITING, FINISHED, LINES = 0, 1, 2
INF = math.inf


def _compile(function):  # type: ignore[no-untyped-def]
    """Compile with a cache on disk where there is a place for one, else without.

    Nothing is allocated here, so reference counts are left out (`_nrt`): with them every call counts every array that
    it passes on, and the loop takes five times as long.
    """
    try:
        return njit(cache=True, _nrt=False)(function)
    except RuntimeError:
        return njit(_nrt=False)(function)


_inline = njit(forceinline=True, _nrt=False)


@_inline
def _push(heap, base, size, key, item):
    """Add to the heap of `size` that begins at `base`, ordered by (key, item); the caller raises the size."""
    i = size
    while i > 0:
        up = (i - 1) >> 1
        above = heap[base + up].key
        if above < key or (above == key and heap[base + up].item < item):
            break
        heap[base + i].key = above
        heap[base + i].item = heap[base + up].item
        i = up
    heap[base + i].key = key
    heap[base + i].item = item


@_inline
def _pop(heap, base, size):
    """Take the least item off the heap of `size`; the caller lowers the size."""
    least = heap[base].item
    last = size - 1
    key, item = heap[base + last].key, heap[base + last].item
    i = 0
    while True:
        down = 2 * i + 1
        if down >= last:
            break
        below = heap[base + down].key
        if down + 1 < last:
            other = heap[base + down + 1].key
            if other < below or (other == below and heap[base + down + 1].item < heap[base + down].item):
                down += 1
                below = other
        if key < below or (key == below and item < heap[base + down].item):
            break
        heap[base + i].key = below
        heap[base + i].item = heap[base + down].item
        i = down
    heap[base + i].key = key
    heap[base + i].item = item
    return least


@_inline
def _cost(links, source, target, size):
    """Return the time of a transfer between two nodes, ms."""
    if size == 0.0:
        return links[source, target].latency_ms
    return links[source, target].latency_ms + size * links[source, target].ms_per_byte


@_inline
def _log(rules, log, tensor, source, target, start, end):
    line = rules[0].lines
    if line < len(log):
        log[line].tensor = tensor
        log[line].source = source
        log[line].target = target
        log[line].start_ms = start
        log[line].end_ms = end
        rules[0].lines = line + 1


@_inline
def _supply(ops, devices, queue, op, when):
    """Note that one input of `op` is on its device at `when`; queue the op after its last one."""
    if when > ops[op].ready_ms:
        ops[op].ready_ms = when
    ops[op].missing -= 1
    if ops[op].missing == 0:
        d = ops[op].device
        _push(queue, devices[d].queue_base, devices[d].queue_size, ops[op].ready_ms, op)
        devices[d].queue_size += 1


@_inline
def _deliver(ops, devices, tensors, consumers, queue, tensor, target, when):
    """Supply the consumers of a tensor on one device."""
    for k in range(tensors[tensor].first, tensors[tensor].last):
        if ops[consumers[k]].device == target:
            _supply(ops, devices, queue, consumers[k], when)


@_inline
def _carry(rules, tensors, links, log, tensor, source, target, now):
    """Put a transfer on a link, overlapped, and return when it arrives."""
    start = now
    if rules[0].contended and links[source, target].free_ms > now:
        start = links[source, target].free_ms
    end = start + _cost(links, source, target, tensors[tensor].bytes)
    links[source, target].free_ms = end
    _log(rules, log, tensor, source, target, start, end)
    return end


@_inline
def _send_overlapped(rules, ops, devices, tensors, links, consumers, queue, legs, log, tensor, s, now):
    """Send a tensor that device `s` has just produced; transfers occupy links alone."""
    host = len(devices)
    out_end = -1.0
    for k in range(tensors[tensor].first, tensors[tensor].last):
        op = consumers[k]
        d = ops[op].device
        if d == s:
            _supply(ops, devices, queue, op, now)
            continue
        if devices[d].stamp != tensor:
            devices[d].stamp = tensor
            if not rules[0].host:
                devices[d].arrival_ms = _carry(rules, tensors, links, log, tensor, s, d, now)
            else:
                if out_end < 0.0:
                    out_end = now if devices[s].stays else _carry(rules, tensors, links, log, tensor, s, host, now)
                if devices[d].stays:
                    devices[d].arrival_ms = out_end
                elif not rules[0].contended:
                    devices[d].arrival_ms = _carry(rules, tensors, links, log, tensor, host, d, out_end)
                else:
                    devices[d].arrival_ms = INF
                    _push(legs[d], 0, devices[d].leg_size, out_end, tensor)
                    devices[d].leg_size += 1
        if devices[d].arrival_ms < INF:
            _supply(ops, devices, queue, op, devices[d].arrival_ms)


@_inline
def _request_blocking(rules, waits, tensor, target, now):
    """Queue a direct transfer by (request time, tensor, target)."""
    i = rules[0].waiting
    while i > 0:
        if waits[i - 1].request_ms < now or waits[i - 1].tensor < tensor:
            break
        if waits[i - 1].tensor == tensor and waits[i - 1].target < target:
            break
        waits[i].request_ms = waits[i - 1].request_ms
        waits[i].tensor = waits[i - 1].tensor
        waits[i].target = waits[i - 1].target
        i -= 1
    waits[i].request_ms = now
    waits[i].tensor = tensor
    waits[i].target = target
    rules[0].waiting += 1


@_inline
def _spread_blocking(rules, ops, devices, tensors, consumers, queue, legs, waits, tensor, s, now):
    """Request what brings a tensor to every receiver: in legs from host memory, or direct transfers."""
    for k in range(tensors[tensor].first, tensors[tensor].last):
        d = ops[consumers[k]].device
        if d == s or devices[d].stamp == tensor:
            continue
        devices[d].stamp = tensor
        if not rules[0].host:
            _request_blocking(rules, waits, tensor, d, now)
        elif devices[d].stays:
            _deliver(ops, devices, tensors, consumers, queue, tensor, d, now)
        else:
            _push(legs[d], 0, devices[d].leg_size, now, tensor)
            devices[d].leg_size += 1


@_inline
def _send_blocking(rules, ops, devices, tensors, consumers, queue, legs, waits, tensor, s, now):
    """Send a tensor that device `s` has just produced; transfers occupy devices."""
    remote = False
    for k in range(tensors[tensor].first, tensors[tensor].last):
        op = consumers[k]
        if ops[op].device == s:
            _supply(ops, devices, queue, op, now)
        else:
            remote = True
    if not remote:
        return
    if rules[0].host and not devices[s].stays:
        _push(legs[s], 0, devices[s].leg_size, now, tensor)
        devices[s].leg_size += 1
    else:
        _spread_blocking(rules, ops, devices, tensors, consumers, queue, legs, waits, tensor, s, now)


@_inline
def _finish_op(rules, ops, devices, tensors, links, outputs, inputs, consumers, queue, legs, waits, log, op, now):
    s = ops[op].device
    rules[0].finished += 1
    for k in range(ops[op].first_output, ops[op].last_output):
        if rules[0].blocking:
            _send_blocking(rules, ops, devices, tensors, consumers, queue, legs, waits, outputs[k], s, now)
        else:
            _send_overlapped(rules, ops, devices, tensors, links, consumers, queue, legs, log, outputs[k], s, now)
    if rules[0].any_frees:
        for k in range(ops[op].first_input, ops[op].last_input):
            p = inputs[k]
            ops[p].uses_left -= 1
            if ops[p].uses_left == 0 and ops[p].frees:
                devices[ops[p].device].held_bytes -= ops[p].activation_bytes


@_inline
def _end(rules, ops, devices, tensors, links, outputs, inputs, consumers, queue, legs, waits, log, now):
    """End everything that ends now."""
    for d in range(len(devices)):
        if devices[d].until_ms == now and devices[d].running != IDLE:
            what = devices[d].running
            devices[d].running = IDLE
            devices[d].until_ms = INF
            if what >= 0:
                _finish_op(
                    rules, ops, devices, tensors, links, outputs, inputs, consumers, queue, legs, waits, log, what, now
                )
            elif what <= RECEIVING:
                tensor = RECEIVING - what
                s = ops[tensors[tensor].producer].device
                if s == d:
                    _spread_blocking(rules, ops, devices, tensors, consumers, queue, legs, waits, tensor, s, now)
                else:
                    _deliver(ops, devices, tensors, consumers, queue, tensor, d, now)
        if devices[d].leg_running != IDLE and devices[d].leg_until_ms == now:
            tensor = devices[d].leg_running
            devices[d].leg_running = IDLE
            devices[d].leg_until_ms = INF
            _deliver(ops, devices, tensors, consumers, queue, tensor, d, now)


@_inline
def _start_direct_blocking(rules, ops, devices, tensors, links, waits, log, now):
    """Start the waiting transfers whose two devices are free; the others hold their devices."""
    for d in range(len(devices)):
        devices[d].held = False
    kept = 0
    for i in range(rules[0].waiting):
        tensor, d = waits[i].tensor, waits[i].target
        s = ops[tensors[tensor].producer].device
        if devices[s].running == IDLE and devices[d].running == IDLE:
            cost = _cost(links, s, d, tensors[tensor].bytes)
            devices[s].running = SENDING
            devices[d].running = RECEIVING - tensor
            devices[s].until_ms = devices[d].until_ms = now + cost
            devices[s].busy_ms += cost
            devices[d].busy_ms += cost
            _log(rules, log, tensor, s, d, now, now + cost)
        else:
            devices[s].held = devices[d].held = True
            waits[kept].request_ms = waits[i].request_ms
            waits[kept].tensor = tensor
            waits[kept].target = d
            kept += 1
    rules[0].waiting = kept


@_inline
def _start_leg(rules, ops, devices, tensors, links, legs, log, d, now):
    """Start a waiting leg of `route: host` on device `d` (blocking) or on its link from host memory."""
    if devices[d].leg_size == 0 or legs[d, 0].key > now:
        return
    if devices[d].leg_running != IDLE or (rules[0].blocking and devices[d].running != IDLE):
        return
    tensor = _pop(legs[d], 0, devices[d].leg_size)
    devices[d].leg_size -= 1
    host = len(devices)
    source, target = host, d
    if ops[tensors[tensor].producer].device == d:
        source, target = d, host
    cost = _cost(links, source, target, tensors[tensor].bytes)
    _log(rules, log, tensor, source, target, now, now + cost)
    if rules[0].blocking:
        devices[d].running = RECEIVING - tensor
        devices[d].until_ms = now + cost
        devices[d].busy_ms += cost
    else:
        devices[d].leg_running = tensor
        devices[d].leg_until_ms = now + cost


@_inline
def _start_op(rules, ops, devices, latency_ms, queue, urgent, d, now):
    """Start the next op of a free device, if one is ready."""
    op = _take(rules, ops, devices, queue, urgent, d, now)
    if op < 0:
        return
    took = latency_ms[op, d]
    devices[d].running = op
    devices[d].until_ms = now + took
    ops[op].start_ms = now
    ops[op].finish_ms = now + took
    devices[d].busy_ms += took
    if rules[0].any_frees:
        devices[d].held_bytes += ops[op].activation_bytes
        if devices[d].held_bytes > devices[d].peak_bytes:
            devices[d].peak_bytes = devices[d].held_bytes


@_inline
def _next_moment(rules, devices, queue, legs, now):
    """Return the next moment at which something ends (maybe `now`) or becomes ready (after `now`)."""
    moment = INF
    for d in range(len(devices)):
        if devices[d].running != IDLE:
            moment = min(moment, devices[d].until_ms)
        elif devices[d].queue_size > 0 and queue[devices[d].queue_base].key > now:
            moment = min(moment, queue[devices[d].queue_base].key)
        if rules[0].host:
            if devices[d].leg_running != IDLE:
                moment = min(moment, devices[d].leg_until_ms)
            elif devices[d].leg_size > 0 and legs[d, 0].key > now:
                moment = min(moment, legs[d, 0].key)
    return moment


@_inline
def _rank(rules, ops, devices, tensors, links, latency_ms, order, outputs, consumers):
    """Fill `rank_ms` with the longest path from each op to the end under the assignment."""
    host = len(devices)
    for j in range(len(order) - 1, -1, -1):
        op = order[j]
        s = ops[op].device
        longest = 0.0
        for k in range(ops[op].first_output, ops[op].last_output):
            tensor = outputs[k]
            size = tensors[tensor].bytes
            for c in range(tensors[tensor].first, tensors[tensor].last):
                d = ops[consumers[c]].device
                path = ops[consumers[c]].rank_ms
                if d != s and not rules[0].host:
                    path += _cost(links, s, d, size)
                elif d != s:
                    way = 0.0 if devices[s].stays else _cost(links, s, host, size)
                    path += way + (0.0 if devices[d].stays else _cost(links, host, d, size))
                longest = max(longest, path)
        ops[op].rank_ms = latency_ms[op, s] + longest


@_inline
def _clear(devices, links):
    """Forget what an earlier run left on devices and links."""
    for d in range(len(devices)):
        devices[d].running = devices[d].leg_running = devices[d].stamp = IDLE
        devices[d].until_ms = devices[d].busy_ms = 0.0
        devices[d].leg_until_ms = devices[d].next_ms = INF
        devices[d].queue_size = devices[d].urgent_size = devices[d].leg_size = 0
        devices[d].held = False
    for s in range(len(links)):
        for d in range(len(links)):
            links[s, d].free_ms = 0.0


@_inline
def _take(rules, ops, devices, queue, urgent, d, now):
    """Take the op that device `d` runs next off its queue, or -1 when none is ready."""
    base = devices[d].queue_base
    if not rules[0].priority:
        if devices[d].queue_size == 0 or queue[base].key > now:
            return -1
        op = _pop(queue, base, devices[d].queue_size)
        devices[d].queue_size -= 1
        return op
    while devices[d].queue_size > 0 and queue[base].key <= now:
        op = _pop(queue, base, devices[d].queue_size)
        devices[d].queue_size -= 1
        _push(urgent, base, devices[d].urgent_size, -ops[op].rank_ms, op)
        devices[d].urgent_size += 1
    if devices[d].urgent_size == 0:
        return -1
    op = _pop(urgent, base, devices[d].urgent_size)
    devices[d].urgent_size -= 1
    return op


@_inline
def _foresee(ops, devices, queue, op, when):
    """Do as `_supply` does, and bring forward the moment at which the op's device starts its next one."""
    if when > ops[op].ready_ms:
        ops[op].ready_ms = when
    ops[op].missing -= 1
    if ops[op].missing == 0:
        d, ready = ops[op].device, ops[op].ready_ms
        _push(queue, devices[d].queue_base, devices[d].queue_size, ready, op)
        devices[d].queue_size += 1
        devices[d].next_ms = min(devices[d].next_ms, max(devices[d].until_ms, ready))


@_inline
def _spread_ahead(rules, ops, devices, tensors, edges, links, queue, log, op):
    """Send what an op produces as soon as its finish is known: rules 3 to 5 without an event."""
    s, now, host = ops[op].device, ops[op].finish_ms, len(devices)
    sent, out_end = -1, 0.0
    for k in range(ops[op].first_edge, ops[op].last_edge):
        consumer, tensor = edges[k].consumer, edges[k].tensor
        d = ops[consumer].device
        if d == s:
            _foresee(ops, devices, queue, consumer, now)
            continue
        if devices[d].stamp != tensor:
            devices[d].stamp = tensor
            if not rules[0].host:
                devices[d].arrival_ms = _carry(rules, tensors, links, log, tensor, s, d, now)
            else:
                if sent != tensor:
                    sent = tensor
                    out_end = now if devices[s].stays else _carry(rules, tensors, links, log, tensor, s, host, now)
                devices[d].arrival_ms = out_end
                if not devices[d].stays:
                    devices[d].arrival_ms = _carry(rules, tensors, links, log, tensor, host, d, out_end)
        _foresee(ops, devices, queue, consumer, devices[d].arrival_ms)


@_inline
def _simulate_ahead(rules, ops, devices, tensors, edges, links, latency_ms, queue, urgent, log):
    """Run one pass without events; return its makespan, ms.

    Where transfers occupy no device and wait for nobody else's, an op's finish says when its results arrive. Ops are then
    started in the order of their start, all that start at one moment before any of them sends: the same rounds.
    """
    makespan = 0.0
    for _ in range(len(ops)):
        now = INF
        for d in range(len(devices)):
            now = min(now, devices[d].next_ms)
        if now == INF:
            return makespan if rules[0].finished == len(ops) else INF
        for d in range(len(devices)):
            devices[d].running = IDLE
            if devices[d].next_ms == now:
                op = _take(rules, ops, devices, queue, urgent, d, now)
                took = latency_ms[op, d]
                devices[d].running = op
                devices[d].until_ms = now + took
                devices[d].busy_ms += took
                devices[d].next_ms = INF
                if devices[d].urgent_size > 0:
                    devices[d].next_ms = devices[d].until_ms
                elif devices[d].queue_size > 0:
                    devices[d].next_ms = max(devices[d].until_ms, queue[devices[d].queue_base].key)
                ops[op].start_ms = now
                ops[op].finish_ms = now + took
                makespan = max(makespan, now + took)
                rules[0].finished += 1
        for d in range(len(devices)):
            if devices[d].running != IDLE:
                _spread_ahead(rules, ops, devices, tensors, edges, links, queue, log, devices[d].running)
    return makespan


@_inline
def _simulate(
    rules, ops, devices, tensors, links, latency_ms, order, sources, outputs, inputs, consumers, edges, queue, urgent, legs, waits, log
):  # fmt: skip
    """Run one pass; return its makespan, ms."""
    _clear(devices, links)
    rules[0].finished = rules[0].waiting = rules[0].lines = 0
    if rules[0].priority:
        _rank(rules, ops, devices, tensors, links, latency_ms, order, outputs, consumers)
    for k in range(len(sources)):
        ops[sources[k]].missing = 1
        _foresee(ops, devices, queue, sources[k], 0.0)
    if not (rules[0].blocking or rules[0].any_frees or (rules[0].host and rules[0].contended)):
        return _simulate_ahead(rules, ops, devices, tensors, edges, links, latency_ms, queue, urgent, log)
    if rules[0].any_frees:
        for d in range(len(devices)):
            devices[d].peak_bytes = devices[d].held_bytes
    now = -1.0
    makespan = 0.0
    while rules[0].finished < len(ops):
        now = _next_moment(rules, devices, queue, legs, now)
        if now == INF:
            return INF
        makespan = now
        _end(rules, ops, devices, tensors, links, outputs, inputs, consumers, queue, legs, waits, log, now)
        if rules[0].blocking and not rules[0].host:
            _start_direct_blocking(rules, ops, devices, tensors, links, waits, log, now)
        for d in range(len(devices)):
            if rules[0].host:
                _start_leg(rules, ops, devices, tensors, links, legs, log, d, now)
            if devices[d].running == IDLE and not devices[d].held:
                _start_op(rules, ops, devices, latency_ms, queue, urgent, d, now)
    return makespan


@_inline
def _add_load(rules, devices, links, source, target, size):
    """Add a transfer to the load of a link and, where it blocks, of the devices at its ends."""
    cost = _cost(links, source, target, size)
    links[source, target].free_ms += cost
    if rules[0].blocking:
        if source < len(devices):
            devices[source].busy_ms += cost
        if target < len(devices):
            devices[target].busy_ms += cost


@_inline
def _load(rules, ops, devices, tensors, links, latency_ms, consumers):
    """Return the load of the busiest resource, ms; fills `busy_ms` and, in `free_ms`, the links' loads."""
    host = len(devices)
    _clear(devices, links)
    for i in range(len(ops)):
        devices[ops[i].device].busy_ms += latency_ms[i, ops[i].device]
    for tensor in range(len(tensors)):
        s, size = ops[tensors[tensor].producer].device, tensors[tensor].bytes
        sent = False
        for k in range(tensors[tensor].first, tensors[tensor].last):
            d = ops[consumers[k]].device
            if d == s or devices[d].stamp == tensor:
                continue
            devices[d].stamp = tensor
            if not rules[0].host:
                _add_load(rules, devices, links, s, d, size)
                continue
            if not devices[s].stays and not sent:
                _add_load(rules, devices, links, s, host, size)
                sent = True
            if not devices[d].stays:
                _add_load(rules, devices, links, host, d, size)
    busiest = 0.0
    for s in range(host + 1):
        if s < host:
            busiest = max(busiest, devices[s].busy_ms)
        for d in range(host + 1):
            if rules[0].contended:
                busiest = max(busiest, links[s, d].free_ms)
    return busiest


@_inline
def _prepare(rules, ops, devices, tensors, links, can_run, colocate_first, consumers, plan):
    """Spread a plan over the ops, hold weights and activations; return whether it can be simulated."""
    for i in range(len(plan)):
        if not can_run[i, plan[i]]:
            return CANNOT_RUN
        if plan[i] != plan[colocate_first[i]]:
            return COLOCATION
    for d in range(len(devices)):
        devices[d].queue_base = 0
        devices[d].held_bytes = 0.0
        devices[d].peak_bytes = 0.0
    for i in range(len(ops)):
        d = plan[ops[i].source]
        ops[i].device = d
        ops[i].missing = ops[i].num_inputs
        ops[i].ready_ms = 0.0
        ops[i].uses_left = ops[i].last_edge - ops[i].first_edge
        devices[d].queue_base += 1
        devices[d].held_bytes += ops[i].weight_bytes
        devices[d].peak_bytes += ops[i].activation_bytes
    base = 0
    fits = True
    for d in range(len(devices)):
        count = devices[d].queue_base
        devices[d].queue_base = base
        base += count
        devices[d].peak_bytes += devices[d].held_bytes
        fits = fits and devices[d].peak_bytes <= devices[d].memory_bytes
    if not fits and not rules[0].any_frees:
        return MEMORY
    if rules[0].may_not_talk and not _talks(rules, ops, devices, tensors, links, consumers):
        return CANNOT_TALK
    return FEASIBLE


@_inline
def _talks(rules, ops, devices, tensors, links, consumers):
    host = len(devices)
    for tensor in range(len(tensors)):
        s = ops[tensors[tensor].producer].device
        for k in range(tensors[tensor].first, tensors[tensor].last):
            d = ops[consumers[k]].device
            if d == s:
                continue
            if not rules[0].host and links[s, d].latency_ms == INF:
                return False
            if rules[0].host and not devices[s].stays and links[s, host].latency_ms == INF:
                return False
            if rules[0].host and not devices[d].stays and links[host, d].latency_ms == INF:
                return False
    return True


@_inline
def _fits(devices):
    for d in range(len(devices)):
        if devices[d].peak_bytes > devices[d].memory_bytes:
            return False
    return True


@_compile
def evaluate_plans(arrays, plans, full, figures, status):
    """Evaluate plans one after the other; the arrays then hold the details of the last.

    Args:
        arrays: `Arrays`.
        plans: int32[P, N], device of every op of the unsplit graph; indices are not checked.
        full: Whether to simulate the schedule even where the objective does not need it.
        figures: float64[4, P], filled with J (inf when infeasible), makespan or steady-state time by goal (ms),
            makespan (ms; inf where it was not simulated), and energy (J; NaN when a device states no watts).
        status: int8[P], filled with FEASIBLE or why not.
    """
    (can_run, colocate_first, latency_ms, order, sources, outputs, inputs, consumers, rules, ops, devices, tensors, edges,
     links, queue, urgent, legs, waits, log) = arrays  # fmt: skip
    weight = rules[0].energy_weight
    for p in range(len(plans)):
        figures[:, p] = INF
        status[p] = _prepare(rules, ops, devices, tensors, links, can_run, colocate_first, consumers, plans[p])
        if status[p] != FEASIBLE:
            continue
        tight = rules[0].any_frees and (full or not _fits(devices))
        if full or tight or not rules[0].throughput:
            figures[1, p] = figures[2, p] = _simulate(
                rules, ops, devices, tensors, links, latency_ms, order, sources, outputs, inputs, consumers, edges, queue,
                urgent, legs, waits, log,
            )  # fmt: skip
            if tight and not _fits(devices):
                status[p] = MEMORY
                continue
        if rules[0].throughput:
            figures[1, p] = _load(rules, ops, devices, tensors, links, latency_ms, consumers)
        idle = busy = 0.0
        for d in range(len(devices)):
            idle += devices[d].idle_watts
            busy += devices[d].extra_watts * devices[d].busy_ms
        figures[3, p] = (idle * figures[1, p] + busy) / 1000.0
        figures[0, p] = figures[1, p]
        if weight > 0.0:
            figures[0, p] = figures[1, p] ** (1.0 - weight) * figures[3, p] ** weight
