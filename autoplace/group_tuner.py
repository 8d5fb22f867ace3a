"""`tune_group()`: from a model and a whole batch to a measured plan over the ranks of a session.

    capture → profile on every rank → propose and simulate (rank 0) → measure the best few → calibrate, propose again
            → measure what that finds → climb from the best by real runs → decide

Every rank runs it with the same arguments, and returns the same. The baselines are measured in the same rounds as the
rest: the fastest single device, and even data parallel, which is what people would run without us. A plan is kept in
their place when the whole interval of its gain in the objective over the better of them lies above 1, and the gain
exceeds what separates two series of that baseline, where something does. Steps over ranks may take seconds, so rounds
are few: the interval is the signed-rank test's (→ `measure.protocol.centre_of`), plans that are beaten leave the
deciding run to the others (→ `choose.beaten`), and it ends where one is left that has won.

The climb is there because the last few per cent are not to be had by prediction: shares of a batch and cuts that the
simulator likes best have neighbours that are faster. It measures the neighbours of the best
plan of each kind (→ `neighbours`), save those that the calibrated simulator expects to be far worse.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils import _pytree as pytree

from autoplace.choose import NOISE_FLOOR, beaten, is_look, pair_gains
from autoplace.costs.calibrate_cluster import ClusterCalibration, calibrate_cluster
from autoplace.costs.cluster_build import profile_cluster
from autoplace.costs.footprint import few_samples, samples_on
from autoplace.errors import InfeasibleError
from autoplace.graph.capture import capture
from autoplace.graph.coarsen import coarsen
from autoplace.measure.pool import plan_key
from autoplace.measure.protocol import centre_of
from autoplace.outcome import Outcome
from autoplace.plan import Plan
from autoplace.problem import Objective, Problem
from autoplace.runtime.batch import batch_size
from autoplace.runtime.distributed.pipeline import Loss
from autoplace.runtime.distributed.pool import GroupEvaluator
from autoplace.runtime.distributed.runner import part_of
from autoplace.runtime.distributed.session import Session
from autoplace.runtime.stage_program import Exports
from autoplace.simulate.cluster_factors import ClusterFactors
from autoplace.simulate.collectives import ClusterEvaluator
from autoplace.simulate.sittings import sittings
from autoplace.strategies.distributed import propose_distributed
from autoplace.strategies.neighbours import neighbours
from autoplace.workload import Workload, inputs_of, loss_of

__all__ = ["GroupResult", "GroupRow", "lots_of", "reference_of", "tune_group"]

T = TypeVar("T")

_PROFILED = 3
"""Passes to take medians over; real runs correct what they say."""
_SCREENED, _SCREENED_AGAIN = 5, 3
_ROUNDS, _FINAL_ROUNDS = 3, 33
_SHARES = {"screen": 0.3, "again": 0.1, "climb": 0.15, "decide": 0.45}
"""Step to its part of the budget."""
_DECIDING_ROUNDS, _MOST_OVER = 7, 1.0
"""What the deciding run has even where it takes this part of the budget beyond it: fewer rounds leave it to chance."""
_FINALISTS = 2
"""Plans in the deciding run, beside the better baseline twice: rounds are worth more than neighbours of the best."""
_MOST_RUNS = 90
"""Plans measured before the deciding run."""
_CLIMBED_FROM = 1.15
"""The best plan of a kind is climbed from where it is no worse than this times the best of all."""
_FIRST_STEP, _LAST_STEP = 1 / 8, 1 / 40
"""Steps of the climb, as parts of the batch or of the ops."""
_MOST_NEIGHBOURS = 4
"""Measured in one step of the climb."""
_UNKNOWN = Outcome(source="simulated", feasible=False)
"""Of a plan that nobody has predicted."""
_HOPELESS = 1.5
"""A neighbour predicted so many times worse than where the climb is gets no real run."""


@dataclass(frozen=True, kw_only=True)
class GroupRow:
    """One plan, and what is known of it."""

    label: str
    plan: Plan
    predicted: Outcome | None = None
    """Before any run of this tuning."""
    calibrated: Outcome | None = None
    """By the simulator as calibrated in the end."""
    measured: Outcome | None = None
    baseline: bool = False


@dataclass(frozen=True, kw_only=True)
class GroupResult:
    """What a tuning over ranks found."""

    plan: Plan
    rows: tuple[GroupRow, ...]
    noise: float
    """By how much two series of the baseline differed in the deciding run, as a fraction; 0.01 where by nothing."""
    runs: int
    """Plans measured, those measured twice counted twice."""
    problem: Problem | None = None
    """As profiled."""
    calibration: ClusterCalibration | None = None
    """Of the simulator, by all plans that ran; None where fewer than two did."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Phase to wall seconds."""


