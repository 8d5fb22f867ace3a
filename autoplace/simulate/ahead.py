"""The simulator's fast loop, without events: for transfers that occupy no device and wait for nobody else's.

An op's finish then says at once when its results arrive. The rules are those of `kernels`.
"""

from __future__ import annotations

from autoplace.jit import inline
from autoplace.simulate.primitives import IDLE, INF, carry, push, take

__all__ = ["begin_op", "foresee", "next_round", "simulate_ahead", "spreading"]


@inline
def foresee(ops, devices, queue, op, when):
    """Do as `supply` does, and bring forward the moment at which the op's device starts its next one."""
    if when > ops[op].ready_ms:
        ops[op].ready_ms = when
    ops[op].missing -= 1
    if ops[op].missing == 0:
        d, ready = ops[op].device, ops[op].ready_ms
        push(queue, devices[d].queue_base, devices[d].queue_size, ready, op)
        devices[d].queue_size += 1
        devices[d].next_ms = min(devices[d].next_ms, max(devices[d].until_ms, ready))


def spreading(arrive):  # type: ignore[no-untyped-def]
    """Build the function that sends what an op produces; `arrive` does as `foresee` does, given a context."""

    @inline
    def spread_ahead(context, rules, ops, devices, tensors, edges, links, queue, log, op):
        """Send what an op produces as soon as its finish is known: rules 3 to 5 without an event."""
        s, now, host = ops[op].device, ops[op].finish_ms, len(devices)
        sent, out_end = -1, 0.0
        for k in range(ops[op].first_edge, ops[op].last_edge):
            consumer, tensor = edges[k].consumer, edges[k].tensor
            d = ops[consumer].device
            if d == s:
                arrive(context, ops, devices, queue, consumer, now)
                continue
            if devices[d].stamp != tensor:
                devices[d].stamp = tensor
                if not rules[0].host:
                    devices[d].arrival_ms = carry(rules, tensors, links, log, tensor, s, d, now)
                else:
                    if sent != tensor:
                        sent = tensor
                        out_end = now if devices[s].stays else carry(rules, tensors, links, log, tensor, s, host, now)
                    devices[d].arrival_ms = out_end
                    if not devices[d].stays:
                        devices[d].arrival_ms = carry(rules, tensors, links, log, tensor, host, d, out_end)
            arrive(context, ops, devices, queue, consumer, devices[d].arrival_ms)

    return spread_ahead


@inline
def _arrive(context, ops, devices, queue, op, when):
    foresee(ops, devices, queue, op, when)


_spread_ahead = spreading(_arrive)


@inline
def begin_op(rules, ops, devices, latency_ms, queue, urgent, d, now):
    """Start the next op of a device that has one ready; return it."""
    op = take(rules, ops, devices, queue, urgent, d, now)
    took = latency_ms[op, d]
    end = now + took
    devices[d].until_ms = end
    devices[d].busy_ms += took
    ops[op].start_ms = now
    ops[op].finish_ms = end
    if devices[d].urgent_size > 0:
        devices[d].next_ms = end
    elif devices[d].queue_size > 0:
        devices[d].next_ms = max(end, queue[devices[d].queue_base].key)
    else:
        devices[d].next_ms = INF
    return op


@inline
def next_round(devices):
    """Return the next moment at which a device starts an op, the first such device, and whether it is the only one."""
    now, first, alone = INF, 0, True
    for d in range(len(devices)):
        moment = devices[d].next_ms
        if moment < now:
            now, first, alone = moment, d, True
        elif moment == now:
            alone = False
    return now, first, alone


@inline
def simulate_ahead(rules, ops, devices, tensors, edges, links, latency_ms, queue, urgent, log):
    """Run one pass without events; return its makespan, ms.

    Ops are started in the order of their start, all that start at one moment before any of them sends: the same rounds
    as those of the event loop.
    """
    makespan = 0.0
    left = len(ops)
    while left > 0:
        now, first, alone = INF, 0, True  # as in `next_round`; called, it takes 7% more
        for d in range(len(devices)):
            moment = devices[d].next_ms
            if moment < now:
                now, first, alone = moment, d, True
            elif moment == now:
                alone = False
        if now == INF:
            return INF
        op = begin_op(rules, ops, devices, latency_ms, queue, urgent, first, now)
        makespan = max(makespan, ops[op].finish_ms)
        left -= 1
        if not alone:
            for d in range(first + 1, len(devices)):
                devices[d].running = IDLE
                if devices[d].next_ms == now:
                    other = begin_op(rules, ops, devices, latency_ms, queue, urgent, d, now)
                    makespan = max(makespan, ops[other].finish_ms)
                    devices[d].running = other
                    left -= 1
        _spread_ahead((), rules, ops, devices, tensors, edges, links, queue, log, op)
        if not alone:
            for d in range(first + 1, len(devices)):
                if devices[d].running != IDLE:
                    _spread_ahead((), rules, ops, devices, tensors, edges, links, queue, log, devices[d].running)
    return makespan
