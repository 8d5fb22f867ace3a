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


@pytest.fixture
def problem():
    graph = OpGraph.build(
        names=[f"op{i}" for i in range(OPS)],
        edges=[(i, [i + 1], 1000.0) for i in range(OPS - 1)],
        weight_bytes=[1000] * OPS,
        activation_bytes=[1000] * OPS,
    )
    devices = tuple(Device(name=f"h{i}/cpu:0", kind="cpu") for i in range(2))
    cluster = Cluster(devices=devices, default_link=Link(latency_ms=2.0, bytes_per_ms=1e6))
    training = with_backward(graph)
    return Problem(
        graph=training, cluster=cluster, latency_ms=np.tile([10.0, 20.0], (training.num_ops, 1)), batch_size=8
    )


def test_a_placement_runs_as_the_best_line_and_the_reference_is_the_fastest_device(problem):
    ranks = Followed(problem)
    case = _case(problem, propose_distributed(problem), ranks)
    (reference,) = case.references
    assert reference.devices == ("h0/cpu:0",) and case.reference_name == "fastest device alone"
    row = settled(problem, np.asarray([0, 1, 0, 0, 1, 0, 0, *[0] * OPS])[: problem.num_ops])
    plan = case.as_run(Plan.from_assignment(case.problem, row, strategy="learned"))
    lines = [
        stages_plan(problem, r, strategy="", microbatches=n) for r in (row, in_line(problem, row)) for n in (1, 2, 4, 8)
    ]
    assert case.forecast(plan).objective == min(case.forecast(line).objective for line in lines)
    assert plan.microbatches > 1 and case.problem.semantics.microbatches > 1
    alone = Plan.from_assignment(case.problem, np.zeros(problem.num_ops, int), strategy="learned")
    assert case.as_run(alone).microbatches == 1
    assert case.forecast(plan).objective < case.forecast(reference).objective
    case.done()
    assert ranks.dismissed


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
