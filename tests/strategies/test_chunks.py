"""Chunks are the best of all contiguous splits of a chain, in every semantics."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from autoplace.problem import Semantics
from autoplace.simulate import SimulatedEvaluator
from autoplace.strategies import Budget
from autoplace.strategies._support import View
from autoplace.strategies.chunks import ChunksStrategy, device_orders


def _all_splits(ops, devices):
    """All contiguous assignments of a chain to distinct devices."""
    for count in range(1, min(ops, devices) + 1):
        for order in itertools.permutations(range(devices), count):
            for cuts in itertools.combinations(range(1, ops), count - 1):
                yield np.repeat(np.asarray(order, np.int32), np.diff([0, *cuts, ops]))


@pytest.mark.parametrize("goal", ["latency", "throughput"])
@pytest.mark.parametrize("route", ["direct", "host"])
@pytest.mark.parametrize("transfers", ["overlapped", "blocking"])
def test_chunks_equal_brute_force_on_chains(transfers, route, goal, random_problem):
    for seed in range(12):
        semantics = Semantics(transfers=transfers, route=route, contention=("none", "link")[seed % 2])
        problem = random_problem(
            seed, ops=1 + seed % 7, devices=1 + seed % 3, goal=goal, semantics=semantics, chain=True,
            memory=(None, 0.5)[seed % 4 == 3], holes=0.2, unable=0.15,
        )  # fmt: skip
        evaluator = SimulatedEvaluator(problem)
        best = min(evaluator.score(np.stack(list(_all_splits(problem.num_ops, problem.num_devices)))))
        plans = ChunksStrategy().propose(problem, budget=Budget())
        mine = evaluator.evaluate(plans[:1])[0].objective if plans else np.inf
        assert mine == pytest.approx(best, rel=1e-9)


def test_microbatches_pay_overhead_and_link_latency_each_time(random_problem):
    for seed in range(6):
        problem = random_problem(seed, ops=6, devices=3, goal="throughput", chain=True,
                                 semantics=Semantics(transfers="blocking", microbatches=3))  # fmt: skip
        problem = problem.with_(overhead_ms=0.3 * problem.latency_ms)
        evaluator = SimulatedEvaluator(problem)
        best = min(evaluator.score(np.stack(list(_all_splits(6, 3)))))
        plans = ChunksStrategy().propose(problem, budget=Budget())
        assert evaluator.evaluate(plans[:1])[0].objective == pytest.approx(best, rel=1e-9)


def test_colocated_ops_fold_into_the_place_of_their_first(random_problem):
    problem = random_problem(3, ops=10, devices=2, goal="throughput", colocate=True, chain=True)
    view = View.of(problem)
    for assignment in ChunksStrategy().candidates(view):
        class_device = view.gather(assignment)
        assert (np.diff(class_device) != 0).sum() <= 1  # one border at most along the class order
        assert (view.spread(class_device) == assignment).all()


def test_every_number_of_chunks_is_proposed(random_problem):
    problem = random_problem(9, devices=4, goal="throughput")
    counts = {len(set(a.tolist())) for a in ChunksStrategy().candidates(View.of(problem))}
    assert counts == {1, 2, 3, 4}


def test_more_than_four_devices_are_laid_out_by_speed_and_links(random_problem):
    view = View.of(random_problem(1, devices=6))
    orders = list(device_orders(view))
    assert len(orders) == len(set(orders)) <= 24
    assert {len(o) for o in orders} == {1, 2, 3, 4, 5, 6}
    assert all(len(set(o)) == len(o) for o in orders)
    pace = view.class_latency_ms.sum(axis=0)
    assert any(len(o) == 1 and pace[o[0]] <= np.median(pace) for o in orders)
