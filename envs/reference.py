"""`best_baseline`: the best non-learned placement of a problem, which rewards are measured against."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoplace.errors import InfeasibleError
from autoplace.problem import Problem
from autoplace.strategies._base import Budget
from autoplace.strategies._search import Scorer
from autoplace.strategies.heuristics import construct

__all__ = ["Baseline", "best_baseline", "constructive_baselines"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Baseline:
    """A placement that no learning was needed for."""

    strategy: str
    assignment: NDArray[np.int32]
    """int32[N]."""
    objective: float
    """J of the simulator."""


def constructive_baselines(problem: Problem) -> list[Baseline]:
    """Return the best placement of each of `strategies.heuristics`, best first; simulated."""
    scorer = Scorer(problem, Budget().start())
    best = [
        Baseline(strategy=name, assignment=found[0][1], objective=found[0][0])
        for name, found in construct(scorer).items()
        if found
    ]
    return sorted(best, key=lambda b: b.objective)


def best_baseline(problem: Problem) -> Baseline:
    """Return the best of → `constructive_baselines`.

    Raises:
        InfeasibleError: If none of them finds a feasible placement.
    """
    found = constructive_baselines(problem)
    if not found:
        raise InfeasibleError(
            f"no baseline finds a placement of {problem.name!r}; give the devices more memory or links"
        )
    return found[0]
