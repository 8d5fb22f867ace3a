"""The last stage: PPO whose reward is the measured latency and energy of short real runs.

`ReferencedEvaluator` stands between the environment and the real runs, wherever they run. Plans are measured beside the
reference plan, so that a machine that slows down does not punish the policy. A plan that comes again is measured again,
so that every reward is a run of its own; where runs are dear, a share of them can be answered from memory, and plans
that a simulator finds hopeless get its word for a reward.

A few dozen noisy runs do not move PPO far. What they found is not lost: in the end the best plans of the training, and
a few of other planners, are measured again beside the policy's own, and one that is better beyond chance is taught to
it (self-imitation: Oh et al. 2018, "Self-imitation learning"). → `ReferencedEvaluator.confirmed`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median_low

import numpy as np

from autoplace.envs.reference import constructive_baselines
from autoplace.errors import InfeasibleError
from autoplace.measure.pool import plan_key
from autoplace.measure.protocol import centre_of
from autoplace.outcome import Evaluator, Outcome
from autoplace.plan import Plan
from autoplace.problem import Problem

from .ppo import PpoConfig

__all__ = ["MeasuredCase", "ReferencedEvaluator", "measured_config"]

_HOPELESS = 1.5
"""Times the reference's forecast from which on a plan is not run."""


_FINALISTS, _CONFIRMING = 3, 7
"""Plans of the training that are measured again in the end, and the runs of each of them and of the teachers'."""


def _undivided(plan: Plan) -> Plan:
    """Return the plan as a tuning would run it: a batch on one device is not split, for that gains nothing there."""
    return plan.with_(microbatches=1) if plan.shape == "single" else plan


@dataclass(frozen=True, kw_only=True, eq=False)
class MeasuredCase:
    """A problem whose plans can be run for real."""

    problem: Problem
    evaluator: Evaluator
    """Runs plans of the problem; `MeasuredEvaluator`, or anything with its face."""
    references: Sequence[Plan] = ()
    """The one of these that is fastest when measured is the reference; none = the best non-learned plans."""
    reference_name: str = "best non-learned plan"
    """What to call the reference when people are told of rewards."""
    as_run: Callable[[Plan], Plan] = _undivided
    """Turns a placement into what runs."""
    forecast: Callable[[Plan], Outcome] | None = None
    """Foretells what a plan that runs will cost, to spare real runs; None = every plan is run."""
    together: int = 1
    """Plans that are measured in one go, beside one run of the reference."""
    temperature: float = 1.0
    """By which a policy is softened that the training starts from: one that is sure of itself tries nothing else."""
    teachers: Sequence[Plan] = ()
    """Other planners' placements that the policy learns from where they turn out to be better."""
    done: Callable[[], None] = lambda: None
    """Called when the last plan has run, for those who help to run them."""


@dataclass
class _Known:
    plan: Plan
    """As it runs."""
    placement: Plan
    """As it was first proposed."""
    outcomes: list[Outcome] = field(default_factory=list)


