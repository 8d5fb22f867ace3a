"""Which plan is kept: the rules of "never slower" as pure functions over measured Outcomes.

The best few plans are screened in short interleaved runs; those that gain (→ `finalists`) run again, longer, and that
run decides (→ `choose`); in it, plans that are beaten leave the rounds to the others (→ `beaten`). A plan replaces
plain PyTorch only when it computes the same, and is better in the objective by more than the A/A noise measured in the
same run, with the whole interval of its median gain above 1. Both shrink with the number of rounds. Plain
`torch.compile`, where it ran, is a second guard: a plan that is to be kept instead of it must gain more, and the whole
interval of its median speed-up over it in the same run must lie above 1, or the gain must be more by more than the
noise. The gain of a plan over plain PyTorch is

    (latency ratio)^(1-w) * (energy ratio)^w          → `gain_interval`

pair by pair: the latency ratio from the two samples of one round of the interleaved run, the energy ratio from the two
Outcomes' energies, which must come from one source. A plan that compiles has to earn the seconds c that this takes
within the R seconds for which the model is to run, so that its latency ratio s counts as

    R / (c + R / s)                                   → `paid_back`

The energy of compiling is not counted: nobody measured it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from autoplace.measure.protocol import aa_noise, median_interval, pair_interval, pair_ratios
from autoplace.outcome import Outcome
from autoplace.plan import Plan
from autoplace.problem import Objective
from autoplace.result import Candidate

__all__ = [
    "COMPILED",
    "Ratio",
    "beaten",
    "choose",
    "compare",
    "finalists",
    "is_look",
    "judged",
    "noise_of",
    "paid_back",
    "pair_gains",
]

COMPILED = Plan.plain().with_(compiled=True)
"""Plain `torch.compile`, the second guard."""
MOST_FINALISTS = 3
"""Plans in the deciding run, beside plain PyTorch twice and plain `torch.compile`."""
NOISE_FLOOR = 0.01
"""Gains below one per cent are never believed, whatever the A/A run says."""
_FIRST_LOOK, _LOOK_EVERY = 7, 4
"""Rounds before a plan may be taken out of the deciding run, and from one look to the next: an interval that is looked
at again and again is sooner or later wrong."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A plan against plain PyTorch; more than 1 is better than plain."""

    speedup: float
    """Median of the pairwise latency ratios, as measured."""
    speedup_interval: tuple[float, float]
    """Their quartiles."""
    gain: float
    """Median gain in the objective; the time to compile is paid back first."""
    gain_low: float
    """Lower end of the interval of the median gain, see `measure.protocol.pair_interval`."""


def paid_back(speedup: float, compile_s: float, run_s: float) -> float:
    """Return what a speed-up counts for over a run that starts with compiling.

    Args:
        speedup: Plain latency over the plan's.
        compile_s: Seconds of compiling.
        run_s: Seconds that plain PyTorch would run; infinity counts compiling for nothing.
    """
    if compile_s <= 0.0 or math.isinf(run_s):
        return speedup
    return run_s / (compile_s + run_s / speedup)


def compare(
    plain: Outcome,
    other: Outcome,
    objective: Objective,
    *,
    compile_s: float = 0.0,
    run_s: float = math.inf,
) -> Ratio | None:
    """Compare a measured plan with plain PyTorch of the same interleaved run.

    Args:
        plain, other: Outcomes with one sample per round; the plan's may end before plain PyTorch's.
        objective: What the gain is in.
        compile_s: Seconds that compiling the plan takes.
        run_s: Seconds for which the model is to run.

    Returns:
        None when either is infeasible, or when energy counts and the two have no figures of one source.
    """
    gain = _gain_of(plain, other, objective, compile_s, run_s)
    if gain is None:
        return None
    beside = plain.samples_ms[: len(other.samples_ms)]
    speedup, quartiles = pair_ratios(beside, other.samples_ms)
    low, _ = pair_interval(beside, other.samples_ms)
    return Ratio(speedup=speedup, speedup_interval=quartiles, gain=gain(speedup), gain_low=gain(low))


