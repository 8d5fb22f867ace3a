"""A placement of ops as data parallelism, and back: each device's part of the work is its share of the batch.

A placement says how much of the work each device should do. Over ranks there are two ways to do it: stages, which hand
activations on, and whole models on parts of the batch, which sum gradients. So whoever proposes placements of ops alone
(the learned policy) proposes both. The work of an op is its time on the device that is fastest at it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autoplace.plan import Plan
from autoplace.problem import Problem
from autoplace.simulate.stage_line import forward_ops
from autoplace.strategies._shares import whole_units
from autoplace.strategies.pipelines import mirrored
from autoplace.strategies.weighted import can_shard, replicas_plan

__all__ = ["all_as_shares", "as_row", "as_shares"]


def as_shares(problem: Problem, row: NDArray[np.integer], *, strategy: str, sharded: float = 0.0) -> Plan | None:
    """Return the data-parallel plan that gives devices the parts of the batch that a placement gives them of the work.

    Args:
        problem: What is placed.
        row: int[N], device of every op.
        strategy: Who proposes it.
        sharded: See `Plan`.

    Returns:
        None where fewer than two devices get a sample, or a device cannot run all of the model.
    """
    parts = np.bincount(row, weights=_work(problem), minlength=problem.num_devices)
    devices = np.flatnonzero(parts > 0)
    counts = whole_units(parts[devices] / parts.sum(), problem.batch_size)
    used = [int(device) for device, count in zip(devices, counts, strict=True) if count > 0]
    if len(used) < 2 or not problem.can_run[:, used].all():
        return None
    return replicas_plan(problem, devices.tolist(), counts, strategy=strategy, sharded=sharded)


def all_as_shares(problem: Problem, row: NDArray[np.integer], *, strategy: str) -> list[Plan]:
    """Return what → `as_shares` makes of a placement, sharded where plans may be, and not; nothing where it cannot."""
    parts = (0.0, 1.0) if can_shard(problem) else (0.0,)
    plans = (as_shares(problem, row, strategy=strategy, sharded=part) for part in parts)
    return [plan for plan in plans if plan is not None]


def as_row(problem: Problem, plan: Plan) -> NDArray[np.int32]:
    """Return a placement that → `as_shares` turns into about these shares: one stretch of ops a device.

    Args:
        problem: What is placed.
        plan: Whole models on several devices.
    """
    count, _ = forward_ops(problem.graph)
    order = [op for op in problem.graph.topological_order.tolist() if op < count]
    work = _work(problem)
    if count < problem.num_ops:  # an op's backward is where it is
        work[:count] += work[:count:-1]
    done = np.cumsum(work[order]) - 0.5 * work[order]
    borders = np.cumsum([replica.share for replica in plan.replicas[:-1]]) * work[:count].sum()
    devices = np.asarray([problem.cluster.index[replica.devices[0]] for replica in plan.replicas], np.int32)
    forward = np.zeros(count, np.int32)
    forward[order] = devices[np.searchsorted(borders, done)]
    return mirrored(problem, forward)


def _work(problem: Problem) -> NDArray[np.float64]:
    """Return the work of every op, float64[N]; where all ops take no time, they count alike."""
    work: NDArray[np.float64] = problem.latency_ms.min(axis=1)
    return work if np.isfinite(work).all() and work.any() else np.ones(problem.num_ops)
