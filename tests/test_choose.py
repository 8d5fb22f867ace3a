"""The rules of "never slower", on Outcomes made by hand."""

from __future__ import annotations

import pytest

from autoplace.choose import MOST_FINALISTS, choose, compare, finalists, noise_of
from autoplace.outcome import Outcome
from autoplace.plan import Plan, Replica
from autoplace.problem import Objective
from autoplace.result import Candidate

FINAL = {"fast", "same", "wild", "broken", "frugal"}


def _outcome(*samples_ms: float, energy_j: float | None = None, source: str | None = "model") -> Outcome:
    middle = sorted(samples_ms)[len(samples_ms) // 2]
    return Outcome(
        source="measured",
        latency_ms=middle,
        samples_ms=samples_ms,
        energy_j=energy_j,
        energy_source=source if energy_j is not None else None,
    )


def _candidate(label: str, outcome: Outcome | None, plain: Outcome, objective: Objective | None = None) -> Candidate:
    ratio = compare(plain, outcome, objective or Objective()) if outcome else None
    plan = Plan(replicas=(Replica(assignment={".": "host0/cpu:0"}),), strategy="single")
    return Candidate(
        label=label,
        plan=plan,
        measured=outcome,
        speedup=ratio and ratio.speedup,
        speedup_interval=ratio and ratio.speedup_interval,
        gain=ratio and ratio.gain,
        gain_low=ratio and ratio.gain_low,
    )


def _plain(outcome: Outcome) -> Candidate:
    return Candidate(label="plain PyTorch", plan=Plan.plain(), measured=outcome, speedup=1.0, gain=1.0)


def test_a_clear_winner_is_kept():
    plain = _outcome(10.0, 10.1, 9.9, 10.0)
    rows = choose([_plain(plain), _candidate("fast", _outcome(5.0, 5.1, 4.9, 5.0), plain)], FINAL, noise=0.02)
    assert [r.kept for r in rows] == [False, True]
    assert rows[1].speedup == pytest.approx(2.0, rel=0.05)


def test_a_gain_within_the_noise_is_refused():
    plain = _outcome(10.0, 10.0, 10.0, 10.0)
    rows = choose([_plain(plain), _candidate("same", _outcome(9.8, 9.8, 9.8, 9.8), plain)], FINAL, noise=0.05)
    assert rows[0].kept
    assert "noise" in rows[1].verdict


def test_a_gain_whose_lower_quartile_is_below_plain_is_refused():
    plain = _outcome(10.0, 10.0, 10.0, 10.0, 10.0)
    wild = _outcome(5.0, 5.0, 6.0, 20.0, 20.0)
    assert choose([_plain(plain), _candidate("wild", wild, plain)], FINAL, noise=0.02)[0].kept


def test_an_infeasible_plan_is_refused_with_its_reason():
    plain = _outcome(10.0, 10.0, 10.0)
    broken = Outcome(source="measured", feasible=False, reason="the outputs differ")
    rows = choose([_plain(plain), _candidate("broken", broken, plain)], FINAL, noise=0.01)
    assert rows[0].kept
    assert rows[1].verdict == "the outputs differ"


def test_energy_counts_by_its_weight():
    objective = Objective(energy_weight=0.5)
    plain = _outcome(10.0, 10.0, 10.0, energy_j=4.0)
    frugal = _outcome(11.0, 11.0, 11.0, energy_j=1.0)
    ratio = compare(plain, frugal, objective)
    assert ratio is not None
    assert ratio.gain == pytest.approx((10 / 11) ** 0.5 * 2.0)
    assert choose([_plain(plain), _candidate("frugal", frugal, plain, objective)], FINAL, noise=0.02)[1].kept


def test_energies_of_different_sources_are_never_compared():
    plain = _outcome(10.0, 10.0, 10.0, energy_j=4.0, source="rapl")
    other = _outcome(5.0, 5.0, 5.0, energy_j=1.0, source="model")
    assert compare(plain, other, Objective(energy_weight=0.5)) is None
    assert compare(plain, other, Objective()) is not None


def test_noise_is_infinite_when_plain_failed_and_has_a_floor():
    good, bad = _outcome(10.0, 10.0, 10.0), Outcome(source="measured", feasible=False, reason="raised")
    assert noise_of(good, bad) == float("inf")
    assert noise_of(good, good) == pytest.approx(0.01)


def test_only_what_gains_goes_into_the_deciding_run_and_only_that_is_kept():
    plain = _outcome(10.0, 10.0, 10.0)
    rows = [_plain(plain)]
    rows += [_candidate(f"x{ms}", _outcome(ms, ms, ms), plain) for ms in (11.0, 9.0, 8.0, 7.0, 6.0)]
    final = finalists(rows)
    assert [c.label for c in final] == ["x6.0", "x7.0", "x8.0"] and len(final) == MOST_FINALISTS
    judged = {c.label: c for c in choose(rows, {"x7.0", "x8.0"}, noise=0.02)}
    assert judged["x7.0"].kept
    assert "left out" in judged["x6.0"].verdict and "worse" in judged["x11.0"].verdict
    assert judged["x8.0"].verdict == "slower than x7.0"