def tune_group(
    model: torch.nn.Module,
    inputs: Any,
    session: Session,
    *,
    targets: Any = None,
    loss: Loss | None = None,
    batch_norm: str = "whole",
    objective: Objective | None = None,
    policy: str | None = "default",
    budget_s: float = 60.0,
    max_groups: int = 64,
    record: Callable[[Plan, Outcome], None] | None = None,
    exports: Exports | None = None,
) -> GroupResult:
    """Find the plan under which a training step of this batch is fastest; every rank has to call it.

    Args:
        model: The model, with the same parameters on every rank.
        inputs: A whole batch, the same on every rank.
        session: The group.
        targets, loss, batch_norm: See `DistributedModel`.
        objective: What to tune for; None = latency.
        policy: Learned policy that proposes too; None goes without.
        budget_s: Seconds for the real runs; the deciding one has a few rounds even where they take as much again.
        max_groups: Op groups that are placed.
        record: Called on rank 0 with every plan that ran and its Outcome.
        exports: See `DistributedModel`.

    Raises:
        InputError: If the model cannot run on the inputs.
        InfeasibleError: If no plan fits the memory of the devices, or none of those that do could run.
    """
    return _Tuning(model, inputs, session, targets, loss, batch_norm, objective or Objective()).run(
        policy, budget_s, max_groups, record, exports
    )


def reference_of(problem: Problem, session: Session) -> tuple[int, int]:
    """Return the rank that runs plain PyTorch, and on how many samples: the fastest of those with the most room.

    Args:
        problem: As `profile_cluster` leaves it.
        session: Its ranks.
    """
    totals, index = problem.latency_ms.sum(axis=0), problem.cluster.index
    room = [(samples_on(problem, name), -totals[index[name]], -rank) for rank, name in enumerate(session.members)]
    samples, _, rank = max(room)
    return -rank, max(samples, session.world_size)  # every rank of a plan has one


def lots_of(problem: Problem, session: Session) -> Callable[[Sequence[Plan]], list[list[int]]] | None:
    """Return what divides plans for `GroupEvaluator` where some rank's memory cannot hold the whole batch; else None.

    Args:
        problem: As `profile_cluster` leaves it.
        session: Its ranks.
    """
    short = any(samples_on(problem, name) < problem.batch_size for name in session.members)
    return partial(sittings, ClusterEvaluator(problem)) if short else None


