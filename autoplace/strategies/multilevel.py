"""Multi-level placement: coarsen, place, refine; for graphs of thousands of ops, up to 100,000 and more.

B. Hendrickson, R. Leland, "A multilevel algorithm for partitioning graphs", Supercomputing 1995, with placements in
place of partitions and the simulator in place of the cut. The coarsest problem is searched; what is found is projected
to the next level, ranked there beside that level's own heuristics and improved by moves of its groups, down to the ops.
On the last level groups move first, and then ops, both scored by the whole problem's simulator.

Every simulation counts as one evaluation of the budget, however small the problem is that it is of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoplace.problem import Problem
from autoplace.strategies._coarse import coarse_problem, project, restrict
from autoplace.strategies._search import Constructive, Found, Placer, Scorer
from autoplace.strategies.annealing import AnnealingStrategy
from autoplace.strategies.chunks import ChunksStrategy
from autoplace.strategies.heft import HeftStrategy
from autoplace.strategies.heuristics import construct, draw_feasible
from autoplace.strategies.metf import MetfStrategy

__all__ = ["Level", "MultilevelStrategy", "coarse_problem", "coarsen_levels", "level_sizes", "project", "restrict"]

_FIRST, _NEXT, _ENOUGH = 3, 4, 600
"""Ops a group on the finest level, groups a group on each level above, and groups of the coarsest level at most."""
_LEAST_GAIN = 0.6
"""A level is worth its work when it has no more than this part of the groups of the level below it."""
_SHARES = {"search": 0.35, "refine": 0.35, "groups": 0.5}
"""Parts of what is left: for the coarsest level, for each level between, for moves of groups on the whole problem."""
_BUILDERS: tuple[type[Constructive], ...] = (ChunksStrategy, HeftStrategy, MetfStrategy)
"""What each level between builds of its own: HEFT on groups is often better than HEFT on ops, and quick."""
_CARRIED = 3
"""Placements that go from a level to the next."""


class Level(NamedTuple):
    """A coarse problem and how the whole one's ops lie in it."""

    problem: Problem
    group_of_op: NDArray[np.int32]
    """int32[N], group of every op of the whole problem."""


