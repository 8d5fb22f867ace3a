"""Simulated annealing from the best heuristic placement: the search that learned planners are measured against.

S. Kirkpatrick, C. Gelatt, M. Vecchi, "Optimization by simulated annealing", Science 220, 1983. Moves, all of them
within what each class of co-located ops may use and, as far as it can be known without a schedule, within memory:

1. a class to another device, half the time to that of a class which it exchanges a tensor with;
2. a run of classes in topological order to one device;
3. two classes exchange their devices;
4. a border, where the device changes along the topological order, moves by some classes.

A worse candidate is accepted with probability exp(-(J - J_now) / (t J_start / K)), K being the number of classes. t
falls geometrically over the budget; where nothing better has come for 50 evaluations a class, it rises to its first
value and falls again within that number, so that a budget which is large for the problem is not spent in one valley.
While most candidates are refused they are drawn in batches and scored in one call: those drawn beside an accepted one
are spent for nothing, which the batch size keeps rare.
"""

from __future__ import annotations

import math
import random

import numpy as np
from numpy.typing import NDArray

from autoplace.strategies._search import Found, Placer, Scorer
from autoplace.strategies._support import View
from autoplace.strategies.heuristics import construct, draw_feasible

__all__ = ["AnnealingStrategy"]

_HOT, _COLD = 1.0, 0.03
"""First and last temperature, in units of J_start / K, about what one class weighs."""
_MAX_BATCH = 16
"""Candidates scored in one call at most."""
_PATIENCE = 50
"""Evaluations a class without a gain after which annealing warms up again, and in which it then cools down."""
_TRIES = 50
"""Draws in a row that may give no new placement before the search ends: nothing else can be reached."""


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
        walk = _Walk(scorer, starts[0], seed)
        limit = None if scorer.clock.limited else scorer.clock.evaluations + 1000 + 20 * scorer.view.num_classes
        begun = scorer.clock.progress
        while not scorer.clock.spent and (limit is None or scorer.clock.evaluations < limit):
            if limit is None:
                part = (scorer.clock.progress - begun) / max(1.0 - begun, 1e-9)
            else:
                part = 1.0 - (limit - scorer.clock.evaluations) / (1000 + 20 * scorer.view.num_classes)
            if not walk.step(part):
                break
        known = {a.tobytes(): (j, a) for j, a in [*walk.trail, *starts]}
        return sorted(known.values(), key=lambda pair: pair[0])[: self.keep]


class _Walk:
    """Where annealing is, and the best that it has seen."""

    def __init__(self, scorer: Scorer, start: tuple[float, NDArray[np.int32]], seed: int) -> None:
        self._scorer = scorer
        self._random = random.Random(seed)
        self._moves = _Moves(scorer.view, self._random)
        self._now = scorer.view.gather(start[1])
        self._value = self._best = start[0]
        self._scale = max(start[0] / scorer.view.num_classes, 1e-300)
        self._acceptance = 1.0
        self._patience = _PATIENCE * scorer.view.num_classes
        self._cooling: float = np.inf
        self._stale = 0
        self._goal = start[0]
        self.trail: Found = [start]
        """Start and every improvement of the best, worst first."""

    def step(self, part: float) -> bool:
        """Score a batch of candidates and go to the first that is accepted; False when there is no candidate.

        Args:
            part: Part of the budget that is spent, 0 to 1.
        """
        temperature = self._temperature(part)
        wanted = min(_MAX_BATCH, max(1, int(0.25 / max(self._acceptance, 1e-9))))
        batch = [
            c for c in (self._moves.draw(self._now) for _ in range(self._scorer.clock.allowed(wanted))) if c is not None
        ]
        if not batch:
            return False
        self._cooling += len(batch)
        self._stale += len(batch)
        assignments = np.stack(batch)[:, self._scorer.view.op_class]
        for candidate, assignment, value in zip(
            batch, assignments, self._scorer.score(assignments).tolist(), strict=True
        ):
            accepted = self._accepts(value, temperature)
            self._acceptance += 0.02 * (accepted - self._acceptance)
            if accepted:
                self._now, self._value = candidate, value
                self._remember(value, assignment)
                break
        return True

    def _temperature(self, part: float) -> float:
        if self._stale > self._patience:
            self._cooling = self._stale = 0
            self._goal = self._value
        return _HOT * (_COLD / _HOT) ** min(part, self._cooling / self._patience)

    def _remember(self, value: float, assignment: NDArray[np.int32]) -> None:
        if value < self._goal:
            self._goal, self._stale = value, 0
        if value < self._best:
            self._best = value
            self.trail.append((value, assignment))

    def _accepts(self, value: float, temperature: float) -> bool:
        if value <= self._value:
            return True
        loss = (value - self._value) / (self._scale * temperature)
        return loss < 50.0 and self._random.random() < math.exp(-loss)


