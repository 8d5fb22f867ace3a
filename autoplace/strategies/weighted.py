"""Data parallelism over ranks: the whole model on several devices, in shares that reckon with the sum of gradients.

Sharded or not (→ `runtime.distributed.sharded`): the shares of both are found alike.

Shares begin where all devices would finish together (→ `replicas.balanced_shares`), for every subset of the devices
where there are few, and for the fastest k, and the fastest k without one, where there are many: a slow device, or a
slow link, may cost more than it brings. The best few are improved sample by sample, by the evaluator's prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np

from autoplace.plan import Plan, Replica
from autoplace.problem import Problem
from autoplace.simulate.collectives import ClusterEvaluator
from autoplace.simulate.stage_line import forward_ops
from autoplace.strategies._shares import Counts, refine_counts, whole_units
from autoplace.strategies.replicas import balanced_shares

__all__ = ["can_shard", "even_plan", "replicas_plan", "weighted_plans"]

_ALL_SUBSETS = 6
"""Devices up to which every subset is tried."""
_REFINED = 3
"""Subsets whose shares are improved."""


def replicas_plan(
    problem: Problem, devices: Sequence[int], counts: Counts, *, strategy: str, sharded: float = 0.0
) -> Plan:
    """Return the plan with a whole model on every device that has samples.

    Args:
        problem: What is placed.
        devices: Indices.
        counts: Samples of each; they sum to the batch.
        strategy: Who proposes it.
        sharded: See `Plan`; one device alone shards nothing.
    """
    names = problem.graph.names
    return Plan(
        replicas=tuple(
            Replica(
                assignment=dict.fromkeys(names, problem.cluster.devices[device].name), share=count / problem.batch_size
            )
            for device, count in zip(devices, counts, strict=True)
            if count > 0
        ),
        strategy=strategy,
        sharded=sharded if sum(count > 0 for count in counts) > 1 else 0.0,
        graph_fingerprint=problem.graph.fingerprint,
        cluster_fingerprint=problem.cluster.fingerprint,
    )


def can_shard(problem: Problem) -> bool:
    """Return whether plans of a problem may have owners of parameters: gradients, and processors alone."""
    return forward_ops(problem.graph)[1] and all(device.kind == "cpu" for device in problem.cluster.devices)


def even_plan(problem: Problem, able: Sequence[int]) -> Plan | None:
    """Return data parallelism with equal shares over all able devices; None when there is only one, or one sample."""
    devices = list(able)[: problem.batch_size]
    if len(devices) < 2:
        return None
    counts = whole_units([1.0 / len(devices)] * len(devices), problem.batch_size)
    return replicas_plan(problem, devices, counts, strategy="even")


def weighted_plans(
    problem: Problem,
    evaluator: ClusterEvaluator,
    able: Sequence[int],
    *,
    evaluations: int = 2000,
    sharded: float = 0.0,
) -> list[Plan]:
    """Return data-parallel plans over subsets of the devices with the best shares found, best first.

    Args:
        problem: What is placed.
        evaluator: Predicts.
        able: Indices of devices that can run every op.
        evaluations: Predictions that improving the shares may take.
        sharded: Part of the parameters that have owners; see `Plan`.

    Returns:
        Plans of two replicas or more that fit; the best of each number of devices among them.
    """
    total = evaluator.latency_ms.sum(axis=0)
    fixed = evaluator.overhead_ms.sum(axis=0)
    found: dict[tuple[int, ...], tuple[float, Counts]] = {}
    for devices in _subsets(sorted(able, key=lambda d: (total[d], d))):
        chosen = list(devices)
        shares = balanced_shares(fixed[chosen], total[chosen] - fixed[chosen])
        counts = whole_units(shares, problem.batch_size)
        found[devices] = (_value_of(problem, evaluator, devices, sharded=sharded)(counts), counts)
    ranked = sorted(found.items(), key=lambda item: (item[1][0], len(item[0]), item[0]))
    plans: dict[tuple[tuple[int, int], ...], tuple[float, Plan]] = {}
    sizes = set[int]()
    for position, (devices, (value, counts)) in enumerate(ranked):
        if position < _REFINED:
            value, counts = refine_counts(
                counts,
                _value_of(problem, evaluator, devices, sharded=sharded),
                most=max(1, evaluations // _REFINED),
            )
        elif len(devices) in sizes:
            continue
        sizes.add(len(devices))
        used = tuple((d, c) for d, c in zip(devices, counts, strict=True) if c > 0)
        if len(used) > 1 and np.isfinite(value):
            plan = replicas_plan(problem, devices, counts, strategy="weighted", sharded=sharded)
            plans[tuple(sorted(used))] = (value, plan)
    return [plan for _, plan in sorted(plans.values(), key=lambda pair: pair[0])]


def _value_of(
    problem: Problem, evaluator: ClusterEvaluator, devices: Sequence[int], *, sharded: float
) -> Callable[[Counts], float]:
    def value(counts: Counts) -> float:
        plan = replicas_plan(problem, devices, counts, strategy="weighted", sharded=sharded)
        return evaluator.evaluate([plan])[0].objective

    return value


def _subsets(ranked: list[int]) -> list[tuple[int, ...]]:
    """Return sets of two devices or more, each in the cluster's order; `ranked` is fastest first."""
    if len(ranked) <= _ALL_SUBSETS:
        wanted = [s for size in range(2, len(ranked) + 1) for s in combinations(ranked, size)]
    else:
        prefixes = [tuple(ranked[:size]) for size in range(2, len(ranked) + 1)]
        wanted = prefixes + [p[:i] + p[i + 1 :] for p in prefixes if len(p) > 2 for i in range(len(p))]
    return list(dict.fromkeys(tuple(sorted(s)) for s in wanted))
