"""Whole units of a batch, shared out over replicas: what strategies over several ranks try and improve.

A unit is what a replica cannot split further: a sample, or one sample for each of its microbatches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Counts", "moved_counts", "refine_counts", "whole_units"]

Counts = tuple[int, ...]
"""Units of every replica; 0 leaves it out."""

_BETTER = 1e-9
"""Relative gain below which two values count as the same."""


def whole_units(shares: Sequence[float] | NDArray[np.float64], units: int) -> Counts:
    """Round shares that sum to 1 to whole units, by largest remainder, ties in order, as the executors split."""
    exact = np.asarray(shares, np.float64) * units
    counts = np.floor(exact + 1e-9).astype(np.int64)
    order = np.argsort(counts - exact, kind="stable")
    counts[order[: units - int(counts.sum())]] += 1
    return tuple(int(c) for c in counts)


def refine_counts(start: Counts, value: Callable[[Counts], float], *, most: int) -> tuple[float, Counts]:
    """Move units from one replica to another as long as that lowers a value; steps get smaller down to one unit.

    Args:
        start: Where to begin.
        value: What to lower, deterministic; inf where it cannot be.
        most: Values to ask for at most.

    Returns:
        The least value found and its counts; the start where nothing is better.
    """
    known = {start: value(start)}

    def of(counts: Counts) -> float:
        if counts not in known:
            if len(known) >= most:
                return float("inf")
            known[counts] = value(counts)
        return known[counts]

    best, step = start, max(1, sum(start) // 8)
    while True:
        found = min(moved_counts(best, step), key=of, default=best)
        if of(found) < of(best) * (1.0 - _BETTER) or (np.isinf(of(best)) and np.isfinite(of(found))):
            best = found
        elif step > 1:
            step //= 2
        else:
            return known[best], best


def moved_counts(counts: Counts, step: int) -> list[Counts]:
    """Return all counts in which one replica has given that many units to another."""
    found = []
    for giver, taker in permutations(range(len(counts)), 2):
        if counts[giver] >= step:
            moved = list(counts)
            moved[giver] -= step
            moved[taker] += step
            found.append(tuple(moved))
    return found
