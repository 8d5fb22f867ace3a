"""Factors of several ranks, fitted to runs that are themselves simulated with known factors."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from autoplace.costs.calibrate_cluster import calibrate_cluster, prediction_error
from autoplace.graph.backward import with_backward
from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.outcome import Outcome
from autoplace.plan import Plan, Replica
from autoplace.problem import Problem
from autoplace.simulate.cluster_factors import ClusterFactors
from autoplace.simulate.collectives import ClusterEvaluator

OPS = 8
NEUTRAL = ClusterFactors()


@pytest.fixture
def problem():
    graph = OpGraph.build(
        names=[f"op{i}" for i in range(OPS)],
        edges=[(i, [i + 1], 2e5) for i in range(OPS - 1)],
        weight_bytes=[2_000_000] * OPS,
    )
    cluster = Cluster(
        devices=tuple(Device(name=f"h{i}/cpu:0", kind="cpu") for i in range(3)),
        default_link=Link(latency_ms=0.1, bytes_per_ms=1e6),
    )
    times = np.outer([5.0] * OPS + [0.0] + [10.0] * OPS, [1.0, 1.5, 2.0])
    return Problem(graph=with_backward(graph), cluster=cluster, latency_ms=times, batch_size=24)


@pytest.fixture
def plans(problem):
    names = problem.graph.names

    def data(*counts):
        parts = [(f"h{i}/cpu:0", c / 24) for i, c in enumerate(counts) if c]
        replicas = tuple(Replica(assignment=dict.fromkeys(names, d), share=s) for d, s in parts)
        return Plan(replicas=replicas, strategy="weighted")

    def piped(cuts, microbatches, devices=(0, 1, 2)):
        row = np.repeat(devices, np.diff([0, *cuts, OPS]))
        whole = [*row, row[-1], *row[::-1]]
        return Plan.from_assignment(problem, whole, strategy="chunks", microbatches=microbatches)

    return [
        Plan.from_assignment(problem, [0] * len(names), strategy="single"),
        data(8, 8, 8),
        data(12, 8, 4),
        data(16, 8, 0),
        data(16, 0, 8),
        piped((3, 6), 1),
        piped((3, 6), 4),
        piped((4, 6), 8),
        piped((5,), 4, (0, 2)),
        piped((4,), 2, (1, 0)),
    ]


def real_runs(problem, plans, factors, noise=0.0):
    random = np.random.default_rng(3)
    evaluator = ClusterEvaluator(problem, factors=factors)
    return [
        Outcome(source="measured", latency_ms=evaluator.predict_ms(plan) * math.exp(noise * random.standard_normal()))
        for plan in plans
    ]


def error(problem, plans, outcomes, factors):
    return prediction_error(problem, plans, outcomes, factors=factors)


@pytest.mark.parametrize(
    "factors",
    [
        ClusterFactors(speed={"h1/cpu:0": 1.4}),
        ClusterFactors(sync_scale=3.0),
        ClusterFactors(link_scale=4.0),
        ClusterFactors(dispatch_ms=2.0),
        ClusterFactors(speed={"h0/cpu:0": 0.8, "h2/cpu:0": 1.3}, sync_scale=2.0, link_scale=2.0, dispatch_ms=1.0),
    ],
)
def test_known_factors_are_found(problem, plans, factors):
    outcomes = real_runs(problem, plans, factors)
    found = calibrate_cluster(problem, plans, outcomes, prior=NEUTRAL)
    assert found.runs == len(plans)
    assert found.after.median < 0.01 and found.after.median <= max(found.before.median, 0.005)
    assert found.after.kendall_tau >= found.before.kendall_tau
    for device in ("h0/cpu:0", "h1/cpu:0", "h2/cpu:0"):
        assert found.factors.speed[device] == pytest.approx(factors.speed.get(device, 1.0), rel=0.05)
    assert found.factors.sync_scale == pytest.approx(factors.sync_scale, rel=0.15)


def test_the_same_runs_teach_the_same(problem, plans):
    outcomes = real_runs(problem, plans[3:7], ClusterFactors(dispatch_ms=1.0))
    first, second = (calibrate_cluster(problem, plans[3:7], outcomes, prior=NEUTRAL) for _ in range(2))
    assert first == second


def test_runs_of_a_busy_machine_say_less(problem, plans):
    outcomes = real_runs(problem, plans[1:5], ClusterFactors(sync_scale=3.0))
    busy = [replace(o, samples_ms=tuple(o.latency_ms * f for f in (0.7, 1.0, 1.3))) for o in outcomes]
    calm = [replace(o, samples_ms=tuple(o.latency_ms * f for f in (0.999, 1.0, 1.001))) for o in outcomes]
    unknown, steady, shaky = (
        calibrate_cluster(problem, plans[1:5], runs, prior=NEUTRAL).factors.sync_scale
        for runs in (outcomes, calm, busy)
    )
    assert steady == pytest.approx(unknown, rel=1e-3) and 1.0 < shaky < steady


def test_noisy_runs_teach_what_other_runs_confirm(problem, plans):
    factors = ClusterFactors(speed={"h1/cpu:0": 1.5}, sync_scale=2.5, overlap_share=0.3, dispatch_ms=1.0)
    outcomes = real_runs(problem, plans, factors, noise=0.03)
    found = calibrate_cluster(problem, plans[::2], outcomes[::2])
    others = plans[1::2], real_runs(problem, plans, factors)[1::2]
    before, after = error(problem, *others, None), error(problem, *others, found.factors)
    assert after.median < before.median and after.median < 0.15
    assert "median error of 5 runs" in found.sentence


def test_a_run_that_fits_nothing_pulls_with_bounded_force(problem, plans):
    outcomes = real_runs(problem, plans, ClusterFactors(sync_scale=2.0))
    wild = [*outcomes[:-1], Outcome(source="measured", latency_ms=30 * outcomes[-1].latency_ms)]
    found = calibrate_cluster(problem, plans, wild, prior=NEUTRAL)
    assert error(problem, plans[:-1], outcomes[:-1], found.factors).median < 0.1


def test_nothing_measured_leaves_the_prior(problem, plans):
    failed = Outcome(source="measured", feasible=False, reason="a rank was lost")
    prior = ClusterFactors(sync_scale=1.5)
    for some, outcomes in (([], []), (plans, [failed] * len(plans)), ([Plan.plain()], [Outcome(source="measured")])):
        found = calibrate_cluster(problem, some, outcomes, prior=prior)
        assert (found.factors, found.runs, found.before.runs) == (prior, 0, 0)
    assert calibrate_cluster(problem, [], []).sentence == "no run to calibrate with"


def test_plans_of_another_model_are_left_out(problem, plans):
    stranger = Plan(replicas=(Replica(assignment={"x": "h0/cpu:0"}),), strategy="t")
    outcomes = real_runs(problem, plans, NEUTRAL)
    found = calibrate_cluster(problem, [*plans, stranger], [*outcomes, outcomes[0]], prior=NEUTRAL)
    assert found.runs == len(plans)


def test_factors_that_no_run_depends_on_stay(problem, plans):
    prior = ClusterFactors(link_scale=1.7, dispatch_ms=0.3)
    outcomes = real_runs(problem, plans[:3], ClusterFactors(sync_scale=2.0))
    found = calibrate_cluster(problem, plans[:3], outcomes, prior=prior).factors
    assert (found.link_scale, found.dispatch_ms) == (1.7, 0.3)
    alone = calibrate_cluster(problem, plans[:1], [Outcome(source="measured", latency_ms=240.0)], prior=prior).factors
    assert alone.speed["h0/cpu:0"] == pytest.approx(2.0, rel=0.1) and alone.sync_scale == 1.0
    assert set(alone.speed) == {"h0/cpu:0"}


def test_right_predictions_stay(problem, plans):
    found = calibrate_cluster(problem, plans, real_runs(problem, plans, NEUTRAL), prior=NEUTRAL)
    assert found.after.median < 1e-3 and found.factors.dispatch_ms < 0.05
    assert all(value == pytest.approx(1.0, abs=0.01) for value in found.factors.speed.values())


def test_plans_that_do_not_fit_memory_count_if_they_ran(problem, plans):
    devices = tuple(Device(name=d.name, kind="cpu", memory_bytes=10.0) for d in problem.cluster.devices)
    small = problem.with_(cluster=Cluster(devices=devices, default_link=problem.cluster.default_link))
    outcomes = real_runs(problem, plans, NEUTRAL)
    assert calibrate_cluster(small, plans, outcomes, prior=NEUTRAL).runs == len(plans)


def test_a_calibration_is_data(problem, plans):
    found = calibrate_cluster(problem, plans, real_runs(problem, plans, ClusterFactors(sync_scale=2.0)), prior=NEUTRAL)
    data = json.loads(json.dumps(found.to_json()))
    assert ClusterFactors.from_json(data["factors"]) == found.factors
    assert data["runs"] == len(plans) and data["after"]["median"] == found.after.median