def pair_gains(
    plain: Outcome,
    other: Outcome,
    objective: Objective,
    *,
    compile_s: float = 0.0,
    run_s: float = math.inf,
) -> list[float]:
    """Return the gain of every pair of one interleaved run, see `compare`; empty when they cannot be compared."""
    gain = _gain_of(plain, other, objective, compile_s, run_s)
    if gain is None:
        return []
    return [gain(a / b) for a, b in zip(plain.samples_ms, other.samples_ms, strict=False)]


def _gain_of(
    plain: Outcome, other: Outcome, objective: Objective, compile_s: float, run_s: float
) -> Callable[[float], float] | None:
    """Return what makes a latency ratio a gain in the objective; None when there is nothing to compare."""
    energy, weight = _energy_ratio(plain, other, objective), objective.energy_weight
    if energy is None:
        return None
    return lambda ratio: paid_back(ratio, compile_s, run_s) ** (1.0 - weight) * energy**weight


def _energy_ratio(plain: Outcome, other: Outcome, objective: Objective) -> float | None:
    """Return plain's energy over the plan's, 1 where energy does not count; None when there is nothing to compare."""
    if not (plain.feasible and other.feasible):
        return None
    if objective.energy_weight == 0.0:
        return 1.0
    if not plain.energy_j or not other.energy_j or plain.energy_source != other.energy_source:
        return None
    return plain.energy_j / other.energy_j


def judged(
    candidate: Candidate,
    plain: Outcome,
    outcome: Outcome,
    objective: Objective,
    *,
    compile_s: float = 0.0,
    run_s: float = math.inf,
) -> Candidate:
    """Return a candidate with what was measured of it beside plain PyTorch; see `compare`."""
    row = replace(candidate, measured=outcome, compile_s=compile_s)
    ratio = compare(plain, outcome, objective, compile_s=compile_s, run_s=run_s)
    if ratio is None:
        return replace(row, speedup=None, speedup_interval=None, gain=None, gain_low=None)
    return replace(
        row,
        speedup=ratio.speedup,
        speedup_interval=ratio.speedup_interval,
        gain=ratio.gain,
        gain_low=ratio.gain_low,
    )


def noise_of(plain: Outcome, again: Outcome) -> float:
    """Return the A/A noise of a run that measured plain PyTorch twice, as a fraction; infinite if either failed."""
    if not (plain.feasible and again.feasible):
        return float("inf")
    return max(NOISE_FLOOR, aa_noise(plain.samples_ms, again.samples_ms))


