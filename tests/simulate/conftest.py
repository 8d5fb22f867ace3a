"""The slow reference simulator, loaded by path, and random problems to try it on."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from autoplace.graph import OpGraph
from autoplace.hardware import Cluster, Device, Link
from autoplace.problem import Objective, Problem, Semantics


@pytest.fixture(scope="session")
def reference():
    spec = importlib.util.spec_from_file_location("simulate_reference", Path(__file__).parent / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def random_problem():
    """A function: (seed, semantics, objective…) to (problem, assignments). Times are dyadic, so ties are exact."""

    def build(seed: int, *, semantics: Semantics, objective: Objective, ops: int, devices: int, pressure: bool):
        rng = np.random.default_rng(seed)
        kinds = rng.choice(["cpu", "cuda"], devices)
        described = tuple(
            Device(
                name=f"host{rng.integers(2)}/{kinds[i]}:{i}",
                kind=str(kinds[i]),
                memory_bytes=float(rng.integers(4, 40)) if pressure and rng.random() < 0.7 else float("inf"),
                idle_watts=None if rng.random() < 0.05 and objective.energy_weight == 0 else float(rng.integers(1, 9)),
                busy_watts=float(rng.integers(9, 99)),
            )
            for i in range(devices)
        )

        def link() -> Link:
            return Link(latency_ms=float(rng.choice([0, 0.25, 0.5])), bytes_per_ms=float(rng.choice([64, 128, 256])))

        links = {(a.name, b.name): link() for a in described for b in described if a is not b and rng.random() < 0.5}
        cluster = Cluster(devices=described, links=links, default_link=link() if rng.random() < 0.85 else None)
        edges = []
        for _ in range(int(rng.integers(0, 2 * ops))):
            producer = int(rng.integers(0, ops))
            later = np.arange(producer + 1, ops)
            consumers = rng.choice(later, min(len(later), int(rng.integers(0, 4))), replace=False)
            edges.append((producer, [int(c) for c in consumers], float(rng.choice([0, 64, 128, 192]))))
        shuffle = rng.permutation(ops)  # op order is not a topological order
        edges = [(int(shuffle[p]), [int(shuffle[c]) for c in cs], b) for p, cs, b in edges]
        graph = OpGraph.build(
            names=[f"op{i}" for i in range(ops)],
            edges=edges,
            weight_bytes=rng.integers(0, 4, ops).tolist(),
            activation_bytes=rng.integers(0, 5, ops).tolist(),
            frees=(rng.random(ops) < rng.choice([0.0, 0.7])).tolist(),
            colocate=np.where(rng.random(ops) < 0.1, 0, -1).tolist(),
        )
        latency = rng.choice([0, 0.25, 0.5, 1, 1, 2], (ops, devices)).astype(float)
        latency[rng.random((ops, devices)) < 0.03] = np.inf
        problem = Problem(
            graph=graph, cluster=cluster, latency_ms=latency, semantics=semantics, objective=objective, batch_size=3
        )
        plans = rng.integers(0, devices, (4, ops))
        plans[0] = plans[0, 0]
        held = graph.colocate == 0
        if held.any():
            plans[:3, held] = plans[:3, held][:, :1]
        return problem, plans.astype(np.int32)

    return build
