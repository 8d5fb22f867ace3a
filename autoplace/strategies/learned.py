"""The learned policy as a strategy: its greedy placement, then samples, scored by simulation.

The policy sees one decision at a time and never a finished plan; the simulator ranks what comes out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autoplace.policy.policy import Policy
from autoplace.policy.tables import build_tables
from autoplace.strategies._search import Placer, Scorer

__all__ = ["LearnedStrategy"]

BATCH_CELLS = 50_000
"""(op, device) cells drawn between two looks at the budget; 32 samples at most."""
DEFAULT_SAMPLES = 256
"""Samples when the budget has no limit."""
STALE_BATCHES = 8
"""Batches without a new placement after which the policy has nothing more to say."""


class LearnedStrategy(Placer):
    """Propose the policy's greedy placement and the best of its samples."""

    name = "learned"

    def __init__(self, policy: Policy, *, temperature: float = 1.0) -> None:
        """Keep the policy.

        Args:
            policy: Scores the devices.
            temperature: Of the softmax that samples are drawn from.
        """
        self.policy = policy
        self.temperature = temperature

    def search(self, scorer: Scorer, *, seed: int) -> list[tuple[float, NDArray[np.int32]]]:
        """Return the feasible placements found, best first; deterministic by seed and budget of evaluations."""
        problem, clock = scorer.problem, scorer.clock
        tables = build_tables(problem)
        batch = max(1, min(32, BATCH_CELLS // (problem.num_ops * problem.num_devices)))
        best = scorer.rank(list(self.policy.sample(problem, 1, temperature=0.0, tables=tables)))
        drawn = stale = 0
        while clock.allowed(1) and stale < STALE_BATCHES and (clock.limited or drawn < DEFAULT_SAMPLES):
            draws = self.policy.sample(
                problem, batch, seed=seed * 65_537 + drawn, temperature=self.temperature, tables=tables
            )
            before = clock.evaluations
            best = _merge(best, scorer.rank(list(draws)))[: self.keep]
            drawn += batch
            stale = 0 if clock.evaluations > before else stale + 1
        return best


def _merge(
    one: list[tuple[float, NDArray[np.int32]]], other: list[tuple[float, NDArray[np.int32]]]
) -> list[tuple[float, NDArray[np.int32]]]:
    """Return both lists as one, best first, each placement once."""
    unique = {a.tobytes(): (value, a) for value, a in one + other}
    return sorted(unique.values(), key=lambda pair: pair[0])
