"""The portfolio: one budget for all, never worse than the heuristics, and why nothing can be placed."""

from __future__ import annotations

import numpy as np
import pytest

from autoplace.errors import InfeasibleError
from autoplace.hardware.cluster import Cluster, Device
from autoplace.plan import Plan
from autoplace.policy.network import PolicyNetwork
from autoplace.policy.policy import Policy
from autoplace.simulate import SimulatedEvaluator
from autoplace.strategies import HEURISTICS, Budget, Strategy, best_of, compare, make_strategy, portfolio_strategies
from autoplace.strategies.infeasible import explain_infeasible, prove_infeasible
from autoplace.strategies.random_search import RandomStrategy


class _Foreign(Strategy):
    """A strategy that knows nothing of scorers: everything on device 1."""

    name = "foreign"

    def propose(self, problem, *, budget, seed=0):
        self.evaluations = 5
        self.budget = budget
        return [Plan.from_assignment(problem, np.ones(problem.num_ops, np.int32), strategy=self.name)]


@pytest.mark.parametrize("goal", ["latency", "throughput"])
def test_never_worse_than_the_best_heuristic_and_within_the_budget(goal, random_problem):
    for seed in range(5):
        problem = random_problem(seed, ops=25, goal=goal, memory=(None, 0.6)[seed % 2])
        evaluator = SimulatedEvaluator(problem)
        plans = [p for kind in HEURISTICS for p in kind().propose(problem, budget=Budget())]
        heuristic = min(o.objective for o in evaluator.evaluate(plans))
        plan, outcome, evaluations = best_of(problem, portfolio_strategies(), Budget(evaluations=60), seed)
        assert outcome.objective <= heuristic
        assert outcome.objective == evaluator.score(plan.assignment_array(problem))[0]
        assert evaluations == 60


def test_a_small_budget_serves_the_first_placement_of_each_heuristic(random_problem):
    comparison = compare(random_problem(1), [kind() for kind in HEURISTICS], Budget(evaluations=len(HEURISTICS)))
    assert comparison.evaluations == len(HEURISTICS)
    assert all(p.assignment is not None for p in comparison.proposals)


def test_the_same_budget_and_seed_give_the_same_plan(random_problem):
    problem = random_problem(3, ops=30)
    first, second = (best_of(problem, portfolio_strategies(), Budget(evaluations=120), seed=4) for _ in range(2))
    assert first[0].to_json() == second[0].to_json()
    assert first[1:] == second[1:]


def test_proposers_leave_budget_to_annealing(random_problem):
    foreign, strategies = _Foreign(), portfolio_strategies()
    comparison = compare(
        random_problem(3, ops=30), [*strategies, RandomStrategy(), foreign], Budget(evaluations=1000), seed=4
    )
    assert [p.strategy for p in comparison.proposals] == [
        "single", "chunks", "heft", "metf", "dp", "random", "foreign", "guided",
    ]  # fmt: skip
    assert 150 < foreign.budget.evaluations < 250  # a fifth: half of 0.4
    assert comparison.evaluations == 1000
    by_name = {p.strategy: p for p in comparison.proposals}
    assert by_name["foreign"].objective >= by_name["guided"].objective == comparison.best.objective


def test_the_policy_guides_the_search_and_its_placement_counts(random_problem):
    policy = Policy.of(PolicyNetwork(seed=0))
    problem = random_problem(3, ops=30)
    comparison = compare(problem, portfolio_strategies(policy), Budget(evaluations=400), seed=4)
    assert [p.strategy for p in comparison.proposals][-1] == "guided"
    assert comparison.evaluations == 400
    greedy = SimulatedEvaluator(problem).score(policy.greedy(problem))[0]
    assert comparison.best.objective <= greedy


def test_an_op_that_runs_nowhere_is_named(random_problem):
    problem = random_problem(1)
    latency = problem.latency_ms.copy()
    latency[3] = np.inf
    with pytest.raises(InfeasibleError, match="op 'op3' can run on no device"):
        best_of(problem.with_(latency_ms=latency), portfolio_strategies(), Budget(evaluations=50))


def test_an_op_too_large_for_every_device_is_named(random_problem):
    problem = random_problem(1, memory=0.01)
    with pytest.raises(
        InfeasibleError, match=r"op 'op\d+' needs \d+ bytes and no device that can run it has more than"
    ):
        best_of(problem, portfolio_strategies(), Budget(evaluations=50))


def test_too_little_memory_in_all_is_said_in_bytes(random_problem):
    problem = random_problem(1, memory=0.3)
    total = int((problem.graph.weight_bytes + problem.graph.activation_bytes).sum())
    assert f"all ops together need {total} bytes and all devices together have" in explain_infeasible(problem)


def test_ops_bound_to_one_device_that_is_too_small_are_said_to_be(random_problem):
    problem = random_problem(1, memory=0.6)
    latency = problem.latency_ms.copy()
    latency[:, 1:] = np.inf
    proof = prove_infeasible(problem.with_(latency_ms=latency))
    assert proof is not None
    assert "the ops that can run on 'host0/cpu:0' alone need" in proof


def test_colocated_ops_without_a_device_in_common_are_named(random_problem):
    problem = random_problem(1, devices=2, colocate=True)
    first, second = np.flatnonzero(problem.graph.colocate == 0)
    latency = problem.latency_ms.copy()
    latency[first, 0] = latency[second, 1] = np.inf
    assert f"co-located with 'op{first}' can run on no device" in explain_infeasible(problem.with_(latency_ms=latency))


def test_links_that_forbid_every_placement_are_blamed(random_problem):
    problem = random_problem(1, ops=2, devices=2, chain=True)
    cluster = Cluster(devices=(Device(name="a", kind="cuda"), Device(name="b", kind="cuda")))
    latency = np.asarray([[1.0, np.inf], [np.inf, 1.0]])
    apart = problem.with_(cluster=cluster, latency_ms=latency)
    assert prove_infeasible(apart) is None
    with pytest.raises(InfeasibleError, match="respects missing links"):
        best_of(apart, portfolio_strategies(), Budget(evaluations=50))


def test_random_alone_stays_within_what_it_may(random_problem):
    problem = random_problem(1, memory=0.5)
    comparison = compare(problem, [make_strategy("random")], Budget(evaluations=64))
    assert comparison.evaluations == 64
    assert comparison.best is not None
    assert np.isfinite(comparison.best.objective)
