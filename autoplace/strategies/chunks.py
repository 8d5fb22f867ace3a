"""Contiguous chunks of the topological order, one a device: the pipeline partition.

Classes of co-located ops stand in the order of their first op, so that a backward op which shares a device with its
forward op folds into the forward's place. For every order of devices and every number of chunks k two exact dynamic
programmes over the k - 1 borders run in O(k N), a sliding minimum a chunk:

- `balance`: the least load of the busiest stage, by bisection over that load;
- `sum`: the least sum of all stages and borders, the latency of a chain.

A border costs what the tensors that cross it cost on the link between its two devices: on top of both ends' load where
transfers are `blocking`, a load of its own where links are contended, nothing where they are neither. For the goal
latency it is always on top of the receiver's load. Exact for chains; where a tensor skips a stage it is taken to pass
through it, and the evaluator, which knows better, ranks what comes out.

All orders of devices are tried where there are four or fewer; beyond, the cluster's, by falling and by rising speed,
and from the fastest on along the quickest links, with every number of chunks up to 16 and some beyond.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from autoplace.strategies._search import Constructive
from autoplace.strategies._support import View

__all__ = ["ChunksStrategy"]

_ALL_ORDERS = 4
"""Devices up to which every order is tried."""
_BISECTIONS = 60
"""Halvings of the interval around the least load: enough to end at the resolution of a double."""

Costs = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]
Splits = list[int]
"""k + 1 positions: chunk p is classes [splits[p], splits[p + 1])."""


class ChunksStrategy(Constructive):
    """Propose contiguous chunks for 1 … D devices, balanced and with the least sum."""

    name = "chunks"

    def candidates(self, view: View) -> list[NDArray[np.int32]]:
        """Return, for every k, the chunks with the least largest load and with the least sum, best estimate first."""
        goal = view.problem.objective.goal
        stages = _Stages.of(view)
        best: dict[tuple[int, str], tuple[float, NDArray[np.int32]]] = {}
        for order in device_orders(view):
            count = len(order)
            kinds = ("balance",) if goal == "throughput" else ("balance", "sum")
            for kind in kinds:
                limit = best[count, kind][0] if (count, kind) in best else np.inf
                found = stages.balance(order, below=limit) if kind == "balance" else stages.least_sum(order)
                if found is not None and found[0] < limit:
                    best[count, kind] = (found[0], view.spread(_devices(found[1], order)))
        leading = "balance" if goal == "throughput" else "sum"
        ranked = sorted(best.items(), key=lambda item: (item[0][1] != leading, item[1][0], item[0][0]))
        return [assignment for _, (_, assignment) in ranked]


def device_orders(view: View) -> Iterator[tuple[int, ...]]:
    """Yield the sequences of distinct devices to lay chunks along, every number of devices among them."""
    count = len(view.capacity)
    usable = [d for d in range(count) if view.allowed[:, d].any()]
    if len(usable) <= _ALL_ORDERS:
        for size in range(1, min(len(usable), view.num_classes) + 1):
            yield from itertools.permutations(usable, size)
        return
    latency = view.class_latency_ms
    speed = np.where(view.allowed, latency / np.maximum(latency.min(axis=1, keepdims=True), 1e-12), np.nan)
    pace = np.nanmean(speed[:, usable], axis=0)
    falling = [usable[i] for i in np.argsort(pace, kind="stable")]
    start, per_byte = view.transfer
    typical = float(view.problem.graph.tensor_bytes.mean()) if view.problem.graph.num_tensors else 0.0
    chain, rest = falling[:1], falling[1:]
    while rest:
        nearest = min(rest, key=lambda d: start[chain[-1], d] + typical * per_byte[chain[-1], d])
        chain.append(nearest)
        rest.remove(nearest)
    seen = set()
    for whole in (falling, usable, falling[::-1], chain):
        for size in _sizes(min(len(whole), view.num_classes)):
            if (order := tuple(whole[:size])) not in seen:
                seen.add(order)
                yield order


def _sizes(most: int) -> list[int]:
    """Return numbers of chunks to try: all up to 16, then doubling, and the largest."""
    doubling = [16 * 2**i for i in range(1, 8)]
    return [s for s in (*range(1, 17), *doubling) if s < most] + [most]


@dataclass(frozen=True, eq=False)
class _Stages:
    """What stages and borders cost, for the two dynamic programmes. K classes."""

    view: View
    total_ms: NDArray[np.float64]
    """float64[D, K + 1], running sum of latencies where they are finite."""
    left: NDArray[np.int64]
    """int64[D, K + 1], first class of the longest chunk that ends before each position and may run on the device."""
    crossing: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]
    """float64[K + 1] each: tensors and bytes that cross each position forwards, then backwards."""
    priced: dict[tuple[int, int], Costs] = field(default_factory=dict)
    """What → `borders` returned, where few devices make few pairs."""

    @staticmethod
    def of(view: View) -> _Stages:
        latency = view.class_latency_ms
        count, devices = latency.shape
        total = np.zeros((devices, count + 1))
        np.cumsum(np.where(np.isfinite(latency), latency, 0.0).T, axis=1, out=total[:, 1:])
        held = np.concatenate([[0.0], np.cumsum(view.class_bytes)])
        left = np.zeros((devices, count + 1), np.int64)
        for device in range(devices):
            bad = np.where(np.isfinite(latency[:, device]), 0, np.arange(1, count + 1))
            left[device, 1:] = np.maximum.accumulate(bad)
            fits = np.searchsorted(held, held - view.capacity[device])
            left[device] = np.maximum(left[device], fits)
        return _Stages(view, total, left, _crossing(view))

    def borders(self, source: int, target: int) -> Costs:
        """Return what a border at each position costs sender, receiver and the whole way, ms, float64[K + 1] each."""
        if (source, target) in self.priced:
            return self.priced[source, target]
        parts = self.view.problem.semantics.microbatches
        sums = []
        for ends in (*self.view.ends, self.view.transfer):
            cost = np.zeros(len(self.crossing[0]))
            for (s, t), tensors, size in (
                ((source, target), self.crossing[0], self.crossing[1]),
                ((target, source), self.crossing[2], self.crossing[3]),
            ):
                with np.errstate(invalid="ignore"):
                    start = np.where(tensors > 0, parts * tensors * ends.latency_ms[s, t], 0.0)
                cost += start + size * ends.ms_per_byte[s, t]
            sums.append(cost)
        costs = sums[0], sums[1], sums[2]
        if len(self.total_ms) <= _ALL_ORDERS:
            self.priced[source, target] = costs
        return costs

    def least_sum(self, order: Sequence[int]) -> tuple[float, Splits] | None:
        """Return the least sum of stages and borders along a device order, ms, and its splits; None when none fits."""
        from autoplace.strategies._kernels import sliding_minimum

        reach, back = self._first_stage(order[0]), []
        for previous, device in itertools.pairwise(order):
            border = self.borders(previous, device)[2]
            best, where = sliding_minimum(reach + border - self.total_ms[device], self.left[device])
            reach = best + self.total_ms[device]
            back.append(where)
        if not np.isfinite(reach[-1]):
            return None
        return float(reach[-1]), _unwind(back, len(reach) - 1)

    def _first_stage(self, device: int) -> NDArray[np.float64]:
        reach = np.where(self.left[device] == 0, self.total_ms[device], np.inf)
        reach[0] = np.inf  # no stage is empty
        return reach

    def balance(self, order: Sequence[int], *, below: float) -> tuple[float, Splits] | None:
        """Return the least load of the busiest stage or border along a device order, ms, and its splits.

        Args:
            order: Device of every stage.
            below: Only a load under this is of interest.

        Returns:
            None when nothing fits or nothing is below.
        """
        costs = [self._loads(s, t) for s, t in itertools.pairwise(order)]
        first = self._within(order, costs, np.nextafter(below, 0.0))
        if first is None:
            return None
        low, high, splits = 0.0, self._load(order, costs, first), first
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            if not low < middle < high:
                break
            found = self._within(order, costs, middle)
            if found is None:
                low = middle
            else:
                high, splits = min(middle, self._load(order, costs, found)), found
        return self._load(order, costs, splits), splits

    def _loads(self, source: int, target: int) -> Costs:
        """Return what a border adds to its sender's load, its receiver's load, and its own load as a link, ms."""
        send, receive, whole = self.borders(source, target)
        semantics, none = self.view.problem.semantics, np.where(np.isinf(whole), np.inf, 0.0)
        if semantics.transfers == "blocking":
            return send, receive, none
        if self.view.problem.objective.goal == "latency":
            return none, whole, none
        return none, none, np.maximum(send, receive) if semantics.contention == "link" else none

    def _within(self, order: Sequence[int], costs: Sequence[tuple], limit: float) -> Splits | None:
        """Return splits with which no stage and no border exceeds a load, or None."""
        from autoplace.strategies._kernels import stage_within

        nothing = np.zeros(self.total_ms.shape[1])
        sends = [send for send, _, _ in costs] + [nothing]
        able = self._first_stage(order[0]) + sends[0] <= limit
        back = []
        for stage, (_, receive, link) in enumerate(costs, start=1):
            device = order[stage]
            able, where = stage_within(
                able, receive, link, sends[stage], self.total_ms[device], self.left[device], limit
            )
            back.append(where)
        return _unwind(back, len(nothing) - 1) if able[-1] else None

    def _load(self, order: Sequence[int], costs: Sequence[tuple], splits: Splits) -> float:
        """Return the load of the busiest stage or border, ms."""
        worst = 0.0
        for stage, device in enumerate(order):
            begin, end = splits[stage], splits[stage + 1]
            load = self.total_ms[device, end] - self.total_ms[device, begin]
            if stage > 0:
                load += costs[stage - 1][1][begin]
                worst = max(worst, costs[stage - 1][2][begin])
            if stage < len(order) - 1:
                load += costs[stage][0][end]
            worst = max(worst, load)
        return float(worst)


def _crossing(view: View) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Count tensors and bytes that cross each position of the class order, forwards and backwards."""
    graph, count = view.problem.graph, view.num_classes
    offsets = graph.consumer_offsets
    used = np.flatnonzero(np.diff(offsets) > 0)
    produced = view.op_class[graph.tensor_producer[used]].astype(np.int64)
    consumed = view.op_class[graph.consumers].astype(np.int64)
    size = graph.tensor_bytes[used]
    if len(used) == 0:
        nothing = np.zeros(count + 1)
        return nothing, nothing, nothing, nothing
    latest = np.maximum.reduceat(consumed, offsets[used])
    earliest = np.minimum.reduceat(consumed, offsets[used])
    columns = []
    for low, high in ((produced, latest), (earliest, produced)):
        for weight in (np.ones(len(used)), size):
            steps = np.zeros(count + 2)
            crosses = high > low
            np.add.at(steps, low[crosses] + 1, weight[crosses])
            np.add.at(steps, high[crosses] + 1, -weight[crosses])
            # Sums that should be zero again are not always so in floating point; a byte counts, a rounding does not.
            columns.append(np.where(np.cumsum(steps)[: count + 1] < 1e-6, 0.0, np.cumsum(steps)[: count + 1]))
    return columns[0], columns[1], columns[2], columns[3]


def _unwind(back: Sequence[NDArray[np.int64]], end: int) -> Splits:
    """Follow the dynamic programme's choices from the last position to the first."""
    splits = [end]
    for where in reversed(back):
        splits.append(int(where[splits[-1]]))
    return [0, *reversed(splits)]


def _devices(splits: Splits, order: Sequence[int]) -> NDArray[np.int32]:
    """Return the device of every class, int32[K]."""
    return np.repeat(np.asarray(order, np.int32), np.diff(splits))