class _Moves:
    """Draws neighbours of a placement of K classes on D devices."""

    def __init__(self, view: View, source: random.Random) -> None:
        self._random = source
        self._view = view.relaxed() or view
        self._allowed = self._view.allowed
        self._limited = bool((view.capacity < np.inf).any())
        self._count, self._devices = self._allowed.shape
        self._choices = [np.flatnonzero(row).tolist() for row in self._allowed]
        self._free = [k for k, choices in enumerate(self._choices) if len(choices) > 1]
        self._neighbours = _neighbours(view)

    def draw(self, now: NDArray[np.int32]) -> NDArray[np.int32] | None:
        """Return a neighbour of int32[K] `now`, never `now` itself; None when none was found."""
        if not self._free:
            return None
        for _ in range(_TRIES):
            kind = self._random.random()
            if kind < 0.4:
                found = self._move(now)
            elif kind < 0.65:
                found = self._run(now)
            elif kind < 0.8:
                found = self._swap(now)
            else:
                found = self._border(now)
            if found is not None and (not self._limited or self._view.fits(found)):
                return found
        return None

    def _move(self, now: NDArray[np.int32]) -> NDArray[np.int32] | None:
        one = self._random.choice(self._free)
        device = self._random.choice(self._choices[one])
        if self._random.random() < 0.5 and self._neighbours[one]:
            device = int(now[self._random.choice(self._neighbours[one])])
        if device == now[one] or not self._allowed[one, device]:
            return None
        found = now.copy()
        found[one] = device
        return found

    def _run(self, now: NDArray[np.int32]) -> NDArray[np.int32] | None:
        begin = self._random.randrange(self._count)
        return self._fill(now, begin, begin + self._length(), self._random.randrange(self._devices))

    def _swap(self, now: NDArray[np.int32]) -> NDArray[np.int32] | None:
        one, other = self._random.choice(self._free), self._random.choice(self._free)
        here, there = now[one], now[other]
        if here == there or not (self._allowed[one, there] and self._allowed[other, here]):
            return None
        found = now.copy()
        found[one], found[other] = there, here
        return found

    def _border(self, now: NDArray[np.int32]) -> NDArray[np.int32] | None:
        borders = np.flatnonzero(now[1:] != now[:-1]) + 1
        if len(borders) == 0:
            return None
        border, length = int(borders[self._random.randrange(len(borders))]), self._length()
        if self._random.random() < 0.5:
            return self._fill(now, border, border + length, int(now[border - 1]))
        return self._fill(now, max(0, border - length), border, int(now[border]))

    def _length(self) -> int:
        """Draw a length with as much chance between 1 and 2 as between K/2 and K."""
        return int(2.0 ** (self._random.random() * math.log2(max(2, self._count))))

    def _fill(self, now: NDArray[np.int32], begin: int, end: int, device: int) -> NDArray[np.int32] | None:
        able = self._allowed[begin:end, device] & (now[begin:end] != device)
        if not able.any():
            return None
        found = now.copy()
        found[begin:end][able] = device
        return found


def _neighbours(view: View) -> list[list[int]]:
    """Return for every class those that it exchanges a tensor with."""
    edges = view.problem.graph.edge_list
    pairs = view.op_class[edges[:, :2]]
    pairs = np.unique(np.concatenate([pairs, pairs[:, ::-1]]), axis=0)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    found: list[list[int]] = [[] for _ in range(view.num_classes)]
    for one, other in pairs.tolist():
        found[one].append(other)
    return found
