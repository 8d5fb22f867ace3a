"""`with_backward`: the graph of one training step from the graph of its forward pass.

Forward ops, one barrier (the loss), and a mirrored backward op for each forward op, co-located with it. The estimates
are the usual ones: a backward pass costs twice the forward pass, a gradient has the size of its tensor. It does not
know which tensors carry no gradient (masks, indices), nor gradient sums over replicas.
"""

from __future__ import annotations

import numpy as np

from autoplace.graph.opgraph import OpGraph

__all__ = ["BACKWARD", "LOSS", "with_backward"]

LOSS = "~loss"
"""Name of the barrier between the forward and the backward ops."""

BACKWARD = "~backward"
"""Ending of a backward op's name."""


def with_backward(graph: OpGraph) -> OpGraph:
    """Return the training graph of a forward graph with N ops: 2N + 1 ops.

    Ops 0 to N-1 are the forward ops, op N is the loss, and op 2N-i is the backward op of forward op i. Forward
    activations are held (they are saved for the backward pass); a backward op holds its weights' gradients.

    Args:
        graph: Forward ops, in topological order.
    """
    count = graph.num_ops
    mirror = [2 * count - op for op in range(count)]
    forward = graph.tensors()
    has_consumer = np.zeros(count, np.bool_)
    has_consumer[[producer for producer, consumers, _ in forward if consumers]] = True
    sinks = [op for op in range(count) if not has_consumer[op]]
    edges = [
        *forward,
        *((op, [count], 0.0) for op in sinks),
        (count, [mirror[op] for op in sinks], 0.0),
        *((mirror[op], [mirror[producer]], size) for producer, consumers, size in forward for op in consumers),
    ]

    def mirrored(values: np.ndarray, factor: float) -> list:
        return [*values.tolist(), 0, *(factor * values[::-1]).tolist()]

    return OpGraph.build(
        names=[*graph.names, LOSS, *(name + BACKWARD for name in reversed(graph.names))],
        edges=edges,
        kinds=[*graph.kinds, "barrier", *reversed(graph.kinds)],
        modules=[*graph.modules, "", *reversed(graph.modules)],
        flops=mirrored(graph.flops, 2.0),
        bytes_moved=mirrored(graph.bytes_moved, 2.0),
        weight_bytes=mirrored(graph.weight_bytes, 1.0),
        activation_bytes=mirrored(graph.activation_bytes, 0.0),
        frees=[False] * (2 * count + 1),
        colocate=_colocate(graph),
    )


def _colocate(graph: OpGraph) -> list[int]:
    """Present ids stay; an op without one gets its own, shared with its backward op."""
    ids = graph.colocate.tolist()
    free = max([-1, *ids]) + 1
    for op, key in enumerate(ids):
        if key < 0:
            ids[op], free = free, free + 1
    return [*ids, -1, *reversed(ids)]
