"""The whole road on small models: every box is real, nothing of the model changes, exactly one plan is kept."""

from __future__ import annotations

import json
import os
import time

import numpy as np
import pytest
import torch

from autoplace import Objective, Problem, TuneConfig, Workload, tune
from autoplace.errors import InputError, PolicyError
from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.measure.pool import plan_key
from autoplace.outcome import Outcome
from autoplace.plan import Plan
from autoplace.proposals import merge, predict_again, propose, select, select_new
from autoplace.result import Candidate

QUICK = {
    "budget_s": 4.0,
    "evaluations": 64,
    "measured_plans": 3,
    "rounds": 5,
    "microbatches": (1, 2),
    "policy": None,
    "compile": False,
}


@pytest.fixture
def cluster():
    cores = sorted(os.sched_getaffinity(0))
    devices = tuple(
        Device(name=f"host0/cpu:{i}", kind="cpu", cores=(cores[-i],), idle_watts=1.0, busy_watts=4.0) for i in range(2)
    )
    return Cluster(devices=devices, default_link=Link(latency_ms=0.03, bytes_per_ms=1e7))


@pytest.fixture
def workload():
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[m for _ in range(3) for m in (torch.nn.Linear(64, 64), torch.nn.ReLU())])
    return Workload(model=model.eval(), args=(torch.randn(16, 64),), name="mlp")


@pytest.mark.parametrize("training", [False, True])
def test_the_whole_road(cluster, workload, training):
    workload = Workload(model=workload.model, args=workload.args, training=training, name="mlp")
    before = {k: v.clone() for k, v in workload.model.state_dict().items()}
    flags = [m.training for m in workload.model.modules()]
    phases, records = [], []
    result = tune(
        workload,
        TuneConfig(**QUICK),
        cluster=cluster,
        progress=lambda phase, done, total: phases.append((phase, done, total)),
        record=lambda label, outcome: records.append((label, outcome.source)),
    )
    assert [c.kept for c in result.candidates].count(True) == 1
    assert result.candidates[0].plan.is_plain and result.baseline.measured.feasible
    measured = [c for c in result.candidates[1:] if c.measured is not None]
    assert {c.plan.shape for c in measured} >= {"replicas", "single"}
    assert all(c.measured.feasible and "same outputs" in c.check for c in measured)
    assert all(c.measured.energy_source == "model" and c.measured.energy_j > 0 for c in measured)
    assert result.chosen.gain == 1.0 or result.chosen.gain > 1.0 + result.noise
    assert {c.label for c in result.candidates} == {label for label, _ in records}
    assert {p for p, _, _ in phases} == set(result.seconds)
    labels = [c.label for c in result.candidates]
    assert len(set(labels)) == len(labels)
    calibration = json.loads(json.dumps(result.to_json()))["calibration"]
    assert calibration["runs"] == len([c for c in measured if c.predicted is not None])
    assert calibration["handover_ms"] >= 0 and calibration["concurrency_scale"] >= 1 and calibration["dispatch_ms"] >= 0
    assert calibration["median_error_before"] >= 0 and calibration["median_error_after"] >= 0
    assert len(calibration["second_plans"]) <= 2 and set(calibration["second_plans"]) <= {c.label for c in measured}
    assert any(note.startswith("Calibrated on") for note in result.notes)
    assert all(c.predicted_first is not None for c in measured if c.predicted is not None)
    assert all(torch.equal(before[k], v) for k, v in workload.model.state_dict().items())
    assert [m.training for m in workload.model.modules()] == flags
    assert all(p.grad is None for p in workload.model.parameters())


def test_every_strategy_proposes_and_equal_plans_share_a_row(cluster):
    graph = OpGraph.build(names=[f"layer{i}" for i in range(8)], edges=[(i, [i + 1], 1e3) for i in range(7)])
    problem = Problem(graph=graph, cluster=cluster, latency_ms=np.full((8, 2), 5.0), batch_size=8)
    candidates = propose(problem, policy=None, microbatches=(1, 2, 16), evaluations=64, seed=0)
    labels = " ".join(c.label for c in candidates)
    assert all(name in labels for name in ("single", "heft", "metf", "chunks", "random", "annealing", "replicas"))
    assert {c.plan.microbatches for c in candidates} == {1, 2}
    keys = [repr((c.plan.replicas, c.plan.microbatches, sorted(c.plan.threads.items()))) for c in candidates]
    assert len(set(keys)) == len(keys)
    objectives = [c.predicted.objective for c in candidates]
    assert objectives == sorted(objectives)
    again = propose(problem, policy=None, microbatches=(1, 2, 16), evaluations=64, seed=0)
    assert [c.plan for c in again] == [c.plan for c in candidates]
    assert {c.plan.shape for c in select(candidates, 3)} == {"replicas", "stages", "single"}
    assert any("chunks" in c.label and c.plan.shape == "stages" for c in select(candidates, 4))


