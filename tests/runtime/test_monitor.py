"""The monitor on made-up latencies: drift, noise, single slow calls, and the wait that doubles."""

from __future__ import annotations

import random
import threading

import pytest

from autoplace.errors import InputError
from autoplace.runtime.monitor import Monitor


def _feed(monitor, latencies):
    """Number of the first call that reports drift, else None."""
    return next((i for i, latency_ms in enumerate(latencies) if monitor.observe(latency_ms)), None)


def test_the_baseline_is_the_median_of_the_first_window():
    monitor = Monitor(window=8)
    for latency_ms in (50.0, 20.0, 2.0, 2.0, 2.0, 2.0, 2.0):
        assert not monitor.observe(latency_ms)
    assert monitor.expected_ms is None
    monitor.observe(2.0)
    assert monitor.expected_ms == 2.0 and monitor.latency_ms == 2.0


def test_drift_is_seen_once_more_than_half_a_window_is_slow():
    monitor = Monitor(window=32)
    assert _feed(monitor, [1.0] * 100) is None
    assert _feed(monitor, [1.3] * 40) == 16
    assert monitor.due and monitor.expected_ms == 1.0


def test_a_given_baseline_counts_from_the_first_call():
    assert _feed(Monitor(10.0, window=4), [10.0, 13.0, 13.0, 13.0]) == 3


@pytest.mark.parametrize(
    ("noise", "ratio", "seen"), [(0.0, 1.2, False), (0.0, 1.3, True), (0.2, 1.5, False), (0.2, 1.7, True)]
)
def test_the_limit_follows_the_noise(noise, ratio, seen):
    monitor = Monitor(1.0, noise=noise)
    assert (_feed(monitor, [ratio] * 64) is not None) is seen


def test_noise_around_the_baseline_is_no_drift():
    draw = random.Random(0)
    assert _feed(Monitor(), [draw.lognormvariate(0.0, 0.15) for _ in range(20_000)]) is None


def test_single_slow_calls_are_no_drift():
    monitor = Monitor()
    assert _feed(monitor, [100.0 if i % 3 == 0 else 1.0 for i in range(3000)]) is None
    assert monitor.latency_ms == 1.0


def test_drift_that_passes_is_no_longer_due():
    monitor = Monitor(1.0, window=8)
    _feed(monitor, [2.0] * 8)
    assert monitor.due
    for _ in range(8):
        monitor.observe(1.0)
    assert not monitor.due


def test_the_wait_doubles_with_every_reset():
    monitor = Monitor(window=4, patience=16)
    waits = []
    for _ in range(4):
        monitor.reset(1.0)
        waits.append(_feed(monitor, [2.0] * 1000) + 1)
    assert waits == [16, 32, 64, 128]


def test_reset_learns_the_baseline_anew():
    monitor = Monitor(window=4, patience=8)
    _feed(monitor, [1.0] * 4 + [3.0] * 4)
    monitor.reset()
    assert not monitor.due and monitor.expected_ms is None and monitor.latency_ms is None
    assert _feed(monitor, [3.0] * 100) is None
    assert monitor.expected_ms == 3.0 and monitor.calls > 100


def test_a_baseline_from_a_busy_moment_comes_down():
    monitor = Monitor(window=8)
    _feed(monitor, [4.0] * 8 + [1.0] * 16)
    assert monitor.expected_ms == 1.0
    assert _feed(monitor, [2.0] * 8) is not None


def test_other_calls_are_counted_and_not_compared():
    monitor = Monitor(1.0, window=4)
    for _ in range(10):
        monitor.observe_other()
    assert (monitor.calls, monitor.other_calls, monitor.due) == (0, 10, False)
    assert "10 of other shapes" in repr(monitor)


def test_calls_from_several_threads_are_all_counted():
    monitor = Monitor(1.0)
    threads = [threading.Thread(target=_feed, args=(monitor, [1.0] * 2000)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert monitor.calls == 8000 and not monitor.due


@pytest.mark.parametrize("wrong", [{"window": 1}, {"threshold": 1.0}, {"patience": 0}, {"noise": -0.1}])
def test_bad_arguments(wrong):
    with pytest.raises(InputError, match="cannot tell drift"):
        Monitor(**wrong)
