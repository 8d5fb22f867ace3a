"""Replicas and microbatches become parts of one larger problem: the graph, copied once a part.

Running a share s of the batch takes overhead + s * (latency - overhead); tensors, activations, FLOPs and bytes moved
shrink with s. Weights do not: an op's weights lie once on every device that holds a copy of it, and are counted with
the first part that puts it there. Ops of kind `barrier` (the loss of a training graph) exist once, at the full batch
and on the first part's device, and all parts share them: what enters and leaves a barrier is each part's share.

Order: part by part, and within a part the graph's own order. With `queue: fifo` a device takes the ready op of the
earliest part, so that the microbatches of a replica follow each other; first come, first served over all parts would
let them run in step, each waiting for all others at every stage.

It does not know the gradient sum over replicas: parameters are shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoplace.errors import InputError
from autoplace.graph.opgraph import OpGraph
from autoplace.problem import Problem

__all__ = ["Part", "expand", "expand_equal"]


class Part(NamedTuple):
    """One copy of the graph."""

    assignment: NDArray[np.int32]
    """int32[N], device index of every op."""
    share: float
    """Fraction of the batch, more than 0."""


def expand(problem: Problem, parts: Sequence[Part]) -> tuple[Problem, NDArray[np.int32]]:
    """Copy the graph once a part.

    Args:
        problem: The unsplit problem; its `semantics.microbatches` is not looked at, parts say it all.
        parts: What runs, in order.

    Returns:
        The larger problem (one microbatch, same devices) and the device of each of its ops, int32[M].

    Raises:
        InputError: If there is no part, or a share is not in (0, 1].
    """
    larger, source, part = _repeat(problem, [p.share for p in parts])
    stacked = np.stack([np.asarray(p.assignment, np.int32) for p in parts])
    device = stacked[part, source]
    return _weigh_once(larger, source, device), device


def expand_equal(problem: Problem, count: int) -> tuple[Problem, NDArray[np.int32]]:
    """Split a pass into equal parts that share one assignment.

    Args:
        problem: The unsplit problem.
        count: Number of microbatches.

    Returns:
        The larger problem, and for each of its ops the op of `problem` whose device it has, int32[M].
    """
    if count == 1:
        return problem, np.arange(problem.num_ops, dtype=np.int32)
    larger, source, _ = _repeat(problem, [1.0 / count] * count)
    return _weigh_once(larger, source, np.zeros(len(source), np.int32)), source


def _weigh_once(problem: Problem, source: NDArray[np.int32], device: NDArray[np.int32]) -> Problem:
    """Keep an op's weights only in its first copy on each device."""
    _, first = np.unique(np.stack([source, device]), axis=1, return_index=True)
    weights = np.zeros_like(problem.graph.weight_bytes)
    weights[first] = problem.graph.weight_bytes[first]
    return problem.with_(graph=replace(problem.graph, weight_bytes=weights))


def _repeat(problem: Problem, shares: Sequence[float]) -> tuple[Problem, NDArray[np.int32], NDArray[np.int32]]:
    """Return the larger problem (weights in every copy), and op and part of each of its ops."""
    if not shares or not all(0.0 < s <= 1.0 for s in shares):
        raise InputError(f"the parts' shares are {list(shares)}; each must be more than 0 and at most 1")
    graph, count, ops = problem.graph, len(shares), problem.num_ops
    barrier = np.asarray([k == "barrier" for k in graph.kinds], np.bool_)
    keep = np.tile(~barrier, (count, 1))
    keep[0] = True
    new = np.cumsum(keep.ravel()).reshape(count, ops) - 1
    new = np.where(barrier, new[0], new)
    part, source = (a.astype(np.int32) for a in np.nonzero(keep))
    scale = np.where(barrier[source], 1.0, np.asarray(shares)[part])
    tensors = len(graph.tensor_producer)
    sizes = np.tile(np.diff(graph.consumer_offsets), count)
    offsets = np.zeros(count * tensors + 1, np.int32)
    np.cumsum(sizes, out=offsets[1:])
    ids = int(graph.colocate.max(initial=-1)) + 1
    larger = OpGraph(
        names=tuple(graph.names[i] if p == 0 else f"{graph.names[i]}#{p}" for p, i in zip(part, source, strict=True)),
        kinds=tuple(graph.kinds[i] for i in source),
        modules=tuple(graph.modules[i] for i in source),
        flops=graph.flops[source] * scale,
        bytes_moved=graph.bytes_moved[source] * scale,
        weight_bytes=graph.weight_bytes[source],
        activation_bytes=np.ceil(graph.activation_bytes[source] * scale - 1e-6).astype(np.int64),
        frees=graph.frees[source],
        colocate=np.where(graph.colocate[source] >= 0, graph.colocate[source] + part * ids, -1).astype(np.int32),
        tensor_producer=new[:, graph.tensor_producer].ravel().astype(np.int32),
        tensor_bytes=(np.asarray(shares)[:, None] * graph.tensor_bytes[None, :]).ravel(),
        consumer_offsets=offsets,
        consumers=new[:, graph.consumers].ravel().astype(np.int32),
    )
    latency = _scaled(problem, source, scale)
    overhead = None if problem.overhead_ms is None else problem.overhead_ms[source]
    semantics = replace(problem.semantics, microbatches=1)
    larger_problem = problem.with_(
        graph=larger, latency_ms=latency, overhead_ms=overhead, semantics=semantics, part=part
    )
    return larger_problem, source, part


def _scaled(problem: Problem, source: NDArray[np.int32], scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return latency_ms of a share of the batch; never more than the whole batch takes."""
    latency = problem.latency_ms[source]
    if problem.overhead_ms is None:
        return latency * scale[:, None]
    overhead = np.minimum(problem.overhead_ms[source], latency)
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(latency), overhead + scale[:, None] * (latency - overhead), np.inf)
