"""All strategies on one budget: the heuristics, then what searches on its own, then searches from the best so far.

Never worse than the best of the heuristics that the budget serves, by construction: they come first, and what they find
is only ever replaced by something better. Anytime: the best so far is what comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoplace.errors import InfeasibleError
from autoplace.outcome import Outcome
from autoplace.plan import Plan
from autoplace.problem import Problem
from autoplace.strategies._base import Budget, Strategy
from autoplace.strategies._search import Constructive, Found, Placer, Scorer
from autoplace.strategies.annealing import AnnealingStrategy
from autoplace.strategies.guided import GuidedStrategy
from autoplace.strategies.heuristics import construct, draw_feasible
from autoplace.strategies.infeasible import explain_infeasible

__all__ = ["Comparison", "Proposal", "best_of", "compare"]

_PROPOSER_SHARE = 0.4
"""Part of what the heuristics leave that all proposers together may spend before the searches from the best."""
_IMPROVERS = (AnnealingStrategy, GuidedStrategy)
"""Those searches."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Proposal:
    """What one strategy contributed."""

    strategy: str
    assignment: NDArray[np.int32] | None
    """int32[N], its best feasible placement; None when it found none."""
    objective: float
    """J of that placement; inf when there is none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """What all strategies contributed on one budget."""

    proposals: tuple[Proposal, ...]
    """One a strategy, in the order in which they ran."""
    evaluations: int
    """Evaluations spent by all of them."""

    @property
    def best(self) -> Proposal | None:
        """The best proposal, the first of equals; None when no strategy found a feasible placement."""
        able = [p for p in self.proposals if p.assignment is not None]
        return min(able, key=lambda p: p.objective, default=None)


def compare(problem: Problem, strategies: Sequence[Strategy], budget: Budget, seed: int = 0) -> Comparison:
    """Let strategies share a budget.

    Constructive ones come first, those that search on their own next, each with an equal part of their share of the
    budget, and annealing and the guided search last, from the best so far. Where nothing is found before, they start
    from random placements.

    Args:
        problem: What to place.
        strategies: Which; each runs once.
        budget: For all together.
        seed: Seed of all randomness.
    """
    scorer = Scorer(problem, budget.start())
    builders = [s for s in strategies if isinstance(s, Constructive)]
    improvers = [s for s in strategies if isinstance(s, _IMPROVERS)]
    others = [s for s in strategies if not isinstance(s, (Constructive, *_IMPROVERS))]
    found: dict[str, Found] = construct(scorer, builders) if builders else {}
    fraction = _PROPOSER_SHARE if improvers else 1.0
    for position, strategy in enumerate(others):
        # Equal parts of the same share: what is left shrinks as the ones before spend theirs.
        part = fraction / (len(others) - position * fraction)
        found[strategy.name] = _proposed(scorer, strategy, part, seed)
    for improver in improvers:
        starts = sorted((pair for pairs in found.values() for pair in pairs), key=lambda pair: pair[0])
        if not starts:
            starts = draw_feasible(scorer, seed=seed)
        found[improver.name] = improver.improve(scorer, starts, seed=seed)
    return Comparison(
        proposals=tuple(
            Proposal(
                strategy=name, assignment=pairs[0][1] if pairs else None, objective=pairs[0][0] if pairs else np.inf
            )
            for name, pairs in found.items()
        ),
        evaluations=scorer.clock.evaluations,
    )


def _proposed(scorer: Scorer, strategy: Strategy, fraction: float, seed: int) -> Found:
    """Let a strategy spend a fraction of what is left."""
    budget = scorer.clock.remaining(fraction)
    if budget is None:
        return []
    if isinstance(strategy, Placer):
        with scorer.share(fraction) as lent:
            return strategy.search(lent, seed=seed)
    plans = strategy.propose(scorer.problem, budget=budget, seed=seed)
    scorer.clock.spend(strategy.evaluations)
    plain = [p.assignment_array(scorer.problem) for p in plans if len(p.replicas) == 1 and not p.threads]
    return scorer.rank(plain)


def best_of(
    problem: Problem, strategies: Sequence[Strategy], budget: Budget, seed: int = 0
) -> tuple[Plan, Outcome, int]:
    """Return the best plan that strategies find on a shared budget, its outcome and the evaluations spent.

    Args:
        problem: What to place.
        strategies: Which; see `compare`.
        budget: For all together; the first evaluations go to the first placement of each heuristic.
        seed: Seed of all randomness.

    Raises:
        InfeasibleError: If no strategy finds a feasible placement; names the op or the memory.
    """
    comparison = compare(problem, strategies, budget, seed)
    best = comparison.best
    if best is None or best.assignment is None:
        raise InfeasibleError(explain_infeasible(problem))
    from autoplace.simulate.evaluator import SimulatedEvaluator

    plan = Plan.from_assignment(problem, best.assignment, strategy=best.strategy)
    return plan, SimulatedEvaluator(problem).outcome(best.assignment), comparison.evaluations
