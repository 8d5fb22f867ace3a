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


class Strategy(ABC):
    """Proposes plans for a problem."""

    name: ClassVar[str]
    """Short unique name, as in tables and `--strategy`."""

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
