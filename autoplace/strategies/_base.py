"""The contract of a strategy: a Problem in, candidate Plans out.

A strategy never sees the model, may use only what the Problem holds, counts every evaluation against its budget, and
with the same problem, budget of evaluations and seed returns the same plans, bit for bit.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from autoplace.errors import InputError
from autoplace.plan import Plan
from autoplace.problem import Problem

__all__ = ["Budget", "Strategy"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much a strategy may spend; whichever limit is reached first ends it."""

    evaluations: int | None = None
    """Plans that may be simulated; None = no limit."""
    seconds: float | None = None
    """Wall seconds; None = no limit."""

    def __post_init__(self) -> None:
        if self.evaluations is not None and self.evaluations < 1:
            raise InputError(f"a budget of {self.evaluations} evaluations allows nothing; use 1 or more")
        if self.seconds is not None and self.seconds <= 0:
            raise InputError(f"a budget of {self.seconds} seconds allows nothing; use more than 0")

    def start(self) -> Clock:
        """Start spending."""
        return Clock(self)


class Clock:
    """A budget being spent."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._start = time.perf_counter()
        self.evaluations = 0

    def spend(self, evaluations: int = 1) -> None:
        """Count evaluations."""
        self.evaluations += evaluations

    @property
    def limits(self) -> Budget:
        """What may be spent in all."""
        return self._budget

    @property
    def seconds(self) -> float:
        """Wall seconds since the start."""
        return time.perf_counter() - self._start

    @property
    def spent(self) -> bool:
        """Whether a limit is reached."""
        limits = self._budget
        return (limits.evaluations is not None and self.evaluations >= limits.evaluations) or (
            limits.seconds is not None and self.seconds >= limits.seconds
        )

    @property
    def progress(self) -> float:
        """Spent part of the limit that is nearest to being reached, 0 to 1; 0 when there is no limit."""
        limits, parts = self._budget, [0.0]
        if limits.evaluations is not None:
            parts.append(self.evaluations / limits.evaluations)
        if limits.seconds is not None:
            parts.append(self.seconds / limits.seconds)
        return min(1.0, max(parts))

    @property
    def limited(self) -> bool:
        """Whether there is any limit."""
        return self._budget.evaluations is not None or self._budget.seconds is not None

    def allowed(self, wanted: int, *, late: bool = False) -> int:
        """Return how many of `wanted` evaluations may still be spent; 0 once a limit is reached.

        Args:
            wanted: Evaluations.
            late: Whether the limit of seconds does not count.
        """
        if self.spent and not late:
            return 0
        limit = self._budget.evaluations
        return wanted if limit is None else max(0, min(wanted, limit - self.evaluations))

    def remaining(self, fraction: float = 1.0) -> Budget | None:
        """Return a fraction of what is left as a budget of its own; None once a limit is reached."""
        if self.spent:
            return None
        limits = self._budget
        left = None if limits.evaluations is None else limits.evaluations - self.evaluations
        return Budget(
            evaluations=None if left is None else max(1, int(left * fraction)),
            seconds=None if limits.seconds is None else max(1e-3, (limits.seconds - self.seconds) * fraction),
        )


class Strategy(ABC):
    """Proposes plans for a problem."""

    name: ClassVar[str]
    """Short unique name, as in tables and `--strategy`."""
    evaluations: int = 0
    """Evaluations that the last `propose` spent."""

    @abstractmethod
    def propose(self, problem: Problem, *, budget: Budget, seed: int = 0) -> list[Plan]:
        """Return candidate plans, best first by the strategy's own estimate.

        Args:
            problem: What to place.
            budget: Evaluations or seconds that may be spent; a constructive strategy may spend none.
            seed: Seed of all randomness.

        Returns:
            Plans that respect `Problem.can_run`, co-location and memory; empty when the strategy finds none.
        """
