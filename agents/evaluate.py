"""How a policy does against the heuristics: geometric means of ratios of simulated objectives, J_policy / J_other.

Below 1 the policy is better. Nothing is learned here and no problem is drawn here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autoplace.envs.reference import constructive_baselines
from autoplace.policy.policy import Policy
from autoplace.policy.tables import Tables, build_tables
from autoplace.problem import Problem
from autoplace.simulate.evaluator import SimulatedEvaluator

__all__ = ["Bench", "compare"]


@dataclass(frozen=True, eq=False)
class _Case:
    problem: Problem
    tables: Tables
    evaluator: SimulatedEvaluator
    baselines: dict[str, float]


class Bench:
    """A fixed set of problems with their baselines, to look at a policy again and again.

    Args:
        problems: Problems; those for which no baseline is feasible are left out.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        self._cases = []
        for problem in problems:
            known = {b.strategy: b.objective for b in constructive_baselines(problem)}
            if known:
                self._cases.append(_Case(problem, build_tables(problem), SimulatedEvaluator(problem), known))

    def __len__(self) -> int:
        return len(self._cases)

    def objectives(self, policy: Policy, *, samples: int = 0, seed: int = 0) -> list[float]:
        """Return J of the greedy placement of each problem, or the least of it and `samples` draws; inf when none."""
        found = []
        for case in self._cases:
            draws = [policy.sample(case.problem, 1, temperature=0.0, tables=case.tables)]
            if samples:
                draws.append(policy.sample(case.problem, samples, seed=seed, tables=case.tables))
            placements = np.concatenate(draws)
            found.append(float(case.evaluator.score(placements).min()) if len(placements) else math.inf)
        return found

    def log_ratio(self, policy: Policy) -> float:
        """Return the mean of log(J_best_baseline / J_greedy), the reward; an infeasible placement counts as -5."""
        values = [
            math.log(min(case.baselines.values()) / j) if math.isfinite(j) else -5.0
            for case, j in zip(self._cases, self.objectives(policy), strict=True)
        ]
        return float(np.mean(values)) if values else 0.0

    def compare(self, policy: Policy, *, samples: int = 0, seed: int = 0) -> dict[str, Any]:
        """Return JSON-ready figures of → `compare` on these problems."""
        objectives = self.objectives(policy, samples=samples, seed=seed)
        names = sorted({name for case in self._cases for name in case.baselines})
        against: dict[str, list[float]] = {name: [] for name in [*names, "better_of_heft_metf", "best_heuristic"]}
        wins = 0
        for case, value in zip(self._cases, objectives, strict=True):
            others = dict(case.baselines)
            lists = [others[n] for n in ("heft", "metf") if n in others]
            if lists:
                others["better_of_heft_metf"] = min(lists)
            others["best_heuristic"] = min(case.baselines.values())
            wins += value < others["best_heuristic"] * (1 - 1e-9)
            for name, other in others.items():
                if math.isfinite(value):
                    against[name].append(math.log(value / other))
        return {
            "problems": len(objectives),
            "infeasible": sum(not math.isfinite(j) for j in objectives),
            "samples": samples,
            "better_than_best_heuristic": wins,
            "ratio": {name: _interval(logs) for name, logs in against.items() if logs},
        }


def _interval(logs: list[float]) -> dict[str, float]:
    """Return the geometric mean with its 95% interval (normal, on logs) and the number of problems."""
    mean, count = float(np.mean(logs)), len(logs)
    half = 1.96 * float(np.std(logs, ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    return {
        "geometric_mean": math.exp(mean),
        "low": math.exp(mean - half),
        "high": math.exp(mean + half),
        "problems": count,
    }


def compare(policy: Policy, problems: Sequence[Problem], *, samples: int = 0, seed: int = 0) -> dict[str, Any]:
    """Compare a policy with single device, chunks, HEFT, m-ETF, and the best of them.

    Args:
        policy: What to look at.
        problems: Where.
        samples: Draws besides the greedy placement, of which the best by simulation counts.
        seed: Of the draws.

    Returns:
        JSON-ready figures: `ratio[name]` holds the geometric mean of J_policy / J_name with its 95% interval; below 1
        the policy is better.
    """
    return Bench(problems).compare(policy, samples=samples, seed=seed)
