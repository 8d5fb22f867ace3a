import contextlib
import threading
import time

import numpy as np
import pytest
import torch
from scipy.stats import wilcoxon

from autoplace.errors import ExecutionError, InputError
from autoplace.measure import aa_noise, interleave, median_interval, pair_ratios, summary
from autoplace.measure.protocol import Guard, centre_of
from autoplace.runtime.worker import TaskThread


def test_rounds_interleave_and_warm_up_is_not_counted():
    order, before, after, progress = [], [], [], []
    samples = interleave(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        repeats=3,
        warmup=2,
        deadline_s=5,
        before=before.append,
        after=lambda name, elapsed_ms: after.append((name, elapsed_ms)),
        progress=lambda name, number: progress.append((name, number)),
    )
    assert order == ["a", "b"] * 2 + ["a", "a", "b", "b"] * 3 == before, "each counted run has an untimed one before it"
    assert {name: len(s) for name, s in samples.items()} == {"a": 3, "b": 3}
    assert [elapsed for name, elapsed in after if name == "a"] == samples["a"]
    assert progress[0] == ("a", 0) and progress[-1] == ("b", 4)


def test_runs_that_are_dropped_leave_the_rounds_to_the_others():
    order = []
    samples = interleave(
        {name: (lambda name=name: order.append(name)) for name in "abc"},
        repeats=9,
        warmup=0,
        settle=0,
        deadline_s=5,
        drop=lambda so_far: {1: "b", 2: "bc"}.get(len(so_far["a"]), "abc"),
    )
    assert order == ["a", "b", "c", "a", "c", "a"], "with none left the run ends"
    assert {name: len(s) for name, s in samples.items()} == {"a": 3, "b": 1, "c": 2}


def test_what_is_timed_is_the_run_alone():
    samples = interleave(
        {"a": lambda: time.sleep(0.02)}, repeats=2, warmup=0, deadline_s=5, before=lambda _: time.sleep(0.2)
    )
    assert all(20 <= s < 200 for s in samples["a"])


def test_failed_and_hanging_runs_drop_out_and_the_rest_goes_on():
    errors, calls = {}, []

    def breaks():
        calls.append("breaks")
        raise ValueError("broken")

    samples = interleave(
        {"breaks": breaks, "hangs": lambda: time.sleep(2), "fine": lambda: None},
        repeats=2,
        warmup=1,
        deadline_s={"breaks": 1, "hangs": 0.1, "fine": 1},
        failed=lambda name, error: errors.update({name: error}),
    )
    assert calls == ["breaks"]
    assert isinstance(errors["breaks"], ValueError)
    assert isinstance(errors["hangs"], ExecutionError) and "within 0.1 s" in str(errors["hangs"])
    assert [len(samples[name]) for name in ("breaks", "hangs", "fine")] == [0, 0, 2]


def test_a_run_that_waits_for_a_worker_is_stopped():
    never, guard, worker = threading.Event(), Guard(), TaskThread("stuck")
    try:
        start = time.perf_counter()
        with pytest.raises(ExecutionError, match=r"within 0\.05 s and was stopped; allow more time"):
            guard.run(lambda: worker.run(never.wait), 0.05)
        assert time.perf_counter() - start < 5
        assert guard.run(lambda: 3, 5) == 3
    finally:
        never.set()
        worker.close()
        guard.close()


def test_a_run_that_overruns_in_one_operation_is_stopped_after_it():
    done, guard = [], Guard()
    with pytest.raises(ExecutionError, match="did not finish"):
        guard.run(lambda: (time.sleep(0.3), done.append(1)), 0.05)
    assert not done
    guard.close()


def test_a_run_is_the_calling_threads_own():
    guard = Guard()
    assert guard.run(threading.get_ident, 5) == threading.get_ident()
    guard.close()


def test_a_stopped_run_leaves_the_thread_count():
    guard, before = Guard(), torch.get_num_threads()

    def run():
        torch.set_num_threads(before + 1)
        while True:
            time.sleep(0.01)

    with pytest.raises(ExecutionError, match="did not finish"):
        guard.run(run, 0.05)
    assert torch.get_num_threads() == before
    guard.close()