def level_sizes(num_ops: int) -> list[int]:
    """Return the groups of the levels for a number of ops, finest first; 10,000 ops: 3,333 and 833, and 208 groups."""
    sizes = [num_ops // _FIRST]
    while sizes[-1] > _ENOUGH:
        sizes.append(sizes[-1] // _NEXT)
    return sizes


def coarsen_levels(problem: Problem, sizes: Sequence[int] | None = None) -> list[Level]:
    """Coarsen a problem again and again.

    Args:
        problem: The whole problem.
        sizes: Groups of each level at most, finest first; None = `level_sizes`.

    Returns:
        The levels, finest first; those that would have almost as many groups as the one below are left out.
    """
    levels: list[Level] = []
    below, group_of_op = problem, np.arange(problem.num_ops, dtype=np.int32)
    for size in level_sizes(problem.num_ops) if sizes is None else sizes:
        if size < 2 or size > _LEAST_GAIN * below.num_ops:
            continue
        coarse, group = coarse_problem(below, size)
        if coarse.num_ops > _LEAST_GAIN * below.num_ops:
            continue
        below, group_of_op = coarse, group[group_of_op]
        levels.append(Level(below, group_of_op))
    return levels


class MultilevelStrategy(Placer):
    """Coarsen, place the coarsest problem, refine level by level.

    Args:
        inner: Searches the coarsest problem: (scorer, seed) to what it found. None = annealing from the heuristics.
        refine: Improves placements: (scorer, starts, seed) to what it found, the starts among it. None = annealing.
        levels: Groups of each level at most, finest first; None = `level_sizes`.
    """

    name = "multilevel"

    def __init__(
        self,
        inner: Callable[[Scorer, int], Found] | None = None,
        refine: Callable[[Scorer, Found, int], Found] | None = None,
        *,
        levels: Sequence[int] | None = None,
    ) -> None:
        self._inner = inner or _anneal
        self._refine = refine or _improve
        self._levels = levels

    def search(self, scorer: Scorer, *, seed: int) -> Found:
        """Score the heuristics' placements of the whole problem, then search level by level."""
        starts = sorted((f for found in construct(scorer).values() for f in found), key=lambda pair: pair[0])
        return self.improve(scorer, starts, seed=seed)

    def improve(self, scorer: Scorer, starts: Found, *, seed: int) -> Found:
        """Search level by level until the scorer's budget is spent.

        Args:
            scorer: The whole problem, and the budget.
            starts: Placements of the whole problem that are known; may be empty.
            seed: Seed of all randomness.

        Returns:
            The best few placements found, the starts among them, best first; anytime: what is known when the budget
            ends comes back.
        """
        levels = [] if scorer.clock.spent else coarsen_levels(scorer.problem, self._levels)
        if not levels:
            return self._flat(scorer, starts, seed)
        carried: list[NDArray[np.int32]] = []
        local = scorer
        for position, level in enumerate(reversed(levels)):
            if scorer.clock.spent:
                break
            with scorer.share(_SHARES["search" if position == 0 else "refine"]) as lent:
                local = Scorer(level.problem, lent.clock)
                known = [restrict(scorer.problem, level.problem, level.group_of_op, a) for _, a in starts[:_CARRIED]]
                found = self._on_level(local, carried, known, seed + position)
            above = level.group_of_op
            finer = levels[len(levels) - position - 2] if position + 1 < len(levels) else None
            carried = [a if finer is None else _refined(above, finer, a) for _, a in found[:_CARRIED]]
        return self._finish(scorer, local, levels[0], carried, starts, seed)

    def _on_level(
        self, local: Scorer, carried: Sequence[NDArray[np.int32]], known: Sequence[NDArray[np.int32]], seed: int
    ) -> Found:
        """Search a coarse problem: from nothing on the coarsest level, from what came down on the others."""
        if not carried:
            found = self._inner(local, seed)
            return _best([*found, *local.rank(known)])
        builders = [kind() for kind in _BUILDERS]
        starts = _best([*local.rank([*carried, *known]), *(f for g in construct(local, builders).values() for f in g)])
        return self._refine(local, starts, seed) if starts and not local.clock.spent else starts

    def _finish(
        self,
        scorer: Scorer,
        local: Scorer,
        level: Level,
        carried: Sequence[NDArray[np.int32]],
        starts: Found,
        seed: int,
    ) -> Found:
        """Score what came down on the whole problem, move groups there, and then ops."""
        if len(carried) and len(carried[0]) != level.problem.num_ops:  # the budget ended on a coarser level
            carried = []
        ranked = scorer.rank([project(level.group_of_op, a) for a in carried])
        whole = _best([*ranked, *starts])
        if ranked and not scorer.clock.spent:
            with scorer.share(_SHARES["groups"]) as lent:
                groups = _Grouped(lent, local, level.group_of_op)
                first = {project(level.group_of_op, a).tobytes(): a for a in carried}
                moved = self._refine(groups, [(j, first[a.tobytes()]) for j, a in ranked], seed)
            whole = _best([*((j, project(level.group_of_op, a)) for j, a in moved), *whole])
        return self._flat(scorer, whole, seed)

    def _flat(self, scorer: Scorer, starts: Found, seed: int) -> Found:
        """Improve placements of the whole problem, op by op."""
        if not starts and not scorer.clock.spent:
            starts = draw_feasible(scorer, seed=seed)
        if starts and not scorer.clock.spent:
            return _best([*self._refine(scorer, starts, seed), *starts])[: self.keep]
        return starts[: self.keep]


class _Grouped(Scorer):
    """Scores placements of groups by the simulator of the whole problem."""

    def __init__(self, whole: Scorer, coarse: Scorer, group_of_op: NDArray[np.int32]) -> None:
        self.problem, self.view = coarse.problem, coarse.view
        self.clock = whole.clock
        self.evaluator = whole.evaluator
        self._group_of_op = group_of_op
        self._known = {}

    @property
    def op_class(self) -> NDArray[np.int32]:
        """int32[N], class of groups that every op of the whole problem is in."""
        return self.view.op_class[self._group_of_op]

    def score(self, assignments: NDArray[np.int32]) -> NDArray[np.float64]:
        """Return the objective J of int32[P, G] assignments of groups, float64[P]; counts P evaluations."""
        self.clock.spend(len(assignments))
        return self.evaluator.score(assignments[:, self._group_of_op])


def _refined(above: NDArray[np.int32], finer: Level, assignment: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the device of every group of a finer level from that of every group above it."""
    device = np.zeros(finer.problem.num_ops, np.int32)
    device[finer.group_of_op] = assignment[above]
    return device


def _best(found: Found) -> Found:
    """Return placements best first, each once."""
    unique = {a.tobytes(): (j, a) for j, a in found}
    return sorted(unique.values(), key=lambda pair: pair[0])


def _anneal(scorer: Scorer, seed: int) -> Found:
    return AnnealingStrategy().search(scorer, seed=seed)


def _improve(scorer: Scorer, starts: Found, seed: int) -> Found:
    return AnnealingStrategy().improve(copy(scorer), starts, seed=seed)
