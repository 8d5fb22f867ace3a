import time

import pytest
import torch
from torch import nn

from autoplace.errors import ExecutionError, InputError
from autoplace.hardware.energy import NullMeter
from autoplace.measure import MeasuredEvaluator, figures, pair_ratios
from autoplace.outcome import Evaluator
from autoplace.plan import Plan
from autoplace.problem import Objective
from autoplace.runtime import Identity, build_executor
from autoplace.workload import Workload

A, B = "host0/cpu:0", "host0/cpu:1"


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def workload(model=None, training=False, batch=8):
    return Workload(model=model or mlp(), args=(torch.randn(batch, 8),), training=training)


class InWorker(nn.Module):
    """Does something wrong, but only away from the main thread and the measuring thread."""

    def __init__(self, deed):
        super().__init__()
        self.lin, self.deed = nn.Linear(8, 8), deed

    def forward(self, x):
        import threading

        if threading.current_thread().name.startswith("host0"):
            self.deed()
        return self.lin(x)


@pytest.mark.parametrize("training", [False, True])
def test_plans_become_outcomes(make_cluster, make_plan, training):
    work = workload(training=training)
    recorded, seen = [], []
    evaluator = MeasuredEvaluator(
        work,
        make_cluster(idle_watts=5.0, busy_watts=20.0),
        objective=Objective(energy_weight=0.5),
        repeats=3,
        warmup=1,
        record=lambda plan, outcome: recorded.append((plan, outcome)),
        progress=lambda plan, number: seen.append(number),
        meter=None,
    )
    assert isinstance(evaluator, Evaluator)
    plans = [Plan.plain(), make_plan(A), make_plan(A, B), make_plan({"0": A, "1": A, "2": B}, microbatches=2)]
    outcomes = evaluator.evaluate(plans)
    assert [o.reason for o in outcomes] == [""] * 4
    assert evaluator.evaluations == 4
    assert recorded == list(zip(plans, outcomes, strict=True))
    assert seen == [number for number in range(4) for _ in plans]
    for plan, outcome in zip(plans, outcomes, strict=True):
        assert outcome.source == "measured" and outcome.feasible
        assert len(outcome.samples_ms) == 3
        assert outcome.latency_ms == sorted(outcome.samples_ms)[1] == outcome.period_ms
        assert outcome.throughput_sps == pytest.approx(8 / outcome.latency_ms * 1e3)
        assert outcome.energy_source is not None and outcome.energy_j > 0
        assert outcome.objective == pytest.approx((outcome.latency_ms * outcome.energy_j) ** 0.5)
        assert set(outcome.busy_ms) == {A, B}
        assert all(outcome.busy_ms[d] > 0 for d in plan.devices)
        assert sum(outcome.peak_memory_bytes.values()) >= sum(p.numel() * 4 for p in work.model.parameters())
    assert outcomes[1].busy_ms[B] == 0


def test_the_model_is_left_as_it_was(cluster, make_plan):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    model.eval()
    work = workload(model, training=True)
    grad = model[0].weight.grad = torch.ones(8, 8)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    outcomes = MeasuredEvaluator(work, cluster, repeats=1, warmup=0).evaluate([Plan.plain(), make_plan(A)])
    assert all(o.feasible for o in outcomes)
    assert not model.training and model[2].p == 0.5
    assert model[0].weight.grad is grad and bool((grad == 1).all())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert "forward" not in vars(model[0])


def test_gradients_do_not_pile_up_between_passes(cluster, make_plan):
    work = workload(training=True)
    grads = []
    work.model[0].weight.register_post_accumulate_grad_hook(lambda p: grads.append(p.grad.clone()))
    MeasuredEvaluator(work, cluster, repeats=2, warmup=1, check=False).evaluate([Plan.plain(), make_plan(A)])
    assert len(grads) == 2 * (1 + 2 * 2), "a warm-up, and two rounds of one untimed and one timed pass"
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0])


def test_failures_become_infeasible_outcomes(cluster, make_plan):
    def raises():
        raise RuntimeError("bad weather\nand more")

    def runs_out():
        raise torch.OutOfMemoryError("tried to allocate 99 GiB")

    for deed, words in [
        (raises, "it raised RuntimeError: bad weather"),
        (runs_out, "it ran out of memory: tried to allocate 99 GiB"),
        (lambda: time.sleep(1.0), "did not finish within 0.2 s"),
    ]:
        work = workload(nn.Sequential(InWorker(deed), nn.Dropout(0.25)))
        evaluator = MeasuredEvaluator(work, cluster, repeats=1, warmup=0, limit_s=0.2)
        bad, plain = evaluator.evaluate([make_plan(A, B), Plan.plain()])
        assert not bad.feasible and words in bad.reason
        assert bad.latency_ms == bad.objective == float("inf")
        assert plain.feasible
        assert work.model[1].p == 0.25, "what is left behind does not keep the check's settings"


