import numpy as np
import pytest

from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.problem import Objective, Problem


@pytest.fixture(scope="session")
def problem_maker():
    """A function that draws a small problem; `memory` is each device's share of what all ops need."""

    def make(*, ops=10, devices=3, seed=0, memory=None, energy_weight=0.0, goal="latency"):
        random = np.random.default_rng(seed)
        edges = [(op, [int(random.integers(op + 1, min(ops, op + 4)))], 1e4) for op in range(ops - 1)]
        weights = random.integers(1, 1000, ops)
        capacity = np.inf if memory is None else float(weights.sum()) * memory
        fleet = tuple(
            Device(name=f"host0/cuda:{i}", kind="cuda", memory_bytes=capacity, idle_watts=20.0, busy_watts=100.0)
            for i in range(devices)
        )
        return Problem(
            graph=OpGraph.build(names=[f"op{i}" for i in range(ops)], edges=edges, weight_bytes=weights.tolist()),
            cluster=Cluster(devices=fleet, default_link=Link(latency_ms=0.01, bytes_per_ms=1e5)),
            latency_ms=random.lognormal(0, 1, (ops, 1)) * random.lognormal(0, 0.4, (ops, devices)),
            objective=Objective(goal=goal, energy_weight=energy_weight),
            name=f"small-{seed}",
        )

    return make
