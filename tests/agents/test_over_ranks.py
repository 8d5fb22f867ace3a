"""What a policy's placements run as on ranks; the training itself is in `tests/cli/test_train_ranks.py`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autoplace.agents.over_ranks import _case
from autoplace.graph.backward import with_backward
from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.plan import Plan
from autoplace.problem import Problem
from autoplace.simulate.collectives import ClusterEvaluator
from autoplace.strategies.by_work import as_shares
from autoplace.strategies.distributed import propose_distributed
from autoplace.strategies.pipelines import in_line, settled, stages_plan

OPS = 6


class Followed:
    """Ranks that run as the simulator says; notes on how many threads."""

    def __init__(self, problem):
        self.simulator, self.threads, self.dismissed = ClusterEvaluator(problem), [], False
        self.evaluations = 0

    def evaluate(self, plans):
        self.threads.append(torch.get_num_threads())
        return self.simulator.evaluate(plans)

    def dismiss(self):
        self.dismissed = True


def build(weight):
    graph = OpGraph.build(
        names=[f"op{i}" for i in range(OPS)],
        edges=[(i, [i + 1], 1000.0) for i in range(OPS - 1)],
        weight_bytes=[weight] * OPS,
        activation_bytes=[1000] * OPS,
    )
    devices = tuple(Device(name=f"h{i}/cpu:0", kind="cpu") for i in range(2))
    cluster = Cluster(devices=devices, default_link=Link(latency_ms=2.0, bytes_per_ms=1e6))
    training = with_backward(graph)
    return Problem(
        graph=training, cluster=cluster, latency_ms=np.tile([10.0, 20.0], (training.num_ops, 1)), batch_size=64
    )


@pytest.fixture
def problem():
    return build(1000)


@pytest.mark.parametrize(("weight", "shape"), [(1000, "replicas"), (100_000_000, "stages")])
def test_a_placement_runs_as_is_best_and_the_reference_is_the_fastest_device(weight, shape):
    problem = build(weight)
    ranks = Followed(problem)
    case = _case(problem, propose_distributed(problem), ranks)
    (reference,) = case.references
    assert reference.devices == ("h0/cpu:0",) and case.reference_name == "fastest device alone"
    row = settled(problem, np.asarray([0, 1, 0, 0, 1, 0, 0, *[0] * OPS])[: problem.num_ops])
    plan = case.as_run(Plan.from_assignment(case.problem, row, strategy="learned"))
    forms = [
        stages_plan(problem, r, strategy="", microbatches=n) for r in (row, in_line(problem, row)) for n in (1, 2, 4, 8)
    ]
    forms += [as_shares(problem, row, strategy="", sharded=part) for part in (0.0, 1.0)]
    assert case.forecast(plan).objective == min(case.forecast(form).objective for form in forms)
    assert plan.shape == shape and case.problem.semantics.microbatches > 1
    if shape == "replicas":
        assert [r.share for r in plan.replicas] == [44 / 64, 20 / 64], "for 4 of 6 ops and the loss"
    alone = Plan.from_assignment(case.problem, np.zeros(problem.num_ops, int), strategy="learned")
    assert case.as_run(alone).microbatches == 1 and case.as_run(alone).shape == "single"
    assert case.forecast(plan).objective < case.forecast(reference).objective
    case.done()
    assert ranks.dismissed


def test_teachers_are_placements_that_run_as_what_was_best(problem):
    case = _case(problem, propose_distributed(problem), Followed(problem))
    shapes = [case.as_run(teacher).shape for teacher in case.teachers]
    assert all(len(teacher.replicas) == 1 for teacher in case.teachers) and "replicas" in shapes
    best = min((case.as_run(teacher) for teacher in case.teachers), key=lambda plan: case.forecast(plan).objective)
    foretold = [c.predicted.objective for c in propose_distributed(problem)]
    assert case.forecast(best).objective <= 1.1 * min(foretold)


def test_plans_run_on_the_threads_of_the_device_and_the_policy_on_its_own(problem):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        ranks = Followed(problem)
        case = _case(problem, propose_distributed(problem), ranks)
        torch.set_num_threads(1)
        case.evaluator.evaluate(list(case.references))
        assert ranks.threads == [3, 3] and torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