class ReferencedEvaluator:
    """An Evaluator that measures plans beside a reference.

    Objectives are scaled by the reference's own drift: J_plan * J_reference_first / J_reference_now. Where there is a
    forecast, a plan that does not fit or takes 1.5 times the reference is not run: its Outcome is the simulator's, and
    its objective J_reference_first * forecast_plan / forecast_reference.

    Args:
        case: Problem and real runs.
        remeasure: Share of known plans that are measured again; the others get their median so far.
        seed: Of the choice of those.

    Raises:
        InfeasibleError: If no reference can be run.
    """

    def __init__(self, case: MeasuredCase, *, remeasure: float = 1.0, seed: int = 0) -> None:
        self._case = case
        self._remeasure = remeasure
        self._random = np.random.default_rng(seed)
        self._known: dict[str, _Known] = {}
        self.evaluations = 0
        """Plans asked for so far, those answered from memory or by forecast included."""
        self.measured = 0
        """Plans that were run."""
        plans = list(case.references) or [
            case.as_run(Plan.from_assignment(case.problem, b.assignment, strategy=b.strategy))
            for b in constructive_baselines(case.problem)
        ]
        unique = list({plan_key(plan): plan for plan in plans}.values())
        outcomes = case.evaluator.evaluate(unique)
        self.measured += len(unique)
        able = [(o.objective, i) for i, o in enumerate(outcomes) if o.feasible and math.isfinite(o.objective)]
        if not able:
            reasons = "; ".join(dict.fromkeys(o.reason for o in outcomes)) or "there is no baseline plan"
            raise InfeasibleError(f"no baseline plan of {case.problem.name!r} runs on these devices: {reasons}")
        self.reference, index = min(able)
        """J of the reference as first measured."""
        self.reference_plan = unique[index]
        self._foretold = math.inf if case.forecast is None else case.forecast(self.reference_plan).objective

    def evaluate(self, plans: Sequence[Plan]) -> list[Outcome]:
        """Return one Outcome per plan; see `Evaluator`."""
        self.evaluations += len(plans)
        placements, plans = plans, [self._case.as_run(plan) for plan in plans]
        found = [
            self._hopeless(plan) or self._remembered(plan, placement)
            for plan, placement in zip(plans, placements, strict=True)
        ]
        waiting = [i for i, outcome in enumerate(found) if outcome is None]
        for i, outcome in zip(waiting, self._run([plans[i] for i in waiting]), strict=True):
            found[i] = outcome
        return [outcome for outcome in found if outcome is not None]

    def confirmed(self, own: Plan | None) -> Plan | None:
        """Return a placement of the training, or a teacher's, that is better than the policy's own; None if none is.

        The best few are measured again beside the policy's own, for of many noisy runs the best are lucky ones. The
        whole interval of the ratio has to lie above 1 (→ `measure.protocol.centre_of`).

        Args:
            own: What the policy proposes when it is greedy; None where it finds no plan.
        """
        able = [known for known in self._known.values() if known.outcomes and all(o.feasible for o in known.outcomes)]
        able.sort(key=lambda known: float(np.mean([o.objective for o in known.outcomes])))
        plans = [known.plan for known in able[:_FINALISTS]]
        for placement in self._case.teachers:
            plan = self._known_as(placement)
            plans += [] if plan_key(plan) in map(plan_key, plans) else [plan]
        if own is not None:
            own = self._known_as(own)
            plans = [own, *(plan for plan in plans if plan_key(plan) != plan_key(own))]
        if not plans or plans == [own]:
            return None
        runs = [self._run(plans) for _ in range(_CONFIRMING)]
        objectives = np.asarray([[o.objective if o.feasible else math.inf for o in run] for run in runs])
        beside = objectives[:, 0] if own is not None else np.full(_CONFIRMING, math.inf)
        found = []
        for plan, column in zip(plans, objectives.T, strict=True):
            if plan is own or not np.isfinite(column).all():
                continue
            if not np.isfinite(beside).all():
                found.append((-float(np.median(column)), plan))
            elif (gain := centre_of(beside / column))[1][0] > 1.0:
                found.append((gain[0], plan))
        if not found:
            return None
        return self._known[plan_key(max(found, key=lambda pair: pair[0])[1])].placement

    def _known_as(self, placement: Plan) -> Plan:
        """Return what a placement is run as, and remember what it was."""
        plan = self._case.as_run(placement)
        self._known.setdefault(plan_key(plan), _Known(plan, placement))
        return plan

    def _hopeless(self, plan: Plan) -> Outcome | None:
        """Return what is foretold of a plan that is not worth a run; None where it is worth one."""
        if self._case.forecast is None or not math.isfinite(self._foretold):
            return None
        told = self._case.forecast(plan)
        if told.feasible and told.objective < _HOPELESS * self._foretold:
            return None
        return replace(told, objective=self.reference * told.objective / self._foretold)

    def _remembered(self, plan: Plan, placement: Plan) -> Outcome | None:
        known = self._known.setdefault(plan_key(plan), _Known(plan, placement))
        again = not known.outcomes or self._random.random() < self._remeasure
        return None if again else _median(known.outcomes)

    def _run(self, plans: Sequence[Plan]) -> list[Outcome]:
        """Measure plans beside the reference."""
        if not plans:
            return []
        same = plan_key(self.reference_plan)  # beside itself it would show noise alone
        others = [plan for plan in plans if plan_key(plan) != same]
        beside, *measured = self._case.evaluator.evaluate([self.reference_plan, *others])
        self.measured += len(others)
        outcomes, found = iter(measured), []
        for plan in plans:
            outcome = beside if plan_key(plan) == same else next(outcomes)
            if outcome.feasible and beside.feasible and beside.objective > 0:
                outcome = replace(outcome, objective=outcome.objective * self.reference / beside.objective)
            self._known[plan_key(plan)].outcomes.append(outcome)
            found.append(outcome)
        return found


def _median(outcomes: list[Outcome]) -> Outcome:
    """Return the outcome of median objective; infeasible ones, with J = inf, sort last."""
    middle = median_low([o.objective for o in outcomes])
    return next(o for o in outcomes if o.objective == middle)


def measured_config(classes: int, *, plans_per_update: int = 10, together: int = 1) -> PpoConfig:
    """Return PPO's settings for few, dear and noisy episodes.

    Args:
        classes: Decisions in an episode, the most where problems differ.
        plans_per_update: Episodes between two updates. In 180 plans of twelve decisions with 5 % noise, three seeds,
            ten reached the reference on one of three simulated machines where six fell 0.08 short, and did as well
            as six on the others.
        together: Episodes that end at the same time.
    """
    return PpoConfig(
        learning_rate=3e-3,
        envs=together,
        steps=max(classes, 2) * max(1, plans_per_update // together),
        batch_size=64,
        epochs=8,
        gae_lambda=0.95,
        entropy=0.002,
        target_kl=0.2,
        warmup_updates=0,
        updates_per_chunk=1,
    )
