import math

import numpy as np
import pytest

from autoplace.agents.statistics import TIE, log_ratio, summarise
from autoplace.errors import InputError


def test_below_one_means_that_the_first_is_better():
    assert log_ratio({0: 1.0}, {0: 2.0}) == pytest.approx(math.log(0.5))
    assert summarise([math.log(0.5)] * 3).geometric_mean == pytest.approx(0.5)


def test_the_mean_is_geometric():
    assert summarise([math.log(0.5), math.log(2.0)]).geometric_mean == pytest.approx(1.0)
    assert summarise([math.log(0.5), math.log(8.0)]).geometric_mean == pytest.approx(2.0)


def test_seeds_are_averaged_within_a_problem_and_paired():
    ours, others = {0: 1.0, 1: 4.0, 2: 9.0}, {0: 2.0, 1: 2.0, 7: 100.0}
    assert log_ratio(ours, others) == pytest.approx((math.log(0.5) + math.log(2.0)) / 2)


def test_one_run_without_chance_stands_for_all_seeds():
    assert log_ratio({0: 1.0, 1: 4.0}, {0: 2.0}) == pytest.approx(0.0)
    assert log_ratio({0: 2.0}, {3: 1.0, 4: 4.0}) == pytest.approx(0.0)


def test_more_seeds_do_not_make_more_problems():
    many = [log_ratio(dict.fromkeys(range(50), 2.0 + p), dict.fromkeys(range(50), 3.0)) for p in range(4)]
    few = [log_ratio({0: 2.0 + p}, {0: 3.0}) for p in range(4)]
    assert summarise(many).problems == 4
    assert (summarise(many).low, summarise(many).high) == pytest.approx((summarise(few).low, summarise(few).high))


def test_the_interval_is_that_of_students_t():
    # mean 0.1, sd 0.1 (n - 1), n = 3; t(0.975, 2) = 4.3027
    summary = summarise([0.0, 0.1, 0.2])
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert summary.low == pytest.approx(math.exp(0.1 - half), rel=1e-6)
    assert summary.high == pytest.approx(math.exp(0.1 + half), rel=1e-6)


def test_the_bootstrap_agrees_with_the_normal_interval_where_there_are_many_problems():
    values = np.random.default_rng(0).normal(-0.05, 0.2, 400)
    summary = summarise(values.tolist())
    half = 1.96 * values.std() / 20
    assert math.log(summary.bootstrap_low) == pytest.approx(values.mean() - half, abs=0.003)
    assert math.log(summary.bootstrap_high) == pytest.approx(values.mean() + half, abs=0.003)
    assert summarise(values.tolist()) == summary, "the same seed gives the same interval"


def test_the_interval_covers_the_truth_nineteen_times_of_twenty():
    draws = np.random.default_rng(1).normal(0.3, 0.2, (300, 12))
    found = [summarise(row.tolist()) for row in draws]
    covered = np.mean([s.low <= math.exp(0.3) <= s.high for s in found])
    assert 0.91 <= covered <= 0.98


def test_wins_ties_and_losses_are_counted_with_a_tolerance():
    summary = summarise([-0.1, -2 * TIE, -TIE / 2, 0.0, TIE / 2, 0.2])
    assert (summary.wins, summary.ties, summary.losses) == (2, 3, 1)


def test_equal_planners_are_a_tie_with_no_verdict():
    summary = summarise([0.0, 0.0, 0.0])
    assert (summary.geometric_mean, summary.low, summary.high) == (1.0, 1.0, 1.0)
    assert summary.ties == 3 and summary.verdict == "open"


@pytest.mark.parametrize(("shift", "verdict"), [(-0.1, "better"), (0.1, "worse"), (0.0, "open")])
def test_a_verdict_needs_an_interval_that_excludes_one(shift, verdict):
    noise = np.linspace(-0.05, 0.05, 21)
    assert summarise((noise + shift).tolist()).verdict == verdict


def test_an_infeasible_side_is_a_win_or_a_loss_outside_the_mean():
    logs = [log_ratio({0: math.inf}, {0: 1.0}), log_ratio({0: 1.0}, {0: math.inf}), math.log(0.5)]
    assert logs[:2] == [math.inf, -math.inf]
    summary = summarise(logs)
    assert (summary.wins, summary.ties, summary.losses, summary.left_out) == (2, 0, 1, 2)
    assert summary.problems == 1 and summary.geometric_mean == pytest.approx(0.5)


def test_one_infeasible_seed_makes_the_problem_a_loss():
    assert log_ratio({0: 1.0, 1: math.inf}, {0: 2.0, 1: 2.0}) == math.inf


def test_where_neither_is_feasible_nobody_wins():
    both = log_ratio({0: math.inf}, {0: math.inf})
    summary = summarise([both])
    assert math.isnan(both) and (summary.wins, summary.ties, summary.losses, summary.left_out) == (0, 1, 0, 1)
    assert math.isnan(summary.geometric_mean)


def test_one_problem_has_no_interval_and_no_verdict():
    summary = summarise([-1.0])
    assert (summary.low, summary.high) == (0.0, math.inf) and summary.verdict == "open"
    assert summary.to_json()["interval"] == [0.0, None]


def test_nothing_known_is_null_in_json():
    figures = summarise([]).to_json()
    assert figures["geometric_mean"] is None and figures["problems"] == 0 and figures["verdict"] == "open"


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(InputError, match="run what is missing"):
        log_ratio({}, {0: 1.0})
    with pytest.raises(InputError, match="no seed in common"):
        log_ratio({0: 1.0, 1: 1.0}, {2: 1.0, 3: 1.0})
    with pytest.raises(InputError, match="above 0"):
        log_ratio({0: 0.0}, {0: 1.0})
