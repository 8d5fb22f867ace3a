"""Synthetic placement problems: a graph family on a cluster family, all else drawn. Knows nothing of the split."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from autoplace.errors import InputError
from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.problem import Problem

from .conditions import Conditions, draw_device_count, draw_memory, draw_objective, draw_semantics
from .families import FAMILIES, Shape

__all__ = ["CLUSTERS", "draw_problem"]

_SPEEDS: dict[str, Callable[[Generator, int], NDArray[np.float64]]] = {
    "equal": lambda random, count: np.ones(count),
    "unequal": lambda random, count: np.exp(random.normal(0.0, random.uniform(0.1, 0.8), count)),
    "accelerated": lambda random, count: np.r_[random.uniform(4.0, 20.0), np.exp(random.normal(0, 0.2, count - 1))],
    "hosts": lambda random, count: np.exp(random.normal(0.0, 0.3, count)),
}
"""Cluster family to slowness of its devices, float64[D]."""

CLUSTERS = tuple(_SPEEDS)
"""Cluster families: `equal`, `unequal`, `accelerated` (one slow general device among fast ones) and `hosts` (slow links
between hosts, fast ones within)."""


def draw_problem(
    random: Generator,
    family: str,
    cluster: str,
    *,
    name: str,
    max_ops: int = 300,
    max_devices: int = 16,
    size: int | None = None,
    conditions: Conditions | None = None,
) -> Problem:
    """Draw one problem.

    Args:
        random: Source of everything that is drawn.
        family: A graph family, see `agents.families`.
        cluster: One of `CLUSTERS`.
        name: Of the problem; family and cluster are appended.
        max_ops: Largest number of ops, about.
        max_devices: Largest number of devices.
        size: Number of ops, about; None = drawn from 8 to `max_ops`, small more often than large (log-uniform).
        conditions: What is asked for; None = nothing.

    Raises:
        InputError: If the family or the cluster is unknown.
    """
    if family not in FAMILIES or cluster not in _SPEEDS:
        raise InputError(
            f"problem family {family!r} on cluster {cluster!r} is unknown; use one of {', '.join(FAMILIES)}, "
            f"on one of {', '.join(CLUSTERS)}"
        )
    wanted = conditions or Conditions()
    if size is None:
        size = max(3, round(math.exp(random.uniform(math.log(8), math.log(max(max_ops, 9))))))
    shape = FAMILIES[family](random, size)
    devices = wanted.devices or draw_device_count(random, max_devices)
    latency = _latencies(random, shape, cluster, devices)
    graph = _graph(random, shape)
    hardware = _cluster(random, cluster, devices, graph, latency, wanted)
    watts = hardware.devices[0].idle_watts is not None
    return Problem(
        graph=graph,
        cluster=hardware,
        latency_ms=latency,
        overhead_ms=_overhead(random, latency),
        objective=draw_objective(random, watts=watts, goal=wanted.goal, energy_weight=wanted.energy_weight),
        semantics=wanted.semantics or draw_semantics(random),
        name=f"{name}-{family}-{cluster}",
    )


def _latencies(random: Generator, shape: Shape, cluster: str, devices: int) -> NDArray[np.float64]:
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


def _overhead(random: Generator, latency: NDArray[np.float64]) -> NDArray[np.float64] | None:
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


def _cluster(
    random: Generator, family: str, count: int, graph: OpGraph, latency: NDArray[np.float64], wanted: Conditions
) -> Cluster:
    """Draw memory, watts and links. A transfer takes 0.02 to 5 times a mean op, the latency part of it 0 to half."""
    memory = draw_memory(random, graph, count, how=wanted.memory)
    watts = random.random() < 0.7 or bool(wanted.energy_weight)
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
