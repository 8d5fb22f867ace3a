"""Which plan runs which call: by mode, by the inputs' shapes, and how often they came."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch

from autoplace import Objective, Plan
from autoplace.plan import Replica
from autoplace.slots import CALLS_BEFORE_PLANNING, MORE_PLANNINGS


@pytest.fixture
def planned(monkeypatch):
    """What was tuned: (training, batch size), in order; the single-device plan is chosen every time."""
    import autoplace.planning as planning
    from autoplace.result import Candidate, TuneResult

    seen = []

    def tune_now(state, workload, **_):
        seen.append((workload.training, workload.batch_size))
        single = Plan(replicas=(Replica(assignment={".": "host0/cpu:0"}),), strategy="test")
        rows = (Candidate(label="plain", plan=Plan.plain()), Candidate(label="it", plan=single, kept=True))
        return TuneResult(
            model_name="net",
            mode="inference",
            batch_size=workload.batch_size,
            objective=Objective(),
            cluster=state.options["cluster"],
            candidates=rows,
            noise=0.01,
            capture_rung="module",
        )

    monkeypatch.setattr(planning, "tune_now", tune_now)
    return seen


def test_train_and_eval_have_a_plan_each(tunes, net, planned):
    wrapper, x = tunes(net), torch.randn(8, 8)
    wrapper(x)
    assert wrapper.plan.shape == "single"
    wrapper.eval()
    assert wrapper.plan is None
    with torch.no_grad():
        wrapper(x)
        assert wrapper.plan.shape == "single"
    assert wrapper.plan.shape == "single", "asked outside of no_grad"
    wrapper.train()
    wrapper(x)
    assert planned == [(True, 8), (False, 8)]


def test_gradients_off_and_on_are_modes_of_their_own(tunes, net, planned):
    wrapper, x = tunes(net.eval()), torch.randn(8, 8)
    wrapper(x)
    with torch.no_grad():
        wrapper(x)
    wrapper(x)
    assert planned == [(False, 8), (False, 8)]


def test_other_shapes_run_plain_until_they_came_often(tunes, net, planned):
    wrapper = tunes(net.eval())
    with torch.no_grad():
        wrapper(torch.randn(8, 8))
        for _ in range(CALLS_BEFORE_PLANNING):
            wrapper(torch.randn(5, 8))
        assert planned == [(False, 8)]
        wrapper(torch.randn(5, 8))
        assert planned == [(False, 8), (False, 5)]
        for batch in (2, 3, 4, 6):
            for _ in range(CALLS_BEFORE_PLANNING + 2):
                wrapper(torch.randn(batch, 8))
    assert len(planned) == 1 + MORE_PLANNINGS
    assert len(wrapper._state.mode().counts) + len(wrapper._state.shown().counts) <= 512


def test_a_plan_that_is_given_runs_all_shapes(wrap, net, planned, strict):
    wrapper = wrap(net, "replicas")
    for batch in (8, 3, 5):
        wrapper(torch.randn(batch, 8))
        slot = wrapper._state.mode().slots[next(reversed(wrapper._state.mode().slots))]
        assert slot is wrapper._state.mode().first and slot.executor is not None
    assert planned == []


def test_plain_everywhere_settles_and_a_call_costs_next_to_nothing(wrap, strict):
    import timeit

    class Echo(torch.nn.Module):
        def forward(self, x):
            return x

    model = Echo().eval()
    wrapper, x = wrap(model, "plain"), torch.randn(8, 8)
    wrapper(x)
    assert wrapper._state.mode().settled

    def cost_us(call):
        return min(timeit.repeat(lambda: call(x), number=500, repeat=15)) / 500 * 1e6

    added = cost_us(wrapper) - cost_us(model)
    assert added < 5.0
    mode = wrapper._state.mode()
    mode.common, mode.settled, mode.plannings = False, False, 1  # as after a tuning that kept plain PyTorch
    assert cost_us(wrapper) - cost_us(model) < 20.0


def test_tune_replaces_the_plan_for_its_inputs(tunes, net, planned):
    wrapper = tunes(net.eval())
    with torch.no_grad():
        wrapper(torch.randn(8, 8))
        result = wrapper.tune(torch.randn(3, 8))
        assert planned == [(False, 8), (False, 3)] and result.batch_size == 3
        wrapper.tune((torch.randn(4, 8), torch.randn(4)), objective="edp", budget_s=1.0)
        wrapper.tune({"x": torch.randn(6, 8), "twice": True}, objective=Objective(energy_weight=1.0))
        assert [batch for _, batch in planned] == [8, 3, 4, 6]
        x = torch.randn(3, 8)
        torch.testing.assert_close(wrapper(x), net(x))


def test_tune_puts_a_given_plan_aside(wrap, net, planned, strict):
    wrapper, x = wrap(net, "replicas"), torch.randn(8, 8)
    wrapper(x)
    wrapper.tune(x)
    assert wrapper.plan.shape == "single" and planned == [(True, 8)]
    torch.testing.assert_close(wrapper(x), net(x))
    assert wrapper(torch.randn(5, 8)).shape == (5, 4)


def test_autocast_is_a_signature_of_its_own(tunes, net, planned):
    wrapper, x = tunes(net.eval()), torch.randn(8, 8)
    with torch.no_grad():
        wrapper(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert wrapper(x).dtype == torch.bfloat16
    assert len(planned) == 1


def test_a_plan_from_the_cache_is_checked_and_used(tunes, net, caplog):
    net.eval()
    x = torch.randn(8, 8)
    with torch.no_grad():
        first = tunes(net, cache=True)
        first(x)
        kept = first.plan
        second = tunes(type(net)().eval(), cache=True)
        with caplog.at_level(logging.INFO, "autoplace"):
            second(x)
        if kept.is_plain:
            assert second.plan.is_plain and second._state.results == []
            assert "cache" in second.explain()
        else:
            assert second._state.results == [] or "no longer wins" in caplog.text
        third = tunes(type(net)().eval(), cache=False)
        third(x)
        assert len(third._state.results) == 1


def test_a_report_of_a_cached_plan_tunes_first(tunes, net, tmp_path):
    net.eval()
    x = torch.randn(8, 8)
    with torch.no_grad():
        tunes(net, cache=True)(x)
        again = tunes(net, cache=True)
        again(x)
        assert again.visualize_performance(tmp_path).stat().st_size > 1000


def test_tuning_in_the_background_serves_plain_pytorch_meanwhile(tunes, net):
    import time

    wrapper, x = tunes(net.eval(), background=True), torch.randn(8, 8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        expected = net(x)
        start = time.perf_counter()
        torch.testing.assert_close(wrapper(x), expected)
        pending = wrapper._state.mode().pending
        assert pending is not None and wrapper.plan is None and time.perf_counter() - start < 5
        while not pending.done:
            torch.testing.assert_close(wrapper(x), expected)
            time.sleep(0.02)
        torch.testing.assert_close(wrapper(x), expected)
        assert wrapper.plan is not None and len(wrapper._state.results) == 1


def test_closing_cancels_a_tuning_in_the_background(tunes, net):
    wrapper = tunes(net.eval(), background=True, budget_s=60.0)
    with torch.no_grad():
        wrapper(torch.randn(8, 8))
        pending = wrapper._state.mode().pending
        wrapper.close()
    from autoplace.errors import TuningCancelled

    with pytest.raises(TuningCancelled):
        pending.result()


def test_a_tuning_in_the_background_that_fails_is_not_tried_again(tunes, net, monkeypatch):
    import time

    import autoplace.planning as planning

    tries = []

    def fails(*_, **__):
        tries.append(1)
        raise RuntimeError("nothing to be found")

    monkeypatch.setattr(planning, "tune_now", fails)
    wrapper, x = tunes(net.eval(), background=True), torch.randn(8, 8)
    with torch.no_grad():
        wrapper(x)
        while not wrapper._state.mode().pending.done:
            time.sleep(0.01)
        with pytest.warns(UserWarning, match="planning failed: nothing to be found"):
            torch.testing.assert_close(wrapper(x), net(x))
        for _ in range(3):
            wrapper(x)
        assert tries == [1] and wrapper.plan.is_plain
