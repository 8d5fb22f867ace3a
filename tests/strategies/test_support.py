"""The view of a problem: classes, memory bounds, groups that can talk, packing."""

from __future__ import annotations

import numpy as np

from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.problem import Semantics
from autoplace.strategies._support import View


def test_classes_are_numbered_by_their_first_op(random_problem):
    problem = random_problem(4, colocate=True)
    view = View.of(problem)
    first_seen = dict.fromkeys(view.op_class[problem.graph.topological_order].tolist())
    assert list(first_seen) == list(range(view.num_classes))
    for group in (0, 1):
        assert len(set(view.op_class[problem.graph.colocate == group].tolist())) == 1
    assert view.num_classes == problem.num_ops - 2


def test_memory_bounds_differ_by_what_is_freed(random_problem):
    kept, freed = View.of(random_problem(4, memory=1.0)), View.of(random_problem(4, memory=1.0, frees=True))
    assert kept.relaxed() is None
    relaxed = freed.relaxed()
    graph = freed.problem.graph
    assert relaxed is not None
    assert freed.class_bytes.sum() == graph.weight_bytes.sum() + graph.activation_bytes.sum()
    assert relaxed.class_bytes.sum() == graph.weight_bytes.sum()


def test_spread_and_gather_are_inverse(random_problem):
    view = View.of(random_problem(4, colocate=True))
    class_device = np.random.default_rng(0).integers(0, 3, view.num_classes).astype(np.int32)
    assert (view.gather(view.spread(class_device)) == class_device).all()


def test_groups_hold_only_devices_that_all_talk(random_problem):
    names = ["a", "b", "c"]
    both = {pair: Link(latency_ms=1.0, bytes_per_ms=1.0) for pair in [("a", "b"), ("b", "a"), ("b", "c"), ("c", "b")]}
    cluster = Cluster(devices=tuple(Device(name=n, kind="cuda") for n in names), links=both)
    view = View.of(random_problem(0).with_(cluster=cluster))
    assert [g.tolist() for g in view.groups] == [[0, 1], [1, 2]]


def test_by_the_host_a_transfer_has_two_legs(random_problem):
    problem = random_problem(5, semantics=Semantics(route="host"))
    view, links = View.of(problem), problem.cluster.link_latency_ms
    # Device 0 is the CPU, where the host's memory is: no leg of its own.
    assert view.transfer.latency_ms[1, 2] == links[1, 0] + links[0, 2]
    assert view.transfer.latency_ms[0, 2] == links[0, 2]
    assert view.transfer.latency_ms[1, 0] == links[1, 0]
    assert (np.diag(view.transfer.latency_ms) == 0).all()


def test_microbatches_pay_the_overhead_again(random_problem):
    problem = random_problem(6, semantics=Semantics(microbatches=4))
    problem = problem.with_(overhead_ms=np.full_like(problem.latency_ms, 0.05))
    assert np.allclose(View.of(problem).class_latency_ms, problem.latency_ms[problem.graph.topological_order] + 0.15)


def test_pack_finds_room_where_first_come_would_not(random_problem):
    view = View.of(random_problem(8, memory=0.4))
    packed = view.pack(view.allowed)
    assert packed is not None
    assert view.fits(packed)
    assert view.pack(view.allowed & (np.arange(3) == 0)) is None


def test_upward_ranks_are_those_of_the_paper(topcuoglu):
    ranks = View.of(topcuoglu).upward_rank_ms
    expected = [108.000, 77.000, 80.000, 80.000, 69.000, 63.333, 42.667, 35.667, 44.333, 14.667]
    assert np.allclose(ranks, expected, atol=5e-4)  # Topcuoglu et al. 2002, table 2
