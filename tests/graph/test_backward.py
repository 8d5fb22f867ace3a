import numpy as np

from autoplace.graph.backward import with_backward
from autoplace.graph.opgraph import OpGraph


def forward():
    return OpGraph.build(
        names=["a", "b", "c", "d"],
        edges=[(0, [1, 2], 8.0), (1, [3], 4.0), (2, [3], 2.0)],
        kinds=["linear"] * 4,
        modules=["a", "b", "c", "d"],
        flops=[1.0, 2.0, 3.0, 4.0],
        weight_bytes=[10, 20, 30, 40],
        activation_bytes=[1, 2, 3, 4],
        colocate=[5, -1, -1, 5],
    )


def test_backward_mirrors_forward():
    graph = with_backward(forward())
    assert graph.names == ("a", "b", "c", "d", "~loss", "d~backward", "c~backward", "b~backward", "a~backward")
    assert graph.kinds[4] == "barrier" and graph.flops[4] == 0
    assert graph.flops.tolist() == [1, 2, 3, 4, 0, 8, 6, 4, 2]
    assert graph.weight_bytes.tolist() == [10, 20, 30, 40, 0, 40, 30, 20, 10]
    assert graph.activation_bytes.tolist() == [1, 2, 3, 4, 0, 0, 0, 0, 0]
    assert not graph.frees.any()


def test_edges_are_reversed_with_their_bytes():
    graph = with_backward(forward())
    sizes = {(graph.names[p], graph.names[c]): graph.tensor_bytes[t] for p, c, t in graph.edge_list}
    assert sizes == {
        ("a", "b"): 8, ("a", "c"): 8, ("b", "d"): 4, ("c", "d"): 2,
        ("d", "~loss"): 0, ("~loss", "d~backward"): 0,
        ("d~backward", "b~backward"): 4, ("d~backward", "c~backward"): 2,
        ("b~backward", "a~backward"): 8, ("c~backward", "a~backward"): 8,
    }  # fmt: skip


def test_backward_ops_live_with_their_forward_ops():
    graph = with_backward(forward())
    ids = dict(zip(graph.names, graph.colocate.tolist(), strict=True))
    assert ids["~loss"] == -1
    assert all(ids[name] == ids[name + "~backward"] >= 0 for name in "abcd")
    assert ids["a"] == ids["d"] and len({ids["a"], ids["b"], ids["c"]}) == 3


def test_index_order_is_topological():
    graph = with_backward(forward())
    assert np.array_equal(graph.topological_order, np.arange(9))


def test_single_op():
    graph = with_backward(OpGraph.build(names=["."], edges=[]))
    assert graph.names == (".", "~loss", ".~backward")
    assert graph.edge_list[:, :2].tolist() == [[0, 1], [1, 2]]
