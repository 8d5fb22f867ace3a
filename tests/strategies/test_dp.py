"""The pipeline dynamic programme finds the least load of all contiguous splits."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.problem import Objective, Problem, Semantics
from autoplace.simulate import SimulatedEvaluator
from autoplace.strategies import Budget
from autoplace.strategies._dp_states import plan_states
from autoplace.strategies._ideals import ClassGraph, grid, ideals
from autoplace.strategies._support import View
from autoplace.strategies.chunks import ChunksStrategy
from autoplace.strategies.dp import PipelineDpStrategy

SEMANTICS = [
    Semantics(transfers=t, route=r, contention=c)
    for t, r, c in itertools.product(("overlapped", "blocking"), ("direct", "host"), ("none", "link"))
]


def _even(problem):
    """The same problem with one kind of link between all devices."""
    link = Link(latency_ms=0.3, bytes_per_ms=25.0)
    return problem.with_(cluster=Cluster(devices=problem.cluster.devices, default_link=link))


def _contiguous(problem):
    """All assignments whose devices can be put in an order in which no tensor goes back."""
    edges = problem.graph.edge_list
    rows = []
    for row in itertools.product(range(problem.num_devices), repeat=problem.num_ops):
        ends = [(row[p], row[c]) for p, c, _ in edges.tolist()]
        if any(
            all(order.index(p) <= order.index(c) for p, c in ends)
            for order in itertools.permutations(range(problem.num_devices))
        ):
            rows.append(row)
    return np.asarray(rows, np.int32)


def _load_ms(problem, row):
    """The busiest device or link where a piece pays once for each tensor that it sends and each that it receives."""
    view, semantics, graph = View.of(problem), problem.semantics, problem.graph
    busiest = 0.0
    for device in set(row.tolist()):
        ops = sum(problem.latency_ms[i, device] for i in range(len(row)) if row[i] == device)
        held = sum(view.class_bytes[view.op_class[i]] for i in range(len(row)) if row[i] == device)
        received = sent = 0.0
        for producer, consumers, size in graph.tensors():
            others = [d for d in range(problem.num_devices) if d != device]
            if row[producer] != device and any(row[c] == device for c in consumers):
                received += (
                    view.ends[1].latency_ms[others[0], device] + size * view.ends[1].ms_per_byte[others[0], device]
                )
            if row[producer] == device and any(row[c] != device for c in consumers):
                sent += view.ends[0].latency_ms[device, others[0]] + size * view.ends[0].ms_per_byte[device, others[0]]
        if held > view.capacity[device] or not np.isfinite(ops):
            return np.inf
        if semantics.transfers == "blocking":
            busiest = max(busiest, ops + received + sent)
        elif semantics.contention == "link":
            busiest = max(busiest, ops, received, sent if semantics.route == "host" else 0.0)
        else:
            busiest = max(busiest, ops)
    return busiest


@pytest.mark.parametrize("semantics", SEMANTICS, ids=lambda s: f"{s.transfers}-{s.route}-{s.contention}")
def test_the_load_equals_brute_force_over_all_contiguous_splits(semantics, random_problem):
    for seed in range(8):
        problem = random_problem(
            seed, ops=6, devices=2 + seed % 2, goal="throughput", semantics=semantics,
            memory=(None, 0.6)[seed % 2], unable=0.15,
        )  # fmt: skip
        problem = _even(problem)
        plans = PipelineDpStrategy().candidates(View.of(problem))
        best = min(_load_ms(problem, row) for row in _contiguous(problem))
        mine = min((_load_ms(problem, row) for row in plans), default=np.inf)
        assert mine == pytest.approx(best, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), semantics=st.sampled_from(SEMANTICS), ops=st.integers(1, 7), frees=st.booleans())
def test_two_devices_are_exact_under_simulation(seed, semantics, ops, frees, random_problem):
    problem = random_problem(
        seed, ops=ops, devices=2, goal="throughput", semantics=semantics, unable=0.2, holes=0.2, frees=frees
    )
    values = SimulatedEvaluator(problem).score(_contiguous(problem))
    plans = PipelineDpStrategy().propose(problem, budget=Budget())
    mine = SimulatedEvaluator(problem).evaluate(plans[:1])[0].objective if plans else np.inf
    assert mine == pytest.approx(values.min(), rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), contention=st.sampled_from(["none", "link"]), transfers=st.sampled_from(["overlapped", "blocking"]))  # fmt: skip  # noqa: E501
def test_host_staging_is_exact_under_simulation(seed, contention, transfers, random_problem):
    problem = random_problem(
        seed, ops=6, devices=3, goal="throughput", unable=0.1,
        semantics=Semantics(route="host", contention=contention, transfers=transfers),
    )  # fmt: skip
    best = SimulatedEvaluator(problem).score(_contiguous(problem)).min()
    plans = PipelineDpStrategy().propose(problem, budget=Budget())
    assert SimulatedEvaluator(problem).evaluate(plans[:1])[0].objective == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("transfers", ["overlapped", "blocking"])
@pytest.mark.parametrize("route", ["direct", "host"])
@pytest.mark.parametrize("devices", [3, 4, 6])
def test_never_worse_than_chunks_on_chains(devices, route, transfers, random_problem):
    for seed in range(6):
        problem = random_problem(
            seed, ops=9, devices=devices, goal="throughput", chain=True, memory=(None, 0.5)[seed % 2],
            holes=0.1 * (seed % 3),
            semantics=Semantics(route=route, transfers=transfers, contention=("none", "link")[seed % 2]),
        )  # fmt: skip
        problem = problem.with_(overhead_ms=0.3 * problem.latency_ms)
        for microbatches in (1, 3):
            problem = problem.with_(semantics=Semantics(**{**vars(problem.semantics), "microbatches": microbatches}))
            evaluator = SimulatedEvaluator(problem)
            chunks, dp = (k().propose(problem, budget=Budget()) for k in (ChunksStrategy, PipelineDpStrategy))
            mine, theirs = (evaluator.evaluate(plans[:1])[0].objective for plans in (dp, chunks))
            assert mine <= theirs * (1 + 1e-9)


def test_parallel_branches_are_cut_between_branches(random_problem):
    """Two chains that meet: the ideals find one chain a device, a line of alternating ops cannot."""
    names = [f"op{i}" for i in range(9)]
    edges = [(i, [i + 2], 100.0) for i in range(6)] + [(6, [8], 1.0), (7, [8], 1.0)]
    graph = OpGraph.build(names=names, edges=edges)
    devices = tuple(Device(name=f"host0/x:{d}", kind="x") for d in range(2))
    problem = Problem(
        graph=graph,
        cluster=Cluster(devices=devices, default_link=Link(latency_ms=0.0, bytes_per_ms=10.0)),
        latency_ms=np.where(np.arange(9) == 8, 0.5, 1.0)[:, None].repeat(2, axis=1),
        objective=Objective(goal="throughput"),
        semantics=Semantics(transfers="blocking"),
    )
    plans = PipelineDpStrategy().propose(problem, budget=Budget())
    assert SimulatedEvaluator(problem).evaluate(plans[:1])[0].objective == pytest.approx(4.6)
    chunks = ChunksStrategy().propose(problem, budget=Budget())
    assert SimulatedEvaluator(problem).evaluate(chunks[:1])[0].objective > 8


def _training(layers, *, seed=0, devices=3):
    """A chain, its loss and its mirrored backward, each layer's two ops co-located."""
    random = np.random.default_rng(seed)
    count = 2 * layers
    edges = [
        (i, [i + 1, count - 1 - i] if i < layers else [i + 1], float(random.integers(1, 50))) for i in range(count - 1)
    ]
    graph = OpGraph.build(
        names=[f"op{i}" for i in range(count)],
        edges=edges,
        weight_bytes=random.integers(1, 100, count),
        colocate=[min(i, count - 1 - i) for i in range(count)],
    )
    nodes = tuple(
        Device(name=f"host0/cuda:{d}", kind="cuda", memory_bytes=0.6 * float(graph.weight_bytes.sum()))
        for d in range(devices)
    )
    return Problem(
        graph=graph,
        cluster=Cluster(devices=nodes, default_link=Link(latency_ms=0.1, bytes_per_ms=30.0)),
        latency_ms=0.5 + random.random((count, devices)),
        objective=Objective(goal="throughput"),
    )