def test_a_second_tuning_starts_calibrated(cluster, workload):
    first = tune(workload, TuneConfig(**QUICK), cluster=cluster)
    second = tune(workload, TuneConfig(**QUICK), cluster=cluster)
    keys = ("handover_ms", "concurrency_scale", "dispatch_ms", "runs")
    assert second.calibration["prior"] == {key: first.calibration[key] for key in keys}
    cold = tune(workload, TuneConfig(**{**QUICK, "use_cache": False}), cluster=cluster)
    assert cold.calibration["prior"] == {"handover_ms": 0.0, "concurrency_scale": 1.0, "dispatch_ms": 0.0, "runs": 0}


def test_a_second_proposal_joins_the_first(cluster):
    graph = OpGraph.build(names=[f"layer{i}" for i in range(4)], edges=[(i, [i + 1], 1e3) for i in range(3)])
    problem = Problem(graph=graph, cluster=cluster, latency_ms=np.full((4, 2), 5.0), batch_size=8)

    def candidate(label, *devices, measured_ms=None):
        measured = None if measured_ms is None else Outcome(source="measured", latency_ms=1, objective=measured_ms)
        plan = Plan.from_assignment(problem, devices, strategy=label)
        return Candidate(label=label, plan=plan, predicted=Outcome(source="simulated"), measured=measured)

    first = [
        Candidate(label="plain", plan=Plan.plain(), measured=Outcome(source="measured", latency_ms=1, objective=20.04)),
        candidate("heft", 0, 0, 1, 1, measured_ms=30.0),
        candidate("heft (2)", 0, 0, 0, 1),
    ]
    again = [
        candidate("metf", 0, 0, 1, 1),
        candidate("heft", 0, 0, 0, 0),
        candidate("heft", 0, 1, 1, 1),
        candidate("heft", 0, 1, 0, 1),
    ]
    whole, fresh = merge(first, again)
    assert [c.label for c in whole] == ["plain", "heft", "heft (2)", "heft (3)", "heft (4)", "heft (5)"]
    assert [c.label for c in fresh] == ["heft (3)", "heft (4)", "heft (5)"]
    whole = predict_again(whole, problem)
    assert whole[0].predicted is None and whole[1].predicted.latency_ms == pytest.approx(20.03, abs=1e-2)
    assert all(c.predicted_first == Outcome(source="simulated") for c in whole[1:])
    # One device takes 20.00 ms; every hand-over adds 0.03; plain took 20.04, so that three hand-overs are too many.
    assert [c.label for c in select_new(whole, 9)] == ["heft (3)", "heft (2)", "heft (4)"]
    assert [c.label for c in select_new(whole, 1)] == ["heft (3)"]


def test_an_unknown_policy_is_an_error(cluster, workload):
    with pytest.raises(PolicyError):
        tune(workload, TuneConfig(**{**QUICK, "policy": "no-such-policy"}), cluster=cluster)


def test_inputs_that_do_not_fit_are_an_error(cluster, workload):
    broken = Workload(model=workload.model, args=(torch.randn(16, 3),))
    with pytest.raises(InputError):
        tune(broken, TuneConfig(**QUICK), cluster=cluster)


def test_energy_without_watts_is_an_error(workload, cluster):
    bare = Cluster(
        devices=tuple(Device(name=d.name, kind="cpu", cores=d.cores) for d in cluster.devices),
        default_link=cluster.default_link,
    )
    with pytest.raises(InputError, match="watts"):
        tune(workload, TuneConfig(**QUICK, objective=Objective(energy_weight=0.5)), cluster=bare)


@pytest.mark.parametrize(
    "change",
    [
        {"budget_s": 0},
        {"max_groups": 1000},
        {"rounds": 1},
        {"run_s": 0},
        {"compile": "maybe"},
        {"precision": "bfloat16"},
        {"knob_trials": -1},
    ],
)
def test_impossible_configurations(change):
    with pytest.raises(InputError):
        TuneConfig(**change)


def _images(channels=8):
    layers = []
    for inner, outer in ((3, channels), (channels, channels)):
        layers += [torch.nn.Conv2d(inner, outer, 3, padding=1), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers).eval(), (torch.randn(8, 3, 24, 24),)


