"""The guided search is never worse than its parts, ends in time, and uses what the policy says."""

from __future__ import annotations

import time

import numpy as np
import pytest

from autoplace.policy.network import PolicyNetwork
from autoplace.policy.policy import Policy
from autoplace.simulate import SimulatedEvaluator
from autoplace.strategies import HEURISTICS, Budget
from autoplace.strategies.guided import GuidedConfig, GuidedStrategy


@pytest.fixture(scope="module")
def policy():
    return Policy.of(PolicyNetwork(seed=0))


def _value(problem, plans):
    return SimulatedEvaluator(problem).score(plans[0].assignment_array(problem))[0]


@pytest.mark.parametrize("evaluations", [60, 400, 6000])
def test_it_is_never_worse_than_heuristics_and_policy(evaluations, random_problem, policy):
    better = 0
    for seed in range(4):
        problem = random_problem(seed, ops=30, devices=3, memory=0.6, goal=("latency", "throughput")[seed % 2])
        built = [kind().propose(problem, budget=Budget()) for kind in HEURISTICS]
        known = min(_value(problem, plans) for plans in built if plans)
        for guide in (policy, None):
            strategy = GuidedStrategy(guide)
            value = _value(problem, strategy.propose(problem, budget=Budget(evaluations=evaluations), seed=seed))
            assert value <= known * (1 + 1e-9)
            assert strategy.evaluations <= evaluations
            better += value < known * (1 - 1e-6)
    assert better >= 4


def test_the_same_seed_gives_the_same_plan_and_another_seed_another_search(random_problem, policy):
    problem = random_problem(1, ops=40, devices=4)
    plans = [
        GuidedStrategy(policy).propose(problem, budget=Budget(evaluations=3000), seed=seed)[0].to_json()
        for seed in (5, 5, 6, 7)
    ]
    assert plans[0] == plans[1]
    assert len({str(plan) for plan in plans}) > 1


def test_large_problems_are_searched_on_coarser_graphs_too(random_problem, policy, monkeypatch):
    from autoplace.strategies import multilevel

    sizes = []
    improve = multilevel.MultilevelStrategy.improve

    def watched(self, scorer, starts, *, seed):
        sizes.append(scorer.view.num_classes)
        return improve(self, scorer, starts, seed=seed)

    monkeypatch.setattr(multilevel.MultilevelStrategy, "improve", watched)
    config = GuidedConfig(coarse_from=60)
    for ops, evaluations, expected in ((40, 300, 0), (80, 300, 1), (80, 3000, 0)):
        sizes.clear()
        problem = random_problem(2, ops=ops, devices=3)
        strategy = GuidedStrategy(policy, config)
        assert strategy.propose(problem, budget=Budget(evaluations=evaluations), seed=0)
        assert len(sizes) == expected, (ops, evaluations)
        assert strategy.evaluations <= evaluations


def test_seconds_end_the_search(random_problem, policy):
    problem = random_problem(3, ops=60, devices=4)
    GuidedStrategy(policy).propose(problem, budget=Budget(evaluations=500), seed=0)  # compiles
    begin = time.perf_counter()
    assert GuidedStrategy(policy).propose(problem, budget=Budget(seconds=0.5), seed=0)
    assert 0.4 < time.perf_counter() - begin < 2.0


def test_moves_follow_the_policy(random_problem, policy):
    """A policy that sends everything to one device finds that placement even where samples are left out."""

    class Stubborn(Policy):
        def prior(self, problem, assignment, *, tables=None):
            wish = np.zeros((problem.num_ops, problem.num_devices), np.float32)
            wish[:, 2] = 1.0
            return wish

    base = random_problem(4, ops=12, devices=3)
    latency = np.asarray(base.latency_ms).copy()
    latency[:, 2] = 1e-4 * latency[:, 2]
    problem = base.with_(latency_ms=latency)
    start = np.zeros(12, np.int32)
    from autoplace.strategies._search import Scorer
    from autoplace.strategies.guided import _Run

    counts = []
    for guide in (Stubborn(policy.config, policy.tensors), None):
        scorer = Scorer(problem, Budget(evaluations=25).start())
        value = float(scorer.evaluator.score(start)[0])
        strategy = GuidedStrategy(guide, GuidedConfig(guided=1.0, guided_length=1e9, grafts=0.0))
        found = _Run(strategy, scorer, 3).chains([(value, start)])
        counts.append(int((found[0][1] == 2).sum()))
    assert counts[0] >= counts[1] and counts[0] >= 8
