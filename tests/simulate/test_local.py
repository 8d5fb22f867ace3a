"""Local moves cost what the evaluator and the slow reference say, in every mode, and change nothing until kept."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoplace.graph import OpGraph
from autoplace.hardware import Cluster, Device, Link
from autoplace.problem import Objective, Problem, Semantics
from autoplace.simulate import SimulatedEvaluator, local
from autoplace.simulate.local import begin, keep, new_local, trial


def agrees(found, wanted, limit):
    """Equal up to rounding; inf only beyond the limit, or where the plan is infeasible."""
    if np.isinf(found):
        return np.isinf(wanted) or wanted > limit * (1 - 1e-12)
    return found <= limit and found == pytest.approx(wanted, rel=1e-9, abs=1e-300)


def random_move(rng, problem):
    """Up to three ops; where one is co-located, mostly all of its group."""
    count = min(problem.num_ops, int(rng.integers(1, 4)))
    ops = rng.choice(problem.num_ops, count, replace=bool(rng.random() < 0.1))
    devices = rng.integers(0, problem.num_devices, count)
    grouped = problem.graph.colocate >= 0
    if grouped[ops].any() and rng.random() < 0.9:
        ops = np.concatenate([ops[~grouped[ops]], np.flatnonzero(grouped)])[: problem.num_ops]
        devices = rng.integers(0, problem.num_devices, len(ops))
        devices[grouped[ops]] = devices[-1]
    return ops.astype(np.int32), devices.astype(np.int32)


def walk(problem, plan, rng, moves):
    """Try and keep random moves; return how many were kept, and finite."""
    evaluator = SimulatedEvaluator(problem)
    state = new_local(evaluator)
    state.plan[0] = plan
    current = begin(state)
    assert current == pytest.approx(evaluator.score(plan)[0])
    kept = 0
    for _ in range(moves):
        before = state.plan.copy()
        ops, devices = random_move(rng, problem)
        after = before.copy()
        for op, device in zip(ops, devices, strict=True):
            after[0, op] = device
        wanted = evaluator.score(after)[0]
        limit = [np.inf, current, 1.1 * current, wanted, 0.999 * wanted, 1.001 * wanted][rng.integers(6)]
        found = trial(state, ops, devices, len(ops), limit)
        assert agrees(found, wanted, limit), (found, wanted, limit)
        assert (state.plan == before).all()
        if np.isfinite(found) and rng.random() < 0.6:
            keep(state)
            assert (state.plan == after).all()
            current, kept = found, kept + 1
    return kept, evaluator.score(state.plan)[0], current


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    ops=st.integers(1, 70),
    devices=st.integers(1, 4),
    transfers=st.sampled_from(["overlapped", "overlapped", "blocking"]),
    route=st.sampled_from(["direct", "host"]),
    contention=st.sampled_from(["none", "link"]),
    queue=st.sampled_from(["fifo", "fifo", "priority"]),
    microbatches=st.sampled_from([1, 1, 3]),
    goal=st.sampled_from(["latency", "latency", "throughput"]),
    weight=st.sampled_from([0.0, 0.0, 0.5, 1.0]),
    pressure=st.booleans(),
    frees=st.booleans(),
    switches=st.booleans(),
)
def test_a_walk_costs_what_the_evaluator_says(
    random_problem, seed, ops, devices, transfers, route, contention, queue, microbatches, goal, weight, pressure,
    frees, switches,
):  # fmt: skip
    problem, plans = random_problem(
        seed,
        semantics=Semantics(
            transfers=transfers, route=route, contention=contention, queue=queue, microbatches=microbatches
        ),
        objective=Objective(goal=goal, energy_weight=weight),
        ops=ops,
        devices=devices,
        pressure=pressure,
    )
    if not frees:
        problem = problem.with_(graph=dataclasses.replace(problem.graph, frees=np.zeros(ops, np.bool_)))
    if not pressure:
        problem = problem.with_(latency_ms=np.nan_to_num(problem.latency_ms, posinf=4.0))
    if switches:
        problem = problem.with_(dispatch_ms=0.125, concurrency_scale=1.25)
    rng = np.random.default_rng(seed)
    _, wanted, current = walk(problem, plans[rng.integers(4)], rng, moves=40)
    assert current == pytest.approx(wanted, rel=1e-9) or np.isinf(wanted)


@pytest.mark.parametrize("queue", ["fifo", "priority"])
@pytest.mark.parametrize("contention", ["none", "link"])
@pytest.mark.parametrize("goal", ["latency", "throughput"])
def test_a_trial_equals_the_slow_reference(reference, random_problem, goal, contention, queue):
    problem, plans = random_problem(
        5, semantics=Semantics(contention=contention, queue=queue), objective=Objective(goal=goal, energy_weight=0.5),
        ops=25, devices=3, pressure=False,
    )  # fmt: skip
    problem = problem.with_(latency_ms=np.nan_to_num(problem.latency_ms, posinf=4.0))
    problem = problem.with_(
        graph=dataclasses.replace(
            problem.graph, frees=np.zeros(25, np.bool_), colocate=np.full(25, -1, problem.graph.colocate.dtype)
        )
    )
    state = new_local(SimulatedEvaluator(problem))
    state.plan[0] = plans[1]
    assert begin(state) == pytest.approx(reference.evaluate(problem, plans[1]).objective)
    finite = 0
    for op in range(25):
        for device in range(3):
            plan = state.plan[0].copy()
            plan[op] = device
            wanted = reference.evaluate(problem, plan).objective
            found = trial(state, np.asarray([op], np.int32), np.asarray([device], np.int32), 1, np.inf)
            assert found == pytest.approx(wanted)
            finite += np.isfinite(found)
    assert finite > 0


def chain(ops, devices=2, **changes):
    """A chain with a skip; every op 1 ms, every transfer 0.5 ms."""
    edges = [(i, [i + 1, i + 4] if i + 4 < ops else [i + 1], 0.0) for i in range(ops - 1)]
    cluster = Cluster(
        devices=tuple(Device(name=f"h/cuda:{d}", kind="cuda") for d in range(devices)),
        default_link=Link(latency_ms=0.5, bytes_per_ms=1.0),
    )
    graph = OpGraph.build(names=[f"op{i}" for i in range(ops)], edges=edges)
    return Problem(graph=graph, cluster=cluster, latency_ms=np.ones((ops, devices)), **changes)


def numbers(*values):
    return np.asarray(values, np.int32)


def test_a_move_off_a_chain_costs_its_transfers():
    state = new_local(SimulatedEvaluator(chain(100)))
    assert begin(state) == 100.0
    assert trial(state, numbers(50), numbers(1), 1, np.inf) == 101.0
    assert trial(state, numbers(50), numbers(1), 1, 100.9) == np.inf
    assert trial(state, numbers(50, 51), numbers(1, 1), 2, 101.0) == 101.0
    keep(state)
    assert state.plan[0].nonzero()[0].tolist() == [50, 51]
    assert trial(state, numbers(50, 51), numbers(0, 0), 2, np.inf) == 100.0


def test_sums_do_not_drift_and_do_not_lose_digits():
    """An op whose load dwarfs all others comes and goes: what is left is as exact as if it had never been there."""
    latency = np.full((40, 2), 0.1)
    latency[7, 1] = 1e13
    problem = chain(40, objective=Objective(goal="throughput")).with_(latency_ms=latency)
    state, evaluator = new_local(SimulatedEvaluator(problem)), SimulatedEvaluator(problem)
    state.plan[0, 7] = 1
    begin(state)
    assert trial(state, numbers(7), numbers(0), 1, np.inf) == pytest.approx(4.0, rel=1e-12)
    keep(state)
    rng = np.random.default_rng(0)
    for _ in range(local.KEEPS_BY_COUNT + 10):
        op = int(rng.choice(np.delete(np.arange(40), 7)))
        found = trial(state, numbers(op), 1 - state.plan[0, [op]], 1, np.inf)
        keep(state)
    assert state.counters[local.KEPT] < 20
    assert found == pytest.approx(evaluator.score(state.plan)[0], rel=1e-12)


def test_a_run_begins_at_the_move_and_ends_where_it_changes_nothing_more():
    """Two ops that nobody waits for go elsewhere: the rest of the recorded run is taken as it is."""
    edges = [(i, [i + 1], 0.0) for i in range(1999)] + [(1000, [2000], 0.0)]
    cluster = Cluster(
        devices=tuple(Device(name=f"h/cuda:{d}", kind="cuda") for d in range(3)),
        default_link=Link(latency_ms=0.5, bytes_per_ms=1.0),
    )
    graph = OpGraph.build(names=[f"op{i}" for i in range(2001)], edges=edges)
    problem = Problem(graph=graph, cluster=cluster, latency_ms=np.ones((2001, 3)))
    state = new_local(SimulatedEvaluator(problem))
    state.plan[0, 2000] = 1
    assert begin(state) == 2000.0
    ran = state.runs.ops["epoch"].copy()
    assert trial(state, numbers(2000), numbers(2), 1, 2000.0) == 2000.0
    assert 0 < (state.runs.ops["epoch"] != ran).sum() < 100
    ran = state.runs.ops["epoch"].copy()
    assert trial(state, numbers(1500), numbers(1), 1, 2000.0) == np.inf
    assert 0 < (state.runs.ops["epoch"] != ran).sum() < 100


def test_moves_from_an_infeasible_plan_are_costed():
    latency = np.ones((30, 2))
    latency[3, 1] = np.inf
    state = new_local(SimulatedEvaluator(chain(30).with_(latency_ms=latency)))
    state.plan[:] = 1
    assert begin(state) == np.inf
    assert trial(state, numbers(4), numbers(0), 1, np.inf) == np.inf
    assert trial(state, numbers(3), numbers(0), 1, np.inf) == 31.0
    keep(state)
    assert trial(state, numbers(3), numbers(1), 1, np.inf) == np.inf
    assert trial(state, numbers(5), numbers(1), 1, np.inf) == 31.0


def test_the_version_follows_the_sources(monkeypatch):
    version = local.local_version()
    monkeypatch.setattr(local, "sources_version", lambda: 7)
    assert local.local_version() != version > 0


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("contention", ["none", "link"])
def test_no_usable_move_is_refused_where_streams_of_work_run_apart(contention, microbatches):
    """What a move delays is one stream; another, or another part of the batch, keeps its own time. Times are dyadic."""
    refused = 0
    for seed in range(6):
        rng, length = np.random.default_rng(seed), 60
        edges = [(t * length + i, [t * length + i + 1], 64.0) for t in range(3) for i in range(length - 1)]
        edges += [(i, [length + i + 2], 128.0) for i in range(0, length - 2, 10)]
        ops = 3 * length
        problem = Problem(
            graph=OpGraph.build(names=[f"op{i}" for i in range(ops)], edges=edges),
            cluster=Cluster(
                devices=tuple(Device(name=f"h/cuda:{d}", kind="cuda") for d in range(4)),
                default_link=Link(latency_ms=1 / 64, bytes_per_ms=2048.0),
            ),
            latency_ms=rng.integers(1, 64, (ops, 4)) / 64,
            semantics=Semantics(contention=contention, microbatches=microbatches),
        )
        evaluator = SimulatedEvaluator(problem)
        state = new_local(evaluator)
        state.plan[0] = np.repeat(rng.integers(0, 4, ops // 5), 5)
        current = begin(state)
        for _ in range(200):
            after, op, device = state.plan.copy(), int(rng.integers(ops)), int(rng.integers(4))
            after[0, op] = device
            wanted = evaluator.score(after)[0]
            found = trial(state, numbers(op), numbers(device), 1, current)
            assert found == (wanted if wanted <= current else np.inf)
            refused += np.isinf(found)
            if np.isfinite(found):
                keep(state)
                current = found
    assert refused > 100
