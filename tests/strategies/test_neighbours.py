"""Plans one step away: samples change sides, cuts move, microbatches double and halve."""

from __future__ import annotations

import numpy as np
import pytest

from autoplace.graph.backward import with_backward
from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.problem import Problem
from autoplace.simulate.stage_line import stage_line
from autoplace.strategies.neighbours import neighbours
from autoplace.strategies.pipelines import stages_plan
from autoplace.strategies.weighted import replicas_plan


@pytest.fixture
def problem():
    graph = OpGraph.build(
        names=[f"layer{i}" for i in range(8)],
        edges=[(i, [i + 1], 1000.0) for i in range(7)],
        weight_bytes=[1000] * 8,
        activation_bytes=[1000] * 8,
    )
    cluster = Cluster(
        devices=tuple(Device(name=f"h{i}/cpu:0", kind="cpu") for i in range(3)),
        default_link=Link(latency_ms=0.01, bytes_per_ms=1e8),
    )
    return Problem(graph=with_backward(graph), cluster=cluster, latency_ms=np.ones((17, 3)), batch_size=24)


def pipeline(problem, sizes, microbatches):
    row = np.zeros(problem.num_ops, np.int32)
    row[:8] = np.repeat(np.arange(len(sizes)), sizes)
    return stages_plan(problem, row, strategy="mine", microbatches=microbatches)


def cut_sizes(problem, plan):
    row = plan.assignment_array(problem)
    assert len(stage_line(problem.graph, row).devices) == len(np.unique(row)), "each device has one stretch"
    return tuple(np.bincount(row[:8], minlength=2))


def test_samples_change_sides(problem):
    plans = neighbours(problem, replicas_plan(problem, [0, 2], (16, 8), strategy="mine"), 1 / 8)
    shares = {tuple(round(r.share * 24) for r in plan.replicas) for plan in plans}
    assert shares == {(13, 11), (19, 5)}
    assert all(plan.devices == ("h0/cpu:0", "h2/cpu:0") and plan.strategy == "refined" for plan in plans)


def test_the_part_with_owners_grows_and_shrinks(problem):
    plan = replicas_plan(problem, [0, 2], (16, 8), strategy="mine", sharded=0.5)
    plans = neighbours(problem, plan, 1 / 8)
    assert {p.sharded for p in plans if p.replicas == plan.replicas} == {0.25, 1.0}
    assert {p.sharded for p in plans if p.replicas != plan.replicas} == {0.5}
    alone = neighbours(problem, replicas_plan(problem, [0, 2], (23, 1), strategy="mine", sharded=1.0), 1 / 24)
    assert {p.sharded for p in alone if p.shape == "single"} == {0.0}


def test_a_replica_that_gives_all_leaves(problem):
    plans = neighbours(problem, replicas_plan(problem, [0, 1, 2], (12, 9, 3), strategy="mine"), 1 / 8)
    assert len(plans) == 6
    assert sum(len(plan.replicas) == 2 for plan in plans) == 2
    plans = neighbours(problem, replicas_plan(problem, [0, 1, 2], (12, 11, 1), strategy="mine"), 1 / 8)
    assert len(plans) == 4, "one sample is no step of three"


def test_a_step_is_one_sample_at_least(problem):
    plans = neighbours(problem, replicas_plan(problem, [0, 1], (12, 12), strategy="mine"), 1e-9)
    assert {round(plan.replicas[0].share * 24) for plan in plans} == {11, 13}


def test_cuts_move_and_microbatches_change(problem):
    plans = neighbours(problem, pipeline(problem, (4, 4), 2), 1 / 8)
    assert {cut_sizes(problem, plan) for plan in plans if plan.microbatches == 2} == {(3, 5), (5, 3)}
    assert sorted(plan.microbatches for plan in plans) == [1, 2, 2, 4]
    assert all(cut_sizes(problem, plan) == (4, 4) for plan in plans if plan.microbatches != 2)


def test_no_stage_is_left_empty_and_batches_divide(problem):
    plans = neighbours(problem, pipeline(problem, (1, 7), 8), 1 / 8)
    assert {cut_sizes(problem, plan) for plan in plans if plan.microbatches == 8} == {(2, 6)}
    assert 16 not in {plan.microbatches for plan in plans}, "it does not divide 24"


def test_one_device_has_none(problem):
    row = np.zeros(problem.num_ops, np.int32)
    assert neighbours(problem, stages_plan(problem, row, strategy="mine", microbatches=1), 1 / 8) == []
