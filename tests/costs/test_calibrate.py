"""Calibration: what real runs teach the simulator, on runs that are themselves simulated with known factors."""

from __future__ import annotations

import json

import numpy as np
import pytest

from autoplace.costs.calibrate import Calibration, calibrate, load_calibration, store_calibration
from autoplace.errors import InputError
from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.outcome import Outcome
from autoplace.plan import Plan, Replica
from autoplace.problem import Problem, Semantics
from autoplace.simulate import SimulatedEvaluator

OPS = 12


@pytest.fixture
def problem():
    graph = OpGraph.build(names=[f"op{i}" for i in range(OPS)], edges=[(i, [i + 1], 1e4) for i in range(OPS - 1)])
    cluster = Cluster(
        devices=(Device(name="host0/cpu:0", kind="cpu"), Device(name="host0/cpu:1", kind="cpu")),
        links={("host0/cpu:0", "host0/cpu:1"): Link(latency_ms=0.02, bytes_per_ms=1e6)},
        default_link=Link(latency_ms=0.03, bytes_per_ms=1e6),
    )
    return Problem(graph=graph, cluster=cluster, latency_ms=np.full((OPS, 2), 2.0), batch_size=8)


@pytest.fixture
def plans(problem):
    names = problem.graph.names
    replicas = tuple(
        Replica(assignment=dict.fromkeys(names, f"host0/cpu:{i}"), share=share) for i, share in enumerate((0.5, 0.5))
    )
    halves, turns = np.arange(OPS) // (OPS // 2), np.arange(OPS) % 2
    return [
        Plan(replicas=replicas, strategy="replicas"),
        Plan.from_assignment(problem, np.zeros(OPS, int), strategy="single"),
        *(Plan.from_assignment(problem, halves, strategy="chunks", microbatches=m) for m in (1, 2)),
        *(Plan.from_assignment(problem, turns, strategy="random", microbatches=m) for m in (1, 4)),
    ]


def real_runs(problem, plans, **factors):
    return SimulatedEvaluator(Calibration(**factors).apply(problem)).evaluate(plans)


@pytest.mark.parametrize(
    "factors",
    [
        {"handover_ms": 0.3},
        {"concurrency_scale": 1.2},
        {"dispatch_ms": 0.15},
        {"handover_ms": 0.2, "concurrency_scale": 1.1, "dispatch_ms": 0.1},
    ],
)
def test_known_factors_are_recovered(problem, plans, factors):
    outcomes = real_runs(problem, plans, **factors)
    found = calibrate(problem, plans, outcomes)
    wanted = Calibration(**factors)
    assert found.handover_ms == pytest.approx(wanted.handover_ms, abs=0.06)
    assert found.concurrency_scale == pytest.approx(wanted.concurrency_scale, abs=0.03)
    assert found.dispatch_ms == pytest.approx(wanted.dispatch_ms, abs=0.04)
    assert found.runs == len(plans)
    assert found == calibrate(problem, plans, outcomes)
    before, after = Calibration().error(problem, plans, outcomes), found.error(problem, plans, outcomes)
    assert after.median < 0.02 < before.median + 0.02
    assert after.median <= before.median and after.kendall_tau >= before.kendall_tau


def test_one_run_that_fits_nothing_pulls_with_bounded_force(problem, plans):
    outcomes = real_runs(problem, plans, handover_ms=0.3)
    wild = [*outcomes[:-1], Outcome(source="measured", latency_ms=40 * outcomes[-1].latency_ms)]
    found = calibrate(problem, plans, wild)
    others = found.error(problem, plans[:-1], outcomes[:-1])
    assert others.median < 0.25
    assert found.error(problem, plans, wild).runs == len(plans)


def test_nothing_measured_is_neutral(problem, plans):
    failed = Outcome(source="measured", feasible=False, reason="it hung")
    assert calibrate(problem, [], []) == Calibration()
    assert calibrate(problem, plans, [failed] * len(plans)) == Calibration()
    earlier = Calibration(handover_ms=0.1, runs=4)
    assert calibrate(problem, plans, [failed] * len(plans), prior=earlier) == earlier
    assert Calibration().error(problem, plans, [failed] * len(plans)).runs == 0
    plain = [Plan.plain()]
    assert calibrate(problem, plain, [Outcome(source="measured", latency_ms=5.0)]) == Calibration()


def test_runs_of_single_devices_leave_the_factors_alone(problem, plans):
    outcome = Outcome(source="measured", latency_ms=70.0)
    found = calibrate(problem, plans[1:2], [outcome], prior=Calibration(dispatch_ms=0.2))
    assert found == Calibration(dispatch_ms=0.2, runs=1)


