"""Features that never change during a placement: hardware against ops, shape of the graph, the problem as a whole.

Their meaning stands in → `policy.columns`, in the order in which they are made here.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from numpy.typing import NDArray

from autoplace.jit import compiled
from autoplace.policy._compile import TINY
from autoplace.policy.columns import CLASS_OWN, CLASS_SPREAD, FEATURE_LIMIT, PAIR_OWN, PAIR_SPREAD, WHOLE
from autoplace.policy.propagate import consumers_of, discounted_sums, hop_means, producers_of
from autoplace.policy.tables import UNFIT, Tables, suiting
from autoplace.policy.times import mean_link
from autoplace.problem import Problem

__all__ = ["static_features"]

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
NEAR, FAR = 0.9, 0.99
"""What a hop counts over the one before it."""


def static_features(problem: Problem, tables: Tables, topological: NDArray[np.int64]) -> tuple[Floats, Floats, Floats]:
    """Return the static features of pairs float32[C, D, PS], of classes float32[C, CS], of the problem float32[G].

    Args:
        problem: What is placed.
        tables: Its tables, these features excepted.
        topological: int64[N], producers first.
    """
    least = np.maximum(tables.class_min, 1e-3 * tables.class_scale)[:, None]
    latency = np.where(tables.can_run, tables.class_latency, 0.0)
    ratio = np.where(tables.can_run, np.log(np.maximum(latency, least) / least), 5.0)
    lat, inverse = mean_link(problem)
    transfer = np.where(tables.tensor_bytes > 0, lat + tables.tensor_bytes * inverse, 0.0)
    outgoing = np.where(tables.class_bytes > 0, lat + tables.class_bytes * inverse, 0.0)
    depth, to_end = _paths(topological, tables)
    critical = np.clip((depth + to_end) / max(float(tables.numbers[1]), TINY), 0.0, 2.0)
    spread_pair, spread_class = _spread(tables, topological, transfer, critical)
    pair = np.concatenate([_pair_features(problem, tables, latency, ratio), spread_pair], axis=2)
    own = _class_features(tables, transfer, outgoing, critical, depth, to_end)
    whole = _whole_features(problem, tables, ratio, outgoing)
    limit = FEATURE_LIMIT
    return (
        np.ascontiguousarray(np.clip(pair, -limit, limit), np.float32),
        np.ascontiguousarray(np.clip(np.concatenate([own, spread_class], axis=1), -limit, limit), np.float32),
        np.asarray(np.clip(whole, -limit, limit), np.float32),
    )


def _pair_features(problem: Problem, tables: Tables, latency: Doubles, ratio: Doubles) -> Floats:
    """Return the columns of `PAIR_OWN`, float32[C, D, ...]."""
    can_run, scale = tables.can_run, tables.class_scale[:, None]
    classes, devices = can_run.shape
    pair = np.zeros((classes, devices, len(PAIR_OWN)), np.float32)
    pair[:, :, 0] = np.minimum(ratio, 5.0)
    pair[:, :, 1] = np.where(can_run, np.clip(latency / scale - 1.0, -1.0, 5.0), 5.0)
    slowness = ratio.mean(axis=0)
    pair[:, :, 2] = np.minimum(slowness - slowness.min(), 5.0)
    if problem.objective.energy_weight > 0:
        energy = np.log(np.maximum(latency * tables.dynamic_watts, TINY))
        gap = energy - np.where(can_run, energy, np.inf).min(axis=1, keepdims=True)
        pair[:, :, 3] = np.where(can_run & np.isfinite(gap), np.clip(gap, 0.0, 5.0), 5.0)
    speed = 1.0 / np.maximum(tables.fluid_latency[0], TINY)
    pair[:, :, 4] = np.clip(np.log(np.maximum(speed * devices / speed.sum(), TINY)), -5.0, 5.0)
    pair[:, :, 5] = _send_cost(tables)
    tail = tables.tail[_leads(tables)]
    pair[:, :, 6] = np.minimum(np.log1p((tail - tail.min(axis=1, keepdims=True)) / scale), 10.0)
    for column, window in ((7, 8), (8, 64), (9, classes)):
        pair[:, :, column] = _suits_next(tables.suited, window)
    return pair


def _send_cost(tables: Tables) -> Doubles:
    """Return log(1 + mean time to send a class's output from a device to another / mean latency), float64[C, D]."""
    others = tables.connected & ~np.eye(len(tables.connected), dtype=bool)
    count = np.maximum(others.sum(axis=1), 1)
    latency = np.where(others, tables.link_latency, 0.0).sum(axis=1) / count
    inverse = np.where(others, tables.link_inverse, 0.0).sum(axis=1) / count
    size = tables.class_bytes[:, None]
    return np.where(size > 0, np.minimum(np.log1p((latency + size * inverse) / tables.class_scale[:, None]), 10.0), 0.0)


def _suits_next(from_here_on: Doubles, window: int) -> Doubles:
    """Return how much of the work of the next classes suits each device, 0 = its equal share, float64[C, D]."""
    classes, devices = from_here_on.shape
    padded = np.concatenate([from_here_on, np.zeros((window + 1, devices))])
    work = padded[1 : classes + 1] - padded[1 + window : classes + 1 + window]
    total = work.sum(axis=1, keepdims=True)
    enough = total > TINY * max(float(from_here_on[0].sum()), TINY)
    return np.where(enough, work / np.maximum(total, TINY) * devices - 1.0, 0.0)


def _class_features(
    tables: Tables, transfer: Doubles, outgoing: Doubles, critical: Doubles, depth: Doubles, to_end: Doubles
) -> Floats:
    """Return the columns of `CLASS_OWN`, float32[C, ...]."""
    lead, classes, devices = _leads(tables), *tables.can_run.shape
    members = np.diff(tables.class_offsets)
    scale, total = tables.class_scale, max(float(tables.numbers[2]), TINY)
    incoming = np.zeros(classes)
    readers = np.repeat(np.arange(len(tables.class_of)), np.diff(tables.in_offsets))
    foreign = tables.class_of[tables.tensor_producer[tables.in_tensors]] != tables.class_of[readers]
    incoming += np.bincount(tables.class_of[readers], transfer[tables.in_tensors] * foreign, minlength=classes)
    early, late = _widths(tables, depth, to_end)
    own = np.zeros((classes, len(CLASS_OWN)), np.float32)
    own[:, 0] = critical[lead]
    own[:, 1] = np.clip(np.log(scale / max(float(scale.mean()), TINY)), -5.0, 5.0)
    own[:, 2] = np.clip(np.log1p(outgoing / scale), 0.0, 8.0)
    own[:, 3] = np.clip(np.log1p(incoming / scale), 0.0, 8.0)
    own[:, 4] = np.clip(np.log1p(_fan_out(tables)[lead]) / 2.0, 0.0, 3.0)
    own[:, 5] = np.clip(np.log1p(np.diff(tables.in_offsets)[lead]) / 2.0, 0.0, 3.0)
    own[:, 6] = tables.can_run.mean(axis=1)
    own[:, 7] = np.log1p(early[lead] / devices)
    own[:, 8] = np.log1p(late[lead] / devices)
    own[:, 9] = np.log1p(np.bincount(tables.level_of)[tables.level_of] / devices)
    own[:, 10] = np.log(members) / 4.0
    own[:, 11] = np.clip(np.log(np.maximum(tables.class_min, TINY) * devices / total), -10.0, 5.0)
    if tables.flags[4]:
        own[:, 12] = tables.need * devices / max(float(tables.need_after[0]), 1.0)
    own[:, 13] = np.arange(classes) / classes
    return own


def _whole_features(problem: Problem, tables: Tables, ratio: Doubles, outgoing: Doubles) -> Doubles:
    """Return the columns of `WHOLE`."""
    semantics, work = problem.semantics, max(float(tables.numbers[2]), TINY)
    slowness = ratio.mean(axis=0)
    critical = max(float(tables.numbers[1]), TINY)
    alone = np.maximum(tables.fluid_latency[0], TINY)
    values = np.asarray(
        [
            problem.objective.goal == "throughput",
            semantics.transfers == "blocking",
            semantics.route == "host",
            semantics.contention == "link",
            semantics.queue == "priority",
            problem.objective.energy_weight,
            min(math.log2(semantics.microbatches), 6.0) / 2.0,
            min(math.log2(problem.num_devices), 6.0) / 2.0,
            min(math.log(len(ratio)), 12.0) / 4.0,
            float(np.clip(math.log(work / critical), -5.0, 5.0)),
            float(np.clip(math.log1p(float(outgoing.sum()) / work), 0.0, 8.0)),
            min(float(slowness.max() - slowness.min()), 5.0),
            float(np.log(alone.min() * (1.0 / alone).sum())),
            float(np.clip(np.log(len(ratio) / len(tables.level_work) / problem.num_devices), -5.0, 5.0)),
        ]
    )
    assert len(values) == len(WHOLE)
    return values


def _spread(
    tables: Tables, topological: NDArray[np.int64], transfer: Doubles, critical: Doubles
) -> tuple[Floats, Floats]:
    """Return the columns of `PAIR_SPREAD`, float32[C, D, ...], and of `CLASS_SPREAD`, float32[C, ...]."""
    devices = tables.latency.shape[1]
    latency, ratio, scale = _op_latency(tables)
    made = np.bincount(tables.tensor_producer, transfer, minlength=len(latency))
    fan = np.minimum(np.log1p(_fan_out(tables)) / 2.0, 3.0)
    signals = np.column_stack(
        [
            ratio,
            np.clip(np.log(scale / max(float(scale.mean()), TINY)), -5.0, 5.0),
            np.clip(np.log1p(made / scale), 0.0, 8.0),
            critical,
            fan,
            _op_need(tables),
        ]
    ).astype(np.float32)
    ahead, behind = consumers_of(tables), producers_of(tables)
    on, back = hop_means(ahead, signals, 4), hop_means(behind, signals, 4)
    tied = transfer + TINY
    pair = [means[:, :devices] for means in (*on, *back)]
    pair += [hop_means(edges, signals[:, :devices], 1, tied)[0] for edges in (ahead, behind)]
    share = suiting(latency) * latency.min(axis=1, keepdims=True)
    amounts = np.column_stack([share, latency, latency.min(axis=1)]) / max(float(latency.mean()), TINY)
    for discount in (NEAR, FAR):
        sums = discounted_sums(ahead, topological[::-1].copy(), amounts.astype(np.float32), discount)
        suits, stay, least = sums[:, :devices], sums[:, devices:-1], sums[:, -1:]
        enough = least > 1e-6
        least = np.where(enough, least, 1.0)
        pair.append(np.where(enough, suits / least * devices - 1.0, 0.0))
        pair.append(np.where(enough, np.log(np.maximum(stay, least) / least), 0.0))
    weight, out, path, fans, need = range(devices, devices + 5)
    shared = [means[:, weight] for means in (*on, *back)]
    shared += [on[0][:, out], on[2][:, out], back[0][:, out], back[2][:, out], on[0][:, path], back[0][:, path]]
    shared += [on[1][:, fans], on[2][:, fans], on[0][:, need], on[2][:, need]]
    # The order of the columns: discounted shares before discounted times.
    pair[-3], pair[-2] = pair[-2], pair[-3]
    assert len(pair) == len(PAIR_SPREAD) and len(shared) == len(CLASS_SPREAD)
    return _by_class(tables, np.stack(pair, axis=-1)), _by_class(tables, np.stack(shared, axis=-1))


def _op_latency(tables: Tables) -> tuple[Doubles, Doubles, Doubles]:
    """Return finite latency (ms), log of it over the least device's, and mean latency of every op."""
    runs = np.isfinite(tables.latency)
    raw = np.where(runs, tables.latency, 0.0)
    mean = raw.sum(axis=1) / np.maximum(runs.sum(axis=1), 1)
    scale = np.maximum(mean, max(1e-3 * float(mean.mean()), TINY))
    least = np.maximum(np.where(runs, tables.latency, np.inf).min(axis=1), 1e-3 * scale)
    least = np.where(np.isfinite(least), least, scale)[:, None]
    latency = np.where(runs, np.minimum(np.maximum(raw, least), UNFIT * least), UNFIT * least)
    return latency, np.log(latency / least), scale


def _op_need(tables: Tables) -> Doubles:
    """Return log(1 + bytes / mean bytes) of every op, a class's bytes shared by its ops; 0 when unlimited."""
    if not tables.flags[4]:
        return np.zeros(len(tables.class_of))
    need = (tables.need / np.diff(tables.class_offsets))[tables.class_of]
    return np.minimum(np.log1p(need / max(float(need.mean()), TINY)), 8.0)


def _by_class(tables: Tables, values: NDArray) -> Floats:
    """Return the mean over the ops of each class."""
    sums = np.add.reduceat(values[tables.class_members], tables.class_offsets[:-1], axis=0)
    count = np.diff(tables.class_offsets).reshape(-1, *[1] * (values.ndim - 1))
    return (sums / count).astype(np.float32)


def _leads(tables: Tables) -> NDArray[np.int32]:
    """Return the first op of each class."""
    return tables.class_members[tables.class_offsets[:-1]]


def _fan_out(tables: Tables) -> NDArray[np.int64]:
    """Return the number of consumers of each op."""
    return np.bincount(
        np.repeat(tables.tensor_producer, np.diff(tables.consumer_offsets)), minlength=len(tables.class_of)
    )


def _paths(topological: NDArray[np.int64], tables: Tables) -> tuple[Doubles, Doubles]:
    """Return the earliest start of each op when every op runs where it is fastest and transfers are free, and the
    least time from its start to the end, ms."""
    least = tables.latency.min(axis=1)
    least[~np.isfinite(least)] = 0.0
    depth = np.zeros(len(least))
    _longest_paths(topological, tables.in_offsets, tables.in_tensors, tables.tensor_producer, least, depth)
    to_end = (tables.latency + tables.tail).min(axis=1)
    to_end[~np.isfinite(to_end)] = 0.0
    return depth, to_end


def _widths(tables: Tables, depth: Doubles, to_end: Doubles) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return how many ops run at each op's earliest and latest start, all as early, or as late, as they can."""
    least = tables.latency.min(axis=1)
    least[~np.isfinite(least)] = 0.0
    found = []
    for starts in (depth, to_end.max(initial=0.0) - to_end):
        begun = np.searchsorted(np.sort(starts), starts, side="right")
        ended = np.searchsorted(np.sort(starts + least), starts, side="right")
        found.append(np.maximum(begun - ended, 1))
    return found[0], found[1]


@partial(compiled, allocates=True)
def _longest_paths(topological, in_offsets, in_tensors, tensor_producer, least, depth):
    for op in topological:
        for k in range(in_offsets[op], in_offsets[op + 1]):
            producer = tensor_producer[in_tensors[k]]
            depth[op] = max(depth[op], depth[producer] + least[producer])
