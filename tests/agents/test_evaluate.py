import math

import pytest

from autoplace.agents.distribution import held_out_problems
from autoplace.agents.evaluate import Bench, compare
from autoplace.policy.network import PolicyNetwork
from autoplace.policy.policy import Policy
from autoplace.simulate.evaluator import SimulatedEvaluator


def test_ratios_are_geometric_means_of_simulated_objectives(lanes):
    problem, _ = lanes
    policy = Policy.of(PolicyNetwork(seed=0))
    value = SimulatedEvaluator(problem).score(policy.greedy(problem))[0]
    figures = compare(policy, [problem])
    assert figures["problems"] == 1 and figures["infeasible"] == 0
    assert figures["ratio"]["best_heuristic"]["geometric_mean"] == pytest.approx(value / 8.0)
    assert Bench([problem]).log_ratio(policy) == pytest.approx(math.log(8.0 / value))


def test_samples_never_make_it_worse():
    policy, problems = Policy.of(PolicyNetwork(seed=0)), held_out_problems(4, seed=0, max_ops=20)
    bench = Bench(problems)
    for greedy, sampled in zip(bench.objectives(policy), bench.objectives(policy, samples=8), strict=True):
        assert sampled <= greedy
