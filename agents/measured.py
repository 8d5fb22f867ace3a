"""The last stage: PPO whose reward is the measured latency and energy of short real runs.

`ReferencedEvaluator` stands between the environment and the real runs. Every plan is measured beside the reference
plan, so that a machine that slows down does not punish the policy. A plan that comes again is measured again, so that
every reward is a run of its own; where runs are dear, a share of them can be answered from memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median_low

import numpy as np

from autoplace.envs.reference import constructive_baselines
from autoplace.errors import InfeasibleError
from autoplace.outcome import Evaluator, Outcome
from autoplace.plan import Plan
from autoplace.problem import Problem

from .ppo import PpoConfig

__all__ = ["MeasuredCase", "ReferencedEvaluator", "measured_config"]


@dataclass(frozen=True, kw_only=True, eq=False)
class MeasuredCase:
    """A problem whose plans can be run for real."""

    problem: Problem
    evaluator: Evaluator
    """Runs plans of the problem; `MeasuredEvaluator`, or anything with its face."""


@dataclass
class _Known:
    plan: Plan
    outcomes: list[Outcome] = field(default_factory=list)


class ReferencedEvaluator:
    """An Evaluator that measures plans beside the best non-learned plan.

    Objectives are scaled by the reference's own drift: J_plan * J_reference_first / J_reference_now.

    Args:
        case: Problem and real runs.
        remeasure: Share of known plans that are measured again; the others get their median so far.
        seed: Of the choice of those.

    Raises:
        InfeasibleError: If no baseline can be run.
    """

    def __init__(self, case: MeasuredCase, *, remeasure: float = 1.0, seed: int = 0) -> None:
        self._evaluator = case.evaluator
        self._remeasure = remeasure
        self._random = np.random.default_rng(seed)
        self._known: dict[str, _Known] = {}
        self.evaluations = 0
        """Plans asked for so far, those answered from memory included."""
        self.measured = 0
        """Plans that were run."""
        plans = [
            _as_run(Plan.from_assignment(case.problem, b.assignment, strategy=b.strategy))
            for b in constructive_baselines(case.problem)
        ]
        unique = list({_key(plan): plan for plan in plans}.values())
        outcomes = case.evaluator.evaluate(unique)
        self.measured += len(unique)
        able = [(o.objective, i) for i, o in enumerate(outcomes) if o.feasible and math.isfinite(o.objective)]
        if not able:
            reasons = "; ".join(dict.fromkeys(o.reason for o in outcomes)) or "there is no baseline plan"
            raise InfeasibleError(f"no baseline plan of {case.problem.name!r} runs on these devices: {reasons}")
        self.reference, index = min(able)
        """J of the best baseline as first measured."""
        self.reference_plan = unique[index]

    def evaluate(self, plans: Sequence[Plan]) -> list[Outcome]:
        """Return one Outcome per plan; see `Evaluator`."""
        self.evaluations += len(plans)
        return [self._one(_as_run(plan)) for plan in plans]

    def _one(self, plan: Plan) -> Outcome:
        known = self._known.setdefault(_key(plan), _Known(plan))
        if known.outcomes and self._random.random() >= self._remeasure:
            return _median(known.outcomes)
        beside, outcome = self._evaluator.evaluate([self.reference_plan, plan])
        self.measured += 1
        if outcome.feasible and beside.feasible and beside.objective > 0:
            outcome = replace(outcome, objective=outcome.objective * self.reference / beside.objective)
        known.outcomes.append(outcome)
        return outcome


def _as_run(plan: Plan) -> Plan:
    """Return the plan as a tuning would run it: a batch on one device is not split, for that gains nothing there."""
    return plan.with_(microbatches=1) if plan.shape == "single" else plan


def _key(plan: Plan) -> str:
    return repr([sorted(r.assignment.items()) for r in plan.replicas])


def _median(outcomes: list[Outcome]) -> Outcome:
    """Return the outcome of median objective; infeasible ones, with J = inf, sort last."""
    middle = median_low([o.objective for o in outcomes])
    return next(o for o in outcomes if o.objective == middle)


def measured_config(classes: int, *, plans_per_update: int = 10) -> PpoConfig:
    """Return PPO's settings for few, dear and noisy episodes.

    Args:
        classes: Decisions in an episode, the most where problems differ.
        plans_per_update: Episodes between two updates. In 180 plans of twelve decisions with 5 % noise, three seeds,
            ten reached the reference on one of three simulated machines where six fell 0.08 short, and did as well
            as six on the others.
    """
    return PpoConfig(
        learning_rate=3e-3,
        envs=1,
        steps=max(classes, 2) * plans_per_update,
        batch_size=64,
        epochs=8,
        gae_lambda=0.95,
        entropy=0.002,
        target_kl=0.2,
        warmup_updates=0,
        updates_per_chunk=1,
    )
