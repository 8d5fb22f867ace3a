"""Loads of devices and links under a plan that changes op by op: what a local move can know without a schedule.

A move costs its ops' degree, not the graph: per tensor and device it is known how many consumers are there, so that a
transfer appears with the first and goes with the last. Sums drift by rounding; `local` counts them anew now and then.
The rules are those of `kernels`; a link that does not exist is counted in `MISSING_LINKS` instead of loading anything.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoplace.jit import inline
from autoplace.simulate.arrays import Arrays
from autoplace.simulate.primitives import INF, transfer_ms

__all__ = [
    "APART",
    "CANNOT",
    "MISSING_LINKS",
    "Loads",
    "build_loads",
    "busiest_ms",
    "fits",
    "recount",
    "remember",
    "restore",
    "shift",
    "unshift",
    "value",
    "weights_fit",
]  # fmt: skip

CANNOT, APART, MISSING_LINKS, FAULTS = 0, 1, 2, 3
"""Ops on devices that cannot run them; ops away from the first of their group; transfers without a link."""

SUMS = np.dtype([("ops", "i8"), ("busy_ms", "f8"), ("weight_bytes", "f8"), ("held_bytes", "f8")], align=True)
"""Of a device: unsplit ops, load, bytes of weights, and all bytes when nothing is freed."""


class Loads(NamedTuple):
    """Sums under the current plan, and a second row to return to. N ops, M of them split, D devices, T tensors."""

    sums: NDArray[np.void]
    """SUMS[2, D]."""
    links_ms: NDArray[np.float64]
    """float64[2, D + 1, D + 1], row = source."""
    faults: NDArray[np.int64]
    """int64[2, 3]: `CANNOT`, `APART`, `MISSING_LINKS`."""
    here: NDArray[np.int32]
    """int32[T, D], consumers of a tensor on a device."""
    copy_offsets: NDArray[np.int32]
    """int32[N + 1] into `copies`."""
    copies: NDArray[np.int32]
    """int32[M], the split ops of every unsplit one."""
    member_offsets: NDArray[np.int32]
    """int32[N + 1] into `members`, by the first op of a group."""
    members: NDArray[np.int32]
    """int32[N], a group's ops; an op that is free is a group."""
    input_tensors: NDArray[np.int32]
    """int32[C], tensors by consumer, in the order of `Arrays.inputs`."""


