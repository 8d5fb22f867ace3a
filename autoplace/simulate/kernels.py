"""The simulator's numba kernels: one event loop for all semantics, batched over plans, allocating nothing.

Rules, so that every figure has exactly one value (DESIGN section 5 says the rest):

1. Time advances in rounds. A round takes the earliest moment at which anything ends or becomes ready, first ends all
   that ends then, device by device, and then starts all that can start. An op or a blocking transfer that takes no time
   ends in a further round of the same moment; an overlapped one arrives in the round that requests it.
2. An op is ready when the last of its inputs is on its device. A free device takes, by `queue: fifo`, the ready op with
   the least (ready time, op index), or, where a batch is split into parts, the least (part, op index); by
   `queue: priority`, the ready op with the longest path to the end, then the least index. A path's length is the op
   latencies on the devices assigned and the transfers between them, uncontended.
3. A transfer is requested when its producer finishes: one per (tensor, receiving device), none for the producer's own
   device. It takes the link's latency + bytes / bandwidth; a tensor of no bytes still takes the latency.
4. `route: host`: the tensor goes once from the sender to host memory (out leg) and from there once to each receiver (in
   leg, requested when the out leg ends). Host memory is one place: devices of kind `cpu` live in it, have no legs and
   pay nothing, so a way between hosts costs nothing here; use `direct` where it matters. → `arrays.link_matrices`
5. `contention: link`, overlapped: a link carries one transfer at a time, first come, first served; the out leg of a
   device and the in leg of a device are links. Requests of one moment are served in the order in which their sender
   finished the producers, then by tensor index; on an in leg by (request time, tensor index).
6. `transfers: blocking`: a transfer keeps its two devices busy (a leg: the one that is not host memory) and waits
   until both are free. Waiting transfers start before ops, by (request time, tensor index, target device), each as soon
   as its own devices are free; a device with a waiting transfer starts no op. The link is then never contended.
7. Memory: weights always; activations from the op's start, until its last consumer on any device finishes if the op
   frees, else to the end. Received copies are not counted. What ends in a round is freed before what starts in it is
   held. Both goals use the schedule of one pass.
8. Throughput: the load of a device is its ops, and with `blocking` its transfers; a link's load its transfers.
"""

from __future__ import annotations

from autoplace.jit import compiled, inline
from autoplace.simulate.events import simulate
from autoplace.simulate.primitives import INF, clear, sources_version, transfer_ms

__all__ = ["CANNOT_RUN", "CANNOT_TALK", "COLOCATION", "FEASIBLE", "MEMORY", "evaluate_plans"]

FEASIBLE, CANNOT_RUN, COLOCATION, MEMORY, CANNOT_TALK = 0, 1, 2, 3, 4


@inline
def _add_load(rules, devices, links, source, target, size):
    """Add a transfer to the load of a link and, where it blocks, of the devices at its ends."""
    cost = transfer_ms(links, source, target, size)
    links[source, target].free_ms += cost
    if rules[0].blocking:
        if source < len(devices):
            devices[source].busy_ms += cost
        if target < len(devices):
            devices[target].busy_ms += cost


@inline
def _load(rules, ops, devices, tensors, links, latency_ms, consumers):
    """Return the load of the busiest resource, ms; fills `busy_ms` and, in `free_ms`, the links' loads."""
    host = len(devices)
    clear(devices, links)
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


@inline
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


@inline
def _fits(devices):
    fits = True
    for d in range(len(devices)):
        fits = fits and devices[d].peak_bytes <= devices[d].memory_bytes
    return fits


@inline
def _weights_fit(devices):
    fits = True
    for d in range(len(devices)):
        fits = fits and devices[d].held_bytes <= devices[d].memory_bytes
    return fits


@inline
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


def _entry(version):  # type: ignore[no-untyped-def]
    """Build the entry for one version of the sources: what it closes over is part of its key in the cache."""

    @compiled
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
        (can_run, colocate_first, latency_ms, order, sources, outputs, inputs, consumers, rules, ops, devices, tensors,
         edges, links, queue, urgent, legs, waits, log) = arrays  # fmt: skip
        weight = rules[0].energy_weight if version else 0.0
        for p in range(len(plans)):
            figures[:, p] = INF
            status[p] = _prepare(rules, ops, devices, tensors, links, can_run, colocate_first, consumers, plans[p])
            if status[p] != FEASIBLE:
                continue
            tight = rules[0].any_frees and (full or not _fits(devices))
            if tight and not full and not _weights_fit(devices):
                status[p] = MEMORY
                continue
            if full or tight or not rules[0].throughput:
                figures[1, p] = figures[2, p] = simulate(
                    rules, ops, devices, tensors, links, latency_ms, order, sources, outputs, inputs, consumers, edges,
                    queue, urgent, legs, waits, log, tight,
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

    return evaluate_plans


evaluate_plans = _entry(sources_version())
