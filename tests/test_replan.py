"""A plan whose calls become slower: measured beside plain PyTorch again, kept or dropped, the user's state untouched.

The models sleep, for a time that depends on what runs them, so that nothing hangs on this machine's speed.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

from autoplace import OptimizedParallel, Plan
from autoplace.errors import InputError
from autoplace.hardware.cluster import Cluster, Device
from autoplace.plan import Replica
from autoplace.replan import Recheck, Watch, lent_buffers, may_interrupt, signature_of

A = "host0/cpu:0"
WINDOW = 32


def _planned():
    """Whether a single-device executor runs the present call, in the caller's thread or in its own."""
    frame = sys._getframe()
    while frame is not None and Path(frame.f_code.co_filename).stem != "inline":
        frame = frame.f_back
    return frame is not None or threading.current_thread().name == A


class Sleeper(torch.nn.Module):
    """A layer with a buffer and a random number; takes `planned_ms` under the plan, `plain_ms` elsewhere."""

    def __init__(self, plain_ms, planned_ms):
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))
        self.plain_ms, self.planned_ms = plain_ms, planned_ms

    def forward(self, x):
        time.sleep((self.planned_ms if _planned() else self.plain_ms) / 1e3)
        torch.rand(())
        if self.training:
            self.count += 1.0
        return self.inner(x * (1.0 + 0.0 * self.count))


@pytest.fixture
def cluster():
    return Cluster(devices=(Device(name=A, kind="cpu", cores=(min(os.sched_getaffinity(0)),)),))


@pytest.fixture
def wrap(cluster):
    made = []

    def make(model, **options):
        plan = Plan(replicas=(Replica(assignment={".": A}),), strategy="test")
        made.append(OptimizedParallel(model, plan=plan, cluster=cluster, track=False, policy=None, **options))
        return made[-1]

    yield make
    for wrapper in made:
        wrapper.close()


def _until_due(wrapper, inputs, most=4 * WINDOW):
    for _ in range(most):
        if wrapper.monitor.due:
            return
        wrapper(inputs)
    raise AssertionError(f"no drift: {wrapper.monitor}")


def _slowed(wrap, *, plain_ms, planned_ms, training=False, **options):
    """A wrapper whose plan took 0.3 ms beside plain PyTorch's 1 ms, and now drifts."""
    model = Sleeper(1.0, 0.3).train(training)
    wrapper, inputs = wrap(model, **options), torch.randn(2, 4)
    with torch.set_grad_enabled(training):
        for _ in range(WINDOW + 1):
            wrapper(inputs)
        assert wrapper.monitor.expected_ms is not None and not wrapper.monitor.due
        model.plain_ms, model.planned_ms = plain_ms, planned_ms
        _until_due(wrapper, inputs)
    return wrapper, model, inputs


def test_a_plan_that_became_slower_than_plain_pytorch_is_dropped(wrap):
    wrapper, model, inputs = _slowed(wrap, plain_ms=1.0, planned_ms=4.0)
    with torch.no_grad(), pytest.warns(UserWarning, match="went back to plain PyTorch.*not better beyond the noise"):
        output = wrapper(inputs)
    assert wrapper.plan.is_plain and wrapper.monitor is None
    torch.testing.assert_close(output, model(inputs))


def test_a_plan_that_is_still_faster_is_kept_with_a_new_baseline(wrap, caplog):
    wrapper, _, inputs = _slowed(wrap, plain_ms=9.0, planned_ms=3.0)
    with torch.no_grad(), warnings.catch_warnings(), caplog.at_level(logging.INFO, "autoplace"):
        warnings.simplefilter("error")
        for _ in range(2 * WINDOW):
            wrapper(inputs)
    assert not wrapper.plan.is_plain
    assert [r.message for r in caplog.records if "keeps its plan" in r.message] and len(caplog.records) == 1
    assert wrapper.monitor.expected_ms > 1.0 and not wrapper.monitor.due


def test_the_users_training_state_is_untouched_by_a_recheck(wrap):
    wrapper, model, inputs = _slowed(wrap, plain_ms=1.0, planned_ms=4.0, training=True)
    weight, count = model.inner.weight, model.count
    kept = torch.ones_like(weight)
    weight.grad = kept
    twice = weight * count  # a graph of the user's that holds the buffer
    before, version, random = count.item(), count._version, torch.get_rng_state()
    state, mode = wrapper._state, wrapper._state.mode()
    with pytest.warns(UserWarning, match="went back to plain PyTorch"):
        state._replan_slot(state, mode, mode.first, signature_of((inputs,), {}), (inputs,), {})
    assert weight.grad is kept and torch.equal(kept, torch.ones_like(weight)) and model.inner.bias.grad is None
    assert model.count is count and (count.item(), count._version) == (before, version)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training and all(m.training for m in model.modules())
    twice.sum().backward()


