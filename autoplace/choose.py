"""Which plan is kept: the rules of "never slower" as pure functions over measured Outcomes.

The best few plans are screened in a short interleaved run; those that gain (→ `finalists`) run again, longer, and that
run decides (→ `choose`). A plan replaces plain PyTorch only when it computes the same, and is better in the objective
by more than the A/A noise measured in the same run. The gain of a plan over plain PyTorch is

    (latency ratio)^(1-w) * (energy ratio)^w          → `gain_interval`

pair by pair: the latency ratio from the two samples of one round of the interleaved run, the energy ratio from the two
Outcomes' energies, which must come from one source.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from autoplace.measure.protocol import aa_noise, pair_ratios
from autoplace.outcome import Outcome
from autoplace.problem import Objective
from autoplace.result import Candidate

__all__ = ["Ratio", "choose", "compare", "finalists", "noise_of"]

MOST_FINALISTS = 3
"""Plans in the deciding run, beside plain PyTorch twice."""
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


def finalists(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the measured plans whose median gain is above 1, best first, a few at most; plain PyTorch comes first."""
    able = [c for c in candidates[1:] if c.measured is not None and c.measured.feasible and (c.gain or 0.0) > 1.0]
    return sorted(able, key=lambda c: -(c.gain or 0.0))[:MOST_FINALISTS]


def choose(candidates: Sequence[Candidate], final: Collection[str], *, noise: float) -> list[Candidate]:
    """Fill in verdicts and mark the kept candidate.

    Args:
        candidates: Measured or not; the first is plain PyTorch.
        final: Labels of the plans in the deciding run, which alone may be kept.
        noise: A/A noise of that run, as a fraction.

    Returns:
        The same candidates in the same order, exactly one of them kept.
    """
    plain = candidates[0]
    winners = [c for c in candidates[1:] if c.label in final and _refusal(c, final, noise) is None]
    best = max(winners, key=lambda c: c.gain or 0.0, default=plain)
    judged = []
    for candidate in candidates:
        if candidate is plain:
            verdict = "kept: nothing beats it beyond the noise" if best is plain else "baseline"
        elif candidate is best:
            verdict = "kept"
        else:
            verdict = _refusal(candidate, final, noise) or f"slower than {best.label}"
        judged.append(replace(candidate, kept=candidate is best, verdict=verdict))
    return judged


def _refusal(candidate: Candidate, final: Collection[str], noise: float) -> str | None:
    """Why a candidate may not replace plain PyTorch; None when it may."""
    if candidate.measured is None:
        if candidate.predicted is not None and not candidate.predicted.feasible:
            return f"not measured: {candidate.predicted.reason}"
        return "not measured: predicted slower"
    if not candidate.measured.feasible:
        return candidate.measured.reason
    if candidate.gain is None or candidate.gain_low is None:
        return "no energy figure to compare"
    if candidate.label in final and (candidate.gain <= 1.0 + noise or candidate.gain_low <= 1.0):
        return f"not better beyond the noise (±{noise:.1%})"
    if candidate.gain <= 1.0:
        return "worse than plain PyTorch"
    return None if candidate.label in final else "left out of the deciding run: others gained more"