def test_knobs_are_searched_and_every_trial_is_recorded(cluster):
    model, inputs = _images()
    records = []
    config = TuneConfig(**{**QUICK, "precision": "auto", "budget_s": 12.0})
    result = tune(
        Workload(model=model, args=inputs, name="images"),
        config,
        cluster=cluster,
        record=lambda label, outcome: records.append((label, outcome.source)),
    )
    measured = [c for c in result.candidates if c.measured is not None]
    assert any(c.plan.channels_last for c in measured), "images may be laid out channels last"
    assert any(c.plan.precision == "bfloat16" for c in measured)
    assert not any(c.plan.compiled for c in measured)
    singles = [c for c in measured if c.plan.shape == "single" and not c.plan.channels_last]
    assert {c.plan.threads.get(c.plan.devices[0], 1) for c in singles} == {1, 2}, "one thread, and all"
    assert {(c.label, "measured") for c in measured} <= set(records)
    keys = [plan_key(c.plan) for c in measured]
    assert len(set(keys)) == len(keys), "no plan runs in two rows"
    stopped = [c for c in measured if c.stopped]
    assert all("(stopped early)" in c.label and not c.kept for c in stopped)
    assert "forward" not in vars(model) and all("forward" not in vars(m) for m in model.modules())


def test_full_precision_is_kept_unless_allowed(cluster):
    model, inputs = _images()
    result = tune(Workload(model=model, args=inputs), TuneConfig(**QUICK), cluster=cluster)
    assert {c.plan.precision for c in result.candidates} == {"float32"}


def test_no_search_when_it_may_not_run_anything(cluster, workload):
    result = tune(workload, TuneConfig(**{**QUICK, "knob_trials": 0}), cluster=cluster)
    assert not any(c.stopped for c in result.candidates)
    assert all(c.plan.engine == "threads" and not c.plan.channels_last for c in result.candidates)


def test_plans_that_do_not_keep_the_models_habits_are_left_out(cluster, workload):
    workload.model[0].register_forward_hook(lambda *_: None)
    result = tune(workload, TuneConfig(**QUICK), cluster=cluster)
    replicas = [c for c in result.candidates if c.plan.shape == "replicas"]
    assert replicas and all(c.measured is None and "hooks" in c.verdict for c in replicas)
    assert any(c.measured is not None for c in result.candidates if c.plan.shape == "single")


class Slow(torch.nn.Module):
    """Takes its time."""

    def __init__(self, seconds):
        super().__init__()
        self.lin, self.seconds = torch.nn.Linear(8, 8), seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return self.lin(x)


def test_a_budget_is_kept_roughly(cluster, workload):
    slow = Workload(model=Slow(0.03).eval(), args=(torch.randn(16, 8),), name="slow")
    for work in (workload, slow):
        start = time.perf_counter()
        result = tune(work, TuneConfig(**{**QUICK, "budget_s": 5.0, "compile": "auto"}), cluster=cluster)
        assert result.seconds["measure"] < 2 * 5.0, time.perf_counter() - start
        assert any("not compiled" in note for note in result.notes) or any(
            c.plan.compiled for c in result.candidates if c.measured is not None
        )


def test_a_model_that_is_slow_for_the_budget_is_still_tuned(cluster):
    slow = Workload(model=Slow(0.25).eval(), args=(torch.randn(16, 8),), name="slow")
    result = tune(slow, TuneConfig(**{**QUICK, "budget_s": 1.0}), cluster=cluster)
    assert result.baseline.measured.feasible and result.seconds["measure"] < 15.0


def test_compiled_plans_compete_and_say_what_compiling_took(cluster, workload):
    result = tune(workload, TuneConfig(**{**QUICK, "compile": True, "knob_trials": 3}), cluster=cluster)
    compiled = next(c for c in result.candidates if c.plan == Plan.plain().with_(compiled=True))
    assert compiled.measured is not None and compiled.measured.feasible, compiled.verdict
    assert compiled.label.startswith("plain torch.compile") and compiled.compile_s > 0
    assert compiled.gain < compiled.speedup, "compiling has to be paid back"
    cpp = next(c for c in result.candidates if c.plan == compiled.plan.with_(cpp_wrapper=True))
    assert cpp.measured is not None and cpp.measured.feasible and cpp.compile_s > 0, cpp.verdict
    assert json.loads(json.dumps(result.to_json()))["candidates"][0]["compile_s"] == 0.0


def test_a_machine_without_a_compiler_says_so_once(cluster, workload, monkeypatch):
    monkeypatch.setattr("autoplace.knob_trials.compiler_refusal", lambda _model: "there is no compiler")
    result = tune(workload, TuneConfig(**{**QUICK, "compile": True}), cluster=cluster)
    assert [n for n in result.notes if "compile" in n] == ["Plans were not compiled: there is no compiler."]
    assert not any(c.plan.compiled for c in result.candidates)
