"""What every rank holds under a plan over several ranks: weights, gradients, optimizer state, activations.

    bytes of a rank = weights · (1 + 1 + optimizer)      of the ops that it holds                → `held_by`
                    + weights whose gradients it sums with other ranks, in buckets                → `holder_sets`
                    + what it takes at its borders, and the gradients of what it hands on          → `border_buffers`
                    + Σ stages  activations · b/B/m · k    k microbatches at once                  → `activation_bytes`

with the second 1, the optimizer, the buckets and the borders' gradients in training alone, and k from the schedule (→
`stage_schedule.most_in_flight`), in training one more where there is one. Where a problem says what a rank holds at
rest, that is in place of the first 1: every rank has the whole model. Buckets and buffers are kept between steps: plans
that wait beside each other all hold theirs.

Graphs count a parameter that several ops read with the first of them, and give these ops one co-location id (→
`graph.recorder`). Ranks need not respect it: each holder keeps its own copy, and the copies' gradients are summed. So
an op's weights are held where it runs, and where any later op of its id runs: exact where all its weights are shared,
an upper bound where some are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autoplace.graph.opgraph import OpGraph
from autoplace.plan import Plan
from autoplace.problem import Problem
from autoplace.simulate.stage_line import StageLine, forward_ops
from autoplace.simulate.stage_schedule import most_in_flight

__all__ = ["activation_bytes", "border_buffers", "held_by", "holder_sets", "holders"]


def held_by(problem: Problem, assignments: Sequence[NDArray[np.integer]]) -> NDArray[np.bool_]:
    """Return which devices hold each forward op's weights, bool[n, D].

    Args:
        problem: What is placed.
        assignments: int[N] of every replica, device of every op.
    """
    count, _ = forward_ops(problem.graph)
    held = np.zeros((count, problem.num_devices), np.bool_)
    for assignment in assignments:
        held[np.arange(count), assignment[:count]] = True
    ids = problem.graph.colocate[:count]
    keys, sizes = np.unique(ids[ids >= 0], return_counts=True)
    for key in keys[sizes > 1]:
        members = np.flatnonzero(ids == key)[::-1]
        held[members] = np.logical_or.accumulate(held[members])
    return held


def holder_sets(problem: Problem, held: NDArray[np.bool_]) -> dict[tuple[int, ...], float]:
    """Return the bytes of weights of every set of holders: device indices, ascending, to bytes; in the sets' order."""
    weights = problem.graph.weight_bytes[: len(held)]
    sets: dict[tuple[int, ...], float] = {}
    for op in np.flatnonzero(weights > 0):
        key = tuple(np.flatnonzero(held[op]).tolist())
        sets[key] = sets.get(key, 0.0) + float(weights[op])
    return dict(sorted(sets.items()))


def holders(plan: Plan, problem: Problem) -> dict[tuple[str, ...], float]:
    """Return which devices hold how many bytes of weights in common under a plan.

    Args:
        plan: With a placement.
        problem: What it places.

    Returns:
        Names of devices, in the cluster's order, to bytes. The gradients of each set of two or more are all-reduced.

    Raises:
        PlanFileError: If the plan does not fit the problem.
    """
    rows = [plan.assignment_array(problem, r) for r in range(len(plan.replicas))]
    names = [d.name for d in problem.cluster.devices]
    sets = holder_sets(problem, held_by(problem, rows))
    return {tuple(names[d] for d in key): size for key, size in sets.items()}


def activation_bytes(
    problem: Problem, line: StageLine, fraction: float, microbatches: int, schedule: str
) -> dict[int, float]:
    """Return device to the bytes of activations that it holds at most for one replica.

    In training all activations of a microbatch are held until its backward; in inference those that are freed count as
    long as an op of the same stage, or the next stage, needs them.

    Args:
        problem: What is placed.
        line: The replica's stages.
        fraction: Of the batch, that one microbatch is.
        microbatches: That the replica runs.
        schedule: See `stage_schedule`.
    """
    graph, (_, training) = problem.graph, forward_ops(problem.graph)
    held: dict[int, float] = {}
    for stage, device in enumerate(line.devices):
        ops = np.flatnonzero(line.stage_of == stage)
        kept = ops if training else ops[~graph.frees[ops]]
        alive = most_in_flight(schedule, stage, len(line.devices), microbatches)
        if training:
            # What a backward has freed the heap does not give to the next forward at once: the last of two stages of
            # 1F1B took 1.9 times its one microbatch. [measured: bert, 64 samples, CPU, 2026-11]
            alive = min(microbatches, alive + 1)
        total = float(graph.activation_bytes[kept].sum()) * fraction * alive
        if len(kept) < len(ops):
            total += _peak_of_freed(graph, line, stage) * fraction
        held[device] = held.get(device, 0.0) + total
    return held


def border_buffers(line: StageLine, share: float, *, training: bool) -> dict[int, float]:
    """Return device to the bytes of the buffers that `PipelineStage` makes for all microbatches of a replica.

    Args:
        line: The replica's stages.
        share: Of the batch, the replica's.
        training: Whether gradients come back.
    """
    held: dict[int, float] = {}
    for border, size in enumerate(line.border_bytes.tolist()):
        for stage in (border, border + 1) if training else (border + 1,):
            held[line.devices[stage]] = held.get(line.devices[stage], 0.0) + size * share
    return held


def _peak_of_freed(graph: OpGraph, line: StageLine, stage: int) -> float:
    """Return the most bytes of freed activations that a stage holds at once, of the whole batch."""
    order = [op for op in graph.topological_order.tolist() if op < len(line.stage_of) and line.stage_of[op] == stage]
    position = {op: i for i, op in enumerate(order)}
    last = [len(order)] * len(order)  # what no op of the stage reads last is handed on
    readers: dict[int, list[int]] = {op: [] for op in order}
    for producer, consumer, _ in graph.edge_list.tolist():
        if producer in readers:
            readers[producer].append(position.get(consumer, len(order)))
    for op, places in readers.items():
        last[position[op]] = max(places, default=len(order))
    change = np.zeros(len(order) + 2)
    for i, op in enumerate(order):
        if graph.frees[op]:
            change[i] += graph.activation_bytes[op]
            change[last[i] + 1] -= graph.activation_bytes[op]
    return float(np.cumsum(change).max(initial=0.0))
