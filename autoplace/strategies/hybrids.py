"""Hybrids over ranks: replicas of pipelines, with shares by what each group of devices can do.

The devices are divided into groups: every way of doing so where there are few devices, else by host, by equal size and
by speed. A group's pipeline is cut for its own devices alone (→ `pipelines`); the shares make the groups finish
together, in units of one sample a microbatch, and are improved unit by unit, by the evaluator's prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from autoplace.hardware.cluster import Cluster
from autoplace.plan import Plan, Replica
from autoplace.problem import Problem
from autoplace.simulate.collectives import ClusterEvaluator
from autoplace.strategies._shares import Counts, refine_counts, whole_units
from autoplace.strategies.chunks import ChunksStrategy
from autoplace.strategies.dp import PipelineDpStrategy
from autoplace.strategies.pipelines import built_by, dividing, planned_problem, settled
from autoplace.strategies.replicas import balanced_shares

__all__ = ["hybrid_plans", "partitions"]

Row = NDArray[np.int32]
"""int32[N], device of every op."""

_REFINED = 2
"""Hybrids whose shares are improved."""
_ALL_PARTITIONS = 5
"""Devices up to which every division into groups is tried."""


def hybrid_plans(
    problem: Problem,
    evaluator: ClusterEvaluator,
    able: Sequence[int],
    *,
    microbatches: Sequence[int],
    evaluations: int = 2000,
    split_ties: bool = True,
) -> list[Plan]:
    """Return replicas of pipelines, at least one of them over several devices, best first; none for two devices.

    Args:
        problem: What is placed.
        evaluator: Predicts.
        able: Indices of the devices to use.
        microbatches: Numbers to plan for; those that do not divide the batch are left out.
        evaluations: Predictions that improving the shares may take.
        split_ties: Whether ops that share a parameter may be on several ranks.
    """
    groups: dict[tuple[tuple[int, ...], int], Row | None] = {}
    found: list[tuple[float, Counts, int, list[Row]]] = []
    for count in dividing(microbatches, problem.batch_size):
        for partition in partitions(problem, evaluator, sorted(able)):
            for group in partition:
                if (group, count) not in groups:
                    groups[group, count] = _group_row(problem, evaluator, group, count, split_ties=split_ties)
            rows = [row for group in partition if (row := groups[group, count]) is not None]
            units = problem.batch_size // count
            if len(rows) < len(partition) or units < len(rows):
                continue
            counts = whole_units(_group_shares(evaluator, rows, count), units)
            found.append((_hybrid_value(problem, evaluator, rows, count)(counts), counts, count, rows))
    found.sort(key=lambda item: item[0])
    for position, (_, counts, count, rows) in enumerate(found[:_REFINED]):
        better = refine_counts(counts, _hybrid_value(problem, evaluator, rows, count), most=evaluations // _REFINED)
        found[position] = (*better, count, rows)
    found.sort(key=lambda item: item[0])
    plans = [_hybrid(problem, rows, counts, count) for value, counts, count, rows in found if np.isfinite(value)]
    return [plan for plan in plans if plan.shape == "hybrid"]


def partitions(
    problem: Problem, evaluator: ClusterEvaluator, devices: Sequence[int]
) -> list[tuple[tuple[int, ...], ...]]:
    """Return divisions of the devices into two groups or more, at least one of them of several devices."""
    if len(devices) <= _ALL_PARTITIONS:
        wanted = list(_set_partitions(list(devices)))
    else:
        hosts: dict[str, list[int]] = {}
        for device in devices:
            hosts.setdefault(problem.cluster.devices[device].host, []).append(device)
        ranked = sorted(devices, key=lambda d: (float(evaluator.latency_ms[:, d].sum()), d))
        pairs = [[ranked[i], ranked[-1 - i]] for i in range(len(ranked) // 2)]
        middle = [ranked[len(ranked) // 2]] if len(ranked) % 2 else []
        wanted = [list(hosts.values()), pairs + ([middle] if middle else [])]
        for size in range(2, len(devices) // 2 + 1):
            wanted.append([list(devices[i : i + size]) for i in range(0, len(devices), size)])
    able = [p for p in wanted if 1 < len(p) < len(devices)]
    return list(dict.fromkeys(tuple(tuple(sorted(group)) for group in p) for p in able))


def _set_partitions(items: list[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    for rest in _set_partitions(items[1:]):
        yield [[items[0]], *rest]
        for i, group in enumerate(rest):
            yield [*rest[:i], [items[0], *group], *rest[i + 1 :]]


def _group_row(
    problem: Problem, evaluator: ClusterEvaluator, group: tuple[int, ...], count: int, *, split_ties: bool
) -> Row | None:
    """Return the best pipeline over all devices of a group; None where none is found."""
    if len(group) == 1:
        return np.full(problem.num_ops, group[0], np.int32)
    share = len(group) / problem.num_devices
    planned = planned_problem(
        _restricted(problem, evaluator, group), evaluator, count, split_ties=split_ties, share=share
    )
    rows = [
        settled(problem, np.asarray(group, np.int32)[row])
        for strategy in (ChunksStrategy(), PipelineDpStrategy())
        for row in built_by(strategy, planned)
    ]
    able = [row for row in rows if len(np.unique(row)) == len(group)]
    return min(able, key=lambda row: evaluator.replica(row, share, count).played.makespan_ms, default=None)


def _restricted(problem: Problem, evaluator: ClusterEvaluator, group: Sequence[int]) -> Problem:
    """Return the problem on some of its devices."""
    chosen, cluster = list(group), problem.cluster
    devices = tuple(cluster.devices[d] for d in chosen)
    names = {d.name for d in devices}
    links = {pair: link for pair, link in cluster.links.items() if set(pair) <= names}
    return problem.with_(
        cluster=Cluster(devices=devices, links=links, default_link=cluster.default_link),
        latency_ms=evaluator.latency_ms[:, chosen],
        overhead_ms=evaluator.overhead_ms[:, chosen],
        thread_scale={},
    )


def _group_shares(evaluator: ClusterEvaluator, rows: Sequence[Row], count: int) -> NDArray[np.float64]:
    """Return the shares with which the groups finish together, each taken to be affine in its share."""
    whole, half = (
        np.asarray([evaluator.replica(row, share, count).played.makespan_ms for row in rows]) for share in (1.0, 0.5)
    )
    fixed = np.clip(2.0 * half - whole, 0.0, whole)
    return balanced_shares(fixed, whole - fixed)


def _hybrid_value(
    problem: Problem, evaluator: ClusterEvaluator, rows: Sequence[Row], count: int
) -> Callable[[Counts], float]:
    def value(counts: Counts) -> float:
        return evaluator.evaluate([_hybrid(problem, rows, counts, count)])[0].objective

    return value


def _hybrid(problem: Problem, rows: Sequence[Row], counts: Counts, microbatches: int) -> Plan:
    names, devices = problem.graph.names, [d.name for d in problem.cluster.devices]
    return Plan(
        replicas=tuple(
            Replica(
                assignment={op: devices[d] for op, d in zip(names, row, strict=True)},
                share=units * microbatches / problem.batch_size,
            )
            for row, units in zip(rows, counts, strict=True)
            if units > 0
        ),
        strategy="hybrid",
        microbatches=microbatches,
        graph_fingerprint=problem.graph.fingerprint,
        cluster_fingerprint=problem.cluster.fingerprint,
    )
