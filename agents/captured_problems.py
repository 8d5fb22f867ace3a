"""Placement problems whose graph is a captured model's: its batch, its grain and the hardware are drawn."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.random import Generator

from autoplace.graph.backward import with_backward
from autoplace.graph.opgraph import OpGraph
from autoplace.graph.program_order import in_program_order
from autoplace.hardware.cluster import Cluster
from autoplace.problem import Problem

from .captured import captured_graph, grouped
from .conditions import Conditions, draw_device_count, draw_memory, draw_objective, draw_semantics
from .profiles import DeviceProfile, draw_hardware, roofline

__all__ = ["draw_captured_problem"]


def draw_captured_problem(
    random: Generator,
    model: str,
    cluster: str,
    *,
    name: str,
    training: bool,
    max_ops: int | None,
    max_devices: int = 16,
    in_order: bool = False,
    conditions: Conditions | None = None,
) -> Problem:
    """Draw a problem of a model.

    Args:
        random: Source of everything that is drawn.
        model: One of `captured.MODELS`.
        cluster: A cluster family, see → `draw_hardware`.
        name: Of the problem; what it was made of is appended.
        training: Whether a pass is forward and backward.
        max_ops: Most ops: whole ops where they are as few, else groups along module boundaries; None = whole ops.
        max_devices: Largest number of devices.
        in_order: Whether ops keep program order, as in the problems of `build_problem`.
        conditions: What is asked for; None = nothing.
    """
    wanted = conditions or Conditions()
    graph = _graph(random, model, training, max_ops)
    graph = in_program_order(graph) if in_order else graph
    graph = with_backward(graph) if training else graph
    count = wanted.devices or draw_device_count(random, max_devices)
    half = bool(random.random() < 0.5)
    graph = _scaled(graph, samples=2.0 ** random.uniform(-2.0, 2.0), size=0.5 if half else 1.0)
    hardware, types = draw_hardware(random, cluster, count)
    latency, overhead = roofline(random, graph, types, half=half)
    return Problem(
        graph=graph,
        cluster=_limited(random, hardware, types, graph, wanted.memory),
        latency_ms=latency,
        overhead_ms=overhead,
        objective=draw_objective(random, watts=True, goal=wanted.goal, energy_weight=wanted.energy_weight),
        semantics=wanted.semantics or draw_semantics(random),
        name=f"{name}-{model}-{'training' if training else 'forward'}-{cluster}",
    )


def _graph(random: Generator, model: str, training: bool, max_ops: int | None) -> OpGraph:
    captured = captured_graph(model, training=training)
    if max_ops is None:
        return captured.graph
    most = max(4, (max_ops - 1) // 2 if training else max_ops)
    if captured.graph.num_ops <= most and random.random() < 0.5:
        return captured.graph
    return grouped(captured, max(4, round(math.exp(random.uniform(math.log(min(8, most)), math.log(most))))))


def _scaled(graph: OpGraph, *, samples: float, size: float) -> OpGraph:
    """Return the graph of `samples` times as many samples in a pass, every number `size` times as large in memory."""
    weights = graph.weight_bytes.astype(np.float64)
    moved = np.minimum(graph.bytes_moved, weights) + np.maximum(graph.bytes_moved - weights, 0.0) * samples
    return OpGraph.build(
        names=graph.names,
        edges=[(producer, consumers, bytes_ * samples * size) for producer, consumers, bytes_ in graph.tensors()],
        kinds=graph.kinds,
        modules=graph.modules,
        flops=(graph.flops * samples).tolist(),
        bytes_moved=(moved * size).tolist(),
        weight_bytes=(weights * size).astype(np.int64).tolist(),
        activation_bytes=(graph.activation_bytes * samples * size).astype(np.int64).tolist(),
        frees=graph.frees.tolist(),
        colocate=graph.colocate.tolist(),
    )


def _limited(
    random: Generator, hardware: Cluster, types: list[DeviceProfile], graph: OpGraph, how: str | None
) -> Cluster:
    """Give the devices memory in proportion to their types', a little noise apart, as much as → `draw_memory` says."""
    shares = np.asarray([p.memory_gib for p in types]) * np.exp(random.normal(0.0, 0.1, len(types)))
    shares = np.minimum(shares, 4.0 * shares.min())
    memory = draw_memory(random, graph, len(types), how=how, shares=shares)
    devices = tuple(replace(d, memory_bytes=float(m)) for d, m in zip(hardware.devices, memory, strict=True))
    return replace(hardware, devices=devices)
