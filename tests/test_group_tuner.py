"""The climb by real runs, and the decision, against a world that differs from what the simulator believes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from autoplace.choose import NOISE_FLOOR
from autoplace.graph.backward import with_backward
from autoplace.graph.opgraph import OpGraph
from autoplace.group_tuner import GroupRow, _Tuning
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.measure.pool import plan_key
from autoplace.outcome import Outcome
from autoplace.problem import Objective, Problem
from autoplace.simulate.cluster_factors import ClusterFactors
from autoplace.simulate.collectives import ClusterEvaluator
from autoplace.strategies.pipelines import stages_plan
from autoplace.strategies.weighted import replicas_plan


class Alone:
    """A session of this process alone."""

    rank, world_size = 0, 1

    def together(self, work):
        return work()

    def broadcast(self, value, source=0):
        return value


class World:
    """Measures by a simulator of its own, with watts for every device and a noise of next to nothing."""

    def __init__(self, problem, factors, energy_j=None):
        self.simulator = ClusterEvaluator(problem, factors=factors)
        self.energy_j = energy_j or {}
        self.plans = []

    @property
    def evaluations(self):
        return len(self.plans)

    def evaluate_interleaved(self, plans, rounds, *, budget_s=None, settle=None, drop=None):
        self.plans += plans
        had = [0] * len(plans)
        out = set()
        for _ in range(rounds):
            had = [n + (i not in out) for i, n in enumerate(had)]
            outcomes = [self._outcome(plan, n) for plan, n in zip(plans, had, strict=True)]
            out |= set(drop(outcomes)) if drop is not None else set()
            if len(out) == len(plans):
                break
        return outcomes

    def _outcome(self, plan, rounds):
        latency = self.simulator.predict_ms(plan)
        energy = self.energy_j.get(plan.shape)
        return Outcome(
            source="measured",
            latency_ms=latency,
            energy_j=energy,
            energy_source="model" if energy else None,
            objective=latency,
            samples_ms=tuple(latency * (1 + 1e-4 * (i % 2)) for i in range(rounds)),
        )


@pytest.fixture
def problem():
    graph = OpGraph.build(
        names=[f"layer{i}" for i in range(8)],
        edges=[(i, [i + 1], 1000.0) for i in range(7)],
        weight_bytes=[100_000] * 8,
        activation_bytes=[1000] * 8,
    )
    cluster = Cluster(
        devices=tuple(Device(name=f"h{i}/cpu:0", kind="cpu") for i in range(2)),
        default_link=Link(latency_ms=0.01, bytes_per_ms=1e8),
    )
    latency = np.outer([1.0] * 8 + [0.0] + [2.0] * 8, [1.0, 2.0])
    return Problem(graph=with_backward(graph), cluster=cluster, latency_ms=latency, batch_size=48)


def tuning(problem, world, plans, objective=None):
    found = object.__new__(_Tuning)
    found.session, found.objective, found.calibration = Alone(), objective or Objective(), None
    outcomes = world.evaluate_interleaved(list(plans.values()), 3)
    found.rows = {
        plan_key(plan): GroupRow(label=label, plan=plan, measured=outcome, baseline=label in ("single", "even"))
        for (label, plan), outcome in zip(plans.items(), outcomes, strict=True)
    }
    return found


def single(problem):
    return stages_plan(problem, np.zeros(problem.num_ops, np.int32), strategy="single", microbatches=1)


def test_the_climb_finds_shares_that_the_simulator_does_not_foretell(problem):
    # The second host is as fast as the first, which the profile does not know: even shares are best.
    world = World(problem, ClusterFactors(speed={"h1/cpu:0": 0.5}))
    foretold = replicas_plan(problem, [0, 1], (32, 16), strategy="weighted")
    some = tuning(problem, world, {"single": single(problem), "weighted": foretold})
    assert some._climb(world, problem, np.inf)
    best = min(some._able(), key=lambda row: row.measured.objective)
    counts = [round(r.share * 48) for r in best.plan.replicas]
    assert counts == pytest.approx([24, 24], abs=1)
    assert len({row.label for row in some.rows.values()}) == len(some.rows)
    assert world.evaluations < 40


def test_the_climb_moves_cuts(problem):
    world = World(problem, ClusterFactors(speed={"h1/cpu:0": 0.5}))
    row = np.zeros(problem.num_ops, np.int32)
    row[6:8] = 1
    some = tuning(problem, world, {"chunks": stages_plan(problem, row, strategy="chunks", microbatches=4)})
    some._climb(world, problem, np.inf)
    best = min(some._able(), key=lambda row: row.measured.objective)
    assert np.bincount(best.plan.assignment_array(problem)[:8]).tolist() == [4, 4]


def test_screening_takes_as_many_as_there_is_time_for(problem):
    def rows():
        world = World(problem, ClusterFactors())
        some = tuning(problem, world, {"single": single(problem)})
        counts = [(32, 16), (24, 24), (40, 8), (44, 4)]
        plans = [replicas_plan(problem, [0, 1], c, strategy="weighted") for c in counts]
        for plan, predicted in zip(plans, ClusterEvaluator(problem).evaluate(plans), strict=True):
            some.rows[plan_key(plan)] = GroupRow(label=str(len(some.rows)), plan=plan, predicted=predicted)
        world.plans.clear()
        return some, world

    some, world = rows()
    some._screen(world, 3, 60.0)
    assert [round(p.replicas[0].share * 48) for p in world.plans] == [32, 40, 44]
    some, world = rows()
    some._screen(world, 3, 0.0)
    assert [round(p.replicas[0].share * 48) for p in world.plans] == [32], "one there always is"


def test_a_baseline_alone_is_no_place_to_climb_from(problem):
    world = World(problem, ClusterFactors())
    some = tuning(problem, world, {"single": single(problem)})
    assert not some._climb(world, problem, np.inf)


def test_what_is_far_slower_by_prediction_is_not_run(problem):
    problem = problem.with_(latency_ms=problem.latency_ms * [1.0, 3.0])
    world = World(problem, ClusterFactors())
    some = tuning(problem, world, {"weighted": replicas_plan(problem, [0, 1], (41, 7), strategy="weighted")})
    some._climb(world, problem, np.inf)
    ran = {tuple(round(r.share * 48) for r in plan.replicas) for plan in world.plans}
    assert (47, 1) in ran
    assert (35, 13) not in ran


def test_the_decision_counts_energy_where_the_objective_does(problem):
    plans = {"single": single(problem), "weighted": replicas_plan(problem, [0, 1], (32, 16), strategy="weighted")}
    world = World(problem, ClusterFactors(), energy_j={"single": 1.0, "replicas": 4.0})
    best, noise = tuning(problem, world, plans)._decide(world, 10.0)
    assert best.label == "weighted" and noise == NOISE_FLOOR
    best, _ = tuning(problem, world, plans, Objective(energy_weight=0.9))._decide(world, 10.0)
    assert best.label == "single"


def test_what_is_beaten_leaves_the_deciding_run(problem):
    class Near(World):
        """One of the plans is as fast as a single host."""

        def _outcome(self, plan, rounds):
            if plan.replicas[0].share != 32 / 48:
                return super()._outcome(plan, rounds)
            plain = super()._outcome(plans["single"], rounds)
            return replace(plain, samples_ms=plain.samples_ms[1::2] + plain.samples_ms[::2])

    plans = {
        "single": single(problem),
        "weighted": replicas_plan(problem, [0, 1], (32, 16), strategy="weighted"),
        "worse": replicas_plan(problem, [0, 1], (20, 28), strategy="weighted"),
    }
    some = tuning(problem, World(problem, ClusterFactors()), plans)
    best, _ = some._decide(Near(problem, ClusterFactors()), 10.0)
    assert best.label == "single"
    rounds = {row.label: len(row.measured.samples_ms) for row in some.rows.values()}
    assert rounds == {"single": 33, "weighted": 33, "worse": 7}


def test_the_deciding_run_ends_where_one_is_left_that_has_won(problem):
    plans = {
        "single": single(problem),
        "weighted": replicas_plan(problem, [0, 1], (32, 16), strategy="weighted"),
        "worse": replicas_plan(problem, [0, 1], (36, 12), strategy="weighted"),
    }
    some = tuning(problem, World(problem, ClusterFactors()), plans)
    best, _ = some._decide(World(problem, ClusterFactors()), 10.0)
    assert best.label == "weighted"
    assert {len(row.measured.samples_ms) for row in some.rows.values()} == {7}


def test_a_rank_that_is_not_asked_keeps_what_rank_0_keeps(problem):
    class Led(World):
        """Rank 0 has taken the first finalist out after seven rounds."""

        def evaluate_interleaved(self, plans, rounds, *, budget_s=None, settle=None, drop=None):
            outcomes = [self._outcome(plan, 11) for plan in plans]
            ms = [(10.0,) * 11, (10.0,) * 11, (6.0,) * 7, (8.0,) * 11]
            return [replace(outcome, samples_ms=samples) for outcome, samples in zip(outcomes, ms, strict=True)]

    class Follower(Alone):
        def broadcast(self, value, source=0):
            return [0]

    plans = {
        "single": single(problem),
        "begun well": replicas_plan(problem, [0, 1], (32, 16), strategy="weighted"),
        "better": replicas_plan(problem, [0, 1], (36, 12), strategy="weighted"),
    }
    some = tuning(problem, World(problem, ClusterFactors()), plans)
    some.session = Follower()
    best, _ = some._decide(Led(problem, ClusterFactors()), 10.0)
    assert best.label == "better"


def test_the_deciding_run_ends_where_nothing_is_left_to_win(problem):
    class Broken(World):
        def _outcome(self, plan, rounds):
            right = super()._outcome(plan, rounds)
            return right if plan.shape == "single" else Outcome(source="measured", feasible=False, reason="broken")

    plans = {"single": single(problem), "weighted": replicas_plan(problem, [0, 1], (32, 16), strategy="weighted")}
    some = tuning(problem, World(problem, ClusterFactors()), plans)
    best, _ = some._decide(Broken(problem, ClusterFactors()), 10.0)
    assert best.label == "single" and len(best.measured.samples_ms) == 3, "the kept row is the screening's"
    plain = next(row for row in some.rows.values() if row.label == "single")
    assert len(plain.measured.samples_ms) == 1


def test_the_deciding_run_gets_rounds_enough(problem):
    class Asked(World):
        def evaluate_interleaved(self, plans, rounds, *, budget_s=None, settle=None, drop=None):
            self.budget_s = budget_s
            return super().evaluate_interleaved(plans, rounds, budget_s=budget_s, settle=settle, drop=drop)

    plans = {"single": single(problem), "weighted": replicas_plan(problem, [0, 1], (32, 16), strategy="weighted")}
    some, world = tuning(problem, World(problem, ClusterFactors()), plans), Asked(problem, ClusterFactors())
    seconds = sum(row.measured.latency_ms * (2 if row.baseline else 1) for row in some.rows.values()) / 1e3
    some._decide(world, 0.0, 100.0)
    assert world.budget_s == pytest.approx(15 * seconds), (
        "warming up, and seven rounds with an untimed step before each timed one"
    )
    some._decide(world, 0.0, seconds)
    assert world.budget_s == pytest.approx(seconds), "and no more than is allowed beyond the budget"


def test_finalists_are_those_that_run_and_prediction_speak_for(problem):
    plans = {
        "single": single(problem),
        "lucky": replicas_plan(problem, [0, 1], (20, 28), strategy="weighted"),
        "weighted": replicas_plan(problem, [0, 1], (32, 16), strategy="weighted"),
        "near": replicas_plan(problem, [0, 1], (34, 14), strategy="weighted"),
    }
    world = World(problem, ClusterFactors())
    some = tuning(problem, world, plans)
    for key, row in some.rows.items():
        calibrated = row.measured
        if row.label == "lucky":  # its few rounds met a quiet moment
            some.rows[key] = row = replace(row, measured=replace(row.measured, objective=15.0, latency_ms=15.0))
        some.rows[key] = replace(row, calibrated=calibrated)
    world.plans.clear()
    best, _ = some._decide(world, 10.0)
    assert best.label == "weighted"
    assert [round(p.replicas[0].share * 48) for p in world.plans[2:]] == [32, 34]


def test_a_gain_within_the_noise_is_none(problem):
    class Same(World):
        def _outcome(self, plan, rounds):
            return replace(super()._outcome(plan, rounds), samples_ms=tuple(10.0 + i % 3 for i in range(rounds)))

    plans = {"single": single(problem), "weighted": replicas_plan(problem, [0, 1], (32, 16), strategy="weighted")}
    world = Same(problem, ClusterFactors())
    best, _ = tuning(problem, world, plans)._decide(world, 10.0)
    assert best.label == "single"
