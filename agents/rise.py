"""How much the measured reward rose: the first tenth of the real plans against the last, with bootstrap intervals.

Knows a list of rewards and no training. Intervals are percentile bootstraps (Efron and Tibshirani 1993, chapter 13).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autoplace.errors import InputError

__all__ = ["RewardRise", "reward_rise"]

_DRAWS = 10_000
_LEAST = 5
"""Plans in a tenth at the least, where there are twice as many."""


@dataclass(frozen=True, kw_only=True)
class RewardRise:
    """Mean rewards, log(J_reference / J), at the start and at the end; intervals are of 95 %."""

    plans: int
    """Plans in each of the two parts."""
    first: float
    first_interval: tuple[float, float]
    last: float
    last_interval: tuple[float, float]
    rise: float
    """`last` less `first`."""
    rise_interval: tuple[float, float]

    @property
    def metrics(self) -> dict[str, float]:
        """The figures by the names under which they are tracked."""
        found = {"measure/tenth_plans": float(self.plans)}
        for name in ("first", "last", "rise"):
            label = f"measure/{name}" if name == "rise" else f"measure/{name}_tenth"
            low, high = getattr(self, f"{name}_interval")
            found |= {label: getattr(self, name), f"{label}_low": low, f"{label}_high": high}
        return found

    def __str__(self) -> str:
        """Return two sentences for a person."""

        def shown(value: float, interval: tuple[float, float]) -> str:
            return f"{value:+.3f} (95% {interval[0]:+.3f} to {interval[1]:+.3f})"

        return (
            f"Measured reward, mean of {self.plans} plans: first {shown(self.first, self.first_interval)}, "
            f"last {shown(self.last, self.last_interval)}, rise {shown(self.rise, self.rise_interval)}."
        )


def reward_rise(rewards: Sequence[float], *, seed: int = 0) -> RewardRise:
    """Compare the first tenth of the rewards with the last.

    Args:
        rewards: log(J_reference / J) of every plan, in the order in which they were run.
        seed: Of the bootstrap.

    Raises:
        InputError: If there are fewer than two rewards.
    """
    if len(rewards) < 2:
        raise InputError(f"{len(rewards)} measured plans cannot rise; measure 2 or more")
    count = min(max(len(rewards) // 10, _LEAST), len(rewards) // 2)
    generator = np.random.default_rng(seed)
    first, last = np.asarray(rewards[:count], float), np.asarray(rewards[-count:], float)
    means = [part[generator.integers(0, count, (_DRAWS, count))].mean(axis=1) for part in (first, last)]
    return RewardRise(
        plans=count,
        first=float(first.mean()),
        first_interval=_interval(means[0]),
        last=float(last.mean()),
        last_interval=_interval(means[1]),
        rise=float(last.mean() - first.mean()),
        rise_interval=_interval(means[1] - means[0]),
    )


def _interval(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)
