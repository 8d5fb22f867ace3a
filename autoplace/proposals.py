"""From a Problem to candidates: every strategy's plan at every number of microbatches, simulated, and the best few."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from autoplace.measure.pool import plan_key
from autoplace.plan import Plan
from autoplace.problem import Problem
from autoplace.result import Candidate
from autoplace.simulate import SimulatedEvaluator
from autoplace.strategies import Budget, make_strategy, strategy_names

if TYPE_CHECKING:
    from autoplace.policy.policy import Policy

__all__ = ["merge", "predict_again", "propose", "select", "select_new", "with_unique_labels"]

SECONDS_PER_SEARCH = 5.0
"""What one searching strategy may spend at one number of microbatches, whatever its budget of evaluations."""


def propose(
    problem: Problem,
    *,
    policy: Policy | None,
    microbatches: Sequence[int],
    evaluations: int,
    seed: int,
    step: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[Candidate]:
    """Ask every strategy for its best plan at every number of microbatches, and simulate them.

    Args:
        problem: The workload's problem for a whole batch.
        policy: What `learned` proposes with; None leaves it out.
        microbatches: Numbers to plan for; those above the batch size are left out.
        evaluations: Simulated plans that each search may spend at each number.
        seed: Seed of all searches.
        step: Told how many searches are done, of how many.

    Returns:
        Each plan once, however many strategies proposed it; best predicted objective first.
    """
    # Models have few groups: more than the exact optimum can take, and too few for coarser graphs.
    left_out = {"exact", "multilevel"} | ({"learned"} if policy is None else set())
    names = [n for n in strategy_names() if n not in left_out]
    counts = [m for m in microbatches if m <= problem.batch_size] or [1]
    searches = [(count, name) for count in counts for name in names]
    simulator = SimulatedEvaluator(problem)
    proposers: dict[str, list[str]] = {}
    plans: dict[str, Plan] = {}
    for done, (count, name) in enumerate(searches):
        variant = problem.with_(semantics=replace(problem.semantics, microbatches=count))
        budget = Budget(evaluations=evaluations, seconds=SECONDS_PER_SEARCH)
        for plan in make_strategy(name, policy=policy).propose(variant, budget=budget, seed=seed)[: _keep(name)]:
            if plan.shape in ("single", "replicas"):
                plan = plan.with_(microbatches=1)
            key = plan_key(plan)
            plans.setdefault(key, plan)
            if name not in proposers.setdefault(key, []):
                proposers[key].append(name)
        step(done + 1, len(searches))
    outcomes = simulator.evaluate(list(plans.values()), timeline=True)
    found = [
        Candidate(label=_label(plan, proposers[key]), plan=plan, predicted=outcome)
        for (key, plan), outcome in zip(plans.items(), outcomes, strict=True)
    ]
    found.sort(key=lambda c: c.predicted.objective if c.predicted else float("inf"))
    return with_unique_labels(found)


def select(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """Pick the plans worth real runs: the best of each shape, the policy's, the best pipeline, then the best predicted.

    The simulator ranks plans of one shape better than plans of different shapes, which share cores, caches and memory
    in different ways. A contiguous pipeline runs whatever was predicted, since plans with few hand-overs and plans with
    many together tell the calibration what one costs.
    """
    able = [c for c in candidates if c.predicted is not None and c.predicted.feasible]
    picked: list[Candidate] = []
    for shape in ("replicas", "stages", "single", "hybrid"):
        picked += [c for c in able if c.plan.shape == shape][:1]
    picked += [c for c in able if "learned" in c.label][:1]
    picked += [c for c in able if c.plan.shape == "stages" and "chunks" in c.label][:1]
    unique = {c.label: c for c in [*picked, *able]}
    return list(unique.values())[:count]


def predict_again(candidates: Sequence[Candidate], problem: Problem) -> list[Candidate]:
    """Return the candidates with the predictions of another problem, the calibrated one; the first are kept too."""
    placed = [c.plan for c in candidates if c.predicted is not None]
    outcomes = iter(SimulatedEvaluator(problem).evaluate(placed, timeline=True))
    return [
        c
        if c.predicted is None
        else replace(c, predicted=next(outcomes), predicted_first=c.predicted_first or c.predicted)
        for c in candidates
    ]


def merge(candidates: Sequence[Candidate], proposed: Sequence[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
    """Return all candidates, and those of the second proposal whose plans are new; labels stay unique over both."""
    known = {plan_key(c.plan) for c in candidates}
    fresh = [c for c in proposed if plan_key(c.plan) not in known]
    whole = with_unique_labels([*candidates, *fresh])
    return whole, whole[len(candidates) :]


def select_new(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """Pick the plans worth a second screening, best predicted first.

    Args:
        candidates: Predictions by a calibrated simulator, and what was measured, plain PyTorch included.
        count: How many at most.

    Returns:
        Unmeasured plans predicted better than the best measured one; and the best plan in stages, if unmeasured.
    """
    able = [c for c in candidates if c.predicted is not None and c.predicted.feasible]
    able.sort(key=lambda c: c.predicted.objective if c.predicted else float("inf"))
    real = [c.measured.objective for c in candidates if c.measured is not None and c.measured.feasible]
    better = [
        c
        for c in able
        if c.measured is None and c.predicted is not None and c.predicted.objective < min(real, default=float("inf"))
    ]
    stages = [c for c in able if c.plan.shape == "stages"][:1]
    wanted = {c.label: c for c in [*better, *stages] if c.measured is None}
    return list(wanted.values())[:count]


def _keep(name: str) -> int:
    """How many plans of one strategy are worth a row: all devices and shares, but one placement per search."""
    return 4 if name in ("single", "threads", "replicas") else 1


def _label(plan: Plan, proposers: Sequence[str]) -> str:
    names = ", ".join(proposers)
    if plan.shape == "single":
        device = plan.devices[0]
        threads = plan.threads.get(device)
        return f"{names} {device.split('/')[-1]}" + (f" ({threads} threads)" if threads else "")
    if plan.shape == "replicas":
        return f"{names} " + "/".join(f"{r.share:.2f}" for r in plan.replicas)
    return f"{names} x{plan.microbatches}"


def with_unique_labels(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Number equal labels, (2) from the second one on; labels that are unique already stay as they are."""
    taken: set[str] = set()
    unique = []
    for candidate in candidates:
        label, number = candidate.label, 1
        while label in taken:
            number += 1
            label = f"{candidate.label} ({number})"
        taken.add(label)
        unique.append(candidate if label == candidate.label else replace(candidate, label=label))
    return unique
