"""Coarsening keeps what it says it keeps; the multi-level search finds no less than it was given."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoplace.errors import InputError
from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Cluster, Link
from autoplace.problem import Semantics
from autoplace.simulate import SimulatedEvaluator
from autoplace.strategies._base import Budget
from autoplace.strategies._search import Scorer
from autoplace.strategies._support import View
from autoplace.strategies.annealing import AnnealingStrategy
from autoplace.strategies.heuristics import construct
from autoplace.strategies.multilevel import (
    MultilevelStrategy,
    coarse_problem,
    coarsen_levels,
    level_sizes,
    project,
    restrict,
)


def equal_links(problem, latency_ms=0.3, bytes_per_ms=20.0):
    link = Link(latency_ms=latency_ms, bytes_per_ms=bytes_per_ms)
    return problem.with_(cluster=Cluster(devices=problem.cluster.devices, default_link=link))


def draws(coarse, seed, count=5):
    """Draw placements of groups on devices that can run them, co-located groups together."""
    view, random = View.of(coarse), np.random.default_rng(seed)
    rows = [[random.choice(np.flatnonzero(row)) for row in view.allowed] for _ in range(count)]
    return [view.spread(np.asarray(row)) for row in rows]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    ops=st.integers(1, 80),
    most=st.integers(1, 40),
    colocate=st.booleans(),
    unable=st.sampled_from([0.0, 0.3]),
    contention=st.sampled_from(["none", "link"]),
    transfers=st.sampled_from(["overlapped", "blocking"]),
    route=st.sampled_from(["direct", "host"]),
    goal=st.sampled_from(["latency", "throughput"]),
)
def test_loads_rules_and_memory_of_groups_are_those_of_their_ops(
    random_problem, seed, ops, most, colocate, unable, contention, transfers, route, goal
):
    semantics = Semantics(contention=contention, transfers=transfers, route=route)
    problem = equal_links(
        random_problem(
            seed, ops=max(ops, 4), goal=goal, colocate=colocate, unable=unable, semantics=semantics, memory=3.0
        )
    )
    coarse, group = coarse_problem(problem, most)
    assert sorted(set(group.tolist())) == list(range(coarse.num_ops))
    assert len(coarse.graph.topological_order) == coarse.num_ops  # raises on a cycle
    if not colocate and not unable:
        assert coarse.num_ops <= most
    assert coarse.graph.weight_bytes.sum() == problem.graph.weight_bytes.sum()
    fine_view, fine, score = View.of(problem), SimulatedEvaluator(problem), SimulatedEvaluator(coarse)
    for placed in draws(coarse, seed):
        whole = project(group, placed)
        assert problem.can_run[np.arange(problem.num_ops), whole].all()
        assert np.array_equal(fine_view.spread(fine_view.gather(whole)), whole)  # co-location holds
        assert fine_view.fits(fine_view.gather(whole))
        outcome, rough = fine.outcome(whole), score.outcome(placed)
        assert outcome.feasible and rough.feasible
        busy = outcome.busy_ms if transfers == "overlapped" else None
        if busy is not None:
            assert rough.busy_ms == pytest.approx(busy)
        if goal == "throughput":
            assert rough.objective == pytest.approx(outcome.objective)
        assert np.array_equal(restrict(problem, coarse, group, whole), placed)


def test_a_coarse_placement_out_of_memory_is_one_of_its_ops_too(random_problem):
    problem = random_problem(3, ops=60, memory=0.5)
    coarse, group = coarse_problem(problem, 12)
    for placed in draws(coarse, 0, 20):
        assert (
            SimulatedEvaluator(coarse).outcome(placed).feasible
            == SimulatedEvaluator(problem).outcome(project(group, placed)).feasible
        )


def test_chains_become_groups_of_equal_size_and_keep_their_latency(random_problem):
    problem = equal_links(random_problem(1, ops=200, chain=True), latency_ms=0.0)
    coarse, group = coarse_problem(problem, 20)
    assert 14 <= coarse.num_ops <= 20
    assert (np.diff(group[problem.graph.topological_order]) >= 0).all()
    mean = problem.latency_ms.mean(axis=1)
    assert np.bincount(group, weights=mean).max() <= 1.6 * mean.sum() / 20
    placed = np.arange(coarse.num_ops, dtype=np.int32) * 3 // coarse.num_ops
    rough = SimulatedEvaluator(coarse).score(placed)[0]
    assert rough == pytest.approx(SimulatedEvaluator(problem).score(project(group, placed))[0])


def test_parallel_branches_stay_apart_where_the_goal_is_latency(random_problem):
    edges = [(0, [1 + 5 * b for b in range(4)], 1.0)]
    edges += [(5 * b + i, [5 * b + i + 1 if i < 5 else 21], 1.0) for b in range(4) for i in range(1, 6)]
    base = equal_links(random_problem(0, ops=22), latency_ms=0.01, bytes_per_ms=1e6)
    graph = OpGraph.build(names=[f"op{i}" for i in range(22)], edges=edges)
    problem = base.with_(graph=graph, latency_ms=np.full((22, 3), 1.0))
    _, group = coarse_problem(problem, 6)
    branches = [set(group[1 + 5 * b : 6 + 5 * b].tolist()) for b in range(4)]
    assert all(len(branch) == 1 for branch in branches) and len(set.union(*branches)) == 4


def test_backward_ops_follow_their_forward_ops_without_a_cycle(random_problem):
    count = 40
    chain = [(i, [i + 1], 4.0) for i in range(2 * count - 1)]
    saved = [(i, [2 * count - 1 - i], 4.0) for i in range(count - 1)]
    graph = OpGraph.build(
        names=[f"op{i}" for i in range(2 * count)],
        edges=chain + saved,
        colocate=[*range(count), *reversed(range(count))],
    )
    base = random_problem(0, ops=2 * count)
    problem = base.with_(graph=graph)
    coarse, group = coarse_problem(problem, 16)
    assert coarse.num_ops <= 24
    assert View.of(coarse).num_classes >= 6  # forward and backward groups pair up and do not all stick together
    for i in range(count):
        one, other = group[i], group[2 * count - 1 - i]
        assert one == other or coarse.graph.colocate[one] == coarse.graph.colocate[other] >= 0


def test_barriers_stay_alone_and_costs_that_a_smaller_batch_does_not_save_add_up(random_problem):
    problem = random_problem(5, ops=30, semantics=Semantics(microbatches=3), unable=0.2)
    kinds = ["barrier" if i == 15 else "op" for i in range(30)]
    graph = OpGraph.build(names=problem.graph.names, edges=problem.graph.tensors(), kinds=kinds)
    problem = equal_links(problem.with_(graph=graph, overhead_ms=0.2 * np.ones((30, 3)), dispatch_ms=0.05))
    coarse, group = coarse_problem(problem, 4)
    assert (group == group[15]).sum() == 1 and coarse.graph.kinds[group[15]] == "barrier"
    placed = draws(coarse, 1, 1)[0]
    if len(np.unique(placed)) > 1:
        ours = SimulatedEvaluator(coarse).outcome(placed).busy_ms
        assert ours == pytest.approx(SimulatedEvaluator(problem).outcome(project(group, placed)).busy_ms)


def test_a_tensor_read_by_several_groups_stays_one(random_problem):
    graph = OpGraph.build(names=list("abcd"), edges=[(0, [1, 2, 3], 8.0), (0, [1, 2, 3], 4.0), (1, [3], 2.0)])
    base = equal_links(random_problem(0, ops=4), latency_ms=0.5, bytes_per_ms=10.0)
    problem = base.with_(graph=graph, latency_ms=np.ones((4, 3)))
    coarse, _ = coarse_problem(problem, 4)
    # Two tensors together carry the second's start of 0.5 ms as 5 bytes.
    assert coarse.graph.tensors() == [(0, [1, 2, 3], 8.0 + 4.0 + 5.0), (1, [3], 2.0)]
    with pytest.raises(InputError, match="ask for 1 or more"):
        coarse_problem(problem, 0)


def test_levels_shrink_and_small_problems_have_none(random_problem):
    assert level_sizes(10_000) == [3333, 833, 208] and level_sizes(100_000)[-1] <= 600
    problem = random_problem(2, ops=400, chain=True)
    levels = coarsen_levels(problem, [100, 90, 20])
    assert [level.problem.num_ops for level in levels] == [
        pytest.approx(95, abs=5),
        pytest.approx(18, abs=2),
    ]  # 90 of 100 groups would gain nothing
    for level in levels:
        assert level.group_of_op.shape == (400,)
        assert level.problem.latency_ms.sum() == pytest.approx(problem.latency_ms.sum())
    assert coarsen_levels(random_problem(0, ops=4), [300]) == []


@pytest.mark.parametrize("goal", ["latency", "throughput"])
def test_search_is_never_worse_than_the_heuristics_and_repeats_itself(random_problem, goal):
    problem = random_problem(4, ops=300, goal=goal, memory=0.6)
    heuristics = construct(Scorer(problem, Budget(evaluations=100).start()))
    bound = min(j for found in heuristics.values() for j, _ in found)
    runs = []
    for _ in range(2):
        clock = Budget(evaluations=300).start()
        runs.append(MultilevelStrategy(levels=(80, 20)).search(Scorer(problem, clock), seed=3))
        assert clock.evaluations <= 300
    (best, assignment), (again, same) = runs[0][0], runs[1][0]
    assert best <= bound and best == again and np.array_equal(assignment, same)
    assert SimulatedEvaluator(problem).score(assignment)[0] == best
    assert [j for j, _ in runs[0]] == sorted(j for j, _ in runs[0])


def test_what_is_known_comes_back_when_the_budget_ends(random_problem):
    problem = random_problem(6, ops=200)
    for evaluations in (1, 3, 20):
        clock = Budget(evaluations=evaluations).start()
        scorer = Scorer(problem, clock)
        start = scorer.rank([np.zeros(200, np.int32)])
        found = MultilevelStrategy(levels=(50, 10)).improve(scorer, start, seed=0)
        assert found[0][0] <= start[0][0] and clock.evaluations <= evaluations


def test_it_calls_the_search_that_it_is_given_on_the_coarsest_problem(random_problem):
    seen = []

    def inner(scorer, seed):
        seen.append((scorer.problem.num_ops, seed))
        return AnnealingStrategy().search(scorer, seed=seed)

    found = MultilevelStrategy(inner, levels=(60, 12)).search(
        Scorer(random_problem(7, ops=250), Budget(evaluations=200).start()), seed=5
    )
    assert len(seen) == 1 and seen[0][0] <= 12 and seen[0][1] == 5 and found


def test_memory_that_is_freed_and_devices_that_cannot_talk(random_problem):
    for seed in range(3):
        problem = random_problem(seed, ops=120, memory=0.45, frees=True, holes=0.3)
        found = MultilevelStrategy(levels=(30,)).search(Scorer(problem, Budget(evaluations=150).start()), seed=0)
        for value, assignment in found:
            assert np.isfinite(value) and SimulatedEvaluator(problem).outcome(assignment).feasible
