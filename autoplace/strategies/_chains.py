"""`Annealer`: annealing chains on a scorer's budget, around the compiled loop of `_engine`.

A chain runs between two points of the budget, from hot to cold, and is cut into slices so that a clock can stop it; by
a budget of evaluations alone it is the same on every machine. Temperatures are in units of J_start / K, about what one
of K classes weighs. It knows no strategy: who starts where and how hot is decided by `annealing` and `guided`.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from autoplace.simulate.local import new_local
from autoplace.strategies._engine import anneal, set_out, solve_windows
from autoplace.strategies._moves import BEST, GRAFTS, GUIDED, Prior, Space, Walk, new_walk, uniform_prior
from autoplace.strategies._search import Found, Scorer

__all__ = ["COLD", "Annealer", "hot_for"]

COLD = 0.03
"""Last temperature of a chain."""
_HOTTEST = 10.0
"""First temperature of a chain that has all the time it needs; hotter ones gain nothing [measured: training families,
50 to 250 ops, 30,000 evaluations]."""
_HEAT = 0.1
"""Rise of the first temperature with the evaluations a class. A short chain must not leave the valley that it starts
in: at 2 to 10 evaluations a class descent alone is best, at 200 and more a chain from 10 [measured: as above]."""
_SLICES = 100
"""Slices of a chain on a budget of evaluations."""
_SLICE_SECONDS = 5e-3
"""Length of a slice on a budget of seconds."""
_MOST_SLICE = 20_000
"""Evaluations of a slice at most."""
_WINDOW_SLICE = 1000
"""Evaluations on windows between two looks at the clock."""
_PILOT = 32
"""Evaluations after which the speed is known well enough to plan with."""


def hot_for(evaluations_a_class: float) -> float:
    """Return the first temperature of a chain by its length; 0 = only ever go down."""
    hot = min(_HOTTEST, _HEAT * evaluations_a_class)
    return hot if hot > COLD else 0.0


class Annealer:
    """Runs chains for one scorer, from assignments to assignments."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.space = Space.of(scorer.view, scorer.op_class)
        self.uniform = uniform_prior(self.space)
        self.stuck = len(self.space.free) == 0
        """Whether no other placement can be reached."""
        self._local = new_local(scorer.evaluator)
        self._per_second = 0.0

    def evaluations_a_class(self, until: float = 1.0) -> float:
        """Return how many evaluations a class the budget allows from now to a point of it; a guess by the clock."""
        clock = self.scorer.clock
        share = max(0.0, until - clock.progress)
        limit = clock.limits
        counts = [limit.evaluations * share] if limit.evaluations is not None else []
        if limit.seconds is not None and self._per_second > 0.0:
            counts.append(limit.seconds * share * self._per_second)
        return min(counts, default=0.0) / max(1, self.scorer.view.num_classes)

    def pilot(self, start: tuple[float, NDArray[np.int32]], *, seed: int) -> Found:
        """Go down for a few evaluations where the budget is one of seconds, to learn the speed."""
        clock = self.scorer.clock
        if clock.limits.seconds is None or clock.spent or self.stuck:
            return []
        return [self.chain(start, until=1.0, seed=seed, hot=0.0, most=_PILOT)]

    def chain(
        self,
        start: tuple[float, NDArray[np.int32]],
        *,
        until: float,
        seed: int,
        hot: float,
        scale: float | None = None,
        prior: Prior | None = None,
        guided: float = 0.0,
        grafts: float = 0.0,
        most: int | None = None,
    ) -> tuple[float, NDArray[np.int32]]:
        """Anneal from a placement until a point of the budget.

        Args:
            start: J and assignment int32[N]; feasible.
            until: Point of the budget, as `Clock.progress` counts it.
            seed: Of the walk.
            hot: First temperature; 0 = go down only.
            scale: What temperature 1 is, in units of J; None = J of the start over the number of classes.
            prior: What moves are drawn from; None = no preference.
            guided: Chance that a moved class and its device come from the prior.
            grafts: Chance that a move copies a part of one of the prior's donors.
            most: Evaluations at most.

        Returns:
            J and assignment of the best placement, the start included.
        """
        clock, view = self.scorer.clock, self.scorer.view
        if clock.spent or self.stuck or clock.progress >= until:
            return start
        walk = self._set_out(start, seed=seed, guided=guided, grafts=grafts)
        scale = start[0] / view.num_classes if scale is None else scale
        begun, left = clock.progress, most if most is not None else 2**62
        while left > 0 and clock.progress < until:
            count = clock.allowed(min(left, self._slice(begun, until)))
            if count == 0:
                break
            part = min(1.0, (clock.progress - begun) / (until - begun))
            heat = scale * hot * (COLD / hot) ** part if hot > 0.0 else 0.0
            before = time.perf_counter()
            spent = anneal(self.space, prior or self.uniform, walk, self._local, count, heat)
            self._per_second = spent / max(time.perf_counter() - before, 1e-9)
            clock.spend(spent)
            left -= count
            if spent < count:
                self.stuck = True
                break
        return self._better(walk, start)

    def windows(
        self,
        start: tuple[float, NDArray[np.int32]],
        *,
        size: int,
        seed: int,
        prior: Prior | None = None,
        guided: float = 0.0,
    ) -> tuple[float, NDArray[np.int32]]:
        """Place windows of `size` connected classes exactly until the budget is spent; return the best placement.

        Args:
            start: J and assignment int32[N]; feasible.
            size: Classes of a window.
            seed: Of the windows' places.
            prior: Where windows begin; None = anywhere.
            guided: Chance that a window's place comes from the prior.
        """
        clock = self.scorer.clock
        if clock.spent or self.stuck:
            return start
        walk = self._set_out(start, seed=seed, guided=guided, grafts=0.0)
        timed = clock.limits.evaluations is None
        while count := clock.allowed(self._timed_slice(_WINDOW_SLICE) if timed else _WINDOW_SLICE):
            begun = time.perf_counter()
            spent = solve_windows(self.space, prior or self.uniform, walk, self._local, count, size)
            self._per_second = spent / max(time.perf_counter() - begun, 1e-9)
            clock.spend(spent)
            if spent == 0:
                break
        return self._better(walk, start)

    def _set_out(self, start: tuple[float, NDArray[np.int32]], *, seed: int, guided: float, grafts: float) -> Walk:
        """Return a walk that stands on a placement; costs an evaluation."""
        walk = new_walk(self.space, seed=seed)
        walk.now[:] = self.scorer.view.gather(start[1])
        walk.numbers[GUIDED], walk.numbers[GRAFTS] = guided, grafts
        self.scorer.clock.spend()
        set_out(self.space, walk, self._local)
        return walk

    def _better(self, walk: Walk, start: tuple[float, NDArray[np.int32]]) -> tuple[float, NDArray[np.int32]]:
        """Return the better of a walk's best placement and its start."""
        best = float(walk.numbers[BEST])
        return (best, self.scorer.view.spread(walk.best)) if best < start[0] else start

    def _slice(self, begun: float, until: float) -> int:
        limits = self.scorer.clock.limits
        if limits.evaluations is None:
            return self._timed_slice(_MOST_SLICE)
        return int(min(max(limits.evaluations * (until - begun) / _SLICES, 1), _MOST_SLICE))

    def _timed_slice(self, most: int) -> int:
        """Return how many evaluations to spend before the next look at the clock."""
        return int(min(max(self._per_second * _SLICE_SECONDS or _PILOT, 1), most))
