"""Branches of one microbatch run one after another, as the executors run them."""

from __future__ import annotations

import numpy as np

from autoplace.graph.opgraph import OpGraph
from autoplace.graph.program_order import in_program_order
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.problem import Problem
from autoplace.simulate import SimulatedEvaluator

DIAMOND = OpGraph.build(
    names=list("abcd"), edges=[(0, [1, 2], 8.0), (1, [3], 8.0), (2, [3], 8.0)], weight_bytes=[1, 2, 3, 4]
)


def test_only_missing_neighbours_are_connected_and_costs_stay():
    ordered = in_program_order(DIAMOND)
    assert [tuple(e[:2]) for e in ordered.edge_list] == [(0, 1), (0, 2), (1, 3), (2, 3), (1, 2)]
    assert ordered.tensor_bytes.tolist() == [8.0, 8.0, 8.0, 0.0]
    assert ordered.weight_bytes.tolist() == [1, 2, 3, 4] and ordered.names == DIAMOND.names


def test_branches_do_not_overlap_and_a_border_costs_a_hand_over():
    cluster = Cluster(
        devices=(Device(name="h/cpu:0", kind="cpu"), Device(name="h/cpu:1", kind="cpu")),
        default_link=Link(latency_ms=0.5, bytes_per_ms=1e12),
    )
    plan = np.array([0, 0, 1, 0])
    parallel = Problem(graph=DIAMOND, cluster=cluster, latency_ms=np.full((4, 2), 10.0))
    ordered = parallel.with_(graph=in_program_order(DIAMOND))
    assert np.isclose(SimulatedEvaluator(parallel).outcome(plan).latency_ms, 31.0, atol=1e-3)
    assert np.isclose(SimulatedEvaluator(ordered).outcome(plan).latency_ms, 41.0, atol=1e-3)
