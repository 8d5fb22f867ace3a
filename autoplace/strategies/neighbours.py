"""Plans over several ranks that differ from one by a step: samples that change sides, a cut that moves, microbatches.

Real runs climb over them where the simulator's last few per cent are not to be had by prediction → `group_tuner`.
"""

from __future__ import annotations

from dataclasses import replace

from autoplace.plan import Plan
from autoplace.problem import Problem
from autoplace.simulate.stage_line import forward_ops
from autoplace.strategies._shares import moved_counts, whole_units
from autoplace.strategies.pipelines import dividing, moved_cuts, stages_plan

__all__ = ["SHARDED_PARTS", "neighbours"]

SHARDED_PARTS = (0.25, 0.5, 1.0)
"""Parts of the parameters that are given owners; see `Plan.sharded`."""
_STRATEGY = "refined"


def neighbours(problem: Problem, plan: Plan, part: float) -> list[Plan]:
    """Return the plans one step away from a plan; none for a single device.

    Args:
        problem: What is placed.
        plan: Fits the problem.
        part: Size of the step, above 0 and at most 1: a part of the batch that changes replicas, or of the ops that
            change stages. One sample, or one op, at least.
    """
    if plan.shape in ("replicas", "hybrid"):
        units = problem.batch_size // (plan.microbatches if plan.shape == "hybrid" else 1)
        counts = whole_units([r.share for r in plan.replicas], units)
        return [
            plan.with_(
                strategy=_STRATEGY,
                replicas=tuple(replace(r, share=c / units) for r, c in zip(plan.replicas, moved, strict=True) if c > 0),
                sharded=plan.sharded if sum(c > 0 for c in moved) > 1 else 0.0,
            )
            for moved in moved_counts(counts, max(1, round(part * units)))
        ] + [plan.with_(strategy=_STRATEGY, sharded=other) for other in _beside(plan.sharded)]
    if plan.shape != "stages":
        return []
    row, count = plan.assignment_array(problem), plan.microbatches
    step = max(1, round(part * forward_ops(problem.graph)[0]))
    found = [
        stages_plan(problem, moved, strategy=_STRATEGY, microbatches=count) for moved in moved_cuts(problem, row, step)
    ]
    for other in dividing((count // 2, count * 2), problem.batch_size):
        found.append(plan.with_(strategy=_STRATEGY, microbatches=other))
    return found


def _beside(sharded: float) -> list[float]:
    """Return the next less and the next greater part with owners; none for plans without."""
    if not sharded:
        return []
    less, more = ([p for p in SHARDED_PARTS if p < sharded], [p for p in SHARDED_PARTS if p > sharded])
    return less[-1:] + more[:1]
