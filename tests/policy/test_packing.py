import numpy as np
import pytest

from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.policy.network import PolicyNetwork
from autoplace.policy.policy import Policy
from autoplace.policy.tables import build_tables
from autoplace.problem import Problem
from autoplace.simulate.evaluator import SimulatedEvaluator


def chain(memory, *, frees, ops=40):
    """Return a chain on two devices, 10 bytes of weights and 100 of activations an op."""
    graph = OpGraph.build(
        names=tuple(f"op{i}" for i in range(ops)),
        edges=[(i, [i + 1], 100.0) for i in range(ops - 1)],
        weight_bytes=[10] * ops,
        activation_bytes=[100] * ops,
        frees=[frees] * ops,
    )
    devices = tuple(Device(name=f"h/cuda:{i}", kind="cuda", memory_bytes=memory) for i in range(2))
    cluster = Cluster(devices=devices, default_link=Link(latency_ms=0.01, bytes_per_ms=1e5))
    return Problem(graph=graph, cluster=cluster, latency_ms=np.ones((ops, 2)))


@pytest.mark.parametrize(("memory", "need"), [(2200, 110), (1800, 85), (1300, 60), (800, 35), (500, 22.5), (300, 10)])
def test_as_much_of_freed_activations_counts_as_fits(memory, need):
    tables = build_tables(chain(memory, frees=True))
    assert (tables.need == need).all() and (tables.certificate >= 0).all()


def test_what_is_never_freed_counts_in_full():
    tables = build_tables(chain(1800, frees=False))
    assert (tables.need == 110).all() and (tables.certificate == -1).all()


def test_placements_leave_room_for_what_is_alive():
    """By weights alone all 40 ops fit on one device, which then has no room for two activations."""
    problem, none = chain(500, frees=True), np.zeros(40, bool)
    everything_there = np.zeros(40, np.int32)
    evaluator = SimulatedEvaluator(problem)
    assert not np.isfinite(evaluator.score(everything_there)).any()
    draws = Policy.of(PolicyNetwork()).resample(problem, everything_there, none, 3, seed=0)
    assert len(draws) == 3 and np.isfinite(evaluator.score(draws)).all()
