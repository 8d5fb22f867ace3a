"""The tables of the pipeline dynamic programme: what pieces cost, where a line may be cut, and what a table says.

It does not know which of its plans are worth proposing (→ `dp`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoplace.strategies._dp_kernels import Charges, Lattice, Nodes, run_lattice, run_line
from autoplace.strategies._dp_states import States, plan_states
from autoplace.strategies._ideals import ClassGraph, build_nodes, grid, ideals
from autoplace.strategies._support import View

__all__ = ["Found", "Search"]

_WORK_NS = 0.2e9
"""Time that one table may take if nothing could be left out, about, ns; what the number of cuts follows from."""
_COARSE = 65
"""Positions of a first, coarse cut, whose load is a bound for the finer ones."""
_PASSES = 3
"""Cuts of a line too long for all positions, each finer near the borders of the best one."""


class Found(NamedTuple):
    """A plan with the programme's own estimate."""

    summed: bool
    """Whether its cost is the sum of its pieces; else the greatest of them."""
    cost: float
    devices: tuple[int, ...]
    """Devices used, ascending."""
    class_device: NDArray[np.int32]
    """int32[K]."""
    borders: NDArray[np.int64]
    """Positions of the line where the device changes; empty for ideals."""


class Search:
    """Cuts lines and ideals, and remembers the best load so far: dearer pieces are left out."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._states = plan_states(view)
        self._goal = view.problem.objective.goal
        work_ns = _WORK_NS if self._goal == "throughput" else _WORK_NS / 4
        self.most = max(_COARSE, int(np.sqrt(2.0 * work_ns / self._states.work_ns())))
        """Positions or ideals that one table may have."""
        self.found: list[Found] = []

    def run(self, most_ideals: int) -> list[Found]:
        """Return the plans of all tables: ideals where there are few enough, else lines."""
        graph = ClassGraph.of(self._view)
        lattice = ideals(graph.edges, self._view.num_classes, min(most_ideals, self.most))
        if lattice is not None:
            self._cut_line(graph, grid(graph, _COARSE)[0])
            self._cut_ideals(graph, lattice)
            return self.found
        other = graph.depth_first()
        for line in (graph,) if np.array_equal(graph.place, other.place) else (graph, other):
            self._cut_line(line, grid(line, _COARSE)[0])
            positions, step = grid(line, self.most)
            best = self._cut_line(line, positions)
            for _ in range(_PASSES - 1):
                if step > 1 and best is not None:
                    positions, step = grid(line, self.most, best.borders, step)
                    best = self._cut_line(line, positions) or best
        return self.found

    def _limit_ms(self) -> float:
        """Return what no piece may exceed. With energy, every set of devices counts, whatever its load."""
        if self._view.problem.objective.energy_weight > 0:
            return np.inf
        best = min((f.cost for f in self.found if not f.summed), default=np.inf)
        return best * (1.0 + 1e-9)

    def _cut_ideals(self, graph: ClassGraph, lattice: Lattice) -> None:
        nodes = build_nodes(self._view, graph.place, self._view.num_classes)
        table = _Table(self._view, self._states, nodes, graph.place)
        for summed in self._kinds():
            self.found += table.cut_ideals(lattice, summed, self._limit_ms())

    def _cut_line(self, line: ClassGraph, positions: NDArray[np.int64]) -> Found | None:
        """Cut a line at some positions; return the best plan of the programme that fits the goal best."""
        node = np.searchsorted(positions, line.place, side="right") - 1
        nodes = build_nodes(self._view, node, len(positions) - 1)
        table, leading = _Table(self._view, self._states, nodes, node), []
        for summed in self._kinds():
            found = list(table.cut_line(positions, summed, self._limit_ms()))
            self.found += found
            leading += [f for f in found if f.summed == (self._goal == "latency")]
        return min(leading, key=lambda f: f.cost, default=None)

    def _kinds(self) -> tuple[bool, ...]:
        return (True, False) if self._goal == "latency" else (False,)


class _Table:
    """Runs the programme on nodes and reads the plans out of its table."""

    def __init__(self, view: View, states: States, nodes: Nodes, node: NDArray[np.int64]) -> None:
        self._view, self._states, self._nodes, self._node = view, states, nodes, node
        count = len(nodes.out_first) - 1
        finite = np.isfinite(view.class_latency_ms)
        latency = np.where(finite, view.class_latency_ms, 0.0)
        devices = latency.shape[1]
        self._node_ms = np.zeros((count, devices))
        np.add.at(self._node_ms, node, latency)
        fastest = np.where(finite.any(axis=1), view.class_latency_ms.min(axis=1), 0.0)
        self._node_fastest_ms = np.bincount(node, fastest, count)
        self._node_barred = np.zeros((count, devices))
        np.add.at(self._node_barred, node, ~finite)
        self._node_bytes = np.bincount(node, view.class_bytes, count)

    def cut_line(self, positions: NDArray[np.int64], summed: bool, limit_ms: float) -> Iterator[Found]:
        """Cut a line of nodes; `positions` are where its nodes begin in the line of classes, and its end."""

        def running(values: NDArray) -> NDArray[np.float64]:
            return np.concatenate([np.zeros((1, *values.shape[1:])), np.cumsum(values, axis=0)])

        charges, numbers = self._charges(running, limit_ms), np.arange(len(self._node_ms))
        for cost, pieces in self._plans(*run_line(self._nodes, charges, self._states.moves, summed)):
            borders = positions[[start for start, _, _ in pieces if start > 0]]
            inside = [(numbers >= start) & (numbers < end) for start, end, _ in pieces]
            yield self._found(summed, cost, [d for _, _, d in pieces], inside, borders)

    def cut_ideals(self, lattice: Lattice, summed: bool, limit_ms: float) -> Iterator[Found]:
        """Cut along all chains of order ideals."""
        member = lattice.member.astype(np.float64)
        charges = self._charges(lambda values: member @ values, limit_ms)
        for cost, pieces in self._plans(*run_lattice(self._nodes, lattice, charges, self._states.moves, summed)):
            inside = [lattice.member[end] & ~lattice.member[start] for start, end, _ in pieces]
            yield self._found(summed, cost, [d for _, _, d in pieces], inside, np.zeros(0, np.int64))

    def _charges(self, gather: Callable[[NDArray], NDArray], limit_ms: float) -> Charges:
        """Price the ideals; `gather` sums values of nodes, [K, ...], over every ideal."""
        semantics, latency = self._view.problem.semantics, self._view.problem.objective.goal == "latency"
        blocking = semantics.transfers == "blocking"
        return Charges(
            total_ms=np.ascontiguousarray(gather(self._node_ms)),
            fastest_ms=np.ascontiguousarray(gather(self._node_fastest_ms)),
            barred=np.ascontiguousarray(gather(self._node_barred).astype(np.int32)),
            held=np.ascontiguousarray(gather(self._node_bytes)),
            capacity=self._view.capacity,
            limit_ms=limit_ms,
            device=self._states.device,
            start_ms=self._states.start_ms * semantics.microbatches,
            ms_per_byte=self._states.ms_per_byte,
            on_receiver=blocking or latency,
            on_sender=blocking,
            on_links=semantics.contention == "link" and not blocking and not latency,
            host=semantics.route == "host",
        )

    def _plans(
        self, least: NDArray[np.float64], back: NDArray[np.int32]
    ) -> Iterator[tuple[float, list[tuple[int, int, int]]]]:
        """Yield cost and pieces (ideal before, ideal after, device) of the best way to every final state."""
        moves, states = self._states.moves, self._states
        for final in np.flatnonzero(np.isfinite(least[-1])).tolist():
            pieces, end, state = [], len(least) - 1, final
            while end > 0:
                start, move = back[end, state].tolist()
                pieces.append((start, end, int(states.device[moves.profile[move]])))
                end, state = start, int(moves.source[move])
            waiting = {d: iter(alike) for d, alike in states.alike.items()}
            yield float(least[-1, final]), [(s, e, next(waiting[d])) for s, e, d in reversed(pieces)]

    def _found(
        self, summed: bool, cost: float, devices: list[int], inside: list[NDArray[np.bool_]], borders: NDArray[np.int64]
    ) -> Found:
        node_device = np.zeros(len(self._node_ms), np.int32)
        for device, piece in zip(devices, inside, strict=True):
            node_device[piece] = device
        return Found(summed, cost, tuple(sorted(devices)), node_device[self._node], borders)
