"""Problems to place: random ones of every kind, and chains."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.problem import Objective, Problem, Semantics


def _random_problem(seed, *, ops=12, devices=3, goal="latency", semantics=None, energy_weight=0.0, memory=None,
                    frees=False, colocate=False, holes=0.0, talk=1.0, unable=0.0, chain=False):  # fmt: skip
    """Draw a problem. `memory` = capacity of each device over the ops' whole memory; `holes` = part of missing links.

    `unable` = part of latencies that are missing; device 0 can run everything.
    """
    random = np.random.default_rng(seed)
    edges = [(i, [i + 1], float(random.integers(0, 50))) for i in range(ops - 1)]
    if not chain:
        edges = [
            (i, random.integers(i + 1, min(ops, i + 5), random.integers(1, 4)).tolist(), float(random.integers(0, 50)))
            for i in range(ops - 1)
        ]
    groups = np.full(ops, -1)
    if colocate:
        groups[random.permutation(ops)[:4]] = [0, 0, 1, 1]
    graph = OpGraph.build(
        names=[f"op{i}" for i in range(ops)],
        edges=edges,
        weight_bytes=random.integers(1, 100, ops),
        activation_bytes=random.integers(1, 100, ops),
        frees=[frees] * ops,
        colocate=groups,
    )
    total = float((graph.weight_bytes + graph.activation_bytes).sum())
    nodes = tuple(
        Device(
            name=f"host0/{'cpu' if d == 0 else 'cuda'}:{d}",
            kind="cpu" if d == 0 else "cuda",
            memory_bytes=np.inf if memory is None else memory * total,
            idle_watts=10.0,
            busy_watts=50.0 + 10 * d,
        )
        for d in range(devices)
    )
    pairs = itertools.permutations([n.name for n in nodes], 2)
    links = {
        pair: Link(latency_ms=float(random.random()), bytes_per_ms=float(random.integers(5, 100)))
        for pair in pairs
        if random.random() >= holes
    }
    latency = 0.1 + 3 * random.random((ops, devices))
    latency[:, 1:][random.random((ops, devices - 1)) < unable] = np.inf
    return Problem(
        graph=graph,
        cluster=Cluster(devices=nodes, links=links),
        latency_ms=latency,
        objective=Objective(goal=goal, energy_weight=energy_weight),
        semantics=semantics or Semantics(),
        name=f"random-{seed}",
    )


@pytest.fixture(scope="session")
def random_problem():
    return _random_problem


@pytest.fixture(scope="session")
def topcuoglu():
    """The example of Topcuoglu et al. 2002: figure 2's graph and table 1's costs on three processors."""
    latency = [
        [14, 16, 9], [13, 19, 18], [11, 13, 19], [13, 8, 17], [12, 13, 10],
        [13, 16, 9], [7, 15, 11], [5, 11, 14], [18, 12, 20], [21, 7, 16],
    ]  # fmt: skip
    data = {
        (1, 2): 18, (1, 3): 12, (1, 4): 9, (1, 5): 11, (1, 6): 14, (2, 8): 19, (2, 9): 16, (3, 7): 23,
        (4, 8): 27, (4, 9): 23, (5, 9): 13, (6, 8): 15, (7, 10): 17, (8, 10): 11, (9, 10): 13,
    }  # fmt: skip
    graph = OpGraph.build(
        names=[f"task{i}" for i in range(1, 11)], edges=[(a - 1, [b - 1], float(c)) for (a, b), c in data.items()]
    )
    cluster = Cluster(
        devices=tuple(Device(name=f"host0/p:{i}", kind="p") for i in range(3)),
        default_link=Link(latency_ms=0.0, bytes_per_ms=1.0),
    )
    return Problem(
        graph=graph, cluster=cluster, latency_ms=np.asarray(latency, float), semantics=Semantics(contention="none")
    )
