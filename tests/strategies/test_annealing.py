"""Annealing reaches the optimum of tiny problems and never loses its start."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from autoplace.simulate import SimulatedEvaluator
from autoplace.strategies import HEURISTICS, Budget
from autoplace.strategies.annealing import AnnealingStrategy


@pytest.mark.parametrize("goal", ["latency", "throughput"])
@pytest.mark.parametrize("seed", range(4))
def test_annealing_reaches_the_brute_force_optimum(seed, goal, random_problem):
    problem = random_problem(
        seed, ops=8, devices=3, goal=goal, memory=0.5, colocate=True, energy_weight=0.5 * (seed % 2)
    )
    evaluator = SimulatedEvaluator(problem)
    best = evaluator.score(np.asarray(list(itertools.product(range(3), repeat=8)), np.int32)).min()
    plans = AnnealingStrategy().propose(problem, budget=Budget(evaluations=3000), seed=0)
    assert evaluator.evaluate(plans[:1])[0].objective == pytest.approx(best, rel=1e-12)


def test_annealing_is_never_worse_than_the_heuristics(random_problem):
    improved = 0
    for seed in range(6):
        problem = random_problem(seed, ops=40, devices=3)
        evaluator = SimulatedEvaluator(problem)
        plans = [p for kind in HEURISTICS for p in kind().propose(problem, budget=Budget())]
        start = min(o.objective for o in evaluator.evaluate(plans))
        found = AnnealingStrategy().propose(problem, budget=Budget(evaluations=300), seed=seed)
        value = evaluator.evaluate(found[:1])[0].objective
        assert value <= start
        improved += value < start
    assert improved >= 5


def test_other_seeds_take_other_ways(random_problem):
    problem = random_problem(0, ops=40)
    ways = {
        str(AnnealingStrategy().propose(problem, budget=Budget(evaluations=100), seed=seed)[0].to_json())
        for seed in range(4)
    }
    assert len(ways) > 1


def test_a_start_that_no_heuristic_finds_is_drawn(random_problem, monkeypatch):
    monkeypatch.setattr("autoplace.strategies.annealing.construct", lambda scorer: {})
    problem = random_problem(5, memory=0.5)
    assert AnnealingStrategy().propose(problem, budget=Budget(evaluations=60))


def test_nothing_to_move_ends_the_search(random_problem):
    problem = random_problem(0, devices=1)
    strategy = AnnealingStrategy()
    assert len(strategy.propose(problem, budget=Budget(evaluations=10_000))) == 1
    assert strategy.evaluations < 10
