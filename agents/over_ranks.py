"""The measured stage over several hosts: the policy trains on rank 0, and every rank runs what it proposes.

    profile → propose → run the references and a few pipelines → calibrate → `MeasuredCase` on rank 0, `serve` elsewhere

1. A placement is run as the calibrated simulator finds best for it: as a pipeline, as it is or with each device's ops
   in one stretch, in some number of microbatches; or as data parallelism, with each device's part of the work for its
   share of the batch (→ `by_work`), sharded or not. → `_Line`
2. The policy sees the problem as a tuning over ranks shows it (→ `planned_problem`), for the number of microbatches of
   the best pipeline that has several: with one, devices take turns, and the policy learns to leave all but one idle.
3. The reference is the fastest single device, which most people would use; where the model fits on none, the plan that
   is predicted to be best.

Knows no PPO and no files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch

from autoplace.costs.calibrate_cluster import calibrate_cluster
from autoplace.costs.cluster_build import profile_cluster
from autoplace.costs.footprint import few_samples
from autoplace.graph.capture import capture
from autoplace.graph.coarsen import Grouping, coarsen
from autoplace.group_tuner import lots_of, reference_of
from autoplace.outcome import Outcome
from autoplace.plan import Plan
from autoplace.problem import Objective, Problem
from autoplace.result import Candidate
from autoplace.runtime.distributed.pool import GroupEvaluator
from autoplace.runtime.distributed.session import Session
from autoplace.simulate.collectives import ClusterEvaluator
from autoplace.strategies.by_work import all_as_shares, as_row
from autoplace.strategies.distributed import MICROBATCHES, propose_distributed
from autoplace.strategies.pipelines import dividing, in_line, planned_problem, settled, stages_plan
from autoplace.workload import Workload

if TYPE_CHECKING:
    from .measured import MeasuredCase

__all__ = ["case_over_ranks"]

_PIPELINES, _SHARES = 4, 2
"""Pipelines, and ways to share the batch, that run before the training, for the calibration."""
_TEACHERS = 2
"""Plans of each of the two kinds, the best by the calibrated simulator, that the policy learns from where they are
better than its own."""
_TOGETHER = 5
"""Plans that are measured beside one run of the reference."""
_TEMPERATURE = 3.0
"""In 50 plans on two simulated clusters with 4 % noise, three seeds each, the policy that ships came to a mean gain of
0.12 softened by 3 and of 0.10 as it is, and no run was left without one."""


@contextmanager
def case_over_ranks(
    workload: Workload,
    session: Session,
    *,
    objective: Objective | None = None,
    max_groups: int = 12,
    repeats: int = 2,
    record: Callable[[Plan, Outcome], None] | None = None,
) -> Iterator[MeasuredCase | None]:
    """Profile a training step on all ranks; yield what rank 0 trains on; the others run its plans, then yield None.

    Args:
        workload: Model and inputs of a whole batch, the same on every rank.
        session: The ranks; all have to enter.
        objective: What real runs are rewarded for; None = latency.
        max_groups: Most groups of the model.
        repeats: Counted steps of each plan, each behind one that is not.
        record: Called on rank 0 with every plan that ran and its Outcome.

    Raises:
        InfeasibleError: If no plan fits the memory of the devices.
        AutoplaceError: What one rank finds wrong, on all of them.
    """
    grouping = session.together(lambda: _grouping(workload, session, max_groups))
    name = f"{workload.name}-{grouping.graph.num_ops}"
    problem, _ = profile_cluster(workload, grouping, session, objective=objective, name=name)
    proposed = session.together(lambda: propose_distributed(problem) if session.rank == 0 else [])
    reference_rank, samples = reference_of(problem, session)
    evaluator = GroupEvaluator(
        workload.model,
        dict(workload.kwargs) if workload.kwargs else workload.args,
        session,
        loss=workload.loss,
        objective=objective,
        repeats=repeats,
        warmup=0,
        settle=1,
        check_samples=samples,
        reference_rank=reference_rank,
        record=record,
        lots=lots_of(problem, session),
    )
    if session.rank:
        evaluator.serve()
        yield None
        return
    evaluator.lead()
    try:
        yield _case(problem, proposed, evaluator)
    except BaseException:
        with suppress(Exception):  # whoever failed alike is gone
            evaluator.dismiss()
        raise
    evaluator.dismiss()


class _Line:
    """What a placement is run as, and what the simulator foretells of it."""

    def __init__(self, problem: Problem, simulator: ClusterEvaluator) -> None:
        self._problem, self._simulator = problem, simulator
        self._counts = dividing(MICROBATCHES, problem.batch_size)

    def as_run(self, plan: Plan) -> Plan:
        """Return what is predicted to be the best way to run a placement."""
        row = plan.assignment_array(self._problem)
        rows = [settled(self._problem, row), in_line(self._problem, row)]
        counts = self._counts if len(set(rows[0].tolist())) > 1 else [1]
        plans = [stages_plan(self._problem, r, strategy="learned", microbatches=n) for r in rows for n in counts]
        plans += all_as_shares(self._problem, row, strategy="learned")
        outcomes = self._simulator.evaluate(plans)
        return plans[min(range(len(plans)), key=lambda i: (outcomes[i].objective, i))]

    def forecast(self, plan: Plan) -> Outcome:
        """Return what the simulator foretells of a plan."""
        return self._simulator.evaluate([plan])[0]


class _OnAllThreads:
    """Runs plans with the threads that the device has, while the policy between the runs is held to one."""

    def __init__(self, evaluator: GroupEvaluator) -> None:
        self._evaluator, self._threads = evaluator, torch.get_num_threads()
        self.evaluations = 0
        """Number of plans evaluated so far."""

    def evaluate(self, plans: Sequence[Plan], rounds: int | None = None) -> list[Outcome]:
        """Return one measured Outcome per plan.

        Args:
            plans: Measured against each other.
            rounds: Counted steps of each; None = as many as plans get in training.
        """
        self.evaluations += len(plans)
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            if rounds is None:
                return self._evaluator.evaluate(plans)
            return self._evaluator.evaluate_interleaved(plans, rounds)
        finally:
            torch.set_num_threads(before)


def _grouping(workload: Workload, session: Session, max_groups: int) -> Grouping:
    captured = capture(workload, tried=few_samples(workload, session.cluster))
    return coarsen(captured.graph, max_groups=max_groups, called=captured.called)


def _placed(problem: Problem, plan: Plan) -> Plan:
    """Return the placement of ops that divides the work as a plan shares the batch out."""
    return Plan.from_assignment(problem, as_row(problem, plan), strategy=plan.strategy)


def _case(problem: Problem, proposed: Sequence[Candidate], evaluator: GroupEvaluator) -> MeasuredCase:
    """Calibrate the simulator by a few runs and return what a policy is trained on."""
    from .measured import MeasuredCase  # and PPO, which the other ranks do without

    single = [c.plan for c in proposed if c.plan.shape == "single"][:1]
    references = single or [proposed[0].plan]
    pipelines = [c.plan for c in proposed if c.plan.shape == "stages"]
    runs = _OnAllThreads(evaluator)
    shared = [c.plan for c in proposed if c.plan.shape == "replicas"]
    tried = [*references, *pipelines[:_PIPELINES], *shared[:_SHARES]]
    factors = calibrate_cluster(problem, tried, runs.evaluate(tried)).factors
    simulator = ClusterEvaluator(problem, factors=factors)
    split = [plan for plan in pipelines if plan.microbatches > 1]
    foretold = simulator.evaluate(split)
    ranked = [split[i] for i in sorted(range(len(split)), key=lambda i: foretold[i].objective)]
    count = ranked[0].microbatches if ranked else dividing(MICROBATCHES, problem.batch_size)[-1]
    of_shares = zip(shared, simulator.evaluate(shared), strict=True)
    best_shares = [plan for plan, _ in sorted(of_shares, key=lambda pair: pair[1].objective)]
    teachers = [*ranked[:_TEACHERS], *(_placed(problem, plan) for plan in best_shares[:_TEACHERS])]
    corrected = problem.with_(latency_ms=simulator.latency_ms, overhead_ms=simulator.overhead_ms)
    line = _Line(problem, simulator)
    return MeasuredCase(
        problem=planned_problem(corrected, simulator, count, split_ties=True),
        evaluator=runs,
        references=references,
        reference_name="fastest device alone" if single else "plan predicted to be best",
        as_run=line.as_run,
        forecast=line.forecast,
        together=_TOGETHER,
        temperature=_TEMPERATURE,
        teachers=teachers,
        done=evaluator.dismiss,
    )
