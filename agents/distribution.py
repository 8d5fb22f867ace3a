"""Random placement problems to train on, and others that training never sees. The split is this file.

A problem is a graph family, a cluster family, and draws of everything else: costs, kinds that suit some devices, links
from slow to fast, memory pressure, goals, semantics, energy weights. Families and clusters of `HELD_OUT_FAMILIES` and
`HELD_OUT_CLUSTERS` are kept out of training; `held_out_problems` draws from them alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.random import Generator

from autoplace.errors import InputError
from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.problem import Objective, Problem, Semantics

from .families import FAMILIES, Shape

__all__ = [
    "HELD_OUT_CLUSTERS",
    "HELD_OUT_FAMILIES",
    "TRAIN_CLUSTERS",
    "TRAIN_FAMILIES",
    "draw_problem",
    "held_out_problems",
    "training_problems",
]

HELD_OUT_FAMILIES = ("diamond", "multi_tower", "tensor_parallel")
"""Graph families that training never sees."""
TRAIN_FAMILIES = tuple(name for name in FAMILIES if name not in HELD_OUT_FAMILIES)
"""Graph families that training draws from."""
HELD_OUT_CLUSTERS = ("hosts",)
"""Cluster families that training never sees."""
TRAIN_CLUSTERS = ("equal", "unequal", "accelerated")
"""Cluster families that training draws from."""


def training_problems(count: int, *, seed: int, max_ops: int = 120, max_devices: int = 8) -> list[Problem]:
    """Draw problems of the training families and clusters.

    Args:
        count: How many.
        seed: The same seed gives the same problems, and the first ones do not depend on the count.
        max_ops: Largest number of ops, about.
        max_devices: Largest number of devices.
    """
    return _draw(count, seed, "train", TRAIN_FAMILIES, TRAIN_CLUSTERS, max_ops, max_devices)


def held_out_problems(count: int, *, seed: int, max_ops: int = 120, max_devices: int = 8) -> list[Problem]:
    """Draw problems that training cannot have seen: held-out families on held-out and on known clusters.

    Args:
        count, seed, max_ops, max_devices: As in → `training_problems`.
    """
    clusters = HELD_OUT_CLUSTERS + TRAIN_CLUSTERS
    return _draw(count, seed, "held-out", HELD_OUT_FAMILIES, clusters, max_ops, max_devices)


def _draw(
    count: int, seed: int, split: str, families: Sequence[str], clusters: Sequence[str], max_ops: int, max_devices: int
) -> list[Problem]:
    salt = sum(split.encode())
    problems = []
    for index in range(count):
        random = np.random.default_rng([seed, salt, index])
        name = f"{split}-{seed}-{index}"
        family, cluster = families[index % len(families)], clusters[index // len(families) % len(clusters)]
        problems.append(draw_problem(random, family, cluster, name=name, max_ops=max_ops, max_devices=max_devices))
    return problems


def draw_problem(
    random: Generator, family: str, cluster: str, *, name: str, max_ops: int = 120, max_devices: int = 8
) -> Problem:
    """Draw one problem.

    Args:
        random: Source of everything that is drawn.
        family: A graph family, see `agents.families`.
        cluster: `equal`, `unequal`, `accelerated` (one slow general device among fast ones) or `hosts` (slow links
            between hosts, fast ones within).
        name: Of the problem.
        max_ops: Largest number of ops, about.
        max_devices: Largest number of devices.

    Raises:
        InputError: If the family or the cluster is unknown.
    """
    if family not in FAMILIES or cluster not in _SPEEDS:
        raise InputError(
            f"problem family {family!r} on cluster {cluster!r} is unknown; use one of {', '.join(FAMILIES)}"
        )
    size = max(3, round(math.exp(random.uniform(math.log(8), math.log(max(max_ops, 9))))))
    shape = FAMILIES[family](random, size)
    devices = int(random.integers(2, max_devices + 1))
    latency = _latencies(random, shape, cluster, devices)
    graph = _graph(random, shape)
    hardware = _cluster(random, cluster, devices, graph, latency)
    watts = hardware.devices[0].idle_watts is not None
    return Problem(
        graph=graph,
        cluster=hardware,
        latency_ms=latency,
        overhead_ms=_overhead(random, latency),
        objective=_objective(random, watts),
        semantics=_semantics(random),
        name=f"{name}-{family}-{cluster}",
    )


_SPEEDS: dict[str, Callable[[Generator, int], np.ndarray]] = {
    "equal": lambda random, count: np.ones(count),
    "unequal": lambda random, count: np.exp(random.normal(0.0, random.uniform(0.1, 0.8), count)),
    "accelerated": lambda random, count: np.r_[random.uniform(4.0, 20.0), np.exp(random.normal(0, 0.2, count - 1))],
    "hosts": lambda random, count: np.exp(random.normal(0.0, 0.3, count)),
}
"""Cluster family to slowness of its devices, float64[D]."""


def _latencies(random: Generator, shape: Shape, cluster: str, devices: int) -> np.ndarray:
    """Draw float64[N, D] ms: work times slowness, times how a kind suits a device, times noise; some can't run."""
    work = np.asarray(shape.work) * math.exp(random.normal(0.0, 2.0))
    slowness = _SPEEDS[cluster](random, devices)
    latency = work[:, None] * slowness
    if cluster != "equal":
        kinds, index = np.unique(shape.kinds, return_inverse=True)
        spread = random.choice([0.0, 0.2, 0.6])
        latency = latency * np.exp(random.normal(0.0, spread, (len(kinds), devices)))[index]
        latency = latency * np.exp(random.normal(0.0, random.choice([0.0, 0.1]), latency.shape))
    if random.random() < 0.1:
        forbidden = random.random(latency.shape) < 0.05
        forbidden[:, int(random.integers(devices))] = False
        latency = np.where(forbidden, np.inf, latency)
    return latency