class _Tuning:
    def __init__(
        self,
        model: torch.nn.Module,
        inputs: Any,
        session: Session,
        targets: Any,
        loss: Loss | None,
        batch_norm: str,
        objective: Objective,
    ) -> None:
        self.model, self.inputs, self.session = model, inputs, session
        self.targets, self.loss, self.batch_norm, self.objective = targets, loss, batch_norm, objective
        self.batch = batch_size(pytree.tree_leaves(inputs))
        self.rows: dict[str, GroupRow] = {}
        self.seconds: dict[str, float] = {}
        self.calibration: ClusterCalibration | None = None

    def run(
        self,
        policy: str | None,
        budget_s: float,
        max_groups: int,
        record: Callable[[Plan, Outcome], None] | None,
        exports: Exports | None,
    ) -> GroupResult:
        start = time.perf_counter()
        args, kwargs = inputs_of(self.inputs)
        workload = Workload(
            model=self.model,
            args=args,
            kwargs=kwargs,
            training=True,
            loss=self._loss_of_part,
            name=type(self.model).__name__,
        )
        grouping = self.session.together(lambda: self._grouping(workload, max_groups))
        problem, _ = profile_cluster(workload, grouping, self.session, objective=self.objective, repeats=_PROFILED)
        self.seconds["profile"] = time.perf_counter() - start
        self._propose(problem, policy)
        self.seconds["propose"] = time.perf_counter() - start - sum(self.seconds.values())
        end = time.perf_counter() + budget_s
        reference_rank, samples = reference_of(problem, self.session)
        evaluator = GroupEvaluator(
            self.model,
            self.inputs,
            self.session,
            targets=self.targets,
            loss=self.loss,
            batch_norm=self.batch_norm,
            objective=self.objective,
            check_samples=samples,
            reference_rank=reference_rank,
            record=record,
            exports=exports,
            lots=lots_of(problem, self.session),
        )
        self._screen(evaluator, _SCREENED, budget_s * _SHARES["screen"])
        if self._calibrate(problem, policy, again=True):
            self._screen(evaluator, _SCREENED_AGAIN, budget_s * _SHARES["again"])
            self._calibrate(problem, policy, again=False)
        if self._climb(evaluator, problem, end - budget_s * _SHARES["decide"]):
            self._calibrate(problem, policy, again=False)
        best, noise = self._decide(evaluator, max(1.0, self._left(end)), budget_s * _MOST_OVER)
        self.seconds["measure"] = time.perf_counter() - start - sum(self.seconds.values())
        return GroupResult(
            plan=best.plan,
            rows=tuple(self.rows.values()),
            noise=noise,
            runs=evaluator.evaluations,
            problem=problem,
            seconds=self.seconds,
            calibration=self.calibration,
        )

    def _loss_of_part(self, output: Any) -> torch.Tensor:
        """Return the loss of an output of as many samples as it has: profiling runs halves of the batch as well."""
        sizes = (len(x) for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor) and x.dim())
        size = next(sizes, 0) or self.batch
        return loss_of(self.loss, output, part_of(self.targets, (size, self.batch - size), 0))

    def _on_rank_0(self, work: Callable[[], T]) -> T:
        """Return on all ranks what rank 0 finds, or raise on all what it raises."""
        found = self.session.together(lambda: work() if self.session.rank == 0 else None)
        return self.session.broadcast(found)  # type: ignore[return-value]

    def _left(self, end: float) -> float:
        return self.session.broadcast(end - time.perf_counter())

    def _grouping(self, workload: Workload, max_groups: int) -> Any:
        captured = capture(workload, tried=few_samples(workload, self.session.cluster))
        return coarsen(captured.graph, max_groups=max_groups, called=captured.called)

    def _propose(self, problem: Problem, policy: str | None, factors: ClusterFactors | None = None) -> list[str]:
        """Ask the strategies on rank 0; return the keys of plans that are new."""

        def propose() -> list[tuple[str, dict[str, Any], Outcome | None, bool]]:
            found = propose_distributed(problem, policy=_loaded(policy), factors=factors)
            return [(c.label, c.plan.to_json(), _light(c.predicted), _is_baseline(c.label)) for c in found]

        fresh = []
        for label, data, predicted, baseline in self._on_rank_0(propose):
            plan = Plan.from_json(data)
            key = plan_key(plan)
            if key not in self.rows:
                fresh.append(key)
                # What a calibrated simulator proposes was not foretold; the label may be taken.
                known = {row.label for row in self.rows.values()}
                label = label if label not in known else f"{label} (again)"
                before, after = (predicted, None) if factors is None else (None, predicted)
                self.rows[key] = GroupRow(label=label, plan=plan, predicted=before, calibrated=after, baseline=baseline)
        return fresh

    def _screen(self, evaluator: GroupEvaluator, count: int, budget_s: float) -> None:
        """Measure the baselines and the best predicted plans that have not run yet, as many as there is time for."""
        waiting = sorted(
            ((k, r) for k, r in self.rows.items() if r.measured is None), key=lambda kr: _forecast(kr[1]).objective
        )
        picked = [k for k, r in waiting if r.baseline]
        kinds: set[str] = set()
        for key, row in waiting:  # the best of each kind, then the best
            if _kind(row.plan) not in kinds and key not in picked:
                kinds.add(_kind(row.plan))
                picked.append(key)
        picked += [k for k, _ in waiting if k not in picked]
        least = 1 + sum(self.rows[k].baseline for k in picked)
        # One step is checked, and one warms up where the check does not; to build the plan takes as long, or longer.
        steps_ms = np.cumsum([(2 + _ROUNDS) * _forecast(self.rows[k]).latency_ms for k in picked])
        affordable = int(np.searchsorted(steps_ms, budget_s * 1e3, side="right"))
        picked = picked[: min(max(affordable, least), least - 1 + count)]
        if not picked:
            return
        outcomes = evaluator.evaluate_interleaved([self.rows[k].plan for k in picked], _ROUNDS, budget_s=budget_s)
        for key, outcome in zip(picked, outcomes, strict=True):
            self.rows[key] = replace(self.rows[key], measured=outcome)

    def _calibrate(self, problem: Problem, policy: str | None, *, again: bool) -> bool:
        """Fit the simulator to what ran; return whether it proposes plans that are new."""
        ran = [(r.plan, r.measured) for r in self.rows.values() if r.measured is not None and r.measured.feasible]
        if len(ran) < 2:
            return False

        def calibrate() -> tuple[ClusterCalibration, list[Outcome]]:
            fitted = calibrate_cluster(problem, [p for p, _ in ran], [o for _, o in ran])
            simulator = ClusterEvaluator(problem, factors=fitted.factors)
            return fitted, simulator.evaluate([r.plan for r in self.rows.values()])

        calibration, outcomes = self._on_rank_0(calibrate)
        for (key, row), outcome in zip(list(self.rows.items()), outcomes, strict=True):
            self.rows[key] = replace(row, calibrated=outcome)
        self.calibration = calibration
        return bool(self._propose(problem, policy, calibration.factors)) if again else False

    def _climb(self, evaluator: GroupEvaluator, problem: Problem, end: float) -> bool:
        """Measure the neighbours of the best plans, and theirs, while there is time; return whether any ran."""
        able = sorted((r for r in self._able() if not r.baseline), key=_measured)
        starts: dict[str, GroupRow] = {}
        for row in able:
            if _measured(row) <= _CLIMBED_FROM * _measured(able[0]):
                starts.setdefault(_kind(row.plan), row)
        before = evaluator.evaluations
        for row in starts.values():
            part = _FIRST_STEP
            while part >= _LAST_STEP and evaluator.evaluations < _MOST_RUNS and self._left(end) > 0.0:
                better = self._step(evaluator, problem, row, part)
                row, part = (better, part) if better is not None else (row, part / 2)
        return evaluator.evaluations > before

    def _step(self, evaluator: GroupEvaluator, problem: Problem, row: GroupRow, part: float) -> GroupRow | None:
        """Measure the neighbours of a plan beside it; return the best of them where it is better."""

        def promising() -> list[tuple[dict[str, Any], Outcome | None]]:
            factors = self.calibration.factors if self.calibration is not None else None
            plans = [row.plan, *(p for p in neighbours(problem, row.plan, part) if plan_key(p) not in self.rows)]
            here, *outcomes = ClusterEvaluator(problem, factors=factors).evaluate(plans)
            found = [
                (plan.to_json(), _light(outcome))
                for plan, outcome in zip(plans[1:], outcomes, strict=True)
                if outcome.feasible and outcome.objective <= _HOPELESS * here.objective
            ]
            return sorted(found, key=lambda pair: pair[1].objective if pair[1] else 0.0)[:_MOST_NEIGHBOURS]

        rows: list[GroupRow] = []
        for data, predicted in self._on_rank_0(promising):
            plan = Plan.from_json(data)
            known = {r.label for r in (*self.rows.values(), *rows)}
            shares = "/".join(f"{r.share:.2f}" for r in plan.replicas)
            how = f"{plan.sharded:.0%} of {shares}" if plan.sharded else shares
            label = "refined " + (how if plan.shape == "replicas" else f"x{plan.microbatches}")
            label = label if label not in known else f"{label} ({len(known)})"
            rows.append(GroupRow(label=label, plan=plan, calibrated=predicted))
        if not rows:
            return None
        here, *outcomes = evaluator.evaluate_interleaved([row.plan, *(r.plan for r in rows)], _ROUNDS)
        rows = [replace(r, measured=outcome) for r, outcome in zip(rows, outcomes, strict=True)]
        self.rows.update({plan_key(r.plan): r for r in rows})
        best = min(rows, key=_measured)
        return best if _measured(best) < here.objective else None

    def _able(self) -> list[GroupRow]:
        return [r for r in self.rows.values() if r.measured is not None and r.measured.feasible]

    def _decide(self, evaluator: GroupEvaluator, budget_s: float, over_s: float = 0.0) -> tuple[GroupRow, float]:
        """Run the finalists and the better baseline, twice, in a longer run; return what is kept and the noise."""
        able = sorted(self._able(), key=_measured)
        if not able:
            reasons = {r.measured.reason for r in self.rows.values() if r.measured is not None}
            raise InfeasibleError(f"no plan could run on these ranks: {'; '.join(sorted(reasons))[:400]}")
        baselines = [r for r in able if r.baseline]
        if not baselines:
            return able[0], 0.0
        base = baselines[0]
        finalists = sorted((r for r in able if not r.baseline), key=_expected)[:_FINALISTS]
        if not finalists:
            return base, 0.0
        plans = [base.plan, base.plan, *(r.plan for r in finalists)]
        taken_out: set[int] = set()

        def drop(outcomes: Sequence[Outcome]) -> Collection[int]:
            plain, _, *others = outcomes
            gains = [pair_gains(plain, outcome, self.objective) for outcome in others]
            taken_out.update(i for i, of_plan in enumerate(gains) if not of_plan)
            taken_out.update(beaten(gains, _interval))
            left = [of_plan for i, of_plan in enumerate(gains) if i not in taken_out]
            rounds = len(plain.samples_ms)
            if not left or (len(left) == 1 and is_look(rounds) and _interval(left[0])[0] > 1.0 + NOISE_FLOOR):
                return range(len(plans))
            return [2 + i for i in taken_out]

        needed_s = (1 + 2 * _DECIDING_ROUNDS) * sum(_latency_ms(r) for r in (base, base, *finalists)) / 1e3
        budget_s = max(budget_s, min(needed_s, budget_s + over_s))
        plain, again, *outcomes = evaluator.evaluate_interleaved(
            plans, _FINAL_ROUNDS, budget_s=budget_s, settle=1, drop=drop
        )
        lost = set(self.session.broadcast(sorted(taken_out)))  # rank 0 alone was asked
        if not (plain.feasible and again.feasible):
            return able[0], 0.0
        noise = _difference(pair_gains(plain, again, self.objective))
        best, gain = base, 1.0
        for i, (row, outcome) in enumerate(zip(finalists, outcomes, strict=True)):
            self.rows[plan_key(row.plan)] = replace(row, measured=outcome if outcome.feasible else row.measured)
            gains = [] if i in lost else pair_gains(plain, outcome, self.objective)
            if not gains:
                continue
            centre, (low, _) = centre_of(gains)
            if low > 1.0 and centre > max(gain, 1.0 + noise):
                best, gain = row, centre
        self.rows[plan_key(base.plan)] = replace(base, measured=plain)
        return best, noise


