"""`propose_distributed`: what to run on several ranks, one a device: candidates of every kind, ranked by prediction.

    single      the whole model on one device                                              the fastest that holds it
    even        the whole model on all devices, equal shares                               → `weighted.even_plan`
    weighted    the whole model on some devices, shares by speed and cost of the sum       → `weighted`
    sharded     the same, parameters with one owner each, all or some                      → `weighted`, `Plan.sharded`
    pipeline    contiguous stages, one a device, and microbatches                          → `pipelines`
    hybrid      replicas of pipelines                                                      → `hybrids`
    learned     the policy's placement, as it is, with each device's ops in one stretch,   → `learned`, `by_work`
                and as shares of the batch

All of them are predicted by → `ClusterEvaluator`. It runs nothing and needs no session.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from autoplace.errors import InfeasibleError
from autoplace.measure.pool import plan_key
from autoplace.plan import Plan
from autoplace.problem import Problem
from autoplace.proposals import with_unique_labels
from autoplace.result import Candidate
from autoplace.simulate.cluster_factors import ClusterFactors
from autoplace.simulate.collectives import ClusterEvaluator
from autoplace.strategies._base import Budget
from autoplace.strategies.by_work import all_as_shares
from autoplace.strategies.hybrids import hybrid_plans
from autoplace.strategies.neighbours import SHARDED_PARTS
from autoplace.strategies.pipelines import dividing, in_line, pipeline_plans, planned_problem, stages_plan
from autoplace.strategies.registry import LEARNED, make_strategy
from autoplace.strategies.weighted import can_shard, even_plan, weighted_plans

if TYPE_CHECKING:
    from autoplace.policy.policy import Policy

__all__ = ["KINDS", "MICROBATCHES", "propose_distributed"]

KINDS = ("single", "even", "weighted", "sharded", "pipeline", "hybrid", "learned")
"""Kinds of plans, of which the best come first."""
MICROBATCHES = (1, 2, 4, 8)
"""Numbers of microbatches that are planned for."""
_POLICY_SECONDS = 8.0
"""What the policy may spend on all numbers of microbatches together."""
_KEPT = 8
"""Plans of one kind that are kept."""


def propose_distributed(
    problem: Problem,
    *,
    policy: Policy | None = None,
    factors: ClusterFactors | None = None,
    gpipe: bool = False,
    optimizer_bytes_per_weight_byte: float = 0.0,
    microbatches: Sequence[int] = MICROBATCHES,
    evaluations: int = 2000,
    seed: int = 0,
    split_ties: bool = True,
) -> list[Candidate]:
    """Return plans for several ranks, with predictions.

    Args:
        problem: Over the whole cluster, one rank a device.
        policy: What `learned` proposes with; None leaves it out.
        factors: Corrections of the predictions, for example fitted ones; None = assumed ones.
        gpipe: Whether pipelines run GPipe where 1F1B could run as well.
        optimizer_bytes_per_weight_byte: State that the optimizer keeps on every rank, for example 2 for Adam.
        microbatches: Numbers to plan for; those that do not divide the batch are left out.
        evaluations: Predictions that each search may spend.
        seed: Of the policy's samples.
        split_ties: Whether ops that share a parameter may be on several ranks, which then sum its gradient.

    Returns:
        Feasible plans, each once: the best of each kind, best first, then all others, best first.

    Raises:
        InfeasibleError: If no plan fits; says why the fastest device alone does not.
    """
    evaluator = ClusterEvaluator(
        problem,
        factors=factors,
        gpipe=gpipe,
        optimizer_bytes_per_weight_byte=optimizer_bytes_per_weight_byte,
    )
    total = np.where(problem.can_run.all(axis=0), evaluator.latency_ms.sum(axis=0), np.inf)
    able = [int(d) for d in np.argsort(total, kind="stable") if np.isfinite(total[d])]
    found: dict[str, list[Plan]] = {kind: [] for kind in KINDS}
    found["single"] += _fastest(problem, evaluator, able)
    even = even_plan(problem, sorted(able))
    found["even"] += [] if even is None else [even]
    found["weighted"] += weighted_plans(problem, evaluator, able, evaluations=evaluations)[:_KEPT]
    if can_shard(problem):
        for part in SHARDED_PARTS:
            spent = evaluations // len(SHARDED_PARTS)
            found["sharded"] += weighted_plans(problem, evaluator, able, evaluations=spent, sharded=part)[:_KEPT]
    if problem.num_devices > 1:
        found["pipeline"] += pipeline_plans(problem, evaluator, microbatches=microbatches, split_ties=split_ties)
    if problem.num_devices > 2:
        everybody = [d for d in range(problem.num_devices) if problem.can_run[:, d].any()]
        found["hybrid"] += hybrid_plans(
            problem,
            evaluator,
            everybody,
            microbatches=microbatches,
            evaluations=evaluations,
            split_ties=split_ties,
        )[:_KEPT]
    if policy is not None:
        found["learned"] += _learned(
            problem, evaluator, policy, microbatches, evaluations=evaluations, seed=seed, split_ties=split_ties
        )
    return _ranked(evaluator, found)


def _fastest(problem: Problem, evaluator: ClusterEvaluator, able: Sequence[int]) -> list[Plan]:
    """Return the plan of the fastest device that holds the whole model; where none does, of the fastest one."""
    rows = [np.full(problem.num_ops, device, np.int32) for device in able]
    plans = [stages_plan(problem, row, strategy="single", microbatches=1) for row in rows]
    outcomes = evaluator.evaluate(plans)
    ranked = sorted(zip(plans, outcomes, strict=True), key=lambda pair: pair[1].objective)
    return [plan for plan, _ in ranked[:1]]


def _learned(
    problem: Problem,
    evaluator: ClusterEvaluator,
    policy: Policy,
    microbatches: Sequence[int],
    *,
    evaluations: int,
    seed: int,
    split_ties: bool,
) -> list[Plan]:
    """Return the policy's placement for every number of microbatches, and what it becomes in a line and as shares."""
    plans = []
    corrected = problem.with_(latency_ms=evaluator.latency_ms, overhead_ms=evaluator.overhead_ms)
    counts = dividing(microbatches, problem.batch_size)
    for count in counts:
        planned = planned_problem(corrected, evaluator, count, split_ties=split_ties)
        budget = Budget(evaluations=evaluations, seconds=_POLICY_SECONDS / len(counts))
        for plan in make_strategy(LEARNED, policy=policy).propose(planned, budget=budget, seed=seed)[:1]:
            row = plan.assignment_array(problem)
            rows = [row, in_line(problem, row)] if split_ties else [row]
            plans += [stages_plan(problem, r, strategy="learned", microbatches=count) for r in rows]
            plans += all_as_shares(problem, row, strategy="learned")
    return plans


