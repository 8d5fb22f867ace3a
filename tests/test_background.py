"""A tuning beside the user's program: on a copy, without a trace in the model, the random numbers or the exit code."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import warnings
import weakref

import pytest
import torch

from autoplace.background import BackgroundTuning, cancellable, copy_workload
from autoplace.errors import InputError, TuningCancelled
from autoplace.hands_off import is_hands_off
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.plan_cache import cache_key
from autoplace.runtime import build_executor
from autoplace.tuner import TuneConfig, tune
from autoplace.workload import Workload


class Tied(torch.nn.Module):
    """Tied weights, a buffer that each pass changes, dropout."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(16, 16, bias=False)
        self.norm = torch.nn.BatchNorm1d(16)
        self.drop = torch.nn.Dropout(0.1)
        self.last = torch.nn.Linear(16, 16, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(self.drop(self.norm(self.first(x))))


@pytest.fixture
def workload():
    torch.manual_seed(0)
    return Workload(model=Tied(), args=(torch.randn(8, 16),), training=True, name="Tied")


@pytest.fixture
def cluster():
    cores = sorted(os.sched_getaffinity(0))
    devices = (
        Device(name="host0/cpu:0", kind="cpu", cores=(cores[0],)),
        Device(name="host0/cpu:1", kind="cpu", cores=(cores[-1],)),
    )
    return Cluster(devices=devices, default_link=Link(latency_ms=0.01, bytes_per_ms=1e7))


def _state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def _same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_copy_is_the_same_model_and_shares_nothing(workload):
    model = workload.model
    model.norm.weight.grad = torch.ones(16)
    model.drop.eval()
    with torch.inference_mode():
        copied = copy_workload(workload)
    assert _same(copied.model.state_dict(), model.state_dict())
    assert copied.model.last.weight is copied.model.first.weight
    assert [m.training for m in copied.model.modules()] == [m.training for m in model.modules()]
    assert all(p.grad is None and p.requires_grad and not p.is_inference() for p in copied.model.parameters())
    mine = {t.data_ptr() for t in (*model.parameters(), *model.buffers(), *workload.args)}
    theirs = {t.data_ptr() for t in (*copied.model.parameters(), *copied.model.buffers(), *copied.args)}
    assert not mine & theirs
    assert torch.equal(model.norm.weight.grad, torch.ones(16))


def test_a_plan_is_kept_for_the_copy_under_the_key_of_the_original(workload, cluster):
    def key(of):
        return cache_key(of, cluster, options={"objective": "latency"})

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert BackgroundTuning(workload, key).result() == key(workload)
    assert BackgroundTuning(workload, key).result() == key(workload)


def test_a_loss_that_is_a_method_of_the_model_is_one_of_the_copy(workload):
    from dataclasses import replace

    copied = copy_workload(replace(workload, loss=workload.model.norm.forward))
    assert copied.loss.__self__ is copied.model.norm


@pytest.mark.parametrize("where", ["model", "inputs"])
def test_what_cannot_be_copied_is_refused_with_the_reason(workload, where):
    if where == "model":
        workload.model.lock = threading.Lock()
        bad = workload
    else:
        bad = Workload(model=workload.model, args=workload.args, kwargs={"extra": threading.Lock()})
    with pytest.raises(InputError, match=r"(?s)cannot be tuned in the background.*cannot pickle.*foreground"):
        BackgroundTuning(bad, lambda _workload: None)


def test_what_the_tuning_returns_and_raises_reaches_the_caller(workload):
    go = threading.Event()
    seen = []

    def work(copied):
        go.wait(20)
        seen.append((copied.model is not workload.model, is_hands_off(), torch.is_autocast_enabled("cpu")))
        return "found"

    with torch.autocast("cpu", dtype=torch.bfloat16):
        tuning = BackgroundTuning(workload, work)
    assert not tuning.done and tuning.seconds >= 0
    go.set()
    assert tuning.result() == "found" and tuning.done
    assert seen == [(True, True, True)], "on the copy, hands off, under the caller's autocast"
    seconds = tuning.seconds
    time.sleep(0.01)
    assert tuning.seconds == seconds

    def fail(_copied):
        raise ValueError("as it is")

    with pytest.raises(ValueError, match="as it is"):
        BackgroundTuning(workload, fail).result()


@pytest.mark.parametrize("failing", [False, True])
def test_the_copy_is_freed_at_the_end(workload, failing):
    refs = []

    def work(copied):
        refs.append(weakref.ref(copied.model))
        if failing:
            raise ValueError("no")

    tuning = BackgroundTuning(workload, work)
    while not tuning.done:
        time.sleep(0.001)
    deadline = time.monotonic() + 10
    while refs[0]() is not None and time.monotonic() < deadline:  # the thread may still be leaving
        gc.collect()
    assert refs[0]() is None


def test_a_cancelled_tuning_ends_at_its_next_report(workload):
    told = []
    started = threading.Event()

    def work(_copied):
        report = cancellable(lambda *step: told.append(step))
        while True:
            report("phase", len(told), 10**9)
            started.set()
            time.sleep(0.001)

    tuning = BackgroundTuning(workload, work)
    assert started.wait(20)
    tuning.cancel()
    with pytest.raises(TuningCancelled):
        tuning.result()
    assert told[0] == ("phase", 0, 10**9)
    cancellable()("a foreground tuning is never cancelled", 0, 1)


def test_a_real_tuning_leaves_the_model_and_the_users_random_numbers_alone(workload, cluster):
    """The user trains and draws meanwhile: his buffers move by his passes alone, and no random number comes twice."""
    before, random_before = _state(workload.model), torch.get_rng_state()
    threads = torch.get_num_threads()
    config = TuneConfig(
        budget_s=1.0, policy=None, measured_plans=2, evaluations=50, use_cache=False, compile=False, knob_trials=2
    )
    drawn, warned = [], 0
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        tuning = BackgroundTuning(workload, lambda w: tune(w, config, cluster=cluster, progress=cancellable()))
        filters = warnings.filters[-1]
        while not tuning.done:
            drawn.append(torch.rand((), dtype=torch.float64).item())
            warnings.warn("mine", stacklevel=1)
            warned += 1
            time.sleep(0.002)
        result = tuning.result()
        assert sum(str(w.message) == "mine" for w in seen) == warned and warnings.filters[-1] == filters
    assert len(drawn) > 10 and len(set(drawn)) == len(drawn)
    assert not torch.equal(torch.get_rng_state(), random_before)
    assert _same(_state(workload.model), before) and all(p.grad is None for p in workload.model.parameters())
    assert torch.get_num_threads() == threads
    assert result.chosen is not None and result.mode == "training"
    plan = next(c.plan for c in result.candidates if not c.plan.is_plain)
    with build_executor(workload.model, plan, cluster) as executor:
        assert executor(*workload.args).shape == (8, 16), "a plan for the copy runs the model"


EXITING = """
import sys, time, torch
from autoplace.background import BackgroundTuning, cancellable
from autoplace.hardware.cluster import Cluster
from autoplace.tuner import TuneConfig, tune
from autoplace.workload import Workload
model = torch.nn.Sequential(*[torch.nn.Linear(256, 256) for _ in range(6)])
config = TuneConfig(budget_s=30, policy=None, use_cache=False, evaluations=200, compile=False)
phases = []
def work(workload):
    report = cancellable(lambda phase, *_: phases.append(phase))
    return tune(workload, config, cluster=Cluster.discover(measure_links=False), progress=report)
tuning = BackgroundTuning(Workload(model=model, args=(torch.randn(32, 256),), training=True), work)
while {phase!r} not in phases and not tuning.done:
    time.sleep(0.01)
assert not tuning.done
time.sleep(0.2)
print(time.time(), flush=True)
"""


@pytest.mark.parametrize("phase", ["profile costs", "measure"])
def test_a_program_that_ends_during_the_tuning_exits_promptly_and_quietly(phase):
    done = subprocess.run(
        [sys.executable, "-c", EXITING.format(phase=phase)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert time.time() - float(done.stdout) < 15
