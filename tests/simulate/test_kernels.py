"""The kernels equal the slow reference in every mode, and hand calculations on tiny cases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoplace.graph import OpGraph
from autoplace.hardware import Cluster, Device, Link
from autoplace.problem import Objective, Problem, Semantics
from autoplace.simulate import SimulatedEvaluator
from autoplace.simulate.expand import expand_equal

MODES = [
    dict(zip(("transfers", "route", "contention", "queue"), values, strict=True))
    for values in itertools.product(
        ("overlapped", "blocking"), ("direct", "host"), ("none", "link"), ("fifo", "priority")
    )
]


def check(reference, problem, plans):
    evaluator = SimulatedEvaluator(problem)
    scores = evaluator.score(plans)
    names = [d.name for d in problem.cluster.devices]
    for plan, score in zip(plans, scores, strict=True):
        wanted, found = reference.evaluate(problem, plan), evaluator.outcome(plan)
        assert found.feasible == wanted.feasible
        assert found.objective == score
        if not wanted.feasible:
            assert found.reason and score == np.inf
            continue
        assert found.latency_ms == wanted.makespan
        assert found.period_ms == wanted.period
        assert found.peak_memory_bytes == {names[d]: b for d, b in wanted.peak.items()}
        assert found.busy_ms == pytest.approx({names[d]: b for d, b in wanted.busy.items()})
        assert found.energy_j == (None if wanted.energy is None else pytest.approx(wanted.energy))
        assert found.objective == pytest.approx(wanted.objective)
        start, finish = evaluator.schedule(plan)
        assert start[0].tolist() == [wanted.start[i] for i in range(problem.num_ops)]
        assert finish[0].tolist() == [wanted.finish[i] for i in range(problem.num_ops)]


@pytest.mark.parametrize("mode", MODES, ids=lambda m: "-".join(m.values()))
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    ops=st.integers(1, 10),
    devices=st.integers(1, 4),
    goal=st.sampled_from(["latency", "latency", "throughput"]),
    weight=st.sampled_from([0.0, 0.5, 1.0]),
    pressure=st.booleans(),
)
def test_equals_the_reference(reference, random_problem, mode, seed, ops, devices, goal, weight, pressure):
    objective = Objective(goal=goal, energy_weight=weight)
    problem, plans = random_problem(
        seed, semantics=Semantics(**mode), objective=objective, ops=ops, devices=devices, pressure=pressure
    )
    check(reference, problem, plans)


@pytest.mark.parametrize("mode", MODES, ids=lambda m: "-".join(m.values()))
def test_equals_the_reference_on_a_larger_graph(reference, random_problem, mode):
    for seed in range(3):
        problem, plans = random_problem(
            seed, semantics=Semantics(**mode), objective=Objective(), ops=40, devices=4, pressure=False
        )
        problem = problem.with_(latency_ms=np.nan_to_num(problem.latency_ms, posinf=4.0))
        check(reference, problem, plans[:3])


@pytest.mark.parametrize("mode", MODES, ids=lambda m: "-".join(m.values()))
def test_the_best_of_all_assignments_equals_the_references(reference, random_problem, mode):
    problem, _ = random_problem(11, semantics=Semantics(**mode), objective=Objective(), ops=5, devices=3, pressure=True)
    plans = np.asarray(list(itertools.product(range(3), repeat=5)), np.int32)
    scores = SimulatedEvaluator(problem).score(plans)
    wanted = [reference.evaluate(problem, plan).objective for plan in plans]
    assert scores.tolist() == pytest.approx(wanted)
    assert np.isfinite(scores).any()


def two_devices(kinds=("cuda", "cuda"), **semantics):
    """a (1 ms) makes one tensor of 200 bytes for b (2 ms) and c (3 ms); a link takes 0.5 ms + 100 bytes per ms."""
    graph = OpGraph.build(names=["a", "b", "c"], edges=[(0, [1, 2], 200.0), (0, [2], 100.0)])
    devices = tuple(Device(name=f"h/{k}:{i}", kind=k, idle_watts=10, busy_watts=110) for i, k in enumerate(kinds))
    cluster = Cluster(devices=devices, default_link=Link(latency_ms=0.5, bytes_per_ms=100.0))
    latency = np.repeat([[1.0], [2.0], [3.0]], len(kinds), axis=1)
    return Problem(graph=graph, cluster=cluster, latency_ms=latency, semantics=Semantics(**semantics))


def latency(problem, plan):
    return SimulatedEvaluator(problem).outcome(plan).latency_ms


def test_one_device_is_the_sum_of_its_ops():
    assert latency(two_devices(), [0, 0, 0]) == 6.0


def test_a_tensor_goes_to_a_device_once_and_overlapped_transfers_without_contention_do_not_wait():
    # 200 bytes arrive at 1 + 2.5, 100 bytes at 1 + 1.5; b is ready at 3.5, c at 3.5; b first by op order.
    assert latency(two_devices(contention="none"), [0, 1, 1]) == 3.5 + 2 + 3


def test_a_contended_link_carries_one_transfer_at_a_time():
    # 200 bytes until 3.5, then 100 bytes until 5; b from 3.5 to 5.5, c from 5.5.
    assert latency(two_devices(contention="link"), [0, 1, 1]) == 5.5 + 3
    # c alone over there: both tensors, one after the other, then 3 ms; b meanwhile at home.
    assert latency(two_devices(contention="link"), [0, 0, 1]) == 5.0 + 3


def test_a_blocking_transfer_keeps_both_devices_from_their_ops():
    # transfers from 1 to 3.5 and to 5, and only then b (at home) from 5 to 7; c from 5 to 8.
    problem = two_devices(transfers="blocking")
    found = SimulatedEvaluator(problem).outcome([0, 0, 1])
    assert found.latency_ms == 8.0
    assert found.busy_ms == {"h/cuda:0": 1 + 4 + 2, "h/cuda:1": 4 + 3}


def test_host_route_pays_once_out_and_once_in_for_each_receiver():
    # no cpu device: the default link stands for both legs. 200 bytes: out at 3.5, in at 6; b from 6 to 8.
    # 100 bytes: out at 2.5, in at 4; c waits for the 200 bytes until 6, for b until 8, ends at 11.
    assert latency(two_devices(route="host", contention="none"), [0, 1, 1]) == 11.0


def test_host_route_costs_cpu_devices_nothing():
    problem = two_devices(("cpu", "cuda"), route="host", contention="none")
    assert latency(problem, [0, 1, 1]) == 1 + 2.5 + 2 + 3  # in legs alone
    problem = two_devices(("cpu", "cpu"), route="host", contention="link")
    assert latency(problem, [0, 1, 0]) == 1 + 3


def test_priority_runs_the_longest_path_first():
    assert latency(two_devices(queue="fifo"), [0, 0, 0]) == 6.0
    graph = OpGraph.build(names=["short", "long", "tail"], edges=[(1, [2], 0.0)])
    base = two_devices()
    problem = base.with_(graph=graph, latency_ms=np.repeat([[1.0], [1.0], [5.0]], 2, axis=1))
    start, _ = SimulatedEvaluator(problem).schedule([0, 0, 0])
    assert start.tolist() == [[0.0, 1.0, 2.0]]
    start, _ = SimulatedEvaluator(problem.with_(semantics=Semantics(queue="priority"))).schedule([0, 0, 0])
    assert start.tolist() == [[6.0, 0.0, 1.0]]


@pytest.mark.parametrize(
    ("semantics", "period"),
    [
        ({"contention": "none"}, 5.0),  # devices: 1 and 5
        ({"contention": "link"}, 5.0),  # link: 2.5 + 1.5 = 4
        ({"transfers": "blocking"}, 9.0),  # the receiver: 4 + 5
        ({"transfers": "blocking", "route": "host"}, 9.0),
    ],
)
def test_throughput_is_the_load_of_the_busiest_resource(semantics, period):
    problem = two_devices(**semantics).with_(objective=Objective(goal="throughput"), batch_size=10)
    found = SimulatedEvaluator(problem).outcome([0, 1, 1])
    assert found.period_ms == found.objective == period
    assert found.throughput_sps == pytest.approx(1000 * 10 / period)
    assert found.latency_ms > period


def test_a_contended_link_bounds_the_throughput():
    problem = two_devices().with_(objective=Objective(goal="throughput"), latency_ms=np.full((3, 2), 0.5))
    assert SimulatedEvaluator(problem).outcome([0, 1, 1]).period_ms == 4.0
    free = problem.with_(semantics=Semantics(contention="none"))
    assert SimulatedEvaluator(free).outcome([0, 1, 1]).period_ms == 1.0


def test_energy_is_idle_power_all_the_time_and_busy_power_on_top():
    found = SimulatedEvaluator(two_devices(contention="none")).outcome([0, 1, 1])
    assert found.latency_ms == 8.5
    assert found.energy_j == pytest.approx((2 * 10 * 8.5 + 100 * 6) / 1000)
    assert found.energy_source == "model"


def test_memory_is_freed_after_the_last_consumer_where_the_op_says_so():
    graph = OpGraph.build(
        names=["a", "b", "c", "d"],
        edges=[(0, [1], 0.0), (1, [2], 0.0), (2, [3], 0.0)],
        weight_bytes=[100, 0, 0, 0],
        activation_bytes=[10, 20, 30, 40],
        frees=[True, True, True, True],
    )
    problem = two_devices().with_(graph=graph, latency_ms=np.ones((4, 2)))
    found = SimulatedEvaluator(problem).outcome([0, 0, 0, 0])
    assert found.peak_memory_bytes == {"h/cuda:0": 100 + 30 + 40, "h/cuda:1": 0}


def test_the_timeline_lists_ops_and_transfers():
    found = SimulatedEvaluator(two_devices()).outcome([0, 1, 1], timeline=True)
    spans = [(s.resource, s.label, s.start_ms, s.end_ms) for s in found.timeline]
    assert spans == [
        ("h/cuda:0", "a", 0.0, 1.0),
        ("h/cuda:1", "b", 3.5, 5.5),
        ("h/cuda:1", "c", 5.5, 8.5),
        ("h/cuda:0 -> h/cuda:1", "a", 1.0, 3.5),
        ("h/cuda:0 -> h/cuda:1", "a", 3.5, 5.0),
    ]


@pytest.mark.parametrize("mode", MODES, ids=lambda m: "-".join(m.values()))
def test_the_timeline_fills_every_device_as_long_as_it_is_busy(random_problem, mode):
    problem, plans = random_problem(
        5, semantics=Semantics(**mode), objective=Objective(), ops=12, devices=3, pressure=False
    )
    problem = problem.with_(latency_ms=np.nan_to_num(problem.latency_ms, posinf=4.0))
    evaluator = SimulatedEvaluator(problem)
    found = evaluator.outcome(plans[1], timeline=True)
    assert found.feasible
    for name, busy in found.busy_ms.items():
        mine = [s for s in found.timeline if s.resource == name or name in s.resource.split(" -> ")]
        own = [s for s in mine if s.resource == name]
        counted = mine if mode["transfers"] == "blocking" else own
        if mode["route"] == "host" and "/cpu:" in name:
            counted = own
        assert sum(s.end_ms - s.start_ms for s in counted) == pytest.approx(busy)
    assert max(s.end_ms for s in found.timeline) == found.latency_ms


@pytest.mark.parametrize("mode", MODES, ids=lambda m: "-".join(m.values()))
def test_the_timeline_is_the_references(reference, random_problem, mode):
    seen = 0
    for seed in range(12):
        problem, plans = random_problem(
            seed, semantics=Semantics(**mode), objective=Objective(), ops=12, devices=3, pressure=False
        )
        wanted, found = (
            reference.evaluate(problem, plans[1]),
            SimulatedEvaluator(problem).outcome(plans[1], timeline=True),
        )
        names = {i: d.name for i, d in enumerate(problem.cluster.devices)} | {reference.HOST: reference.HOST}
        spans = [(names[int(plans[1][op])], f"op{op}", start, wanted.finish[op]) for op, start in wanted.start.items()]
        for source, target, tensor, start, end in wanted.transfers:
            label = f"op{problem.graph.tensor_producer[tensor]}"
            spans.append((f"{names[source]} -> {names[target]}", label, start, end))
            seen += 1
        assert sorted((s.resource, s.label, s.start_ms, s.end_ms) for s in found.timeline) == sorted(spans)
    assert seen > 0


@pytest.mark.parametrize("mode", MODES, ids=lambda m: "-".join(m.values()))
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    ops=st.integers(1, 8),
    devices=st.integers(1, 4),
    microbatches=st.sampled_from([2, 4]),
    goal=st.sampled_from(["latency", "throughput"]),
    weight=st.sampled_from([0.0, 0.5]),
    pressure=st.booleans(),
)
def test_microbatches_equal_the_reference(
    reference, random_problem, mode, seed, ops, devices, microbatches, goal, weight, pressure
):
    """Parts are powers of two, so that times stay dyadic and ties exact."""
    problem, plans = random_problem(
        seed,
        semantics=Semantics(**mode, microbatches=microbatches),
        objective=Objective(goal=goal, energy_weight=weight),
        ops=ops,
        devices=devices,
        pressure=pressure,
    )
    evaluator = SimulatedEvaluator(problem)
    larger, source = expand_equal(problem, microbatches)
    for plan, score in zip(plans, evaluator.score(plans), strict=True):
        wanted, found = reference.evaluate(larger, plan[source]), evaluator.outcome(plan)
        assert found.feasible == wanted.feasible
        assert found.objective == score == pytest.approx(wanted.objective)
        if wanted.feasible:
            assert found.latency_ms == wanted.makespan and found.period_ms == wanted.period


def test_the_same_plan_scores_the_same_whatever_ran_before(random_problem):
    problem, plans = random_problem(
        3, semantics=Semantics(queue="priority"), objective=Objective(), ops=30, devices=4, pressure=False
    )
    first = SimulatedEvaluator(problem)
    scores = first.score(np.concatenate([plans, plans[::-1]]))
    assert scores.tolist() == [*scores[:4].tolist(), *scores[:4][::-1].tolist()]
    assert [SimulatedEvaluator(problem).score(p)[0] for p in plans] == scores[:4].tolist()