def _interval(gains: Sequence[float]) -> tuple[float, float]:
    return centre_of(gains)[1]


def _difference(ratios: Sequence[float]) -> float:
    """Return by how much two series of one thing differ, as a fraction: no less than the floor, where the signed-rank
    test finds nothing the floor."""
    centre, (low, high) = centre_of(ratios)
    return NOISE_FLOOR if low <= 1.0 <= high else max(NOISE_FLOOR, abs(centre - 1.0))


def _latency_ms(row: GroupRow) -> float:
    return row.measured.latency_ms if row.measured is not None else 0.0


def _measured(row: GroupRow) -> float:
    return row.measured.objective if row.measured is not None and row.measured.feasible else float("inf")


def _expected(row: GroupRow) -> float:
    """Return what is to be expected of a plan that had a few rounds: half what it showed, half what the calibrated
    simulator says, whose error is no larger than the noise of a few long steps."""
    measured = _measured(row)
    calibrated = row.calibrated.objective if row.calibrated is not None and row.calibrated.feasible else measured
    return math.sqrt(measured * calibrated)


def _kind(plan: Plan) -> str:
    """Return which of the ways to run a model a plan is."""
    return "sharded" if plan.sharded else plan.shape


def _is_baseline(label: str) -> bool:
    return label.startswith("single") or "even data parallel" in label


def _light(outcome: Outcome | None) -> Outcome | None:
    """Return an Outcome without its timeline, to be sent."""
    return None if outcome is None else replace(outcome, timeline=())


def _forecast(row: GroupRow) -> Outcome:
    """Return the latest that the simulator says of a plan."""
    return row.calibrated or row.predicted or _UNKNOWN


def _loaded(policy: str | None) -> Any:
    if policy is None:
        return None
    from autoplace.errors import PolicyError
    from autoplace.zoo import load_policy

    try:
        return load_policy(policy)
    except PolicyError:
        if policy != "default":
            raise
        return None
