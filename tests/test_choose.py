"""The rules of "never slower", on Outcomes made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autoplace.choose import MOST_FINALISTS, beaten, choose, compare, finalists, judged, noise_of, paid_back, pair_gains
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


def _compiled(gain: float) -> Candidate:
    plan = Plan.plain().with_(compiled=True)
    return Candidate(
        label="plain torch.compile",
        plan=plan,
        measured=_outcome(10.0 / gain, 10.0 / gain, 10.0 / gain),
        speedup=gain,
        gain=gain,
        gain_low=gain,
    )


@pytest.mark.parametrize(
    ("compiled", "fast", "kept"),
    [
        (1.30, 1.50, "fast"),
        (1.30, 1.305, "plain torch.compile"),
        (1.30, 1.10, "plain torch.compile"),
        (1.01, 1.03, "fast"),
        (0.80, 1.01, "plain PyTorch"),
    ],
)
def test_a_plan_has_to_beat_plain_compile_too(compiled, fast, kept):
    plain = _outcome(10.0, 10.0, 10.0)
    samples = [10.0 / fast * factor for factor in (0.99, 1.0, 1.01)]
    rows = [_plain(plain), _candidate("fast", _outcome(*samples), plain), _compiled(compiled)]
    rows = choose(rows, FINAL | {"plain torch.compile"}, noise=0.02)
    assert [r.label for r in rows if r.kept] == [kept]
    assert all(r.verdict for r in rows)
    if (compiled, fast) == (1.30, 1.305):
        assert rows[1].verdict == "not better than plain torch.compile beyond the noise (±2.0%)"


def test_a_small_lead_over_plain_compile_counts_where_every_round_shows_it():
    plain = _outcome(10.0, 10.0, 10.0)
    for samples, kept in (((7.5, 7.6, 7.55), "fast"), ((7.5, 7.6, 7.8), "plain torch.compile")):
        rows = [_plain(plain), _candidate("fast", _outcome(*samples), plain), _compiled(1.30)]
        rows = choose(rows, FINAL | {"plain torch.compile"}, noise=0.05)
        assert [r.label for r in rows if r.kept] == [kept]


def test_compiling_has_to_pay_back():
    assert paid_back(2.0, 0.0, 600.0) == 2.0 and paid_back(2.0, 5.0, float("inf")) == 2.0
    assert paid_back(2.0, 100.0, 600.0) == pytest.approx(1.5)
    assert paid_back(2.0, 300.0, 600.0) == pytest.approx(1.0), "what is gained goes into compiling"
    plain, fast = _outcome(10.0, 10.0, 10.0), _outcome(8.0, 8.0, 8.0)
    row = _candidate("fast", None, plain)
    for run_s, kept in ((60.0, False), (600.0, True)):
        found = judged(row, plain, fast, Objective(), compile_s=14.0, run_s=run_s)
        assert found.speedup == pytest.approx(1.25) and found.compile_s == 14.0
        assert found.gain == pytest.approx(run_s / (14.0 + run_s / 1.25))
        final = choose([_plain(plain), found], FINAL, noise=0.02, run_s=run_s)[1]
        assert final.kept is kept
        if not kept:
            assert final.verdict == "compiling took 14 s and would not pay back within 60 s"


def test_gains_of_pairs():
    plain, other = _outcome(10.0, 12.0, 9.0, energy_j=4.0), _outcome(5.0, 12.0, 18.0, energy_j=1.0)
    assert pair_gains(plain, other, Objective()) == [2.0, 1.0, 0.5]
    assert pair_gains(plain, other, Objective(energy_weight=1.0)) == [4.0, 4.0, 4.0]
    assert pair_gains(plain, replace(other, energy_j=None, energy_source=None), Objective(energy_weight=0.5)) == []
    assert pair_gains(plain, Outcome(source="measured", feasible=False), Objective()) == []
    assert pair_gains(plain, other, Objective(), compile_s=1.0, run_s=2.0)[0] == pytest.approx(1.0)


def test_plans_that_were_stopped_are_no_finalists():
    plain = _outcome(10.0, 10.0)
    stopped = replace(_candidate("fast", _outcome(8.0, 8.0), plain), stopped=True)
    assert finalists([_plain(plain), stopped]) == []
    rows = choose([_plain(plain), stopped], set(), noise=0.02)
    assert rows[0].kept and rows[1].verdict == "stopped after 2 rounds: it could not win"


def test_the_reason_why_a_plan_was_not_measured_is_its_verdict():
    plain = _outcome(10.0, 10.0)
    unfit = replace(_candidate("fast", None, plain), check="the model has hooks")
    assert choose([_plain(plain), unfit], set(), noise=0.02)[1].verdict == "not measured: the model has hooks"


def test_plans_that_cannot_win_leave_the_deciding_run():
    slow, fast, near, failed = [0.9] * 7, [1.2, 1.3] * 4, [1.3, 1.2] * 4, []
    assert beaten([slow, fast[:7], near[:7], failed]) == {0}, "worse than plain PyTorch"
    assert beaten([[1.1] * 7, fast[:7], near[:7]]) == {0}, "worse than another, pair by pair"
    assert beaten([slow[:6], fast[:6]]) == set() == beaten([[*slow, 0.9], fast]), "not at every round is there a look"
    assert beaten([slow, [1.2] * 11, [1.3] * 11]) == {1}, "what was taken out before is not asked for again"
    assert beaten([[1.0] * 7]) == {0}, "as good as plain PyTorch is no win"


def test_a_plan_that_was_taken_out_is_not_kept_however_well_it_began():
    plain, fast = _outcome(*[10.0] * 11), _outcome(*[8.0] * 11)
    begun = _candidate("begun", _outcome(*[7.0] * 7), plain)
    rows = choose([_plain(plain), begun, _candidate("fast", fast, plain)], {"begun", "fast"}, noise=0.02)
    assert begun.gain == pytest.approx(10 / 7) and [r.kept for r in rows] == [False, False, True]
    assert "after 7 rounds" in rows[1].verdict
