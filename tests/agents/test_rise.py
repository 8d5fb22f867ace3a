import numpy as np
import pytest

from autoplace.agents.rise import reward_rise
from autoplace.errors import InputError


def test_a_rise_beyond_the_noise_has_an_interval_above_zero():
    noise = np.random.default_rng(0).normal(0.0, 0.1, 200)
    rise = reward_rise(list(np.linspace(-1.0, 0.0, 200) + noise))
    assert rise.plans == 20
    assert rise.first == pytest.approx(-0.95, abs=0.08) and rise.last == pytest.approx(-0.05, abs=0.08)
    assert rise.rise_interval[0] > 0.7 and rise.first_interval[0] < rise.first < rise.first_interval[1]
    assert "mean of 20 plans" in str(rise) and f"{rise.rise:+.3f}" in str(rise)


def test_noise_alone_has_an_interval_around_zero():
    rise = reward_rise(list(np.random.default_rng(1).normal(0.0, 1.0, 100)))
    assert rise.rise_interval[0] < 0.0 < rise.rise_interval[1]


def test_the_bootstrap_interval_is_that_of_the_mean():
    parts = np.random.default_rng(2).normal(0.0, 1.0, 1000)
    low, high = reward_rise(list(parts)).first_interval
    assert high - low == pytest.approx(2 * 1.96 * parts[:100].std() / 10, rel=0.1)


@pytest.mark.parametrize(("count", "each"), [(2, 1), (9, 4), (12, 5), (60, 6)])
def test_short_trainings_compare_what_they_have(count, each):
    rise = reward_rise([0.0] * count)
    assert rise.plans == each and rise.metrics["measure/rise"] == 0.0
    assert set(rise.metrics) >= {"measure/first_tenth", "measure/last_tenth_low", "measure/rise_high"}


def test_one_plan_cannot_rise():
    with pytest.raises(InputError, match="2 or more"):
        reward_rise([0.1])
