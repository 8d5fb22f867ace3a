"""What surrounds a graph in a drawn problem: how much memory there is, what is asked for, how time passes.

Everything here can be left to chance or asked for, → `Conditions`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from autoplace.graph.opgraph import OpGraph
from autoplace.problem import Objective, Semantics

__all__ = ["Conditions", "draw_device_count", "draw_memory", "draw_objective", "draw_semantics", "needed_bytes"]

MEMORY = ("unlimited", "ample", "binding")
"""How much memory a cluster has: no limit, enough to be careless, or so little that no device holds everything."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a drawn problem has to be; None = left to chance."""

    devices: int | None = None
    """Number of devices."""
    goal: str | None = None
    """`latency` or `throughput`."""
    memory: str | None = None
    """One of `MEMORY`."""
    energy_weight: float | None = None
    """w of the objective; above 0, the devices state their watts."""
    semantics: Semantics | None = None


def draw_device_count(random: Generator, most: int) -> int:
    """Draw 2 to `most` devices, few more often than many (log-uniform)."""
    return min(most, int(math.exp(random.uniform(math.log(2.0), math.log(most + 1.0)))))


def draw_memory(
    random: Generator, graph: OpGraph, count: int, *, how: str | None = None, shares: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Draw the memory of each device, float64[D] bytes.

    Binding memory is 1.15 to 1.5 times what one device alone would need in all, and 0.9 of it on one device at most,
    unless a single co-location class needs more.

    Args:
        random: Source of what is drawn.
        graph: What has to fit.
        count: Number of devices D.
        how: One of `MEMORY`; None = half unlimited, a quarter ample, a quarter binding.
        shares: float64[D], relative sizes of the devices' memories; None = drawn, equal or unequal.
    """
    how = how or str(random.choice(MEMORY, p=[0.5, 0.25, 0.25]))
    if how == "unlimited":
        return np.full(count, np.inf)
    total, largest = needed_bytes(graph)
    if shares is None:
        shares = random.dirichlet(np.full(count, random.choice([3.0, 1000.0])))
    ratio = random.uniform(2.0, count + 2.0) if how == "ample" else random.uniform(1.15, 1.5)
    memory = shares / shares.sum() * total * ratio
    if how == "binding":
        memory = _level(memory, 0.9 * total)
    return np.maximum(memory, 1.05 * largest)


def _level(memory: NDArray[np.float64], most: float) -> NDArray[np.float64]:
    """Cut what a device has beyond `most`, and share it among those that have less."""
    over = np.maximum(memory - most, 0.0).sum()
    room = np.maximum(most - memory, 0.0)
    return np.minimum(memory, most) + (room * min(1.0, over / room.sum()) if room.sum() > 0.0 else 0.0)


def needed_bytes(graph: OpGraph) -> tuple[float, float]:
    """Return the memory that one device needs for all ops in topological order, and that of the largest class, bytes.

    Activations that are freed count as long as a consumer is to come in the first figure, always in the second.
    """
    whole = (graph.weight_bytes + graph.activation_bytes).astype(np.float64)
    keys = np.where(graph.colocate >= 0, graph.colocate, graph.colocate.max(initial=-1) + 1 + np.arange(graph.num_ops))
    largest = float(np.bincount(np.unique(keys, return_inverse=True)[1], weights=whole).max())
    order = graph.topological_order
    position = np.empty(graph.num_ops, np.int64)
    position[order] = np.arange(graph.num_ops)
    last = position.copy()
    edges = graph.edge_list
    np.maximum.at(last, edges[:, 0], position[edges[:, 1]])
    held = float(graph.weight_bytes.sum()) + float(graph.activation_bytes[~graph.frees].sum())
    change = np.zeros(graph.num_ops + 1)
    freed = graph.frees
    np.add.at(change, position[freed], graph.activation_bytes[freed])
    np.add.at(change, last[freed] + 1, -graph.activation_bytes[freed].astype(np.float64))
    return held + float(np.cumsum(change).max(initial=0.0)), largest


def draw_objective(
    random: Generator, *, watts: bool, goal: str | None = None, energy_weight: float | None = None
) -> Objective:
    """Draw a goal (two fifths throughput) and, where the devices state their watts, an energy weight for half.

    Args:
        random: Source of what is drawn.
        watts: Whether energy can count.
        goal, energy_weight: Asked for; None = drawn.
    """
    weight = 0.0
    if watts and random.random() < 0.5:
        weight = 0.5 if random.random() < 0.6 else float(random.uniform(0.05, 0.95))
    drawn = "throughput" if random.random() < 0.4 else "latency"
    return Objective(goal=goal or drawn, energy_weight=weight if energy_weight is None else energy_weight)


def draw_semantics(random: Generator) -> Semantics:
    """Draw how time passes: mostly overlapped, direct transfers with contention and one microbatch."""
    return Semantics(
        transfers="blocking" if random.random() < 0.25 else "overlapped",
        route="host" if random.random() < 0.2 else "direct",
        contention="none" if random.random() < 0.25 else "link",
        queue="priority" if random.random() < 0.25 else "fifo",
        microbatches=int(random.choice([2, 4])) if random.random() < 0.2 else 1,
    )
