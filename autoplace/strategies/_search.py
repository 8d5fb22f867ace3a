"""`Scorer`: a budget, an evaluator and what they found; and `Placer`, the base of the strategies that use one.

The portfolio hands one scorer to several strategies, so that they share a budget and nothing is simulated twice.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy

import numpy as np
from numpy.typing import NDArray

from autoplace.errors import InputError
from autoplace.plan import Plan
from autoplace.problem import Problem
from autoplace.strategies._base import Budget, Clock, Strategy
from autoplace.strategies._support import View

__all__ = ["Constructive", "Found", "Placer", "Scorer"]

Assignment = NDArray[np.int32]
"""int32[N], device of every op."""
Found = list[tuple[float, Assignment]]
"""Objective J and assignment of what a search found, best first."""


class Scorer:
    """Scores assignments within a budget and remembers those that it is asked to."""

    def __init__(self, problem: Problem, clock: Clock) -> None:
        from autoplace.simulate.evaluator import SimulatedEvaluator  # numba: only when something is simulated

        self.problem = problem
        self.clock = clock
        self.view = View.of(problem)
        self.evaluator = SimulatedEvaluator(problem)
        self._known: dict[bytes, float] = {}

    @property
    def op_class(self) -> NDArray[np.int32]:
        """int32[N], class of every op that the evaluator knows."""
        return self.view.op_class

    def score(self, assignments: NDArray[np.int32]) -> NDArray[np.float64]:
        """Return the objective J of int32[P, N] assignments, float64[P]; counts P evaluations."""
        self.clock.spend(len(assignments))
        return self.evaluator.score(assignments)

    def score_once(self, assignments: Sequence[Assignment], *, late: bool = False) -> None:
        """Score and remember assignments in turn until the budget is spent; known ones cost nothing.

        Args:
            assignments: int32[N] each.
            late: Whether to go on when only the seconds are over.
        """
        fresh = {_key(a): a for a in assignments}
        keys = [k for k in fresh if k not in self._known]
        keys = keys[: self.clock.allowed(len(keys), late=late)]
        if keys:
            values = self.score(np.stack([fresh[k] for k in keys]))
            self._known.update(zip(keys, values.tolist(), strict=True))

    def rank(self, assignments: Sequence[Assignment]) -> Found:
        """Return the feasible assignments with their J, best first, each once; those beyond the budget are left out."""
        self.score_once(assignments)
        return self.rank_known(assignments)

    def rank_known(self, assignments: Sequence[Assignment]) -> Found:
        """Return those of the assignments that were scored and are feasible, with their J, best first, each once."""
        unique = {_key(a): a for a in assignments}
        scored = [(self._known.get(k, np.inf), a) for k, a in unique.items()]
        return sorted((pair for pair in scored if np.isfinite(pair[0])), key=lambda pair: pair[0])

    @contextmanager
    def share(self, fraction: float) -> Iterator[Scorer]:
        """Lend a scorer that may spend a fraction of what is left and knows what this one knows.

        What it spends is counted here when the context ends; it must not be entered once the budget is spent.
        """
        budget = self.clock.remaining(fraction)
        if budget is None:
            raise InputError("the budget is spent; allow more evaluations or seconds")
        lent = copy(self)
        lent.clock = budget.start()
        yield lent
        self.clock.spend(lent.clock.evaluations)


def _key(assignment: Assignment) -> bytes:
    """Return what stands for an assignment in the memory: 16 bytes, however many ops there are."""
    return hashlib.blake2b(np.ascontiguousarray(assignment, np.int32).tobytes(), digest_size=16).digest()


class Placer(Strategy):
    """A strategy whose plans are one assignment each, scored by simulation."""

    keep: int = 8
    """Plans returned at most."""

    @abstractmethod
    def search(self, scorer: Scorer, *, seed: int) -> Found:
        """Return feasible assignments with their objective J, best first; spends the scorer's budget."""

    def propose(self, problem: Problem, *, budget: Budget, seed: int = 0) -> list[Plan]:
        """Return the best few plans, best first; empty when none is feasible. See `Strategy.propose`."""
        clock = budget.start()
        found = self.search(Scorer(problem, clock), seed=seed)[: self.keep]
        self.evaluations = clock.evaluations
        return [Plan.from_assignment(problem, a, strategy=self.name) for _, a in found]


class Constructive(Placer):
    """A placer that builds a few assignments without any search and spends one evaluation on each."""

    @abstractmethod
    def candidates(self, view: View) -> list[Assignment]:
        """Return assignments within the view's memory, best first by the strategy's own estimate."""

    def search(self, scorer: Scorer, *, seed: int) -> Found:
        """Score the candidates; where none is feasible, those that rely on activations being freed."""
        found = scorer.rank(self.candidates(scorer.view))
        relaxed = None if found else scorer.view.relaxed()
        return scorer.rank(self.candidates(relaxed)) if relaxed is not None else found
