"""Replicas and microbatches as parts of one larger problem, against hand calculations."""

from __future__ import annotations

import numpy as np
import pytest

from autoplace.errors import InputError
from autoplace.graph import OpGraph
from autoplace.hardware import Cluster, Device, Link
from autoplace.problem import Objective, Problem, Semantics
from autoplace.simulate import Part, SimulatedEvaluator, expand


def chain(*, microbatches=1, overhead=None, kinds=("op", "op"), **fields):
    """a (2 ms) sends 400 bytes to b (4 ms); a link takes 1 ms + 100 bytes per ms."""
    graph = OpGraph.build(
        names=["a", "b"],
        kinds=kinds,
        edges=[(0, [1], 400.0)],
        flops=[8.0, 16.0],
        bytes_moved=[80.0, 160.0],
        weight_bytes=[1000, 2000],
        activation_bytes=[10, 21],
        colocate=[-1, 3],
    )
    cluster = Cluster(
        devices=(Device(name="h/cuda:0", kind="cuda"), Device(name="h/cuda:1", kind="cuda")),
        default_link=Link(latency_ms=1.0, bytes_per_ms=100.0),
    )
    return Problem(
        graph=graph,
        cluster=cluster,
        latency_ms=np.asarray([[2.0, 2.0], [4.0, 4.0]]),
        overhead_ms=overhead,
        semantics=Semantics(microbatches=microbatches),
        **fields,
    )


def test_costs_shrink_with_the_share_and_weights_count_once_per_device():
    larger, device = expand(
        chain(overhead=np.asarray([[1.0, 1.0], [0.0, 0.0]])),
        [Part(np.asarray([0, 0]), 0.5), Part(np.asarray([0, 1]), 0.25), Part(np.asarray([0, 1]), 0.25)],
    )
    graph = larger.graph
    assert device.tolist() == [0, 0, 0, 1, 0, 1]
    assert graph.names == ("a", "b", "a#1", "b#1", "a#2", "b#2")
    assert larger.latency_ms[:, 0].tolist() == [1.5, 2.0, 1.25, 1.0, 1.25, 1.0]
    assert graph.tensor_bytes.tolist() == [200.0, 100.0, 100.0]
    assert graph.flops.tolist() == [4, 8, 2, 4, 2, 4]
    assert graph.bytes_moved.tolist() == [40, 80, 20, 40, 20, 40]
    assert graph.activation_bytes.tolist() == [5, 11, 3, 6, 3, 6]  # rounded up
    assert graph.weight_bytes.tolist() == [1000, 2000, 0, 2000, 0, 0]
    assert len(set(graph.colocate[[1, 3, 5]].tolist())) == 3 and graph.colocate[0] == -1
    assert larger.semantics.microbatches == 1


def test_an_op_that_cannot_run_somewhere_cannot_in_any_part():
    problem = chain(overhead=np.asarray([[1.0, np.inf], [0.0, 0.0]]))
    problem = problem.with_(latency_ms=np.asarray([[2.0, np.inf], [4.0, 4.0]]))
    larger, _ = expand(problem, [Part(np.asarray([0, 0]), 0.5)] * 2)
    assert np.isinf(larger.latency_ms[[0, 2], 1]).all() and np.isfinite(larger.latency_ms[:, 0]).all()


def test_two_microbatches_of_a_pipeline_by_hand():
    # a: 0-1, 1-2; link (1 + 2 ms each): 1-4, 4-7; b: 4-6, 7-9.
    evaluator = SimulatedEvaluator(chain(microbatches=2))
    assert evaluator.score([0, 1]).tolist() == [9.0]
    start, finish = evaluator.schedule([0, 1])
    assert start.tolist() == [[0.0, 4.0], [1.0, 7.0]] and finish.tolist() == [[1.0, 6.0], [2.0, 9.0]]
    found = evaluator.outcome([0, 1])
    assert found.latency_ms == 9.0
    assert found.peak_memory_bytes == {"h/cuda:0": 1000 + 2 * 5, "h/cuda:1": 2000 + 2 * 11}
    # one part: 2 + (1 + 4) + 4
    assert SimulatedEvaluator(chain()).score([0, 1]).tolist() == [11.0]


def test_microbatches_on_one_device_take_the_overhead_once_each():
    overhead = np.asarray([[0.5, 0.5], [1.0, 1.0]])
    assert SimulatedEvaluator(chain(microbatches=3, overhead=overhead)).score([0, 0])[0] == pytest.approx(
        3 * (0.5 + 1.5 / 3 + 1.0 + 3.0 / 3)
    )


