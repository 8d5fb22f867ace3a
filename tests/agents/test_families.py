import numpy as np
import pytest

from autoplace.agents.families import FAMILIES
from autoplace.graph.opgraph import OpGraph


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("size", [3, 25, 90])
def test_families_give_connected_acyclic_graphs_of_about_the_size(family, size):
    shape = FAMILIES[family](np.random.default_rng(0), size)
    count = len(shape.work)
    graph = OpGraph.build(names=[str(i) for i in range(count)], edges=shape.edges, kinds=shape.kinds)
    assert size / 3 <= count <= 3 * size + 24
    assert min(shape.work) > 0
    group = np.arange(count)
    for producer, consumer, _ in graph.edge_list:
        group[group == group[producer]] = group[consumer]
    assert len(np.unique(group)) == 1