def _ranked(evaluator: ClusterEvaluator, found: dict[str, list[Plan]]) -> list[Candidate]:
    plans: dict[str, Plan] = {}
    kinds: dict[str, list[str]] = {}
    for kind, some in found.items():
        for plan in some:
            key = plan_key(plan)
            plans.setdefault(key, plan)
            if kind not in kinds.setdefault(key, []):
                kinds[key].append(kind)
    outcomes = dict(zip(plans, evaluator.evaluate(list(plans.values()), timeline=True), strict=True))
    able = sorted((key for key in plans if outcomes[key].feasible), key=lambda key: outcomes[key].objective)
    if not able:
        reason = next((o.reason for o in outcomes.values()), "no device can run all of the model")
        raise InfeasibleError(f"no plan over these ranks fits: {reason}")
    best = [next(key for key in able if kind in kinds[key]) for kind in KINDS if any(kind in kinds[k] for k in able)]
    best = sorted(dict.fromkeys(best), key=lambda key: outcomes[key].objective)
    return with_unique_labels(
        [
            Candidate(label=_label(plans[key], kinds[key]), plan=plans[key], predicted=outcomes[key])
            for key in dict.fromkeys([*best, *able])
        ]
    )


def _label(plan: Plan, kinds: Sequence[str]) -> str:
    """Name a plan: its kinds, then its device, its shares or its microbatches."""
    words = {"even": "even data parallel", "pipeline": plan.strategy}
    names = ", ".join(words.get(kind, kind) for kind in kinds)
    if plan.shape == "single":
        return f"{names} {plan.devices[0]}"
    shares = "/".join(f"{r.share:.2f}" for r in plan.replicas)
    if plan.shape == "replicas":
        return f"{names} {plan.sharded:.0%} of {shares}" if plan.sharded else f"{names} {shares}"
    return f"{names} x{plan.microbatches}" + (f" {shares}" if plan.shape == "hybrid" else "")
