"""What every placement strategy promises, whatever the problem."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest

from autoplace.errors import InputError
from autoplace.policy.network import PolicyNetwork
from autoplace.policy.policy import Policy
from autoplace.problem import Semantics
from autoplace.simulate import SimulatedEvaluator
from autoplace.strategies import Budget, make_strategy, placement_strategy_names, strategy_names

NAMES = [n for n in placement_strategy_names() if n != "exact"]  # it takes its time: see test_exact
BUDGET = Budget(evaluations=40)

SEMANTICS = [
    Semantics(transfers=t, route=r, contention=c, queue=q)
    for t, r, c, q in itertools.product(
        ("overlapped", "blocking"), ("direct", "host"), ("none", "link"), ("fifo", "priority")
    )
] + [Semantics(microbatches=3)]


@functools.cache
def _policy():
    return Policy.of(PolicyNetwork(seed=0))


def _make(name):
    return make_strategy(name, _policy() if name == "learned" else None)


def _check(problem, plans, *, name):
    """Every plan is feasible; they are sorted by the objective."""
    evaluator = SimulatedEvaluator(problem)
    outcomes = evaluator.evaluate(plans)
    assert [o.reason for o in outcomes if not o.feasible] == []
    values = [o.objective for o in outcomes]
    assert values == sorted(values)
    for plan in plans:
        assert plan.strategy == name
        assert plan.microbatches == problem.semantics.microbatches
        assert plan.graph_fingerprint == problem.graph.fingerprint


@pytest.mark.parametrize("goal", ["latency", "throughput"])
@pytest.mark.parametrize("name", NAMES)
def test_every_semantics_and_goal_gets_a_feasible_plan(name, goal, random_problem):
    for seed, semantics in enumerate(SEMANTICS):
        problem = random_problem(seed, goal=goal, semantics=semantics, energy_weight=0.5 * (seed % 2))
        plans = _make(name).propose(problem, budget=BUDGET, seed=seed)
        assert plans
        _check(problem, plans, name=name)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "single"])
def test_colocation_missing_latencies_and_binding_memory_are_respected(name, random_problem):
    found = 0
    for seed in range(12):
        problem = random_problem(seed, memory=0.55, colocate=True, unable=0.1)
        plans = _make(name).propose(problem, budget=BUDGET, seed=seed)
        _check(problem, plans, name=name)
        for plan in plans:
            assignment = plan.assignment_array(problem)
            for group in (0, 1):
                assert len(set(assignment[problem.graph.colocate == group].tolist())) == 1
            whole = problem.graph.weight_bytes + problem.graph.activation_bytes
            used = np.bincount(assignment, weights=whole, minlength=problem.num_devices)
            assert (used <= [d.memory_bytes for d in problem.cluster.devices]).all()
        found += bool(plans)
    assert found >= 8  # memory for 1.65 times the ops: nearly every draw can be placed


@pytest.mark.parametrize("name", NAMES)
def test_memory_that_only_freed_activations_fit_in_is_used(name, random_problem):
    problem = random_problem(3, devices=1, memory=0.9, frees=True)
    plans = _make(name).propose(problem, budget=BUDGET)
    assert [p.devices for p in plans] == [("host0/cpu:0",)]


@pytest.mark.parametrize("name", NAMES)
def test_devices_that_cannot_talk_share_no_tensor(name, random_problem):
    for seed in range(6):
        problem = random_problem(seed, devices=4, holes=0.5)
        plans = _make(name).propose(problem, budget=BUDGET, seed=seed)
        assert plans  # device 0 can run everything
        _check(problem, plans, name=name)


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_plans(name, random_problem):
    problem = random_problem(7, memory=0.6, colocate=True)
    first, second = (_make(name).propose(problem, budget=BUDGET, seed=5) for _ in range(2))
    assert [p.to_json() for p in first] == [p.to_json() for p in second]


@pytest.mark.parametrize("evaluations", [1, 3, 40])
@pytest.mark.parametrize("name", NAMES)
def test_the_budget_is_counted_and_kept(name, evaluations, random_problem, monkeypatch):
    scored = []
    score = SimulatedEvaluator.score
    monkeypatch.setattr(SimulatedEvaluator, "score", lambda self, a: (scored.append(len(a)), score(self, a))[1])
    strategy = _make(name)
    plans = strategy.propose(random_problem(2), budget=Budget(evaluations=evaluations))
    assert plans
    # Local moves are counted by the compiled loops; what is left was scored whole.
    if name in ("annealing", "guided", "multilevel"):
        assert sum(scored) <= strategy.evaluations <= evaluations
    else:
        assert sum(scored) == strategy.evaluations <= evaluations
    if name in ("random", "annealing"):
        assert strategy.evaluations == evaluations


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_of_seconds_ends_the_search(name, random_problem):
    strategy = _make(name)
    assert strategy.propose(random_problem(2), budget=Budget(seconds=0.05))
    assert strategy.evaluations > 0


@pytest.mark.parametrize("name", NAMES)
def test_without_a_limit_the_search_ends_by_itself(name, random_problem):
    assert _make(name).propose(random_problem(2, ops=5), budget=Budget())


@pytest.mark.parametrize("name", NAMES)
def test_an_infeasible_problem_gets_no_plan(name, random_problem):
    assert _make(name).propose(random_problem(1, memory=0.01), budget=BUDGET) == []
    stuck = random_problem(1)
    latency = stuck.latency_ms.copy()
    latency[3] = np.inf
    assert _make(name).propose(stuck.with_(latency_ms=latency), budget=BUDGET) == []


@pytest.mark.parametrize("name", NAMES)
def test_one_op_on_one_device(name, random_problem):
    plans = _make(name).propose(random_problem(0, ops=1, devices=1), budget=BUDGET)
    assert [p.shape for p in plans] == ["single"]


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(InputError, match="'greedy' is unknown; use one of single, chunks, heft, metf, dp, random"):
        make_strategy("greedy")


def test_learned_without_a_policy_says_so():
    with pytest.raises(InputError, match="needs a policy"):
        make_strategy("learned")
    assert strategy_names()[-1] == "learned"
