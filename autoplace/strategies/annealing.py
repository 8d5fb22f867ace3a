"""Simulated annealing from the best heuristic placement: the search that learned planners are measured against.

S. Kirkpatrick, C. Gelatt, M. Vecchi, "Optimization by simulated annealing", Science 220, 1983. One chain cools from hot
to cold over the whole budget; how hot depends on the evaluations a class that the budget allows (→ `_chains.hot_for`).
Where that is more than a chain can use, chains follow one another, each from the best placement so far. The moves are
those of `_engine`: a class, a run of classes, a connected group, an exchange, a border.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy

from autoplace.strategies._base import Budget
from autoplace.strategies._chains import Annealer, hot_for
from autoplace.strategies._search import Found, Placer, Scorer
from autoplace.strategies.heuristics import construct, draw_feasible

__all__ = ["AnnealingStrategy", "within_limits"]

_LONGEST = 3000.0
"""Evaluations a class of one chain at most."""


class AnnealingStrategy(Placer):
    """Improve the best placement of the heuristics until the budget is spent; the best so far comes back."""

    name = "annealing"

    def search(self, scorer: Scorer, *, seed: int) -> Found:
        """Score the heuristics' placements, random ones where there is none, and anneal from the best."""
        starts = sorted((f for found in construct(scorer).values() for f in found), key=lambda pair: pair[0])
        return self.improve(scorer, starts or draw_feasible(scorer, seed=seed), seed=seed)

    def improve(self, scorer: Scorer, starts: Found, *, seed: int) -> Found:
        """Anneal from the best of `starts` until the scorer's budget is spent.

        Without any limit, 1,000 evaluations and 20 a class are spent.

        Returns:
            The best few placements found, the start among them, best first; empty when there is no start.
        """
        if not starts:
            return []
        with within_limits(scorer) as limited:
            annealer, found = Annealer(limited), list(starts)
            found += annealer.pilot(starts[0], seed=seed)
            length, begun = annealer.evaluations_a_class(), limited.clock.progress
            chains = max(1, math.ceil(length / _LONGEST))
            for index in range(chains):
                until = begun + (1.0 - begun) * (index + 1) / chains
                start = min(found, key=lambda pair: pair[0])
                hot, scale = hot_for(length / chains), starts[0][0] / scorer.view.num_classes
                found.append(annealer.chain(start, until=until, seed=seed * 1009 + index, hot=hot, scale=scale))
        known = {a.tobytes(): (j, a) for j, a in reversed(found)}
        return sorted(known.values(), key=lambda pair: pair[0])[: self.keep]


@contextmanager
def within_limits(scorer: Scorer) -> Iterator[Scorer]:
    """Lend a scorer whose budget has a limit: 1,000 evaluations and 20 a class where there was none."""
    if scorer.clock.limited:
        yield scorer
        return
    lent = copy(scorer)
    lent.clock = Budget(evaluations=1000 + 20 * scorer.view.num_classes).start()
    yield lent
    scorer.clock.spend(lent.clock.evaluations)