def test_right_predictions_stay(problem, plans):
    found = calibrate(problem, plans, SimulatedEvaluator(problem).evaluate(plans))
    assert found.factors == (0.0, 1.0, 0.0)
    assert found.sentence == "no correction"


def test_apply_changes_the_predictions_it_should(problem, plans):
    plain = SimulatedEvaluator(problem).evaluate(plans)
    # Alternating in four parts hides half a millisecond behind the work of the other parts.
    handed = real_runs(problem, plans, handover_ms=0.5)
    assert [b.latency_ms > a.latency_ms for a, b in zip(plain, handed, strict=True)] == [
        False,
        False,
        True,
        True,
        True,
        False,
    ]
    at_once = real_runs(problem, plans, concurrency_scale=1.5)
    changed = [b.latency_ms > a.latency_ms for a, b in zip(plain, at_once, strict=True)]
    assert changed == [True, False, False, True, False, True]
    assert at_once[0].latency_ms == pytest.approx(1.5 * plain[0].latency_ms)
    called = real_runs(problem, plans, dispatch_ms=0.1)
    assert called[2].latency_ms == pytest.approx(plain[2].latency_ms + OPS * 0.1)
    assert [called[i].latency_ms for i in (0, 1)] == [plain[i].latency_ms for i in (0, 1)]


def test_fingerprints_of_graph_and_cluster_stay_and_the_problem_s_changes(problem):
    applied = Calibration(handover_ms=0.1, concurrency_scale=1.1).apply(problem)
    assert applied.cluster.fingerprint == problem.cluster.fingerprint
    assert applied.fingerprint != problem.fingerprint
    assert np.allclose(applied.cluster.link_latency_ms, [[0.0, 0.12], [0.13, 0.0]])
    assert Calibration().apply(problem).fingerprint == problem.fingerprint


@pytest.mark.parametrize("microbatches", [1, 4])
def test_search_sees_what_evaluate_sees(problem, plans, microbatches):
    applied = Calibration(handover_ms=0.1, concurrency_scale=1.3, dispatch_ms=0.2).apply(problem)
    applied = applied.with_(semantics=Semantics(microbatches=microbatches))
    rows = np.stack([np.zeros(OPS, int), np.arange(OPS) % 2, np.ones(OPS, int), np.arange(OPS) // 6])
    scores = SimulatedEvaluator(applied).score(rows)
    elsewhere = SimulatedEvaluator(applied.with_(semantics=Semantics(microbatches=2)))
    for row, score in zip(rows, scores, strict=True):
        plan = Plan.from_assignment(applied, row, strategy="any")
        assert elsewhere.evaluate([plan])[0].objective == pytest.approx(score)
        assert SimulatedEvaluator(applied).outcome(row).objective == pytest.approx(score)


def test_the_order_of_runs_is_compared(problem, plans):
    predicted = SimulatedEvaluator(problem).evaluate(plans)
    slowest_first = [Outcome(source="measured", latency_ms=100.0 - p.latency_ms) for p in predicted]
    assert Calibration().error(problem, plans, predicted).kendall_tau == pytest.approx(1.0)
    assert Calibration().error(problem, plans, slowest_first).kendall_tau == pytest.approx(-1.0)
    equal = [Outcome(source="measured", latency_ms=7.0)] * len(plans)
    assert Calibration().error(problem, plans, equal).kendall_tau == 0.0


def test_a_calibration_is_kept_for_the_next_tuning(problem, plans):
    assert load_calibration(problem) is None
    found = calibrate(problem, plans, real_runs(problem, plans, handover_ms=0.3))
    store_calibration(problem, found)
    again = Problem(graph=problem.graph, cluster=problem.cluster, latency_ms=problem.latency_ms * 1.01)
    assert load_calibration(again) == found
    assert Calibration.from_json(json.loads(json.dumps(found.to_json()))) == found
    other = OpGraph.build(names=["alone"], edges=[])
    assert load_calibration(Problem(graph=other, cluster=problem.cluster, latency_ms=np.ones((1, 2)))) is None


def test_a_damaged_calibration_is_none_at_all(problem):
    from autoplace.costs import cache, calibrate  # noqa: F401 - the function hides the module of its name
    from autoplace.costs.calibrate import _key

    cache.store(_key(problem), {"handover_ms": -1.0, "concurrency_scale": 1.0, "dispatch_ms": 0.0, "runs": 3})
    assert load_calibration(problem) is None
    cache.store(_key(problem), {"handover_ms": "much"})
    assert load_calibration(problem) is None
    with pytest.raises(InputError):
        Calibration.from_json([])
    with pytest.raises(InputError):
        Calibration(concurrency_scale=0.9)
