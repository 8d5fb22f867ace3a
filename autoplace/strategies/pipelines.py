"""Pipelines over ranks: contiguous stages, one a device, with microbatches.

Where the cuts go is found by the strategies that know (→ `chunks`, `dp`), on a problem that says what ranks are (→
`rank_problem`), and then improved cut by cut, by the evaluator's prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from autoplace.graph.opgraph import OpGraph
from autoplace.plan import Plan
from autoplace.problem import Problem
from autoplace.simulate.collectives import ClusterEvaluator
from autoplace.simulate.stage_line import forward_ops
from autoplace.strategies._search import Constructive
from autoplace.strategies._support import View
from autoplace.strategies.chunks import ChunksStrategy
from autoplace.strategies.dp import PipelineDpStrategy

__all__ = [
    "built_by",
    "dividing",
    "in_line",
    "mirrored",
    "moved_cuts",
    "pipeline_plans",
    "planned_problem",
    "rank_problem",
    "settled",
    "stages_plan",
]

Row = NDArray[np.int32]
"""int32[N], device of every op."""

_REFINED = 2
"""Pipelines of one number of microbatches whose cuts are improved."""
_MOST_STEPS = 40
"""Improvements of one pipeline."""


def stages_plan(problem: Problem, row: NDArray[np.integer], *, strategy: str, microbatches: int) -> Plan:
    """Return the plan of one replica; the loss is where the last forward op runs, and one device splits no batch."""
    row = settled(problem, row)
    count = microbatches if len(np.unique(row)) > 1 else 1
    return Plan.from_assignment(problem, row, strategy=strategy, microbatches=count)


def rank_problem(
    problem: Problem,
    microbatches: int,
    *,
    optimizer_bytes_per_weight_byte: float = 0.0,
    gpipe: bool = False,
    split_ties: bool = True,
    share: float = 1.0,
) -> Problem:
    """Return the problem as a strategy for one host should see it, so that its placements suit ranks.

    Weights count with the optimizer's state, activations with as many microbatches as 1F1B holds, and ops that share a
    parameter may part: only a forward op and its backward stay together. Where ranks hold all weights at rest, what
    they hold then is taken off their memory, and weights count no more.

    Args:
        problem: What is placed.
        microbatches: Of the pipeline.
        optimizer_bytes_per_weight_byte: State that the optimizer keeps.
        gpipe: Whether all microbatches' activations are held.
        split_ties: Whether ops that share a parameter may be on several ranks.
        share: Of the batch, for a replica's activations.
    """
    graph, (count, training) = problem.graph, forward_ops(problem.graph)
    weights, resting = graph.weight_bytes.astype(np.float64), problem.resting_bytes
    weights[:count] *= (0.0 if resting else 1.0) + (optimizer_bytes_per_weight_byte if training else 0.0)
    colocate = graph.colocate
    if split_ties:
        colocate = np.full(graph.num_ops, -1, np.int32)
        if training:
            colocate[:count] = np.arange(count)
            colocate[count + 1 :] = np.arange(count)[::-1]
    held = share if gpipe or not training else share * min(1.0, (problem.num_devices + 1) / microbatches)
    planned: OpGraph = replace(
        graph,
        weight_bytes=np.ceil(weights).astype(np.int64),
        activation_bytes=np.ceil(graph.activation_bytes * held).astype(np.int64),
        colocate=colocate,
    )
    devices = tuple(
        replace(d, memory_bytes=max(0.0, d.memory_bytes - resting.get(d.name, 0.0))) for d in problem.cluster.devices
    )
    return problem.with_(
        graph=planned,
        cluster=replace(problem.cluster, devices=devices) if resting else problem.cluster,
        semantics=replace(problem.semantics, microbatches=microbatches, route="direct"),
        concurrency_scale=1.0,
        dispatch_ms=0.0,
    )


def planned_problem(
    problem: Problem, evaluator: ClusterEvaluator, microbatches: int, *, split_ties: bool, share: float = 1.0
) -> Problem:
    """Return the `rank_problem` of what an evaluator predicts with: its optimizer, its schedule."""
    return rank_problem(
        problem,
        microbatches,
        optimizer_bytes_per_weight_byte=evaluator.optimizer,
        gpipe=evaluator.gpipe,
        split_ties=split_ties,
        share=share,
    )


def in_line(problem: Problem, row: NDArray[np.integer]) -> Row:
    """Return a placement with as many ops on each device, but each device's in one stretch of the program.

    Devices come in the order of the mean position of their ops.

    Args:
        problem: What is placed.
        row: int[N], device of every op.
    """
    count, _ = forward_ops(problem.graph)
    order = [op for op in problem.graph.topological_order.tolist() if op < count]
    devices = np.asarray(row)[order]
    used, sizes = np.unique(devices, return_counts=True)
    middle = [float(np.flatnonzero(devices == device).mean()) for device in used]
    ranked = np.argsort(middle, kind="stable")
    forward = np.zeros(count, np.int32)
    forward[order] = np.repeat(used[ranked], sizes[ranked])
    return mirrored(problem, forward)


def pipeline_plans(
    problem: Problem,
    evaluator: ClusterEvaluator,
    *,
    microbatches: Sequence[int],
    split_ties: bool = True,
) -> list[Plan]:
    """Return pipelines over two devices or more, for every number of microbatches, best first.

    Args:
        problem: What is placed.
        evaluator: Predicts; also says what the optimizer keeps and which schedule is run.
        microbatches: Numbers to plan for; those that do not divide the batch are left out.
        split_ties: Whether ops that share a parameter may be on several ranks.
    """
    found: dict[tuple[int, bytes], tuple[float, Plan]] = {}
    for count in dividing(microbatches, problem.batch_size):

        def value(row: Row, count: int = count) -> float:
            return evaluator.evaluate([stages_plan(problem, row, strategy="", microbatches=count)])[0].objective

        corrected = problem.with_(latency_ms=evaluator.latency_ms, overhead_ms=evaluator.overhead_ms)
        planned = planned_problem(corrected, evaluator, count, split_ties=split_ties)
        starts: dict[bytes, tuple[float, str, Row]] = {}
        for strategy in (ChunksStrategy(), PipelineDpStrategy()):
            for row in built_by(strategy, planned):
                row = settled(problem, row)
                if len(np.unique(row)) > 1 and row.tobytes() not in starts:
                    starts[row.tobytes()] = (value(row), strategy.name, row)
        ranked = sorted((s for s in starts.values() if np.isfinite(s[0])), key=lambda s: s[0])
        improved = [
            (*_refined_cuts(problem, row, value, split_ties=split_ties), name) for _, name, row in ranked[:_REFINED]
        ]
        for worth, name, row in [*((w, n, r) for w, r, n in improved), *ranked]:
            key = (count, row.tobytes())
            if key not in found:
                found[key] = (worth, stages_plan(problem, row, strategy=name, microbatches=count))
    return [plan for _, plan in sorted(found.values(), key=lambda pair: pair[0])]


def dividing(microbatches: Sequence[int], batch: int) -> list[int]:
    """Return the numbers of microbatches that divide a batch, each once."""
    return [m for m in dict.fromkeys(microbatches) if m >= 1 and batch % m == 0]


def built_by(strategy: Constructive, problem: Problem) -> list[Row]:
    """Return what a constructive strategy builds; where memory is too little, with activations freed."""
    view = View.of(problem)
    relaxed = view.relaxed()
    return strategy.candidates(view) or (strategy.candidates(relaxed) if relaxed is not None else [])


def mirrored(problem: Problem, forward: NDArray[np.integer]) -> Row:
    """Return the device of every op from that of the forward ops; the loss is with the last of them."""
    count, training = forward_ops(problem.graph)
    if not training:
        return np.asarray(forward, np.int32)
    last = [op for op in problem.graph.topological_order.tolist() if op < count][-1]
    return np.concatenate([forward, [forward[last]], forward[::-1]]).astype(np.int32)


def settled(problem: Problem, row: NDArray[np.integer]) -> Row:
    """Return a placement with the loss where the last forward op runs."""
    return mirrored(problem, np.asarray(row)[: forward_ops(problem.graph)[0]])


def moved_cuts(problem: Problem, row: NDArray[np.integer], step: int) -> list[Row]:
    """Return a pipeline's placements with one cut moved by that many ops; none where a device has several stretches.

    Args:
        problem: What is placed.
        row: int[N], device of every op.
        step: Forward ops, 1 or more.
    """
    count, _ = forward_ops(problem.graph)
    order = [op for op in problem.graph.topological_order.tolist() if op < count]
    devices = np.asarray(row)[order]
    cuts = [0, *(np.flatnonzero(np.diff(devices)) + 1).tolist(), count]
    line = devices[cuts[:-1]]
    found: list[Row] = []
    if len(set(line.tolist())) < len(line):
        return found
    for i in range(1, len(cuts) - 1):
        for moved in (cuts[i] - step, cuts[i] + step):
            if cuts[i - 1] < moved < cuts[i + 1]:
                forward = np.zeros(count, np.int32)
                forward[order] = np.repeat(line, np.diff([*cuts[:i], moved, *cuts[i + 1 :]]))
                found.append(mirrored(problem, forward))
    return found


def _refined_cuts(problem: Problem, row: Row, value: Callable[[Row], float], *, split_ties: bool) -> tuple[float, Row]:
    """Move one cut after the other as long as that lowers the value; steps get smaller down to one op."""
    best, worth = row, value(row)
    step = max(1, forward_ops(problem.graph)[0] // 8)
    for _ in range(_MOST_STEPS):
        tried = [r for r in moved_cuts(problem, best, step) if split_ties or _together(problem, r)]
        found = min(((value(r), i) for i, r in enumerate(tried)), default=(np.inf, 0))
        if found[0] < worth * (1.0 - 1e-9):
            worth, best = found[0], tried[found[1]]
        elif step > 1:
            step //= 2
        else:
            break
    return worth, best


def _together(problem: Problem, row: Row) -> bool:
    """Return whether ops with one co-location id are on one device."""
    ids = problem.graph.colocate
    return all(len(np.unique(row[ids == key])) == 1 for key in np.unique(ids[ids >= 0]))
