"""The constructive strategies, run together: where every search starts and what it must not fall behind."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autoplace.strategies._search import Constructive, Found, Scorer
from autoplace.strategies._support import View
from autoplace.strategies.chunks import ChunksStrategy
from autoplace.strategies.dp import PipelineDpStrategy
from autoplace.strategies.heft import HeftStrategy
from autoplace.strategies.metf import MetfStrategy
from autoplace.strategies.random_search import draw
from autoplace.strategies.single import SingleStrategy

__all__ = ["HEURISTICS", "construct", "draw_feasible"]

HEURISTICS: tuple[type[Constructive], ...] = (
    SingleStrategy,
    ChunksStrategy,
    HeftStrategy,
    MetfStrategy,
    PipelineDpStrategy,
)
"""The constructive strategies, in the order in which a small budget serves them."""

_DRAWS = 256
"""Random placements looked at where no heuristic finds a feasible one."""


def construct(scorer: Scorer, strategies: Sequence[Constructive] | None = None) -> dict[str, Found]:
    """Score what constructive strategies build, the first of each, then the second of each, within the budget.

    Args:
        scorer: Problem and budget.
        strategies: Which; None = all of `HEURISTICS`.

    Returns:
        Strategy name to its feasible assignments, best first; empty lists where there is none.
    """
    strategies = [kind() for kind in HEURISTICS] if strategies is None else list(strategies)
    found = _scored(scorer, strategies, scorer.view)
    relaxed = scorer.view.relaxed()
    if relaxed is not None and not any(found.values()):
        found = _scored(scorer, strategies, relaxed)
    return found


def _scored(scorer: Scorer, strategies: Sequence[Constructive], view: View) -> dict[str, Found]:
    """Build and score; where the seconds are over before anything is scored, what is built by then is scored still."""
    built: dict[str, list[NDArray[np.int32]]] = {}
    for strategy in strategies:
        late = scorer.clock.spent and any(built.values())
        built[strategy.name] = [] if late else strategy.candidates(view)
    turns = [a for turn in itertools.zip_longest(*built.values()) for a in turn if a is not None]
    scorer.score_once(turns, late=True)
    return {name: scorer.rank_known(assignments) for name, assignments in built.items()}


def draw_feasible(scorer: Scorer, *, seed: int) -> Found:
    """Return the first feasible random placements, where the heuristics find none; empty when there is none either."""
    random = np.random.default_rng(seed)
    for _ in range(_DRAWS // 16):
        drawn = [a for a in (draw(scorer.view, random) for _ in range(16)) if a is not None]
        if found := scorer.rank(drawn):
            return found
        if scorer.clock.spent:
            break
    return []
