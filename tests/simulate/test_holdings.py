"""What ranks hold: weights by set of holders, and activations by schedule."""

from __future__ import annotations

import numpy as np
import pytest

from autoplace.errors import PlanFileError
from autoplace.graph import OpGraph
from autoplace.graph.backward import with_backward
from autoplace.hardware import Cluster, Device, Link
from autoplace.plan import Plan, Replica
from autoplace.problem import Problem
from autoplace.simulate.holdings import activation_bytes, border_buffers, held_by, holders
from autoplace.simulate.stage_line import stage_line


def build(*, training=True, frees=False, colocate=None, devices=4):
    """Four ops in a chain; weights 100, 200, 300, 400 and activations 10, 20, 30, 40."""
    graph = OpGraph.build(
        names=list("abcd"),
        edges=[(i, [i + 1], 8.0) for i in range(3)],
        weight_bytes=[100, 200, 300, 400],
        activation_bytes=[10, 20, 30, 40],
        frees=[frees] * 4,
        colocate=colocate,
    )
    graph = with_backward(graph) if training else graph
    cluster = Cluster(
        devices=tuple(Device(name=f"h{i}/cpu:0", kind="cpu") for i in range(devices)),
        default_link=Link(latency_ms=1.0, bytes_per_ms=10.0),
    )
    return Problem(graph=graph, cluster=cluster, latency_ms=np.ones((graph.num_ops, devices)), batch_size=8)


def placed(problem, *rows, shares=None):
    """A plan whose replicas have the given devices for a, b, c, d."""
    shares = shares or [1.0 / len(rows)] * len(rows)
    names, replicas = problem.graph.names, []
    for row, share in zip(rows, shares, strict=True):
        whole = [*row, row[-1], *row[::-1]] if problem.num_ops == 9 else row
        assignment = {n: f"h{d}/cpu:0" for n, d in zip(names, whole, strict=True)}
        replicas.append(Replica(assignment=assignment, share=share))
    return Plan(replicas=tuple(replicas), strategy="test")


def test_data_parallel_holds_all_everywhere():
    problem = build()
    assert holders(placed(problem, [0] * 4, [1] * 4, [2] * 4), problem) == {
        ("h0/cpu:0", "h1/cpu:0", "h2/cpu:0"): 1000.0
    }


def test_a_pipeline_shares_nothing_but_ties():
    problem = build()
    assert holders(placed(problem, [0, 0, 1, 1]), problem) == {("h0/cpu:0",): 300.0, ("h1/cpu:0",): 700.0}
    tied = build(colocate=[0, -1, -1, 0])  # a's weights are read by d again
    assert holders(placed(tied, [0, 0, 1, 1]), tied) == {
        ("h0/cpu:0",): 200.0,
        ("h0/cpu:0", "h1/cpu:0"): 100.0,
        ("h1/cpu:0",): 700.0,
    }
    assert holders(placed(tied, [0, 0, 0, 0]), tied) == {("h0/cpu:0",): 1000.0}


def test_hybrids_with_unlike_cuts_have_a_set_for_each_pair():
    problem = build()
    assert holders(placed(problem, [0, 0, 1, 1], [2, 3, 3, 3]), problem) == {
        ("h0/cpu:0", "h2/cpu:0"): 100.0,
        ("h0/cpu:0", "h3/cpu:0"): 200.0,
        ("h1/cpu:0", "h3/cpu:0"): 700.0,
    }


def test_the_sum_of_all_sets_is_the_model():
    problem = build(colocate=[0, -1, 1, 0])
    for rows in ([[0, 1, 2, 3]], [[0, 0, 1, 1], [2, 2, 2, 3]]):
        assert sum(holders(placed(problem, *rows), problem).values()) == 1000.0


def test_a_plan_of_another_model_is_refused():
    problem = build()
    with pytest.raises(PlanFileError):
        holders(Plan(replicas=(Replica(assignment={"x": "h0/cpu:0"}),), strategy="t"), problem)


def test_activations_in_training_follow_the_schedule():
    problem = build()
    line = stage_line(problem.graph, np.asarray([0, 0, 1, 1, 1, 1, 1, 0, 0]))
    assert activation_bytes(problem, line, 0.25, 4, "gpipe") == {0: 30.0, 1: 70.0}
    assert activation_bytes(problem, line, 0.25, 4, "1f1b") == {0: 22.5, 1: 35.0}


def test_buffers_at_the_borders_are_kept_for_all_microbatches():
    problem = build(devices=3)
    line = stage_line(problem.graph, np.asarray([0, 0, 1, 2, 2, 2, 1, 0, 0]))
    assert border_buffers(line, 0.5, training=True) == {0: 4.0, 1: 8.0, 2: 4.0}
    assert border_buffers(line, 1.0, training=False) == {1: 8.0, 2: 8.0}


def test_activations_in_inference_are_freed():
    problem = build(training=False, frees=True)
    line = stage_line(problem.graph, np.asarray([0, 0, 0, 1]))
    # a and b together, then b and c, which is handed on.
    assert activation_bytes(problem, line, 0.5, 2, "gpipe") == {0: 25.0, 1: 20.0}
    kept = build(training=False)
    assert activation_bytes(kept, line, 0.5, 2, "gpipe") == {0: 60.0, 1: 40.0}


def test_later_readers_hold_a_tied_weight_and_earlier_ones_do_not():
    problem = build(colocate=[0, -1, 0, -1])
    held = held_by(problem, [np.asarray([0, 1, 2, 3, 3, 3, 2, 1, 0])])
    assert held.astype(int).tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
