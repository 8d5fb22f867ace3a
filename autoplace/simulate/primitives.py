"""What both loops of the simulator are made of: heaps, queues of ops, links. The rules are those of `kernels`.

All functions are compiled into their callers and work on the record arrays of `arrays`.
"""

from __future__ import annotations

import math
from pathlib import Path

from autoplace.jit import digest, inline

__all__ = [
    "IDLE",
    "INF",
    "carry",
    "clear",
    "deliver",
    "log_transfer",
    "pop",
    "push",
    "rank",
    "sources_version",
    "supply",
    "take",
    "transfer_ms",
]  # fmt: skip

INF = math.inf
IDLE = -1


def sources_version() -> int:
    """Return a number that changes with the simulator's sources: the cache on disk sees the entry's own file alone."""
    return digest(
        Path(__file__).with_name(f"{name}.py")
        for name in ("primitives", "ahead", "events", "kernels", "marks", "arrays")
    )


@inline
def push(heap, base, size, key, item):
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


@inline
def pop(heap, base, size):
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


@inline
def transfer_ms(links, source, target, size):
    """Return the time of a transfer between two nodes, ms."""
    if size == 0.0:
        return links[source, target].latency_ms
    return links[source, target].latency_ms + size * links[source, target].ms_per_byte


@inline
def log_transfer(rules, log, tensor, source, target, start, end):
    """Write a line where a log is kept."""
    line = rules[0].lines
    if line < len(log):
        log[line].tensor = tensor
        log[line].source = source
        log[line].target = target
        log[line].start_ms = start
        log[line].end_ms = end
        rules[0].lines = line + 1


@inline
def clear(devices, links):
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


@inline
def supply(ops, devices, queue, op, when):
    """Note that one input of `op` is on its device at `when`; queue the op after its last one."""
    if when > ops[op].ready_ms:
        ops[op].ready_ms = when
    ops[op].missing -= 1
    if ops[op].missing == 0:
        d = ops[op].device
        push(queue, devices[d].queue_base, devices[d].queue_size, ops[op].ready_ms, op)
        devices[d].queue_size += 1


@inline
def deliver(ops, devices, tensors, consumers, queue, tensor, target, when):
    """Supply the consumers of a tensor on one device."""
    for k in range(tensors[tensor].first, tensors[tensor].last):
        if ops[consumers[k]].device == target:
            supply(ops, devices, queue, consumers[k], when)


@inline
def carry(rules, tensors, links, log, tensor, source, target, now):
    """Put a transfer on a link, overlapped, and return when it arrives."""
    start = now
    if rules[0].contended and links[source, target].free_ms > now:
        start = links[source, target].free_ms
    end = start + transfer_ms(links, source, target, tensors[tensor].bytes)
    links[source, target].free_ms = end
    log_transfer(rules, log, tensor, source, target, start, end)
    return end


@inline
def take(rules, ops, devices, queue, urgent, d, now):
    """Take the op that device `d` runs next off its queue, or -1 when none is ready."""
    base = devices[d].queue_base
    if not rules[0].ranked:
        if devices[d].queue_size == 0 or queue[base].key > now:
            return -1
        op = pop(queue, base, devices[d].queue_size)
        devices[d].queue_size -= 1
        return op
    while devices[d].queue_size > 0 and queue[base].key <= now:
        op = pop(queue, base, devices[d].queue_size)
        devices[d].queue_size -= 1
        push(urgent, base, devices[d].urgent_size, -ops[op].rank_ms, op)
        devices[d].urgent_size += 1
    if devices[d].urgent_size == 0:
        return -1
    op = pop(urgent, base, devices[d].urgent_size)
    devices[d].urgent_size -= 1
    return op


@inline
def rank(rules, ops, devices, tensors, edges, links, latency_ms, order):
    """Fill `rank_ms` with the longest path from each op to the end under the assignment."""
    host = len(devices)
    for j in range(len(order) - 1, -1, -1):
        op = order[j]
        s = ops[op].device
        longest = 0.0
        for k in range(ops[op].first_edge, ops[op].last_edge):
            consumer, size = edges[k].consumer, tensors[edges[k].tensor].bytes
            d = ops[consumer].device
            path = ops[consumer].rank_ms
            if d != s and not rules[0].host:
                path += transfer_ms(links, s, d, size)
            elif d != s:
                way = 0.0 if devices[s].stays else transfer_ms(links, s, host, size)
                path += way + (0.0 if devices[d].stays else transfer_ms(links, host, d, size))
            longest = max(longest, path)
        ops[op].rank_ms = latency_ms[op, s] + longest
