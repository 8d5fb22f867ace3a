"""The whole road on small models: every box is real, nothing of the model changes, exactly one plan is kept."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from autoplace import Objective, Problem, TuneConfig, Workload, tune
from autoplace.errors import InputError, PolicyError
from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.proposals import propose, select

QUICK = {"budget_s": 4.0, "evaluations": 64, "measured_plans": 3, "rounds": 5, "microbatches": (1, 2), "policy": None}


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


@pytest.mark.parametrize("change", [{"budget_s": 0}, {"max_groups": 1000}, {"rounds": 1}])
def test_impossible_configurations(change):
    with pytest.raises(InputError):
        TuneConfig(**change)