def finalists(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the measured plans whose median gain is above 1, best first, a few at most; plain PyTorch comes first.

    Plans that were stopped early could not win and are none.
    """
    able = [c for c in candidates[1:] if c.measured is not None and c.measured.feasible and not c.stopped]
    able = [c for c in able if (c.gain or 0.0) > 1.0]
    return sorted(able, key=lambda c: -(c.gain or 0.0))[:MOST_FINALISTS]


def is_look(rounds: int) -> bool:
    """Return whether plans may be taken out of the deciding run after so many rounds."""
    return rounds >= _FIRST_LOOK and (rounds - _FIRST_LOOK) % _LOOK_EVERY == 0


def beaten(
    gains: Sequence[Sequence[float]],
    interval: Callable[[Sequence[float]], tuple[float, float]] = median_interval,
) -> set[int]:
    """Return which plans of an interleaved run cannot win any more.

    Those are the plans whose whole interval of the gain is not above 1, or lies below another plan's, pair by pair.

    Args:
        gains: Of each plan, those of every pair with plain PyTorch so far, see `pair_gains`.
        interval: What is taken for the interval of several gains.
    """
    rounds = max(map(len, gains), default=0)
    if not is_look(rounds):
        return set()
    running = [i for i, of_plan in enumerate(gains) if len(of_plan) == rounds]
    return {
        i
        for i in running
        if interval(gains[i])[1] <= 1.0
        or any(interval([b / a for a, b in zip(gains[i], gains[j], strict=True)])[0] > 1.0 for j in running)
    }


def choose(
    candidates: Sequence[Candidate], final: Collection[str], *, noise: float, run_s: float = math.inf
) -> list[Candidate]:
    """Fill in verdicts and mark the kept candidate.

    Args:
        candidates: Measured or not; the first is plain PyTorch.
        final: Labels of the plans in the deciding run, which alone may be kept.
        noise: A/A noise of that run, as a fraction.
        run_s: Seconds for which the model is to run, for the words.

    Returns:
        The same candidates in the same order, exactly one of them kept.
    """
    plain = candidates[0]
    rounds = len(plain.measured.samples_ms) if plain.measured is not None else 0
    refusals = [_refusal(c, final, rounds, noise, run_s) for c in candidates[1:]]
    winners = [c for c, refusal in zip(candidates[1:], refusals, strict=True) if refusal is None]
    guard = next((c for c in winners if c.plan == COMPILED), None)
    best = max(winners, key=lambda c: c.gain or 0.0, default=plain)
    if guard is not None and not _beats(best, guard, noise):
        best = guard
    verdicts = ["kept: nothing beats it beyond the noise" if best is plain else "baseline"]
    for candidate, refusal in zip(candidates[1:], refusals, strict=True):
        if candidate is best:
            verdicts.append("kept")
        elif refusal is None and best is guard and (candidate.gain or 0.0) > (guard.gain or 0.0):
            verdicts.append(f"not better than {best.label} beyond the noise (±{noise:.1%})")
        else:
            verdicts.append(refusal or f"slower than {best.label}")
    return [replace(c, kept=c is best, verdict=verdict) for c, verdict in zip(candidates, verdicts, strict=True)]


def _beats(candidate: Candidate, guard: Candidate, noise: float) -> bool:
    """Return whether a plan is to be kept instead of plain `torch.compile`."""
    ours_gain, theirs_gain = candidate.gain or 0.0, guard.gain or 0.0
    if ours_gain <= theirs_gain or candidate.measured is None or guard.measured is None:
        return False
    if ours_gain > theirs_gain * (1.0 + noise):
        return True
    ours, theirs = candidate.measured.samples_ms, guard.measured.samples_ms
    rounds = min(len(ours), len(theirs))
    return pair_interval(theirs[:rounds], ours[:rounds])[0] > 1.0


def _refusal(candidate: Candidate, final: Collection[str], rounds: int, noise: float, run_s: float) -> str | None:
    """Why a candidate may not replace plain PyTorch, whose last run had so many rounds; None when it may."""
    if candidate.measured is None:
        if candidate.predicted is not None and not candidate.predicted.feasible:
            return f"not measured: {candidate.predicted.reason}"
        return f"not measured: {candidate.check or 'predicted slower'}"
    if not candidate.measured.feasible:
        return candidate.measured.reason
    if candidate.gain is None or candidate.gain_low is None:
        return "no energy figure to compare"
    had = len(candidate.measured.samples_ms)
    if candidate.label in final and had < rounds and candidate.gain > 1.0:
        return f"taken out after {had} rounds of the deciding run: another is better"
    if candidate.gain <= 1.0 < (candidate.speedup or 0.0) and candidate.compile_s > 0.0 and not math.isinf(run_s):
        return f"compiling took {candidate.compile_s:.0f} s and would not pay back within {run_s:.0f} s"
    if candidate.label in final and (candidate.gain <= 1.0 + noise or candidate.gain_low <= 1.0):
        return f"not better beyond the noise (±{noise:.1%})"
    if candidate.gain <= 1.0:
        return "worse than plain PyTorch"
    if candidate.label in final:
        return None
    return (
        f"stopped after {had} rounds: it could not win"
        if candidate.stopped
        else ("left out of the deciding run: others gained more")
    )
