"""Plans wait beside each other as far as memory has room for what they keep."""

from __future__ import annotations

import numpy as np
import pytest

from autoplace.graph import OpGraph
from autoplace.graph.backward import with_backward
from autoplace.hardware import Cluster, Device, Link
from autoplace.plan import Plan, Replica
from autoplace.problem import Problem
from autoplace.simulate.collectives import ClusterEvaluator
from autoplace.simulate.sittings import sittings


def build(memory):
    """100 bytes of weights, 40 of activations, 10 between the two ops; 500 bytes at rest."""
    graph = OpGraph.build(
        names=["a", "b"], edges=[(0, [1], 10.0)], weight_bytes=[50, 50], activation_bytes=[20, 20], flops=[1.0, 1.0]
    )
    cluster = Cluster(
        devices=tuple(Device(name=f"h{i}/cpu:0", kind="cpu", memory_bytes=memory) for i in range(2)),
        default_link=Link(latency_ms=1.0, bytes_per_ms=10.0),
    )
    resting = {d.name: 500.0 for d in cluster.devices}
    return Problem(
        graph=with_backward(graph), cluster=cluster, latency_ms=np.ones((5, 2)), batch_size=4, resting_bytes=resting
    )


def parallel(problem, share):
    shares = (share, 1.0 - share)
    return Plan(
        replicas=tuple(
            Replica(assignment=dict.fromkeys(problem.graph.names, f"h{i}/cpu:0"), share=s) for i, s in enumerate(shares)
        ),
        strategy="test",
    )


def piped(problem):
    return Plan.from_assignment(problem, [0, 1, 1, 1, 0], strategy="test")


def test_what_is_kept_is_buckets_and_buffers():
    problem = build(1000.0)
    evaluator = ClusterEvaluator(problem)
    held, kept = evaluator.memory_bytes(parallel(problem, 0.75))
    assert kept.tolist() == [100.0, 100.0]
    assert held.tolist() == [500 + 100 + 100 + 30.0, 500 + 100 + 100 + 10.0]
    held, kept = evaluator.memory_bytes(piped(problem))
    assert kept.tolist() == [10.0, 10.0] and held.tolist() == [500 + 50 + 20 + 10.0] * 2
    single = Plan.from_assignment(problem, [0] * 5, strategy="test")
    assert evaluator.memory_bytes(single)[1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("memory", "lots"), [
    (float("inf"), [[0, 1, 2, 3]]),
    (940.0, [[0, 1, 2, 3]]),
    (939.0, [[0, 1, 2], [3]]),
    (839.0, [[0, 1], [2, 3]]),
    (740.0, [[0, 1], [2], [3]]),
    (739.0, [[0], [1, 2], [3]]),
])  # fmt: skip
def test_plans_are_divided_where_those_that_wait_leave_no_room(memory, lots):
    problem = build(memory)
    plans = [parallel(problem, 0.75), piped(problem), parallel(problem, 0.5), parallel(problem, 0.25)]
    found = sittings(ClusterEvaluator(problem), plans)
    assert sorted(i for lot in found for i in lot) == [0, 1, 2, 3]
    assert found == lots