def test_a_pass_that_overruns_adds_no_gradients_later(cluster, make_plan):
    class SlowBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            time.sleep(0.5)
            return grad

    class Net(nn.Linear):
        def forward(self, x):
            return SlowBackward.apply(super().forward(x))

    work = workload(Net(8, 8), training=True)
    evaluator = MeasuredEvaluator(work, cluster, repeats=1, warmup=0, limit_s=0.1, check=False)
    (outcome,) = evaluator.evaluate([make_plan(A)])
    assert "did not finish within 0.1 s" in outcome.reason
    work.model.zero_grad()
    time.sleep(0.7)
    assert work.model.weight.grad is None


def test_what_hangs_only_when_timed_is_dropped_too(cluster, make_plan):
    calls = []

    def third_hangs():
        calls.append(1)
        if len(calls) == 3:
            time.sleep(1.0)

    evaluator = MeasuredEvaluator(workload(InWorker(third_hangs)), cluster, repeats=4, warmup=0, limit_s=0.3)
    bad, plain = evaluator.evaluate([make_plan(A, B), Plan.plain()])
    assert not bad.feasible and "did not finish" in bad.reason
    assert plain.feasible and len(plain.samples_ms) == 4


def test_plans_that_compute_something_else_are_not_timed(cluster, make_plan):
    class Centred(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y - y.mean(0)

    work = workload(Centred(8, 8), training=True)
    plan = make_plan(A, B)
    (outcome,) = MeasuredEvaluator(work, cluster, repeats=1, warmup=0).evaluate([plan])
    assert not outcome.feasible and "differs from plain PyTorch" in outcome.reason
    (unchecked,) = MeasuredEvaluator(work, cluster, repeats=1, warmup=0, check=False).evaluate([plan])
    assert unchecked.feasible


def test_a_verdict_holds_until_a_parameter_changes(cluster, make_plan):
    passes = []
    work = workload()
    work.model.register_forward_hook(lambda *_: passes.append(1))
    evaluator = MeasuredEvaluator(work, cluster, repeats=1, warmup=0)

    def count():
        passes.clear()
        assert evaluator.evaluate([make_plan(A)])[0].feasible
        return len(passes)

    assert count() == 1 + 2 + 1 + 2, "memory, two plain, the check, one untimed, one timed"
    assert count() == 2
    with torch.no_grad():
        work.model[0].weight.add_(1.0)
    assert count() == 2 + 1 + 2


def test_plans_that_do_not_fit_are_refused_before_they_run(cluster, make_plan, monkeypatch):
    work = workload(training=True)
    monkeypatch.setattr(figures, "host_free_bytes", lambda: 100.0)
    plain, parts, missing = MeasuredEvaluator(work, cluster, repeats=1, warmup=0).evaluate(
        [Plan.plain(), make_plan(A, B), make_plan({"nope": A})]
    )
    assert plain.feasible
    assert "GiB free" in parts.reason
    monkeypatch.undo()
    (missing,) = MeasuredEvaluator(work, cluster, repeats=1, warmup=0).evaluate([make_plan({"nope": A})])
    assert "'nope'" in missing.reason


def test_rounds_pair_up(cluster, make_plan):
    evaluator = MeasuredEvaluator(workload(), cluster, warmup=1)
    a, b = evaluator.evaluate_interleaved([Plan.plain(), Plan.plain()], 6)
    assert len(a.samples_ms) == len(b.samples_ms) == 6
    median, (low, high) = pair_ratios(a.samples_ms, b.samples_ms)
    assert 0.1 < low <= median <= high < 10


def test_energy_is_never_made_up(cluster):
    work = workload()
    (outcome,) = MeasuredEvaluator(work, cluster, repeats=1, warmup=0, meter=NullMeter()).evaluate([Plan.plain()])
    assert outcome.feasible and outcome.energy_j is None and outcome.energy_source is None
    with pytest.raises(InputError, match="no source"):
        MeasuredEvaluator(work, cluster, objective=Objective(energy_weight=0.5), meter=NullMeter())


def test_slow_counters_are_read_over_a_stretch(cluster, make_plan):
    class Counter(NullMeter):
        source = "nvml"
        stretches: list[float] = []  # noqa: RUF012

        def end(self, elapsed_ms, busy_ms=None):
            self.stretches.append(elapsed_ms)
            return elapsed_ms * 1e-3

    meter = Counter()
    (outcome,) = MeasuredEvaluator(workload(), cluster, repeats=1, warmup=0, meter=meter).evaluate([make_plan(A)])
    assert len(meter.stretches) == 1 and meter.stretches[0] >= 500
    assert 0 < outcome.energy_j < 0.25 and outcome.energy_source == "nvml"


def test_executors_are_kept_from_call_to_call_and_closed_at_the_end(cluster, make_plan, monkeypatch):
    from autoplace.measure import pool

    built = []

    def build(model, plan, cluster):
        built.append(build_executor(model, plan, cluster))
        return built[-1]

    monkeypatch.setattr(pool, "build_executor", build)
    plans = [Plan.plain(), Plan.plain(), make_plan(A), make_plan({"0": A, "1": A, "2": B})]
    work = workload()
    with MeasuredEvaluator(work, cluster, repeats=1, warmup=0, keep=8) as evaluator:
        first, second = evaluator.evaluate(plans), evaluator.evaluate(plans[::-1])
        assert all(o.feasible for o in first + second)
        assert len(built) == 3 and len(evaluator._pool) == 3
        assert "forward" in vars(work.model[0]), "the gates of the kept stages"
    assert "forward" not in vars(work.model[0])
    with pytest.raises(ExecutionError, match="closed"):
        built[1](*work.args)
    built.clear()
    evaluator = MeasuredEvaluator(work, cluster, repeats=1, warmup=0)
    evaluator.evaluate(plans), evaluator.evaluate(plans)
    assert len(built) == 6 and len(evaluator._pool) == 0, "nothing is kept unless asked for"
    few = MeasuredEvaluator(work, cluster, repeats=1, warmup=0, keep=1)
    few.evaluate(plans)
    assert len(few._pool) == 1
    few.close()


def test_an_executor_that_failed_is_not_kept(cluster, make_plan):
    def raises():
        raise RuntimeError("bad weather")

    work = workload(InWorker(raises))
    with MeasuredEvaluator(work, cluster, repeats=1, warmup=0, keep=8) as evaluator:
        bad, plain = evaluator.evaluate([make_plan(A, B), Plan.plain()])
        assert not bad.feasible and plain.feasible and len(evaluator._pool) == 1


def test_a_run_ends_when_it_knows_enough_or_its_time_is_up(cluster, make_plan):
    seen = []

    def drop(outcomes):
        seen.append([len(o.samples_ms) for o in outcomes])
        return (0, 1) if len(seen) == 4 else ()

    evaluator = MeasuredEvaluator(workload(), cluster, warmup=0)
    outcomes = evaluator.evaluate_interleaved([Plan.plain(), make_plan(A)], 9, drop=drop)
    assert seen == [[1, 1], [2, 2], [3, 3], [4, 4]]
    assert [len(o.samples_ms) for o in outcomes] == [4, 4]
    outcomes = evaluator.evaluate_interleaved([Plan.plain(), make_plan(A)], 5, drop=lambda outcomes: [1])
    assert [len(o.samples_ms) for o in outcomes] == [5, 1], "the others go on without it"
    past = time.perf_counter() - 1.0
    plain, late = evaluator.evaluate_interleaved([Plan.plain(), make_plan(A)], 9, until_s=past)
    assert len(plain.samples_ms) == 3
    assert not late.feasible and "budget" in late.reason


def test_plans_that_do_not_fit_the_model_are_not_built(cluster, make_plan, monkeypatch):
    from autoplace.measure import pool

    monkeypatch.setattr(pool, "build_executor", lambda model, plan, cluster: Identity(model, plan, cluster))
    work = workload(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), training=True)
    evaluator = MeasuredEvaluator(work, cluster, repeats=1, warmup=0)
    (outcome,) = evaluator.evaluate([make_plan(A, B)])
    assert not outcome.feasible and "statistics over the whole batch" in outcome.reason
    assert len(evaluator._pool) == 0


