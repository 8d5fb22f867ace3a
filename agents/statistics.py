"""Geometric means of ratios J_a / J_b over problems, with 95% intervals. Below 1 the first planner is better.

The unit is the problem: the logs of the ratios are averaged over seeds first, and only then over problems, so that more
seeds narrow the noise of a problem and never pretend to be more problems.

    r_p        = mean over seeds of ln J_a - mean over seeds of ln J_b          → `log_ratio`
    ratio      = exp(mean over problems of r_p)                                 → `summarise`
    interval   = exp(mean -+ t(0.975, P - 1) sd(r) / sqrt(P))                   Student's t on the logs
    bootstrap  = percentiles of the mean of P problems drawn with replacement   (Efron and Tibshirani 1993, chapter 13)

A planner that finds nothing feasible (J = inf) has no logarithm: such a problem is left out of the mean, counted as a
win or a loss, and named in the count of those left out. Knows numbers alone, no problem and no planner.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autoplace.errors import InputError

__all__ = ["TIE", "RatioSummary", "log_ratio", "summarise"]

TIE = 1e-6
"""Largest |ln(J_a / J_b)| that counts as a tie: one part in a million, far above rounding."""

_DRAWS = 10_000


@dataclass(frozen=True, kw_only=True)
class RatioSummary:
    """What is known of J_a / J_b over some problems."""

    problems: int
    """Problems in the mean: those on which both planners found something feasible."""
    geometric_mean: float
    """Of the ratios; NaN when there is no problem."""
    low: float
    high: float
    """Ends of the 95% interval by Student's t on the logs; 0 and inf with fewer than two problems."""
    bootstrap_low: float
    bootstrap_high: float
    """Ends of the 95% percentile bootstrap over problems; likewise."""
    wins: int
    ties: int
    losses: int
    """Problems on which a is better, as good within → `TIE`, or worse; those left out of the mean included."""
    left_out: int
    """Problems on which one planner found nothing feasible."""

    @property
    def verdict(self) -> str:
        """`better` or `worse` where both intervals exclude 1, `open` otherwise."""
        if max(self.high, self.bootstrap_high) < 1.0:
            return "better"
        return "worse" if min(self.low, self.bootstrap_low) > 1.0 else "open"

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready figures; what is not finite becomes null."""
        figures: dict[str, float | list[float]] = {
            "geometric_mean": self.geometric_mean,
            "interval": [self.low, self.high],
            "bootstrap_interval": [self.bootstrap_low, self.bootstrap_high],
        }
        finite = {key: _finite(value) for key, value in figures.items()}
        counts = {key: getattr(self, key) for key in ("problems", "wins", "ties", "losses", "left_out")}
        return {**finite, **counts, "verdict": self.verdict}


def log_ratio(ours: Mapping[int, float], others: Mapping[int, float]) -> float:
    """Return the mean of ln(J_a / J_b) on one problem.

    Args:
        ours: Seed to J_a; inf = nothing feasible.
        others: Seed to J_b. Where both have seeds in common only those count; a planner without chance has one entry,
            which stands for all seeds.

    Returns:
        Negative where a is better; inf or -inf where only one of them is feasible in every seed that counts; NaN where
        neither is.

    Raises:
        InputError: If one of them has no entry, or a J is not above 0.
    """
    if not ours or not others:
        raise InputError("a ratio needs a run of both planners; run what is missing")
    seeds = sorted(set(ours) & set(others))
    several = len(ours) > 1 and len(others) > 1
    if several and not seeds:
        raise InputError("the two planners have no seed in common; run both with the same seeds")
    first = _mean_log([ours[s] for s in seeds] if several else list(ours.values()))
    second = _mean_log([others[s] for s in seeds] if several else list(others.values()))
    return math.nan if math.isinf(first) and math.isinf(second) else first - second


def summarise(log_ratios: Sequence[float], *, seed: int = 0) -> RatioSummary:
    """Summarise the log ratios of problems, one each.

    Args:
        log_ratios: As → `log_ratio` returns them; NaN (neither planner is feasible) counts as a tie that is left out.
        seed: Of the bootstrap.
    """
    values = np.asarray(log_ratios, float)
    known = values[np.isfinite(values)]
    mean = float(known.mean()) if len(known) else math.nan
    low, high = _student(known)
    bootstrap = _bootstrap(known, seed)
    return RatioSummary(
        problems=len(known),
        geometric_mean=math.exp(mean),
        low=math.exp(low),
        high=math.exp(high),
        bootstrap_low=math.exp(bootstrap[0]),
        bootstrap_high=math.exp(bootstrap[1]),
        wins=int((values < -TIE).sum()),
        ties=int((~(np.abs(values) > TIE)).sum()),
        losses=int((values > TIE).sum()),
        left_out=len(values) - len(known),
    )


def _mean_log(objectives: Sequence[float]) -> float:
    """Return the mean of the logs; inf where a run found nothing feasible."""
    values = np.asarray(objectives, float)
    if np.isnan(values).any() or (values <= 0).any():
        raise InputError(f"an objective of {values.min()} has no logarithm; every J must be above 0")
    return float(np.log(values).mean())


def _student(values: np.ndarray) -> tuple[float, float]:
    """Return the interval of the mean by Student's t."""
    count = len(values)
    if count < 2:
        return -math.inf, math.inf
    from scipy.special import stdtrit

    half = float(stdtrit(count - 1, 0.975)) * float(values.std(ddof=1)) / math.sqrt(count)
    return float(values.mean()) - half, float(values.mean()) + half


def _bootstrap(values: np.ndarray, seed: int) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean."""
    count = len(values)
    if count < 2:
        return -math.inf, math.inf
    draws = values[np.random.default_rng(seed).integers(0, count, (_DRAWS, count))].mean(axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def _finite(value: float | list[float]) -> float | list[float | None] | None:
    if isinstance(value, list):
        return [v if math.isfinite(v) else None for v in value]
    return value if math.isfinite(value) else None