def test_the_throughput_of_microbatches_adds_their_loads():
    problem = chain(microbatches=2, objective=Objective(goal="throughput"))
    assert SimulatedEvaluator(problem).score([0, 1]).tolist() == [6.0]  # the link: 2 * (1 + 2)


@pytest.mark.parametrize("queue", ["fifo", "priority"])
def test_microbatches_keep_their_order(queue):
    problem = chain(microbatches=4).with_(semantics=Semantics(microbatches=4, queue=queue))
    for plan in ([0, 0], [0, 1]):
        start, _ = SimulatedEvaluator(problem).schedule(plan)
        assert (np.diff(start, axis=0) > 0).all()


def test_a_barrier_is_shared_by_all_parts():
    graph = OpGraph.build(
        names=["forward", "loss", "backward"],
        kinds=["linear", "barrier", "linear"],
        edges=[(0, [1, 2], 100.0), (1, [2], 100.0)],
        activation_bytes=[4, 4, 4],
    )
    problem = chain().with_(graph=graph, latency_ms=np.asarray([[4.0, 4.0], [0.0, 0.0], [8.0, 8.0]]))
    larger, device = expand(problem, [Part(np.asarray([0, 0, 0]), 0.5), Part(np.asarray([1, 1, 1]), 0.5)])
    assert larger.graph.names == ("forward", "loss", "backward", "forward#1", "backward#1")
    assert device.tolist() == [0, 0, 0, 1, 1]
    assert larger.graph.edge_list.tolist() == [
        [0, 1, 0], [0, 2, 0], [1, 2, 1], [3, 1, 2], [3, 4, 2], [1, 4, 3],
    ]  # fmt: skip
    assert larger.graph.activation_bytes.tolist() == [2, 4, 2, 2, 2]
    # forward ends at 2 on both; the second one's loss input arrives at 2 + 1.5; its gradient returns by 5; 4 more.
    assert SimulatedEvaluator(larger).score(device).tolist() == [9.0]


def test_all_forward_ends_before_backward_begins():
    graph = OpGraph.build(
        names=["f", "loss", "b"], kinds=["op", "barrier", "op"], edges=[(0, [1], 0.0), (1, [2], 0.0), (0, [2], 0.0)]
    )
    problem = chain(microbatches=2).with_(graph=graph, latency_ms=np.asarray([[4.0, 4.0], [0.0, 0.0], [8.0, 8.0]]))
    start, finish = SimulatedEvaluator(problem).schedule([0, 0, 0])
    assert start.tolist() == [[0.0, 4.0, 4.0], [2.0, 4.0, 8.0]] and finish.max() == 12.0


def test_bad_shares_are_refused():
    for parts in ([], [Part(np.asarray([0, 0]), 0.0)], [Part(np.asarray([0, 0]), 1.5)]):
        with pytest.raises(InputError, match="shares"):
            expand(chain(), parts)


def test_equal_parts_equal_the_expanded_problem(random_problem, reference):
    for seed in range(12):
        semantics = Semantics(microbatches=3, transfers=("overlapped", "blocking")[seed % 2])
        problem, plans = random_problem(
            seed, semantics=semantics, objective=Objective(), ops=8, devices=3, pressure=True
        )
        plan = plans[1]
        larger, device = expand(problem, [Part(plan, 1 / 3)] * 3)
        wanted = reference.evaluate(larger, device)
        found = SimulatedEvaluator(problem).outcome(plan)
        assert found.feasible == wanted.feasible and found.objective == wanted.objective


def test_microbatches_follow_each_other_from_stage_to_stage():
    graph = OpGraph.build(names=list("abcd"), edges=[(0, [1], 0.0), (1, [2], 0.0), (2, [3], 0.0)])
    cluster = Cluster(
        devices=(Device(name="h/cpu:0", kind="cpu"), Device(name="h/cpu:1", kind="cpu")),
        default_link=Link(latency_ms=0.0, bytes_per_ms=1e9),
    )
    problem = Problem(
        graph=graph, cluster=cluster, latency_ms=np.full((4, 2), 4.0), semantics=Semantics(microbatches=2)
    )
    # Two stages of two ops of 2 ms a part: part 0 leaves the first stage at 4 ms, part 1 the second one at 12 ms.
    # In step, part 0 would leave the first stage at 6 ms and part 1 the second one at 14 ms.
    assert SimulatedEvaluator(problem).outcome(np.array([0, 0, 1, 1])).latency_ms == pytest.approx(12.0)