def _grouped(keys: NDArray[np.int32], count: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return offsets, int32[count + 1], and the indices of `keys` in the order of their keys."""
    offsets = np.zeros(count + 1, np.int32)
    np.cumsum(np.bincount(keys, minlength=count), out=offsets[1:])
    return offsets, np.argsort(keys, kind="stable").astype(np.int32)


def build_loads(arrays: Arrays) -> Loads:
    """Lay out the sums of a problem; they are filled by `recount`."""
    ops, devices = arrays.can_run.shape
    copy_offsets, copies = _grouped(arrays.ops["source"], ops)
    member_offsets, members = _grouped(arrays.colocate_first, ops)
    tensor_of_pair = np.repeat(np.arange(len(arrays.tensors)), arrays.tensors["last"] - arrays.tensors["first"])
    return Loads(
        sums=np.zeros((2, devices), SUMS),
        links_ms=np.zeros((2, devices + 1, devices + 1)),
        faults=np.zeros((2, FAULTS), np.int64),
        here=np.zeros((len(arrays.tensors), devices), np.int32),
        copy_offsets=copy_offsets,
        copies=copies,
        member_offsets=member_offsets,
        members=members,
        input_tensors=tensor_of_pair[np.argsort(arrays.consumers, kind="stable")].astype(np.int32),
    )


@inline
def _carry(arrays, loads, source, target, size, sign):
    """Add a transfer to, or take it off, the load of a link and, where it blocks, of the devices at its ends."""
    if arrays.links[source, target].latency_ms == INF:
        loads.faults[0, MISSING_LINKS] += sign
        return
    cost = sign * transfer_ms(arrays.links, source, target, size)
    loads.links_ms[0, source, target] += cost
    if arrays.rules[0].blocking:
        if source < len(arrays.devices):
            loads.sums[0, source].busy_ms += cost
        if target < len(arrays.devices):
            loads.sums[0, target].busy_ms += cost


@inline
def _send(arrays, loads, tensor, s, sign):
    """Add or take off all transfers of a tensor that device `s` makes."""
    host, size = len(arrays.devices), arrays.tensors[tensor].bytes
    remote = False
    for d in range(host):
        if d == s or loads.here[tensor, d] == 0:
            continue
        remote = True
        if not arrays.rules[0].host:
            _carry(arrays, loads, s, d, size, sign)
        elif not arrays.devices[d].stays:
            _carry(arrays, loads, host, d, size, sign)
    if remote and arrays.rules[0].host and not arrays.devices[s].stays:
        _carry(arrays, loads, s, host, size, sign)


@inline
def _reach(arrays, loads, plan, tensor, a, b):
    """Move one consumer of a tensor from device `a` to `b`."""
    s = plan[0, arrays.ops[arrays.tensors[tensor].producer].source]
    if arrays.rules[0].host:
        _send(arrays, loads, tensor, s, -1)
        loads.here[tensor, a] -= 1
        loads.here[tensor, b] += 1
        _send(arrays, loads, tensor, s, 1)
        return
    size = arrays.tensors[tensor].bytes
    loads.here[tensor, a] -= 1
    if a != s and loads.here[tensor, a] == 0:
        _carry(arrays, loads, s, a, size, -1)
    if b != s and loads.here[tensor, b] == 0:
        _carry(arrays, loads, s, b, size, 1)
    loads.here[tensor, b] += 1


@inline
def _hold(arrays, loads, latency_ms, op, d, sign):
    """Add a split op to, or take it off, the sums of a device."""
    if latency_ms[op, d] < INF:
        loads.sums[0, d].busy_ms += sign * latency_ms[op, d]
    loads.sums[0, d].weight_bytes += sign * arrays.ops[op].weight_bytes
    loads.sums[0, d].held_bytes += sign * (arrays.ops[op].weight_bytes + arrays.ops[op].activation_bytes)


@inline
def _join(arrays, loads, plan, op, a, b):
    """Count anew which ops are away from the first of their group when `op` goes from `a` to `b`."""
    first = arrays.colocate_first[op]
    if first != op:
        loads.faults[0, APART] += (plan[0, first] != b) - (plan[0, first] != a)
        return
    for k in range(loads.member_offsets[op], loads.member_offsets[op + 1]):
        other = loads.members[k]
        if other != op:
            loads.faults[0, APART] += (plan[0, other] != b) - (plan[0, other] != a)


@inline
def shift(arrays, loads, latency_ms, plan, op, b):
    """Move one unsplit op to device `b` in the plan and in all sums."""
    a = plan[0, op]
    if a == b:
        return
    loads.faults[0, CANNOT] += (not arrays.can_run[op, b]) - (not arrays.can_run[op, a])
    _join(arrays, loads, plan, op, a, b)
    loads.sums[0, a].ops -= 1
    loads.sums[0, b].ops += 1
    for c in range(loads.copy_offsets[op], loads.copy_offsets[op + 1]):
        copy = loads.copies[c]
        _hold(arrays, loads, latency_ms, copy, a, -1)
        _hold(arrays, loads, latency_ms, copy, b, 1)
        for k in range(arrays.ops[copy].first_output, arrays.ops[copy].last_output):
            _send(arrays, loads, arrays.outputs[k], a, -1)
            _send(arrays, loads, arrays.outputs[k], b, 1)
        for k in range(arrays.ops[copy].first_input, arrays.ops[copy].last_input):
            _reach(arrays, loads, plan, loads.input_tensors[k], a, b)
    plan[0, op] = b


@inline
def unshift(arrays, loads, plan, op, a):
    """Take back a `shift` from device `a` in the plan and in the counts; → `restore` does so for the sums."""
    b = plan[0, op]
    if a == b:
        return
    for c in range(loads.copy_offsets[op], loads.copy_offsets[op + 1]):
        copy = loads.copies[c]
        for k in range(arrays.ops[copy].first_input, arrays.ops[copy].last_input):
            loads.here[loads.input_tensors[k], b] -= 1
            loads.here[loads.input_tensors[k], a] += 1
    plan[0, op] = a


@inline
def _copy_row(loads, source, target):
    devices = loads.sums.shape[1]
    for d in range(devices):
        loads.sums[target, d].ops = loads.sums[source, d].ops
        loads.sums[target, d].busy_ms = loads.sums[source, d].busy_ms
        loads.sums[target, d].weight_bytes = loads.sums[source, d].weight_bytes
        loads.sums[target, d].held_bytes = loads.sums[source, d].held_bytes
    for s in range(devices + 1):
        for d in range(devices + 1):
            loads.links_ms[target, s, d] = loads.links_ms[source, s, d]
    for k in range(FAULTS):
        loads.faults[target, k] = loads.faults[source, k]


@inline
def remember(loads):
    """Note all sums."""
    _copy_row(loads, 0, 1)


@inline
def restore(loads):
    """Return to the sums noted."""
    _copy_row(loads, 1, 0)


@inline
def recount(arrays, loads, latency_ms, plan):
    """Count all sums of a plan from nothing."""
    host = len(arrays.devices)
    for d in range(host):
        loads.sums[0, d].ops = 0
        loads.sums[0, d].busy_ms = loads.sums[0, d].weight_bytes = loads.sums[0, d].held_bytes = 0.0
    for s in range(host + 1):
        for d in range(host + 1):
            loads.links_ms[0, s, d] = 0.0
    for k in range(FAULTS):
        loads.faults[0, k] = 0
    for i in range(plan.shape[1]):
        loads.sums[0, plan[0, i]].ops += 1
        loads.faults[0, CANNOT] += not arrays.can_run[i, plan[0, i]]
        loads.faults[0, APART] += plan[0, i] != plan[0, arrays.colocate_first[i]]
    for op in range(len(arrays.ops)):
        _hold(arrays, loads, latency_ms, op, plan[0, arrays.ops[op].source], 1)
    for tensor in range(len(arrays.tensors)):
        for d in range(host):
            loads.here[tensor, d] = 0
        for k in range(arrays.tensors[tensor].first, arrays.tensors[tensor].last):
            loads.here[tensor, plan[0, arrays.ops[arrays.consumers[k]].source]] += 1
        _send(arrays, loads, tensor, plan[0, arrays.ops[arrays.tensors[tensor].producer].source], 1)


@inline
def busiest_ms(arrays, loads):
    """Return the load of the busiest resource: no schedule is shorter."""
    host = len(arrays.devices)
    busiest = 0.0
    for d in range(host):
        busiest = max(busiest, loads.sums[0, d].busy_ms)
    if arrays.rules[0].contended:
        for s in range(host + 1):
            for d in range(host + 1):
                busiest = max(busiest, loads.links_ms[0, s, d])
    return busiest


@inline
def fits(arrays, loads):
    """Return whether every device holds all its bytes at once."""
    fit = True
    for d in range(len(arrays.devices)):
        fit = fit and loads.sums[0, d].held_bytes <= arrays.devices[d].memory_bytes
    return fit


@inline
def weights_fit(arrays, loads):
    """Return whether every device holds its weights."""
    fit = True
    for d in range(len(arrays.devices)):
        fit = fit and loads.sums[0, d].weight_bytes <= arrays.devices[d].memory_bytes
    return fit


@inline
def value(arrays, loads, time_ms):
    """Return J of a makespan or steady-state time."""
    weight = arrays.rules[0].energy_weight
    if weight == 0.0:
        return time_ms
    idle = busy = 0.0
    for d in range(len(arrays.devices)):
        idle += arrays.devices[d].idle_watts
        busy += arrays.devices[d].extra_watts * loads.sums[0, d].busy_ms
    return time_ms ** (1.0 - weight) * (max(0.0, idle * time_ms + busy) / 1000.0) ** weight
