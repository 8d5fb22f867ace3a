"""Schedules of pipelines against hand calculations, and what holds for all of them."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoplace.simulate.stage_schedule import StageTimes, most_in_flight, play, schedule_of


def two_stages(**changes):
    """Forward 1 and 1.5 ms, backward 2 and 3 ms, 5 ms on the link both ways."""
    times = {
        "devices": (0, 1),
        "forward_ms": [1.0, 1.5],
        "backward_ms": [2.0, 3.0],
        "onward_ms": [5.0],
        "back_ms": [5.0],
    }
    return StageTimes(**(times | changes))


def starts(played, device):
    return [(a.backward, a.microbatch, a.start_ms) for a in played.actions if a.device == device]


def test_gpipe_by_hand():
    # The second value moves when the second stage asks for it, at 7.5; its gradient when the first stage does, at 24.
    played = play(two_stages(), 2, "gpipe")
    assert starts(played, 0) == [(False, 0, 0.0), (False, 1, 1.0), (True, 0, 22.0), (True, 1, 29.0)]
    assert starts(played, 1) == [(False, 0, 6.0), (False, 1, 12.5), (True, 0, 14.0), (True, 1, 17.0)]
    assert played.end_ms == {0: 31.0, 1: 29.0} and played.makespan_ms == 31.0
    assert played.busy_ms == {0: 6.0, 1: 9.0}
    assert [(t.start_ms, t.end_ms) for t in played.transfers] == [(1.0, 6.0), (7.5, 12.5), (17.0, 22.0), (24.0, 29.0)]


def test_one_forward_one_backward_by_hand():
    played = play(two_stages(), 2, "1f1b")
    assert starts(played, 0) == [(False, 0, 0.0), (False, 1, 1.0), (True, 0, 15.5), (True, 1, 25.0)]
    assert starts(played, 1) == [(False, 0, 6.0), (True, 0, 7.5), (False, 1, 15.5), (True, 1, 17.0)]
    assert played.end_ms == {0: 27.0, 1: 25.0}


def test_a_device_with_two_stages_by_hand():
    times = StageTimes(devices=(0, 1, 0), forward_ms=[1.0, 2.0, 1.0], onward_ms=[1.0, 1.0], back_ms=[1.0, 1.0])
    played = play(times, 2, "looped")
    # stage 0: 0-1, 1-2; stage 1: 2-4, 4-6; stage 2: 5-6, 7-8.
    assert [(a.stage, a.microbatch, a.start_ms) for a in sorted(played.actions, key=lambda a: a.start_ms)] == [
        (0, 0, 0.0), (0, 1, 1.0), (1, 0, 2.0), (1, 1, 4.0), (2, 0, 5.0), (2, 1, 7.0),
    ]  # fmt: skip
    assert played.makespan_ms == 8.0


def test_inference_is_the_forwards_alone():
    played = play(two_stages(backward_ms=None), 2, "gpipe")
    assert played.makespan_ms == 14.0 and not any(a.backward for a in played.actions)


def test_a_sender_pays_for_its_copies():
    played = play(two_stages(copies_ms=[(0.5, 0.25)]), 2, "gpipe")
    assert played.busy_ms == {0: 6.0 + 2 * 0.5, 1: 9.0 + 2 * 0.25}
    assert starts(played, 0)[1] == (False, 1, 1.5)


def test_the_runtime_s_choice_of_schedule():
    assert schedule_of((0, 1), 4, backward=True) == "1f1b"
    assert schedule_of((0, 1), 4, backward=True, gpipe=True) == "gpipe"
    assert schedule_of((0, 1, 2), 2, backward=True) == "gpipe"
    assert schedule_of((0, 1), 4, backward=False) == "gpipe"
    assert schedule_of((0,), 4, backward=True) == "gpipe"
    assert schedule_of((0, 1, 0), 4, backward=True) == "looped"
    assert [most_in_flight("1f1b", s, 3, 4) for s in range(3)] == [3, 2, 1]
    assert [most_in_flight("gpipe", s, 3, 4) for s in range(3)] == [4, 4, 4]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.floats(0.1, 5), st.floats(0.1, 5)), min_size=1, max_size=5),
    st.integers(1, 8),
    st.floats(0, 3),
    st.sampled_from(["gpipe", "1f1b", "looped"]),
)
def test_every_microbatch_runs_once_and_after_what_it_needs(stages, microbatches, link_ms, schedule):
    count = len(stages)
    if schedule == "1f1b":
        microbatches = max(microbatches, count)
    devices = tuple(i % 2 for i in range(count)) if schedule == "looped" else tuple(range(count))
    times = StageTimes(
        devices=devices,
        forward_ms=[f for f, _ in stages],
        backward_ms=[b for _, b in stages],
        onward_ms=[link_ms] * (count - 1),
        back_ms=[link_ms] * (count - 1),
    )
    played = play(times, microbatches, schedule)
    when = {(a.backward, a.stage, a.microbatch): (a.start_ms, a.end_ms) for a in played.actions}
    assert len(when) == len(played.actions) == 2 * count * microbatches
    for (backward, stage, k), (start, _) in when.items():
        before = stage + 1 if backward else stage - 1
        if 0 <= before < count:
            assert start >= when[backward, before, k][1] + link_ms - 1e-9
        if backward:
            assert start >= when[False, stage, k][1] - 1e-9
    for device in set(devices):
        own = sorted((a.start_ms, a.end_ms) for a in played.actions if a.device == device)
        assert all(end <= start + 1e-9 for (_, end), (start, _) in pairwise(own))
    most = max(sum(f + b for (f, b), d in zip(stages, devices, strict=True) if d == e) for e in set(devices))
    assert played.makespan_ms >= max(sum(f + b for f, b in stages), microbatches * most) - 1e-6


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.floats(0.1, 5), st.floats(0.1, 5)), min_size=2, max_size=4), st.integers(4, 8))
def test_without_transfers_both_schedules_take_the_same_on_equal_stages(stages, microbatches):
    forward, backward = stages[0]
    times = StageTimes(
        devices=tuple(range(len(stages))),
        forward_ms=[forward] * len(stages),
        backward_ms=[backward] * len(stages),
        onward_ms=[0.0] * (len(stages) - 1),
        back_ms=[0.0] * (len(stages) - 1),
    )
    whole = (microbatches + len(stages) - 1) * (forward + backward)
    assert play(times, microbatches, "gpipe").makespan_ms == pytest.approx(whole)
    assert play(times, microbatches, "1f1b").makespan_ms == pytest.approx(whole, rel=1e-9)
