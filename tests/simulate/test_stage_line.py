"""Stages as the ranks run them, and what crosses each border."""

from __future__ import annotations

import numpy as np
import pytest

from autoplace.graph import OpGraph
from autoplace.graph.backward import with_backward
from autoplace.graph.program_order import in_program_order
from autoplace.simulate.stage_line import forward_ops, stage_line


@pytest.fixture
def skip():
    """a -> b -> c -> d, and a's result again in d."""
    return OpGraph.build(names=list("abcd"), edges=[(0, [1, 3], 10.0), (1, [2], 20.0), (2, [3], 30.0)])


def test_a_training_graph_is_known_by_its_loss(skip):
    assert forward_ops(skip) == (4, False)
    assert forward_ops(with_backward(skip)) == (4, True)
    assert forward_ops(OpGraph.build(names=list("abc"), edges=[])) == (3, False)


def test_a_tensor_that_jumps_a_stage_crosses_every_border(skip):
    for graph in (skip, with_backward(skip)):
        row = np.asarray([0, 0, 1, 2, *([2, 2, 1, 0, 0] if graph is not skip else [])])
        line = stage_line(graph, row)
        assert line.devices == (0, 1, 2) and line.alone
        assert line.stage_of.tolist() == [0, 0, 1, 2]
        assert line.border_bytes.tolist() == [30.0, 40.0]


def test_one_device_is_one_stage(skip):
    line = stage_line(skip, np.zeros(4, int))
    assert line.devices == (0,) and line.border_bytes.tolist() == []


def test_a_device_that_comes_again_has_two_stages(skip):
    line = stage_line(skip, np.asarray([0, 1, 1, 0]))
    assert line.devices == (0, 1, 0) and not line.alone
    assert line.border_bytes.tolist() == [10.0, 30.0 + 10.0]


def test_branches_are_regrouped_where_the_program_s_order_does_not_bind():
    """Two branches of two ops each, called in turn: as stages they are one a device."""
    graph = OpGraph.build(
        names=["in", "a0", "b0", "a1", "b1", "out"],
        edges=[(0, [1, 2], 8.0), (1, [3], 8.0), (2, [4], 8.0), (3, [5], 8.0), (4, [5], 8.0)],
    )
    row = np.asarray([0, 0, 1, 0, 1, 1])
    assert stage_line(in_program_order(graph), row).devices == (0, 1)
    chain = OpGraph.build(names=graph.names, edges=[(i, [i + 1], 8.0) for i in range(5)])
    assert stage_line(chain, row).devices == (0, 1, 0, 1)