@pytest.mark.parametrize("transfers", ["overlapped", "blocking"])
@pytest.mark.parametrize("most_ideals", [2000, 0])
def test_training_mirrors_the_forward_split(most_ideals, transfers):
    for seed in range(6):
        problem = _training(6, seed=seed).with_(semantics=Semantics(transfers=transfers))
        evaluator = SimulatedEvaluator(problem)
        splits = [
            np.repeat(np.asarray(order, np.int32), np.diff([0, *cuts, 6]))
            for k in (1, 2, 3)
            for order in itertools.permutations(range(3), k)
            for cuts in itertools.combinations(range(1, 6), k - 1)
        ]
        best = evaluator.score(np.stack([np.concatenate([s, s[::-1]]) for s in splits])).min()
        plans = PipelineDpStrategy(most_ideals=most_ideals).propose(problem, budget=Budget())
        for plan in plans:
            assignment = plan.assignment_array(problem)
            assert (assignment == assignment[::-1]).all()
        assert evaluator.evaluate(plans[:1])[0].objective == pytest.approx(best, rel=1e-9)


def test_ideals_are_counted_and_bounded():
    chains = np.asarray([(c * 5 + i, c * 5 + i + 1) for c in range(3) for i in range(4)])
    lattice = ideals(chains, 15, 216)
    assert lattice is not None
    assert len(lattice.member) == 6**3
    sizes = lattice.member.sum(axis=1)
    assert (np.diff(sizes) >= 0).all() and sizes[0] == 0 and sizes[-1] == 15
    assert (lattice.member[:, chains[:, 0]] >= lattice.member[:, chains[:, 1]]).all()
    assert len(np.unique(lattice.member, axis=0)) == 216
    for child, (begin, end) in enumerate(itertools.pairwise(lattice.below_first.tolist())):
        for smaller, node in zip(lattice.below[begin:end], lattice.without[begin:end], strict=True):
            assert lattice.member[child].sum() == lattice.member[smaller].sum() + 1
            assert lattice.member[child, node] and not lattice.member[smaller, node]
    assert ideals(chains, 15, 215) is None


