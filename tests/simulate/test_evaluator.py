"""`SimulatedEvaluator`: its two doors agree, plans of all kinds, and reasons that name what is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from autoplace.errors import InputError
from autoplace.graph import OpGraph
from autoplace.hardware import Cluster, Device, Link
from autoplace.outcome import Evaluator
from autoplace.plan import Plan, Replica
from autoplace.problem import Objective, Problem, Semantics
from autoplace.simulate import SimulatedEvaluator


@pytest.fixture
def problem():
    """a (2 ms) sends 400 bytes to b (4 ms); a link takes 1 ms + 100 bytes per ms; 8 samples a pass."""
    return Problem(
        graph=OpGraph.build(names=["a", "b"], edges=[(0, [1], 400.0)], weight_bytes=[5, 7]),
        cluster=Cluster(
            devices=(
                Device(name="h/cpu:0", kind="cpu", idle_watts=10, busy_watts=20),
                Device(name="h/cpu:1", kind="cpu", idle_watts=10, busy_watts=20),
            ),
            default_link=Link(latency_ms=1.0, bytes_per_ms=100.0),
        ),
        latency_ms=np.asarray([[2.0, 2.0], [4.0, 4.0]]),
        batch_size=8,
        thread_scale={"h/cpu:0": {1: 2.0, 2: 1.0}},
    )


def replica(*devices, share=1.0):
    return Replica(assignment=dict(zip("ab", devices, strict=True)), share=share)


def test_it_is_an_evaluator_and_counts(problem):
    evaluator = SimulatedEvaluator(problem)
    assert isinstance(evaluator, Evaluator) and evaluator.problem is problem
    evaluator.score(np.zeros((5, 2), int))
    evaluator.score([0, 1])
    evaluator.outcome([0, 1])
    evaluator.evaluate([Plan.plain(), Plan.from_assignment(problem, [0, 1], strategy="test")])
    assert evaluator.evaluations == 9


def test_an_assignment_scores_alike_through_all_doors(problem):
    evaluator = SimulatedEvaluator(problem)
    for plan in ([0, 0], [0, 1], [1, 0], [1, 1]):
        found = evaluator.evaluate([Plan.from_assignment(problem, plan, strategy="test")])[0]
        assert found == evaluator.outcome(plan)
        assert found.objective == evaluator.score(plan)[0] == found.latency_ms
        assert found.throughput_sps == pytest.approx(8000 / found.latency_ms)
        assert found.source == "simulated" and found.energy_source == "model"


def test_replicas_split_the_batch(problem):
    halves = Plan(replicas=(replica(*["h/cpu:0"] * 2, share=0.5), replica(*["h/cpu:1"] * 2, share=0.5)), strategy="t")
    uneven = Plan(replicas=(replica(*["h/cpu:0"] * 2, share=0.75), replica(*["h/cpu:1"] * 2, share=0.25)), strategy="t")
    found = SimulatedEvaluator(problem).evaluate([halves, uneven])
    assert [f.latency_ms for f in found] == [3.0, 4.5]
    assert found[1].busy_ms == {"h/cpu:0": 4.5, "h/cpu:1": 1.5}
    assert found[1].peak_memory_bytes == {"h/cpu:0": 12.0, "h/cpu:1": 12.0}
    assert found[0].energy_j == pytest.approx((2 * 10 * 3 + 10 * 6) / 1000)


def test_a_plan_says_its_microbatches_itself(problem):
    two = Plan(replicas=(replica("h/cpu:0", "h/cpu:1"),), strategy="t", microbatches=2)
    split = problem.with_(semantics=Semantics(microbatches=2))
    for base in (problem, split):
        assert SimulatedEvaluator(base).evaluate([two])[0].latency_ms == 9.0
    assert SimulatedEvaluator(split).evaluate([two.with_(microbatches=1)])[0].latency_ms == 11.0


def test_threads_scale_latencies_where_they_were_measured(problem):
    plan = Plan(replicas=(replica("h/cpu:0", "h/cpu:0"),), strategy="t")
    evaluator = SimulatedEvaluator(problem)
    for threads, latency in (({}, 6.0), ({"h/cpu:0": 2}, 6.0), ({"h/cpu:0": 1}, 12.0), ({"h/cpu:0": 3}, 6.0)):
        assert evaluator.evaluate([plan.with_(threads=threads)])[0].latency_ms == latency
    overhead = problem.with_(overhead_ms=np.ones((2, 2)))
    halves = plan.with_(threads={"h/cpu:0": 1}, microbatches=2)
    assert SimulatedEvaluator(overhead).evaluate([halves])[0].latency_ms == 2 * 2 * (1.5 + 2.5)


def test_a_plan_that_cannot_be_simulated_is_infeasible_with_a_reason(problem):
    evaluator = SimulatedEvaluator(problem)
    plain, foreign, threads = evaluator.evaluate(
        [
            Plan.plain(),
            Plan(replicas=(replica("h/cpu:0", "elsewhere"),), strategy="t"),
            Plan(replicas=(replica("h/cpu:0", "h/cpu:0"),), strategy="t", threads={"elsewhere": 2}),
        ]
    )
    for found, word in ((plain, "plain PyTorch"), (foreign, "elsewhere"), (threads, "elsewhere")):
        assert not found.feasible and word in found.reason
        assert found.objective == np.inf and found.energy_j is None


def test_reasons_name_the_op_or_the_memory(problem):
    nowhere = problem.with_(latency_ms=np.asarray([[2.0, np.inf], [4.0, 4.0]]))
    graph = OpGraph.build(names=["a", "b"], edges=[], colocate=[0, 0])
    apart = problem.with_(graph=graph)
    devices = tuple(Device(name=d.name, kind="cpu", memory_bytes=10) for d in problem.cluster.devices)
    small = problem.with_(cluster=Cluster(devices=devices, default_link=problem.cluster.default_link))
    silent = problem.with_(cluster=Cluster(devices=problem.cluster.devices))
    cases = [
        (nowhere, [1, 0], "'a' cannot run on 'h/cpu:1'"),
        (apart, [0, 1], "'a' on 'h/cpu:0' and 'b' on 'h/cpu:1' are co-located"),
        (small, [1, 1], "'h/cpu:1' would hold 12 bytes and has 10"),
        (silent, [0, 1], "'b' on 'h/cpu:1' needs a tensor of 'a' on 'h/cpu:0'"),
    ]
    for case, plan, words in cases:
        evaluator = SimulatedEvaluator(case)
        assert evaluator.score(plan)[0] == np.inf
        found = evaluator.outcome(plan)
        assert not found.feasible and words in found.reason
        assert np.isinf(evaluator.schedule(plan)[0]).all()
        halves = Plan(
            replicas=tuple(replica(*[devices[d].name for d in plan], share=0.5) for _ in range(2)), strategy="t"
        )
        assert words in evaluator.evaluate([halves])[0].reason
    assert SimulatedEvaluator(small).outcome([1, 1]).peak_memory_bytes == {"h/cpu:0": 0.0, "h/cpu:1": 12.0}


def test_host_route_needs_a_way_to_the_host():
    problem = Problem(
        graph=OpGraph.build(names=["a", "b"], edges=[(0, [1], 0.0)]),
        cluster=Cluster(devices=tuple(Device(name=f"h/cuda:{i}", kind="cuda") for i in range(2))),
        latency_ms=np.ones((2, 2)),
        semantics=Semantics(route="host"),
    )
    evaluator = SimulatedEvaluator(problem)
    assert evaluator.score([[0, 0], [0, 1]]).tolist() == [2.0, np.inf]
    assert "no link" in evaluator.outcome([0, 1]).reason


def test_energy_in_the_objective_needs_watts(problem):
    weighed = problem.with_(objective=Objective(energy_weight=0.5))
    evaluator = SimulatedEvaluator(weighed)
    found = evaluator.outcome([0, 1])
    assert found.objective == evaluator.score([0, 1])[0]
    assert found.objective == pytest.approx((found.latency_ms * found.energy_j) ** 0.5)
    devices = (problem.cluster.devices[0], Device(name="h/cpu:1", kind="cpu", idle_watts=3))
    silent = problem.with_(cluster=Cluster(devices=devices, default_link=problem.cluster.default_link))
    found = SimulatedEvaluator(silent).outcome([0, 1])
    assert found.feasible and found.energy_j is None and found.energy_source is None
    with pytest.raises(InputError, match="h/cpu:1"):
        SimulatedEvaluator(silent.with_(objective=Objective(energy_weight=0.5)))


def test_assignments_that_do_not_fit_are_refused(problem):
    evaluator = SimulatedEvaluator(problem)
    for bad in ([0], [0, 1, 0], [0.0, 1.0], [[[0, 1]]], [0, 2], [-1, 0]):
        with pytest.raises(InputError, match="assignment"):
            evaluator.score(bad)
    with pytest.raises(InputError, match="one assignment"):
        evaluator.outcome([[0, 0], [0, 1]])
    assert evaluator.score(np.zeros((0, 2), int)).shape == (0,)


def test_a_graph_of_nothing_but_one_op_works():
    problem = Problem(
        graph=OpGraph.build(names=["all"], edges=[]),
        cluster=Cluster(devices=(Device(name="h/cpu:0", kind="cpu"),)),
        latency_ms=np.asarray([[3.0]]),
    )
    found = SimulatedEvaluator(problem).outcome([0], timeline=True)
    assert found.latency_ms == 3.0 and [s.label for s in found.timeline] == ["all"]
