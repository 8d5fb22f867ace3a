import numpy as np
import pytest

from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.problem import Objective, Problem, Semantics


def make_problem(
    *,
    ops=24,
    devices=3,
    seed=0,
    memory=None,
    colocate=False,
    goal="latency",
    energy_weight=0.0,
    missing=(),
    semantics=None,
):
    """Draw a small problem; `memory` is each device's share of what all ops need, `missing` pairs cannot talk."""
    random = np.random.default_rng(seed)
    edges = []
    for op in range(ops - 1):
        consumers = random.integers(op + 1, min(ops, op + 6), size=int(random.integers(1, 3))).tolist()
        edges.append((op, consumers, float(random.lognormal(10, 1))))
    groups = np.full(ops, -1)
    if colocate:
        groups[[0, ops - 1]] = 0
        groups[[2, ops // 2, ops // 2 + 1]] = 1
    weights, activations = random.integers(1, 1000, ops), random.integers(1, 1000, ops)
    graph = OpGraph.build(
        names=[f"op{i}" for i in range(ops)],
        edges=edges,
        weight_bytes=weights.tolist(),
        activation_bytes=activations.tolist(),
        colocate=groups.tolist(),
    )
    capacity = np.inf if memory is None else float((weights + activations).sum()) * memory
    names = [f"host0/cuda:{i}" for i in range(devices)]
    fleet = tuple(
        Device(name=n, kind="cuda", memory_bytes=capacity, idle_watts=20.0 + 5 * i, busy_watts=100.0 + 50 * i)
        for i, n in enumerate(names)
    )
    link = Link(latency_ms=0.01, bytes_per_ms=1e5)
    if missing:
        absent = {(names[a], names[b]) for a, b in missing}
        links = {(a, b): link for a in names for b in names if a != b and (a, b) not in absent}
        cluster = Cluster(devices=fleet, links=links)
    else:
        cluster = Cluster(devices=fleet, default_link=link)
    return Problem(
        graph=graph,
        cluster=cluster,
        latency_ms=random.lognormal(0, 1, (ops, 1)) * random.lognormal(0, 0.4, (ops, devices)),
        objective=Objective(goal=goal, energy_weight=energy_weight),
        semantics=semantics or Semantics(),
        name="small",
    )


@pytest.fixture(scope="session")
def problem_maker():
    return make_problem
