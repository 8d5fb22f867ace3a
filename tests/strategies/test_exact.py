"""The exact optimum: both methods agree with brute force, and what is called proven is."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from autoplace.errors import InputError
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.problem import Semantics
from autoplace.simulate import SimulatedEvaluator
from autoplace.strategies import Budget, exact, make_strategy, portfolio_strategies
from autoplace.strategies._milp import solve_linear
from autoplace.strategies._support import View
from autoplace.strategies.exact import TOLERANCE, ExactStrategy, solve

SEMANTICS = [
    Semantics(transfers=t, route=r, contention=c)
    for t, r, c in itertools.product(("overlapped", "blocking"), ("direct", "host"), ("none", "link"))
] + [Semantics(transfers="blocking", microbatches=3), Semantics(microbatches=2)]


def _brute(problem):
    rows = np.asarray(list(itertools.product(range(problem.num_devices), repeat=problem.num_ops)), np.int32)
    return float(SimulatedEvaluator(problem).score(rows).min())


@pytest.fixture
def no_enumeration(monkeypatch):
    monkeypatch.setattr(exact, "MOST_ASSIGNMENTS", 0)


@pytest.fixture
def simulated(monkeypatch):
    """Counts what is simulated."""
    counted = []
    score = SimulatedEvaluator.score
    monkeypatch.setattr(SimulatedEvaluator, "score", lambda self, a: (counted.append(len(a)), score(self, a))[1])
    return counted


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    semantics=st.sampled_from(SEMANTICS),
    goal=st.sampled_from(["latency", "throughput"]),
    weight=st.sampled_from([0.0, 0.5, 1.0]),
    frees=st.booleans(),
)
def test_enumeration_is_brute_force(seed, semantics, goal, weight, frees, random_problem):
    problem = random_problem(
        seed, ops=6, goal=goal, semantics=semantics, energy_weight=weight, memory=0.5, frees=frees, colocate=True,
        holes=0.1, unable=0.1,
    )  # fmt: skip
    best, result = _brute(problem), solve(problem, seconds=600)  # the first one compiles
    assert (result.method, result.proven) == ("enumeration", True)
    assert result.objective == best == result.lower_bound
    if np.isfinite(best):
        assert SimulatedEvaluator(problem).score(result.assignment)[0] == best
    else:
        assert result.assignment is None


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize(
    "semantics", SEMANTICS, ids=lambda s: f"{s.transfers}-{s.route}-{s.contention}-{s.microbatches}"
)
@pytest.mark.usefixtures("no_enumeration")
def test_the_programme_is_brute_force_for_throughput(semantics, weight, random_problem):
    for seed in range(3):
        problem = random_problem(
            seed, ops=6, goal="throughput", semantics=semantics, energy_weight=weight, memory=(None, 0.5, 0.6)[seed],
            colocate=seed == 1, holes=0.1, unable=0.1,
        )  # fmt: skip
        if semantics.microbatches > 1:
            problem = problem.with_(overhead_ms=0.3 * problem.latency_ms, concurrency_scale=1.2, dispatch_ms=0.05)
        best, result = _brute(problem), solve(problem, seconds=30)
        assert result.method == "milp"
        assert result.objective == pytest.approx(best, rel=TOLERANCE)
        assert result.lower_bound <= best * (1 + 1e-9)
        assert result.proven


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), semantics=st.sampled_from(SEMANTICS), holes=st.sampled_from([0.0, 0.3]))
@example(seed=87244, semantics=Semantics(transfers="blocking", microbatches=3), holes=0.0)  # thirds of odd bytes
def test_the_programme_agrees_with_enumeration_on_random_problems(seed, semantics, holes, random_problem):
    problem = random_problem(
        seed, ops=5, devices=3, goal="throughput", semantics=semantics, memory=0.6, holes=holes, unable=0.1
    )
    tried = solve(problem, seconds=30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "MOST_ASSIGNMENTS", 0)
        solved = solve(problem, seconds=30)
    assert (tried.method, solved.method) == ("enumeration", "milp")
    assert solved.objective == pytest.approx(tried.objective, rel=TOLERANCE)
    assert solved.proven and tried.proven


@pytest.mark.parametrize("goal", ["latency", "throughput"])
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
@pytest.mark.usefixtures("no_enumeration")
def test_the_bound_holds_and_what_is_proven_is_optimal(weight, goal, random_problem):
    proven = 0
    for seed, semantics in enumerate(SEMANTICS[:8:2] + SEMANTICS[1:8:3]):
        problem = random_problem(
            seed, ops=5, devices=2 + seed % 2, goal=goal, semantics=semantics, energy_weight=weight,
            memory=(None, 0.75)[seed % 2], frees=seed % 3 == 0, colocate=seed % 2 == 1,
        )  # fmt: skip
        best, result = _brute(problem), solve(problem, seconds=20)
        assert result.lower_bound is not None
        assert result.lower_bound <= best * (1 + TOLERANCE)
        assert result.lower_bound > 0.3 * best
        assert result.objective >= best
        if result.proven:
            assert result.objective <= best * (1 + 2 * TOLERANCE)
        proven += result.proven
    assert proven >= (0 if weight == 0.5 else 3)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    semantics=st.sampled_from(SEMANTICS),
    goal=st.sampled_from(["latency", "throughput"]),
    queue=st.sampled_from(["fifo", "priority"]),
    energy=st.booleans(),
)
@example(seed=501049, semantics=SEMANTICS[1], goal="throughput", queue="fifo", energy=False)  # HiGHS 1.14's presolve
def test_the_programme_never_bounds_too_high(seed, semantics, goal, queue, energy, random_problem):
    problem = random_problem(
        seed, ops=5, devices=2, goal=goal, semantics=replace(semantics, queue=queue), energy_weight=float(energy),
        memory=0.8, frees=True, unable=0.1,
    )  # fmt: skip
    view = View.of(problem)
    solution = solve_linear(
        view.relaxed() or view, time_weight=1.0 - energy, energy_weight=float(energy), longest_ms=np.inf, alike=[],
        seconds=20,
    )  # fmt: skip
    assert solution.bound <= _brute(problem) * (1 + 1e-7)
    assert solution.bound > 0


@pytest.mark.usefixtures("no_enumeration")
def test_infeasible_is_proven_too(random_problem):
    result = solve(random_problem(0, ops=5, devices=2, goal="throughput", memory=0.3), seconds=10)
    assert result.assignment is None
    assert result.proven
    assert result.objective == result.lower_bound == np.inf


def test_devices_that_are_alike_are_tried_once(random_problem, simulated):
    problem = random_problem(0, ops=7, devices=3, goal="latency")
    devices = tuple(Device(name=f"host0/x:{d}", kind="x", idle_watts=1.0, busy_watts=2.0) for d in range(3))
    same = problem.with_(
        cluster=Cluster(devices=devices, default_link=Link(latency_ms=0.1, bytes_per_ms=9.0)),
        latency_ms=np.repeat(problem.latency_ms[:, :1], 3, axis=1),
    )
    result = solve(same, seconds=30)
    assert result.objective == _brute(same)
    heuristics = 60
    assert sum(simulated) - 3**7 <= (3**6 + 1) // 2 + heuristics
    uneven = same.with_(cluster=Cluster(
        devices=devices, default_link=Link(latency_ms=0.1, bytes_per_ms=9.0),
        links={(devices[0].name, devices[1].name): Link(latency_ms=9.0, bytes_per_ms=1.0)},
    ))  # fmt: skip
    assert exact._alike(View.of(same)) == [[0, 1, 2]]
    assert exact._alike(View.of(uneven)) == []
    blocking = same.with_(semantics=Semantics(transfers="blocking"))
    assert exact._alike(View.of(blocking)) == []  # ties by device index


def test_a_large_problem_is_refused_with_a_reason(random_problem):
    for goal, words in (("throughput", "1200 ops times devices"), ("latency", "48 ops")):
        with pytest.raises(InputError, match=f"500 ops on 3 devices is out of reach .at most {words}.*--strategy auto"):
            solve(random_problem(0, ops=500, goal=goal), seconds=1)


def test_busy_watts_below_idle_are_refused_where_transfers_block(random_problem):
    problem = random_problem(0, goal="throughput", energy_weight=1.0, semantics=Semantics(transfers="blocking"), ops=40)
    devices = tuple(replace(d, idle_watts=90.0) for d in problem.cluster.devices)
    with pytest.raises(InputError, match="draws less power busy than idle"):
        solve(problem.with_(cluster=Cluster(devices=devices, links=problem.cluster.links)), seconds=1)


def test_the_strategy_keeps_its_budget_and_ranks_its_plans(random_problem, simulated):
    problem = random_problem(5, ops=9, goal="throughput", memory=0.6, colocate=True)
    strategy = make_strategy("exact")
    assert isinstance(strategy, ExactStrategy)
    plans = strategy.propose(problem, budget=Budget(evaluations=40, seconds=20))
    assert strategy.result.method == "milp"  # 3^7 placements are more than 40
    assert sum(simulated) == strategy.evaluations <= 40
    values = [o.objective for o in SimulatedEvaluator(problem).evaluate(plans)]
    assert values == sorted(values)
    assert all(p.strategy == "exact" for p in plans)
    few = make_strategy("exact").propose(problem, budget=Budget(evaluations=1, seconds=5))
    assert len(few) == 1


def test_a_short_time_brings_the_heuristics_answer(random_problem):
    problem = random_problem(3, ops=40, goal="latency")
    strategy = ExactStrategy()
    plans = strategy.propose(problem, budget=Budget(seconds=0.3))
    assert plans
    assert not strategy.result.proven
    assert strategy.result.seconds < 5


def test_a_spent_budget_is_no_reason_to_refuse(random_problem):
    problem = random_problem(3, ops=60, devices=1, goal="latency")
    strategy = ExactStrategy()
    assert len(strategy.propose(problem, budget=Budget(evaluations=1))) == 1
    assert (strategy.result.proven, strategy.result.lower_bound) == (False, None)


def test_it_is_asked_for_by_name_only():
    assert "exact" not in [s.name for s in portfolio_strategies()]
