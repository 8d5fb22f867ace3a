"""The simulator's event loop: for all semantics that `ahead` leaves out. The rules are those of `kernels`."""

from __future__ import annotations

from autoplace.jit import inline
from autoplace.simulate.ahead import foresee, simulate_ahead
from autoplace.simulate.primitives import (
    IDLE,
    INF,
    carry,
    clear,
    deliver,
    log_transfer,
    pop,
    push,
    rank,
    supply,
    take,
    transfer_ms,
)  # fmt: skip

__all__ = ["simulate"]

SENDING, RECEIVING = -2, -3
"""What a device does besides an op; RECEIVING less a tensor's index says which."""


@inline
def _send_overlapped(rules, ops, devices, tensors, links, consumers, queue, legs, log, tensor, s, now):
    """Send a tensor that device `s` has just produced; transfers occupy links alone."""
    host = len(devices)
    out_end = -1.0
    for k in range(tensors[tensor].first, tensors[tensor].last):
        op = consumers[k]
        d = ops[op].device
        if d == s:
            supply(ops, devices, queue, op, now)
            continue
        if devices[d].stamp != tensor:
            devices[d].stamp = tensor
            if not rules[0].host:
                devices[d].arrival_ms = carry(rules, tensors, links, log, tensor, s, d, now)
            else:
                if out_end < 0.0:
                    out_end = now if devices[s].stays else carry(rules, tensors, links, log, tensor, s, host, now)
                if devices[d].stays:
                    devices[d].arrival_ms = out_end
                elif not rules[0].contended:
                    devices[d].arrival_ms = carry(rules, tensors, links, log, tensor, host, d, out_end)
                else:
                    devices[d].arrival_ms = INF
                    push(legs[d], 0, devices[d].leg_size, out_end, tensor)
                    devices[d].leg_size += 1
        if devices[d].arrival_ms < INF:
            supply(ops, devices, queue, op, devices[d].arrival_ms)


@inline
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


@inline
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
            deliver(ops, devices, tensors, consumers, queue, tensor, d, now)
        else:
            push(legs[d], 0, devices[d].leg_size, now, tensor)
            devices[d].leg_size += 1


@inline
def _send_blocking(rules, ops, devices, tensors, consumers, queue, legs, waits, tensor, s, now):
    """Send a tensor that device `s` has just produced; transfers occupy devices."""
    remote = False
    for k in range(tensors[tensor].first, tensors[tensor].last):
        op = consumers[k]
        if ops[op].device == s:
            supply(ops, devices, queue, op, now)
        else:
            remote = True
    if not remote:
        return
    if rules[0].host and not devices[s].stays:
        push(legs[s], 0, devices[s].leg_size, now, tensor)
        devices[s].leg_size += 1
    else:
        _spread_blocking(rules, ops, devices, tensors, consumers, queue, legs, waits, tensor, s, now)


@inline
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


@inline
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
                    deliver(ops, devices, tensors, consumers, queue, tensor, d, now)
        if devices[d].leg_running != IDLE and devices[d].leg_until_ms == now:
            tensor = devices[d].leg_running
            devices[d].leg_running = IDLE
            devices[d].leg_until_ms = INF
            deliver(ops, devices, tensors, consumers, queue, tensor, d, now)


@inline
def _start_direct_blocking(rules, ops, devices, tensors, links, waits, log, now):
    """Start the waiting transfers whose two devices are free; the others hold their devices."""
    for d in range(len(devices)):
        devices[d].held = False
    kept = 0
    for i in range(rules[0].waiting):
        tensor, d = waits[i].tensor, waits[i].target
        s = ops[tensors[tensor].producer].device
        if devices[s].running == IDLE and devices[d].running == IDLE:
            cost = transfer_ms(links, s, d, tensors[tensor].bytes)
            devices[s].running = SENDING
            devices[d].running = RECEIVING - tensor
            devices[s].until_ms = devices[d].until_ms = now + cost
            devices[s].busy_ms += cost
            devices[d].busy_ms += cost
            log_transfer(rules, log, tensor, s, d, now, now + cost)
        else:
            devices[s].held = devices[d].held = True
            waits[kept].request_ms = waits[i].request_ms
            waits[kept].tensor = tensor
            waits[kept].target = d
            kept += 1
    rules[0].waiting = kept


@inline
def _start_leg(rules, ops, devices, tensors, links, legs, log, d, now):
    """Start a waiting leg of `route: host` on device `d` (blocking) or on its link from host memory."""
    if devices[d].leg_size == 0 or legs[d, 0].key > now:
        return
    if devices[d].leg_running != IDLE or (rules[0].blocking and devices[d].running != IDLE):
        return
    tensor = pop(legs[d], 0, devices[d].leg_size)
    devices[d].leg_size -= 1
    host = len(devices)
    source, target = host, d
    if ops[tensors[tensor].producer].device == d:
        source, target = d, host
    cost = transfer_ms(links, source, target, tensors[tensor].bytes)
    log_transfer(rules, log, tensor, source, target, now, now + cost)
    if rules[0].blocking:
        devices[d].running = RECEIVING - tensor
        devices[d].until_ms = now + cost
        devices[d].busy_ms += cost
    else:
        devices[d].leg_running = tensor
        devices[d].leg_until_ms = now + cost


@inline
def _start_op(rules, ops, devices, latency_ms, queue, urgent, d, now):
    """Start the next op of a free device, if one is ready."""
    op = take(rules, ops, devices, queue, urgent, d, now)
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


@inline
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


@inline
def simulate(
    rules, ops, devices, tensors, links, latency_ms, order, sources, outputs, inputs, consumers, edges, queue, urgent,
    legs, waits, log, frees,
):  # fmt: skip
    """Run one pass, with what memory holds at each moment where `frees` asks for it; return its makespan, ms."""
    clear(devices, links)
    rules[0].finished = rules[0].waiting = rules[0].lines = 0
    if rules[0].ranked and not rules[0].by_part:
        rank(rules, ops, devices, tensors, edges, links, latency_ms, order)
    for k in range(len(sources)):
        ops[sources[k]].missing = 1
        foresee(ops, devices, queue, sources[k], 0.0)
    if not (rules[0].blocking or frees or (rules[0].host and rules[0].contended)):
        return simulate_ahead(rules, ops, devices, tensors, edges, links, latency_ms, queue, urgent, log)
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
