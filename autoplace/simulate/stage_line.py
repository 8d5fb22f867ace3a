"""`stage_line`: one replica of a plan as the line of stages that the ranks run, and what crosses each border.

The rules are the runtime's (→ `runtime.distributed.chain`): ops are put in an order in which the device changes as
seldom as can be found, runs of one device become one stage, and a stage hands values to the next one alone, so that a
tensor which jumps stages crosses every border in between. It crosses once, however many ops need it. Tensors of no
bytes are the order of the program, which does not bind an exported graph.

It does not know times, nor that a mask or an index travels forwards only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoplace.graph.backward import LOSS
from autoplace.graph.opgraph import OpGraph

__all__ = ["StageLine", "forward_ops", "stage_line"]


@dataclass(frozen=True, kw_only=True, eq=False)
class StageLine:
    """S stages; n forward ops."""

    devices: tuple[int, ...]
    """Device of every stage; neighbours differ."""
    stage_of: NDArray[np.int32]
    """int32[n], stage of every forward op."""
    border_bytes: NDArray[np.float64]
    """float64[S - 1], bytes of the whole batch that cross from each stage to the next."""

    @property
    def alone(self) -> bool:
        """Whether every device has one stage."""
        return len(set(self.devices)) == len(self.devices)


def forward_ops(graph: OpGraph) -> tuple[int, bool]:
    """Return the number n of forward ops, and whether a backward follows them (→ `graph.backward.with_backward`)."""
    middle = graph.num_ops // 2
    training = graph.num_ops % 2 == 1 and graph.names[middle] == LOSS
    return (middle if training else graph.num_ops), training


def stage_line(graph: OpGraph, assignment: NDArray[np.integer]) -> StageLine:
    """Return the stages that an assignment makes.

    Args:
        graph: Of one pass; of a training graph, the forward ops alone are looked at.
        assignment: int[N], device of every op.
    """
    count, _ = forward_ops(graph)
    device = np.asarray(assignment[:count])
    order = [op for op in graph.topological_order.tolist() if op < count]
    runs = _runs(order, device)
    if len(runs) > len(np.unique(device)):
        regrouped = _regrouped(graph, order, device)
        runs = regrouped if len(regrouped) < len(runs) else runs
    stage_of = np.zeros(count, np.int32)
    for stage, run in enumerate(runs):
        stage_of[run] = stage
    return StageLine(
        devices=tuple(int(device[run[0]]) for run in runs),
        stage_of=stage_of,
        border_bytes=_border_bytes(graph, stage_of, len(runs)),
    )


def _runs(order: Sequence[int], device: NDArray[np.integer]) -> list[list[int]]:
    runs: list[list[int]] = []
    for op in order:
        if not runs or device[runs[-1][0]] != device[op]:
            runs.append([])
        runs[-1].append(op)
    return runs


def _regrouped(graph: OpGraph, order: Sequence[int], device: NDArray[np.integer]) -> list[list[int]]:
    """Return the fewest runs found by staying on a device as long as anything is ready there, from each first one."""
    before: dict[int, set[int]] = {op: set() for op in order}
    for producer, consumer, tensor in graph.edge_list.tolist():
        if consumer in before and graph.tensor_bytes[tensor] > 0:
            before[consumer].add(producer)
    starts = dict.fromkeys(int(device[op]) for op in order)
    return min((_stay(before, order, device.tolist(), first) for first in starts), key=len)


def _stay(before: dict[int, set[int]], order: Sequence[int], device: list[int], current: int) -> list[list[int]]:
    left, done, runs = list(order), set[int](), []
    while left:
        run = _reach(before, left, done, device, current)
        if run:
            runs.append(run)
            done.update(run)
            left = [op for op in left if op not in done]
        ready = dict.fromkeys(device[op] for op in left if before[op] <= done)
        if ready:
            current = max(ready, key=lambda d: len(_reach(before, left, done, device, d)))
    return runs


def _reach(before: dict[int, set[int]], left: list[int], done: set[int], device: list[int], current: int) -> list[int]:
    """Return the ops that can run on a device without leaving it; `left` is in topological order."""
    have, found = set(done), []
    for op in left:
        if device[op] == current and before[op] <= have:
            have.add(op)
            found.append(op)
    return found


def _border_bytes(graph: OpGraph, stage_of: NDArray[np.int32], stages: int) -> NDArray[np.float64]:
    edges, count = graph.edge_list, len(stage_of)
    edges = edges[(edges[:, 0] < count) & (edges[:, 1] < count)]
    last = np.zeros(graph.num_tensors, np.int64)
    np.maximum.at(last, edges[:, 2], stage_of[edges[:, 1]])
    steps = np.zeros(stages + 1)
    for tensor in np.unique(edges[:, 2]):
        first = stage_of[graph.tensor_producer[tensor]]
        if last[tensor] > first:
            steps[first] += graph.tensor_bytes[tensor]
            steps[last[tensor]] -= graph.tensor_bytes[tensor]
    return np.maximum(np.cumsum(steps)[: stages - 1], 0.0)