def test_outputs_of_the_dropped_plan_keep_their_backward(wrap):
    wrapper, model, inputs = _slowed(wrap, plain_ms=1.0, planned_ms=4.0, training=True)
    pending = wrapper._state.mode().first.executor(inputs)
    with pytest.warns(UserWarning, match="went back to plain PyTorch"):
        wrapper(inputs)
    (expected,) = torch.autograd.grad(model(inputs).sum(), model.inner.weight)
    pending.sum().backward()
    torch.testing.assert_close(model.inner.weight.grad, expected)


def test_tuning_again_installs_the_new_plan_and_keeps_the_wait(wrap, monkeypatch):
    wrapper, _, inputs = _slowed(wrap, plain_ms=9.0, planned_ms=1.5, replan="tune", budget_s=1.0)
    monitor = wrapper.monitor
    monkeypatch.setattr("autoplace.planning.recheck", lambda *_, **__: Recheck(keep=False, verdict="as the test says"))
    with torch.no_grad(), pytest.warns(UserWarning, match="as the test says; it tunes again now"):
        wrapper(inputs)
    assert wrapper.plan.strategy != "test" and not wrapper.plan.is_plain
    assert wrapper.monitor is monitor and not monitor.due and monitor.expected_ms is None
    assert wrapper._state.results[-1].chosen.speedup > 2.0


def test_nothing_is_watched_under_plain_pytorch_or_when_switched_off(wrap, cluster):
    inputs = torch.randn(2, 4)
    off = wrap(Sleeper(0.0, 0.0), replan=False)
    off(inputs)
    plain = OptimizedParallel(Sleeper(0.0, 0.0), plan=Plan.plain(), cluster=cluster)
    plain(inputs)
    assert not off.plan.is_plain and off.monitor is None
    assert plain.plan.is_plain and plain.monitor is None
    with pytest.raises(InputError, match="replan"):
        OptimizedParallel(Sleeper(0.0, 0.0), replan="always")


def test_only_like_calls_are_compared(wrap):
    wrapper, inputs = wrap(Sleeper(0.0, 0.0)), torch.randn(2, 4)
    wrapper(inputs)
    wrapper(torch.randn(3, 4))
    with torch.no_grad():
        wrapper(inputs)
    thread = threading.Thread(target=wrapper, args=(inputs,))
    thread.start()
    thread.join()
    assert (wrapper.monitor.calls, wrapper.monitor.other_calls) == (1, 2), "no_grad is a mode with a plan of its own"


def test_a_signature_sees_shapes_flags_and_nesting():
    x = torch.zeros(2, 3)
    watch = Watch(signature_of((x, [x, {"deep": x}]), {"cache": True, "scale": 1.0}))
    assert watch.covers(signature_of((x + 1, [x, {"deep": x}]), {"cache": True, "scale": 2.0}))
    assert not watch.covers(signature_of((x, [x, {"deep": x[:1]}]), {"cache": True, "scale": 1.0}))
    assert not watch.covers(signature_of((x, [x, {"deep": x}]), {"cache": False, "scale": 1.0}))
    assert watch.monitor.other_calls == 2


def test_a_recheck_waits_for_a_quiet_place():
    model = torch.nn.Linear(2, 2)
    seen = []

    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(may_interrupt(model))
            return grad

    assert may_interrupt(model)
    Asks.apply(torch.zeros(1, requires_grad=True)).backward()
    torch.jit.trace(lambda x: seen.append(may_interrupt(model)) or x, torch.zeros(1), check_trace=False)
    hook = model.weight.register_post_accumulate_grad_hook(lambda p: None)
    seen.append(may_interrupt(model))
    hook.remove()
    assert seen == [False, False, False] and may_interrupt(model)


def test_a_compiled_wrapper_is_not_watched(wrap):
    wrapper, inputs = wrap(torch.nn.Linear(4, 4)), torch.randn(2, 4)
    with torch.no_grad(), warnings.catch_warnings():
        expected = wrapper(inputs)
        compiled = torch.compile(wrapper, backend="eager")
        warnings.simplefilter("error")
        torch.testing.assert_close(compiled(inputs), expected)
    assert (wrapper.monitor.calls, wrapper.monitor.other_calls) == (1, 0)


def test_lent_buffers_keep_ties():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2))
    model[1].running_mean = own = model[0].running_mean
    version = own._version
    with lent_buffers(model):
        assert model[0].running_mean is model[1].running_mean is not own
        model(torch.randn(8, 2))
    assert model[0].running_mean is model[1].running_mean is own
    assert torch.equal(own, torch.zeros(2)) and own._version == version