def test_too_many_ideals_fall_back_to_lines(random_problem):
    problem = _even(random_problem(2, ops=30, devices=2, goal="throughput"))
    whole, line = (PipelineDpStrategy(most_ideals=n).candidates(View.of(problem)) for n in (2000, 0))
    graphs = [ClassGraph.of(View.of(problem))]
    graphs.append(graphs[0].depth_first())
    two = [a for a in line if len(set(a.tolist())) == 2]
    assert two
    for assignment in two:  # contiguous in one of the two lines
        cuts = [(np.diff(assignment[np.argsort(g.place)]) != 0).sum() for g in graphs]
        assert min(cuts) == 1
    assert min(_load_ms(problem, a) for a in whole) <= min(_load_ms(problem, a) for a in line) + 1e-12


def test_the_grid_keeps_its_bound_and_what_is_near_a_border(random_problem):
    graph = ClassGraph.of(View.of(random_problem(3, ops=500)))
    coarse, step = grid(graph, 50)
    assert len(coarse) <= 52 and coarse[0] == 0 and coarse[-1] == 500
    assert step == 10
    fine, step = grid(graph, 50, np.asarray([123]), reach=10)
    assert len(fine) <= 52
    assert set(range(113, 134)) <= set(fine.tolist())
    assert step == 1
    assert grid(graph, 501)[0].tolist() == list(range(501))


def test_states_grow_with_what_must_be_known(random_problem):
    even = _even(random_problem(1, devices=4, goal="throughput"))
    assert plan_states(View.of(even)).moves.states == 16
    same = even.with_(latency_ms=np.repeat(even.latency_ms[:, :1], 4, axis=1))
    cluster = Cluster(devices=tuple(Device(name=f"a/x:{d}", kind="x") for d in range(4)), default_link=Link(latency_ms=0.1, bytes_per_ms=1.0))  # fmt: skip  # noqa: E501
    assert plan_states(View.of(same.with_(cluster=cluster))).moves.states == 5
    uneven = random_problem(1, devices=4, goal="throughput")
    assert plan_states(View.of(uneven)).moves.states == 33
    many = random_problem(1, devices=12, goal="throughput")
    assert len(plan_states(View.of(many)).moves.source) <= 48


def test_energy_gets_a_plan_for_every_set_of_devices(random_problem):
    problem = _even(random_problem(4, ops=10, devices=3, goal="throughput", energy_weight=0.5))
    sets = {frozenset(a.tolist()) for a in PipelineDpStrategy().candidates(View.of(problem))}
    assert len(sets) == 7


@pytest.mark.parametrize("goal", ["latency", "throughput"])
def test_large_problems_stay_within_their_time(goal, random_problem):
    view = View.of(random_problem(0, ops=3000, devices=4, goal=goal))
    PipelineDpStrategy().candidates(View.of(random_problem(0, ops=10, devices=4, goal=goal)))
    begin = time.perf_counter()
    plans = PipelineDpStrategy().candidates(view)
    assert time.perf_counter() - begin < 5.0
    assert {len(set(a.tolist())) for a in plans} == {1, 2, 3, 4}