def test_a_limit_that_is_just_met_never_reaches_what_comes_after():
    guard, ended = Guard(), 0
    for _ in range(20):
        with contextlib.suppress(ExecutionError):
            guard.run(lambda: time.sleep(0.05), 0.05)
        ended += 1
    guard.close()
    time.sleep(0.15)
    assert ended == 20


def test_without_a_handler_failures_are_raised():
    with pytest.raises(ZeroDivisionError):
        interleave({"a": lambda: 1 / 0}, repeats=1, warmup=0, deadline_s=1)  # type: ignore[dict-item]
    with pytest.raises(InputError, match="repeats"):
        interleave({}, repeats=0, warmup=0, deadline_s=1)


def test_the_guard_tells_its_timeout_from_the_functions_own():
    guard = Guard()

    def times_out():
        raise TimeoutError("my own")

    with pytest.raises(TimeoutError, match="my own"):
        guard.run(times_out, 5)
    with pytest.raises(ExecutionError, match="did not finish"):
        guard.run(lambda: time.sleep(1), 0.05)
    assert guard.run(lambda: 3, 5) == 3
    guard.close()


def test_summaries_and_ratios():
    assert summary([1, 2, 3, 4, 100]) == (3.0, 2.0)
    median, (low, high) = pair_ratios([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    assert (median, low, high) == (2.0, 2.0, 2.5)
    assert aa_noise([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]) == 0.0
    assert aa_noise([1.1, 1.1, 1.1], [1.0, 1.0, 1.0]) == pytest.approx(0.1)
    assert aa_noise([0.8, 1.0, 1.2], [1.0, 1.0, 1.0]) == pytest.approx(0.2)
    with pytest.raises(InputError, match="pair"):
        pair_ratios([1.0], [1.0, 2.0])
    with pytest.raises(InputError, match="no samples"):
        summary([])


def test_the_interval_of_a_median_covers_it_and_shrinks_with_the_rounds():
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert median_interval(list(range(1, 22))) == (6, 16), "the sixth smallest of 21, by tables of the sign test"
    random = np.random.default_rng(0)
    covered = dict.fromkeys((7, 21, 42), 0)
    widths = {n: [] for n in covered}
    for n in covered:
        for _ in range(2000):
            low, high = median_interval(random.lognormal(0.0, 0.1, n).tolist())
            covered[n] += low <= 1.0 <= high
            widths[n].append(high - low)
    assert all(hits >= 0.94 * 2000 for hits in covered.values()), covered
    assert np.mean(widths[42]) < np.mean(widths[21]) < np.mean(widths[7])
    with pytest.raises(InputError, match="no samples"):
        median_interval([])


def test_the_centre_of_ratios_is_the_signed_rank_tests():
    ratios = [1.3, 0.9, 1.1, 1.25, 1.05, 1.4, 1.2, 0.98, 1.15]
    centre, (low, high) = centre_of(ratios)
    logs = np.log(ratios)
    for end, inside in ((low, 1.001), (high, 0.999)):
        assert wilcoxon(logs - np.log(end * inside)).pvalue > 0.05, "what lies inside is not rejected"
        assert wilcoxon(logs - np.log(end / inside)).pvalue < 0.05, "what lies outside is"
    assert low < centre < high
    inverse, (below, above) = centre_of([1 / r for r in ratios])
    assert (inverse, below, above) == pytest.approx((1 / centre, 1 / high, 1 / low))


def test_the_centre_of_few_ratios_lies_between_the_extremes():
    assert centre_of([1.0, 1.2, 1.1]) == (pytest.approx(1.098, abs=0.001), (1.0, pytest.approx(1.2)))
    with pytest.raises(InputError, match="no samples"):
        centre_of([])


def test_the_interval_of_the_centre_holds_it_and_is_narrower_than_the_medians():
    random, held, widths = np.random.default_rng(0), 0, []
    for _ in range(400):
        ratios = random.lognormal(np.log(1.1), 0.2, 7).tolist()
        low, high = centre_of(ratios)[1]
        held += low <= 1.1 <= high
        few_low, few_high = median_interval(ratios)
        widths.append((high - low) / (few_high - few_low))
    assert held >= 0.92 * 400
    assert np.mean(widths) < 0.75