def test_seconds_of_compiling_are_kept_by_plan(cluster, monkeypatch):
    from autoplace.measure import pool

    class Counts(Identity):
        spent_s = 0.0

        def __call__(self, *args, **kwargs):
            self.spent_s += 2.0 if self.spent_s == 0 else 5.0 if self.spent_s == 2.0 else 0.0
            return self.model(*args, **kwargs)

        def compile_s(self):
            return self.spent_s

    class Silent(Identity):
        def compile_s(self):
            return 0.0

        def __call__(self, *args, **kwargs):
            if not hasattr(self, "called"):
                self.called = time.sleep(0.3)
            return self.model(*args, **kwargs)

    compiled = Plan.plain().with_(compiled=True)
    for kind, expected in ((Counts, 5.0), (Silent, pytest.approx(0.4, abs=0.1))):
        monkeypatch.setattr(pool, "build_executor", lambda model, plan, cluster, kind=kind: kind(model, plan, cluster))
        evaluator = MeasuredEvaluator(workload(), cluster, repeats=2, warmup=1)
        assert all(o.feasible for o in evaluator.evaluate([Plan.plain(), compiled]))
        assert evaluator.compile_s(compiled) == expected, "one compilation, of the check's and the runs' two"
        assert evaluator.compile_s(Plan.plain()) == 0.0


def test_plans_are_checked_from_the_same_buffers_in_every_call(cluster, make_plan):
    work = workload(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), training=True)
    with MeasuredEvaluator(work, cluster, repeats=1, warmup=0, keep=4) as evaluator:
        for plan in (make_plan(A), make_plan(B), make_plan({"0": A, "1": B})):
            (outcome,) = evaluator.evaluate([plan])
            assert outcome.feasible, outcome.reason
            work.model[1].running_mean.add_(1.0)
