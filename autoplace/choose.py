"""Which plan is kept: the rules of "never slower" as pure functions over measured Outcomes.

A plan replaces plain PyTorch only when it computes the same, and is better in the objective by more than the noise
measured in the same interleaved run. The gain of a plan over plain PyTorch is

    (latency ratio)^(1-w) * (energy ratio)^w          → `gain_interval`

pair by pair: the latency ratio from the two samples of one round of the interleaved run, the energy ratio from the two
Outcomes' energies, which must come from one source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from autoplace.measure.protocol import aa_noise, pair_ratios
from autoplace.outcome import Outcome
from autoplace.problem import Objective
from autoplace.result import Candidate

__all__ = ["Ratio", "choose", "compare", "noise_of"]

NOISE_FLOOR = 0.01
"""Gains below one per cent are never believed, whatever the A/A run says."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A plan against plain PyTorch; more than 1 is better than plain."""

    speedup: float
    """Median of the pairwise latency ratios."""
    speedup_interval: tuple[float, float]
    """Their quartiles."""
    gain: float
    """Median gain in the objective."""
    gain_low: float
    """Lower quartile of the gain."""


def compare(plain: Outcome, other: Outcome, objective: Objective) -> Ratio | None:
    """Compare a measured plan with plain PyTorch of the same interleaved run.

    Returns:
        None when either is infeasible, or when energy counts and the two have no figures of one source.
    """
    if not (plain.feasible and other.feasible):
        return None
    speedup, quartiles = pair_ratios(plain.samples_ms, other.samples_ms)
    weight, energy = objective.energy_weight, 1.0
    if weight > 0.0:
        if not plain.energy_j or not other.energy_j or plain.energy_source != other.energy_source:
            return None
        energy = plain.energy_j / other.energy_j
    return Ratio(
        speedup=speedup,
        speedup_interval=quartiles,
        gain=speedup ** (1.0 - weight) * energy**weight,
        gain_low=quartiles[0] ** (1.0 - weight) * energy**weight,
    )


def noise_of(plain: Outcome, again: Outcome) -> float:
    """Return the A/A noise of a run that measured plain PyTorch twice, as a fraction; infinite if either failed."""
    if not (plain.feasible and again.feasible):
        return float("inf")
    return max(NOISE_FLOOR, aa_noise(plain.samples_ms, again.samples_ms))


def choose(candidates: Sequence[Candidate], *, noise: float) -> list[Candidate]:
    """Fill in verdicts and mark the kept candidate.

    Args:
        candidates: Measured or not; the first is plain PyTorch.
        noise: A/A noise of the run in which they were measured, as a fraction.

    Returns:
        The same candidates in the same order, exactly one of them kept.
    """
    winners = [c for c in candidates[1:] if _refusal(c, noise) is None]
    best = max(winners, key=lambda c: c.gain or 0.0, default=candidates[0])
    judged = []
    for candidate in candidates:
        verdict = "kept" if candidate is best else _refusal(candidate, noise)
        if candidate is candidates[0]:
            verdict = "kept: nothing beats it beyond the noise" if candidate is best else "baseline"
        judged.append(replace(candidate, kept=candidate is best, verdict=verdict or f"slower than {best.label}"))
    return judged


def _refusal(candidate: Candidate, noise: float) -> str | None:
    """Why a candidate may not replace plain PyTorch; None when it may."""
    if candidate.measured is None:
        if candidate.predicted is not None and not candidate.predicted.feasible:
            return f"not measured: {candidate.predicted.reason}"
        return "not measured: predicted slower"
    if not candidate.measured.feasible:
        return candidate.measured.reason
    if candidate.gain is None or candidate.speedup_interval is None or candidate.gain_low is None:
        return "no energy figure to compare"
    if candidate.gain <= 1.0 + noise or candidate.gain_low <= 1.0:
        return f"not better beyond the noise (±{noise:.1%})" if candidate.gain > 1.0 - noise else "worse than plain"
    return None
