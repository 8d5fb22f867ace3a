import numpy as np

from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.policy.tables import build_tables
from autoplace.policy.times import transfer_times
from autoplace.problem import Problem, Semantics


def test_classes_hold_each_op_once_and_colocated_ops_together(problem_maker):
    problem = problem_maker(colocate=True)
    tables = build_tables(problem)
    assert sorted(tables.class_members.tolist()) == list(range(problem.num_ops))
    assert tables.class_of[0] == tables.class_of[problem.num_ops - 1]
    assert len(tables.class_offsets) - 1 == problem.num_ops - 1 - 2


def test_order_is_topological_when_nothing_is_colocated(problem_maker):
    problem = problem_maker(ops=60, seed=3)
    step = build_tables(problem).class_of
    edges = problem.graph.edge_list
    assert (step[edges[:, 0]] < step[edges[:, 1]]).all()


def test_tail_is_the_best_way_to_the_end():
    graph = OpGraph.build(names=("a", "b"), edges=[(0, [1], 1000.0)])
    devices = tuple(Device(name=f"h/cuda:{i}", kind="cuda") for i in range(2))
    cluster = Cluster(devices=devices, default_link=Link(latency_ms=1.0, bytes_per_ms=1000.0))
    problem = Problem(graph=graph, cluster=cluster, latency_ms=np.array([[1.0, 1.0], [9.0, 4.0]]))
    tables = build_tables(problem)
    # From device 0: stay for 9, or send for 1 + 1 and run for 4. From device 1: stay for 4.
    np.testing.assert_allclose(tables.tail, [[6.0, 4.0], [0.0, 0.0]])


def test_ops_after_each_class_add_up(problem_maker):
    problem = problem_maker(memory=0.6)
    tables = build_tables(problem)
    graph = problem.graph
    assert tables.need_after[0] == (graph.weight_bytes + graph.activation_bytes).sum()
    np.testing.assert_allclose(tables.rest_latency[0], problem.latency_ms.sum(axis=0))


def test_host_route_costs_both_legs():
    names = ("h/cuda:0", "h/cuda:1", "h/cpu:0")
    devices = tuple(Device(name=n, kind=n[2:].split(":")[0]) for n in names)
    links = {(a, b): Link(latency_ms=1.0, bytes_per_ms=10.0) for a in names for b in names if a != b}
    graph = OpGraph.build(names=("a",), edges=[])
    problem = Problem(
        graph=graph,
        cluster=Cluster(devices=devices, links=links),
        latency_ms=np.ones((1, 3)),
        semantics=Semantics(route="host"),
    )
    latency, inverse = transfer_times(problem)
    assert latency[0, 1] == 2.0 and latency[0, 2] == 1.0 and latency[0, 0] == 0.0
    np.testing.assert_allclose(inverse[0, 1], 0.2)


def test_certificate_fits_into_memory(problem_maker):
    problem = problem_maker(memory=0.4)
    tables = build_tables(problem)
    used = np.bincount(tables.certificate, weights=tables.need, minlength=3)
    assert (tables.certificate >= 0).all() and (used <= tables.capacity).all()