def _overhead(random: Generator, latency: np.ndarray) -> np.ndarray | None:
    if random.random() < 0.7:
        return None
    return np.where(np.isfinite(latency), latency, 0.0) * random.uniform(0.0, 0.4)


def _graph(random: Generator, shape: Shape) -> OpGraph:
    ops = len(shape.work)
    size = np.exp(random.normal(0.0, 0.3, ops)) * 1e5
    weights = np.asarray(shape.work) * 1e6 * np.exp(random.normal(0.0, 0.7, ops))
    weights *= random.random(ops) < 0.7
    colocate = np.full(ops, -1)
    if random.random() < 0.15:
        colocate[[0, ops - 1]] = 0
    if random.random() < 0.15:
        for key in range(1, 1 + ops // 8):
            colocate[random.integers(ops, size=2)] = key
    return OpGraph.build(
        names=[f"op{i}" for i in range(ops)],
        edges=[(p, consumers, share * size[p]) for p, consumers, share in shape.edges],
        kinds=shape.kinds,
        weight_bytes=weights.astype(np.int64).tolist(),
        activation_bytes=(size * random.uniform(0.5, 4.0)).astype(np.int64).tolist(),
        frees=[bool(random.random() < 0.25)] * ops,
        colocate=colocate.tolist(),
    )


def _cluster(random: Generator, family: str, count: int, graph: OpGraph, latency: np.ndarray) -> Cluster:
    """Draw memory, watts and links. A transfer takes 0.02 to 5 times a mean op, the latency part of it 0 to half."""
    memory = _memory(random, count, graph)
    watts = random.random() < 0.7
    busy = np.exp(random.normal(5.0, 0.5, count))
    kinds = ["cpu" if family == "accelerated" and i == 0 else "cuda" for i in range(count)]
    devices = tuple(
        Device(
            name=f"host{i * 2 // count if family == 'hosts' else 0}/{kinds[i]}:{i}",
            kind=kinds[i],
            memory_bytes=float(memory[i]),
            idle_watts=float(busy[i] * random.uniform(0.1, 0.4)) if watts else None,
            busy_watts=float(busy[i]) if watts else None,
        )
        for i in range(count)
    )
    op_ms = float(np.median(latency[np.isfinite(latency)]))
    mean_bytes = float(graph.tensor_bytes.mean()) if graph.num_tensors else 1e5
    transfer_ms = op_ms * math.exp(random.uniform(math.log(0.02), math.log(5.0)))
    fixed = transfer_ms * random.choice([0.0, 0.1, 0.5])
    base = Link(latency_ms=fixed, bytes_per_ms=mean_bytes / max(transfer_ms - fixed, 1e-9))
    return Cluster(devices=devices, links=_links(random, family, devices, base), default_link=base)


def _links(random: Generator, family: str, devices: tuple[Device, ...], base: Link) -> dict[tuple[str, str], Link]:
    """Draw what differs from the base link: nothing, every pair a little, and links between hosts a lot."""
    spread = random.choice([0.0, 0.5])
    slow = random.uniform(2.0, 10.0) if family == "hosts" else 1.0
    links = {}
    for a in devices:
        for b in devices:
            if a is not b and (spread > 0 or a.host != b.host):
                factor = math.exp(random.normal(0.0, spread)) / (slow if a.host != b.host else 1.0)
                links[a.name, b.name] = Link(
                    latency_ms=base.latency_ms / factor, bytes_per_ms=base.bytes_per_ms * factor
                )
    return links


def _memory(random: Generator, count: int, graph: OpGraph) -> np.ndarray:
    """Draw float64[D] bytes: unlimited, ample, or scarce (1.2 to 1.8 times what is needed in all)."""
    pressure = random.random()
    if pressure < 0.5:
        return np.full(count, np.inf)
    need = (graph.weight_bytes + graph.activation_bytes).astype(np.float64)
    for key in np.unique(graph.colocate[graph.colocate >= 0]):
        members = graph.colocate == key
        need[members] = need[members].sum()
    total = float((graph.weight_bytes + graph.activation_bytes).sum())
    ratio = random.uniform(2.0, count + 2.0) if pressure < 0.75 else random.uniform(1.2, 1.8)
    shares = random.dirichlet(np.full(count, random.choice([3.0, 1000.0])))
    return np.maximum(shares * total * ratio, 1.1 * need.max())


def _objective(random: Generator, watts: bool) -> Objective:
    weight = 0.0
    if watts and random.random() < 0.5:
        weight = 0.5 if random.random() < 0.6 else float(random.uniform(0.05, 0.95))
    return Objective(goal="throughput" if random.random() < 0.35 else "latency", energy_weight=weight)


def _semantics(random: Generator) -> Semantics:
    return Semantics(
        transfers="blocking" if random.random() < 0.25 else "overlapped",
        route="host" if random.random() < 0.2 else "direct",
        contention="none" if random.random() < 0.25 else "link",
        queue="priority" if random.random() < 0.25 else "fifo",
        microbatches=int(random.choice([2, 4])) if random.random() < 0.2 else 1,
    )
