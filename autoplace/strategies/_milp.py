"""Placement as a mixed-integer linear programme, solved by HiGHS through scipy.

Variables: x[class, device]; what of every tensor goes from where to where; T, the time; and with the goal latency the
start of every op and the order of those that could share a device. Minimised is a weighted sum of T and the energy.

With the goal throughput the programme says what the simulator says → `simulate.kernels`, rules 3, 4 and 8. With
latency it is a relaxation, the best schedule of all: links have loads but no order, blocking transfers load devices
without a place in time, and ops wait for nobody's queue. So its bound holds for every assignment, and memory counts
only what is never freed.

It does not know energy weights between 0 and 1: J is then no linear function (→ `exact`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoplace.errors import InputError
from autoplace.problem import Problem
from autoplace.simulate.expand import expand_equal
from autoplace.strategies._support import View

__all__ = ["Solution", "ops_in_time", "solve_linear"]


class Solution(NamedTuple):
    """What the solver found."""

    class_device: NDArray[np.int32] | None
    """int32[K]; None when it found nothing."""
    bound: float
    """No placement has a lower weighted sum; inf when none exists."""


class _Rows:
    """A linear programme that grows by variables and rows."""

    def __init__(self) -> None:
        self.lower: list[float] = []
        self.upper: list[float] = []
        self.whole: list[bool] = []
        self._entries: list[tuple[int, int, float]] = []
        self._least: list[float] = []
        self._most: list[float] = []

    def variables(self, *shape: int, upper: float = 1.0, whole: bool = False) -> NDArray[np.int64]:
        """Add variables of at least 0 and return their indices."""
        count, begin = int(np.prod(shape)), len(self.lower)
        self.lower += [0.0] * count
        self.upper += [upper] * count
        self.whole += [whole] * count
        return np.arange(begin, begin + count).reshape(shape)

    def row(self, terms: Sequence[tuple[int, float]], *, least: float = -np.inf, most: float = np.inf) -> None:
        """Bound a weighted sum of variables."""
        number = len(self._least)
        self._entries += [(number, int(index), float(factor)) for index, factor in terms if factor != 0.0]
        self._least.append(least)
        self._most.append(most)

    def minimise(self, cost: Sequence[tuple[int, float]], seconds: float):  # type: ignore[no-untyped-def]
        """Return scipy's answer.

        Without presolve: that of HiGHS 1.14, which some versions of scipy bring, calls solutions optimal that are not
        (ERGO-Code/HiGHS#2961).
        """
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        rows, columns, values = (np.asarray(part) for part in zip(*self._entries, strict=True))
        weights = np.zeros(len(self.lower))
        for index, factor in cost:
            weights[index] += factor
        matrix = csr_array((values, (rows, columns)), shape=(len(self._least), len(self.lower)))
        return milp(
            weights,
            integrality=np.asarray(self.whole, np.int64),
            bounds=Bounds(np.asarray(self.lower), np.asarray(self.upper)),
            constraints=LinearConstraint(matrix, np.asarray(self._least), np.asarray(self._most)),
            options={"time_limit": max(seconds, 0.01), "mip_rel_gap": 1e-8, "presolve": False},
        )


class _Tensor(NamedTuple):
    """Tensors of one class that the same other classes read, taken together."""

    producer: int
    consumers: tuple[int, ...]
    number: int
    size: float
    """Bytes of all of them."""


def ops_in_time(problem: Problem) -> int:
    """Return the number of ops that a schedule holds: all microbatches of all ops."""
    return len(expand_equal(problem, problem.semantics.microbatches)[1])


def solve_linear(
    view: View,
    *,
    time_weight: float,
    energy_weight: float,
    longest_ms: float,
    alike: Sequence[Sequence[int]],
    seconds: float,
) -> Solution:
    """Minimise time_weight · T (ms) + energy_weight · E (J) over the placements of a view.

    Args:
        view: Its `class_bytes` are what memory counts.
        time_weight, energy_weight: Not both 0.
        longest_ms: A time that some optimal placement does not exceed; inf where none is known.
        alike: Groups of devices that may stand for each other.
        seconds: Time limit.

    Raises:
        InputError: If energy counts, transfers are `blocking`, and a device draws less power when it is busy.
    """
    programme = _Programme(view, longest_ms)
    programme.break_symmetry(alike)
    cost = programme.cost(time_weight, energy_weight)
    answer = programme.rows.minimise(cost, seconds)
    if answer.status == 2:
        return Solution(None, np.inf)
    bound = -np.inf if answer.mip_dual_bound is None else float(answer.mip_dual_bound) * programme.unit
    if answer.x is None:
        return Solution(None, bound)
    return Solution(answer.x[programme.place].argmax(axis=1).astype(np.int32), bound)


class _Programme:
    """The rows of one problem. Times are in units of `unit` ms, so that coefficients stay near 1."""

    def __init__(self, view: View, longest_ms: float) -> None:
        problem = view.problem
        self._view, self._problem = view, problem
        self._larger, source = expand_equal(problem, problem.semantics.microbatches)
        self._op_class = view.op_class[source]
        scale = problem.concurrency_scale if problem.semantics.microbatches > 1 else 1.0
        latency = self._larger.latency_ms * scale + problem.dispatch_ms
        finite = latency[np.isfinite(latency)]
        self.unit = max(float(finite.max(initial=0.0)), 1e-9)
        self._latency = latency / self.unit
        self._devices = range(problem.num_devices)
        self.rows = _Rows()
        self.place = self.rows.variables(*view.allowed.shape, whole=True)
        self._longest = min(longest_ms / self.unit * (1.0 + 1e-6), self._serial())
        self.time = int(self.rows.variables(1, upper=self._longest)[0])
        self._busy: list[list[tuple[int, float]]] = [[] for _ in self._devices]
        self._links: dict[tuple[int, int], list[tuple[int, float]]] = {}
        self._placement()
        self._transfers()
        for load in (*self._busy, *self._links.values()):
            self.rows.row([*load, (self.time, -1.0)], most=0.0)
        if problem.objective.goal == "latency":
            self._schedule()

    def _serial(self) -> float:
        """Return a time in which any placement's ops and transfers can follow each other."""
        start, per_byte = (np.where(np.isfinite(a), a, 0.0).max(initial=0.0) for a in self._view.transfer)
        graph = self._larger.graph
        moves = np.minimum(np.diff(graph.consumer_offsets), len(self._devices))
        ops = np.where(np.isfinite(self._latency), self._latency, 0.0).max(axis=1).sum()
        return float(ops + (moves * (start + graph.tensor_bytes * per_byte)).sum() / self.unit) * (1.0 + 1e-6) + 1e-6

    def _placement(self) -> None:
        """Every class on one device that it may use, within memory; ops are load."""
        view, latency = self._view, np.zeros(self._view.allowed.shape)
        np.add.at(latency, self._op_class, self._latency)
        for one, choices in enumerate(view.allowed):
            self.rows.row([(self.place[one, d], 1.0) for d in self._devices], least=1.0, most=1.0)
            for device in np.flatnonzero(~choices).tolist():
                self.rows.upper[self.place[one, device]] = 0.0
        for device in self._devices:
            able = np.flatnonzero(view.allowed[:, device])
            self._busy[device] += [(self.place[k, device], latency[k, device]) for k in able]
            room = view.capacity[device]
            if np.isfinite(room) and room > 0:
                terms = [(self.place[k, device], view.class_bytes[k] / room) for k in able]
                self.rows.row(terms, most=1.0)

    def _tensors(self) -> list[_Tensor]:
        merged: dict[tuple[int, tuple[int, ...]], list[float]] = {}
        for producer, consumers, size in self._larger.graph.tensors():
            one = int(self._op_class[producer])
            others = tuple(sorted({int(self._op_class[c]) for c in consumers} - {one}))
            if others:
                merged.setdefault((one, others), []).append(size)
        return [_Tensor(one, others, len(sizes), sum(sizes)) for (one, others), sizes in merged.items()]

    def _cost(self, tensor: _Tensor, start: float, per_byte: float) -> float:
        return (tensor.number * start + tensor.size * per_byte) / self.unit

    def _charge(self, variable: int, cost: float, source: int, target: int) -> None:
        """Load what a transfer keeps busy: its devices (-1 = host memory), or its link."""
        if not np.isfinite(cost):
            self.rows.upper[variable] = 0.0
        elif self._problem.semantics.transfers == "blocking":
            for end in (source, target):
                if end >= 0:
                    self._busy[end].append((variable, cost))
        elif self._problem.semantics.contention == "link":
            self._links.setdefault((source, target), []).append((variable, cost))

    def _transfers(self) -> None:
        for tensor in self._tensors():
            if self._problem.semantics.route == "host":
                self._stage(tensor)
            else:
                self._send(tensor)

    def _send(self, tensor: _Tensor) -> None:
        """Route `direct`: z[source, target] = it is made on the one and read on the other."""
        ends, flows = self._view.ends[0], self.rows.variables(len(self._devices), len(self._devices))
        for source in self._devices:
            for target in self._devices:
                self.rows.row([(flows[source, target], 1.0), (self.place[tensor.producer, source], -1.0)], most=0.0)
                if source != target:
                    cost = self._cost(tensor, ends.latency_ms[source, target], ends.ms_per_byte[source, target])
                    self._charge(int(flows[source, target]), cost, source, target)
        for target in self._devices:
            arrived = [(flow, 1.0) for flow in flows[:, target]]
            for consumer in tensor.consumers:
                self.rows.row([*arrived, (self.place[consumer, target], -1.0)], least=0.0)

    def _stage(self, tensor: _Tensor) -> None:
        """Route `host`: up[device] = made there and read elsewhere; down[device] = read there and made elsewhere."""
        for device in self._devices:
            if self._problem.cluster.devices[device].kind == "cpu" or len(self._devices) == 1:
                continue
            other = 0 if device else 1
            up, down = self.rows.variables(2)
            sender, receiver = self._view.ends
            self._charge(
                int(up),
                self._cost(tensor, sender.latency_ms[device, other], sender.ms_per_byte[device, other]),
                device,
                -1,
            )
            self._charge(
                int(down),
                self._cost(tensor, receiver.latency_ms[other, device], receiver.ms_per_byte[other, device]),
                -1,
                device,
            )
            made = self.place[tensor.producer, device]
            for consumer in tensor.consumers:
                read = self.place[consumer, device]
                self.rows.row([(up, 1.0), (made, -1.0), (read, 1.0)], least=0.0)
                self.rows.row([(down, 1.0), (read, -1.0), (made, 1.0)], least=0.0)

    def break_symmetry(self, alike: Sequence[Sequence[int]]) -> None:
        """Use a device of a group only where an earlier class uses the one before it."""
        for group in alike:
            for before, device in itertools.pairwise(group):
                for one in range(len(self.place)):
                    earlier = [(self.place[k, before], 1.0) for k in range(one)]
                    self.rows.row([*earlier, (self.place[one, device], -1.0)], least=0.0)

    def cost(self, time_weight: float, energy_weight: float) -> list[tuple[int, float]]:
        """Return the weights of the variables in the sum that is minimised, per `unit` of its value."""
        if energy_weight == 0.0:
            return [(self.time, time_weight)]
        nodes = self._problem.cluster.devices
        idle = np.asarray([d.idle_watts for d in nodes], np.float64)
        extra = np.asarray([d.busy_watts for d in nodes], np.float64) - idle
        if self._problem.semantics.transfers == "blocking" and (extra < 0).any():
            name = nodes[int(np.argmin(extra))].name
            raise InputError(
                f"device {name!r} draws less power busy than idle, which the exact solver cannot weigh where transfers "
                "are blocking; use another strategy"
            )
        terms = [(self.time, time_weight + energy_weight * float(idle.sum()) / 1000.0)]
        for device in self._devices:
            terms += [(v, energy_weight * extra[device] / 1000.0 * factor) for v, factor in self._busy[device]]
        return terms

    def _schedule(self) -> None:
        """Starts of ops, after their inputs' arrivals and beside no other op of their device."""
        count = self._larger.num_ops
        starts = self.rows.variables(count, upper=self._longest)
        lengths = [self._length(op) for op in range(count)]
        for op in range(count):
            self.rows.row([(starts[op], 1.0), *lengths[op], (self.time, -1.0)], most=0.0)
        after = np.zeros((count, count), np.bool_)
        largest: dict[tuple[int, int], float] = {}
        for producer, consumer, tensor in self._larger.graph.edge_list.tolist():
            size = float(self._larger.graph.tensor_bytes[tensor])
            largest[producer, consumer] = max(size, largest.get((producer, consumer), 0.0))
            after[producer, consumer] = True
        routes: dict[tuple[int, int], NDArray[np.int64]] = {}
        for (producer, consumer), size in largest.items():
            arrival = [(starts[producer], 1.0), *lengths[producer], *self._way(producer, consumer, size, routes)]
            self.rows.row([*arrival, (starts[consumer], -1.0)], most=0.0)
        for op in self._larger.graph.topological_order[::-1]:
            after[op] |= after[after[op]].any(axis=0)
        for one in range(count):
            for other in range(one + 1, count):
                if not after[one, other] and not after[other, one]:
                    self._apart(starts, lengths, one, other)

    def _length(self, op: int) -> list[tuple[int, float]]:
        one = self._op_class[op]
        return [(self.place[one, d], self._latency[op, d]) for d in np.flatnonzero(self._view.allowed[one])]

    def _way(
        self, producer: int, consumer: int, size: float, routes: dict[tuple[int, int], NDArray[np.int64]]
    ) -> list[tuple[int, float]]:
        """Return the time from a producer to a consumer as a sum over the pairs of their devices."""
        one, other = int(self._op_class[producer]), int(self._op_class[consumer])
        if one == other:
            return []
        way, terms = self._view.transfer, []
        if (one, other) not in routes:
            pairs = routes[one, other] = self.rows.variables(len(self._devices), len(self._devices))
            for device in self._devices:
                self.rows.row([*((p, 1.0) for p in pairs[device]), (self.place[one, device], -1.0)], least=0, most=0)
                self.rows.row(
                    [*((p, 1.0) for p in pairs[:, device]), (self.place[other, device], -1.0)], least=0, most=0
                )
        for source in self._devices:
            for target in self._devices:
                if source == target:
                    continue
                cost = (way.latency_ms[source, target] + size * way.ms_per_byte[source, target]) / self.unit
                pair = int(routes[one, other][source, target])
                if np.isfinite(cost):
                    terms.append((pair, cost))
                else:
                    self.rows.upper[pair] = 0.0
        return terms

    def _apart(self, starts: NDArray[np.int64], lengths: list[list[tuple[int, float]]], one: int, other: int) -> None:
        """One of two ops that share a device ends before the other starts."""
        first = int(self.rows.variables(1, whole=True)[0])
        far = self._longest
        for device in self._devices:
            here, there = self._op_class[one], self._op_class[other]
            if not (self._view.allowed[here, device] and self._view.allowed[there, device]):
                continue
            both = [(self.place[here, device], far), (self.place[there, device], far)]
            self.rows.row(
                [(starts[one], 1.0), *lengths[one], (starts[other], -1.0), (first, far), *both], most=3.0 * far
            )
            self.rows.row(
                [(starts[other], 1.0), *lengths[other], (starts[one], -1.0), (first, -far), *both], most=2.0 * far
            )
