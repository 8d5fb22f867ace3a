"""What the pipeline dynamic programme cuts: lines of nodes and the order ideals of a graph of nodes.

A node is a class of co-located ops, or a run of classes where there are too many. An order ideal is a set of nodes that
holds the producers of all its nodes: what may have run before a border. Ideals are enumerated by breadth-first search
up to a bound on their number.

Where co-location closes cycles between classes, as backward ops with their forward ops do, classes are ordered by their
first op and only the tensors that go forward in that order bind; the others are traffic back, from later pieces to
earlier ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from autoplace.jit import compiled
from autoplace.strategies._dp_kernels import Lattice, Nodes
from autoplace.strategies._support import View

__all__ = ["ClassGraph", "build_nodes", "grid", "ideals"]

_LINKS = 24
"""Ways from an ideal to those with one node less, on average, beyond which ideals are not worth their time."""


_compile = partial(compiled, allocates=True)


@dataclass(frozen=True, eq=False)
class ClassGraph:
    """K classes in a topological order of what binds them."""

    view: View
    place: NDArray[np.int64]
    """int64[K], position of every class in the line."""
    edges: NDArray[np.int64]
    """int64[E, 2], pairs of positions, lower first, that bind; each once, sorted."""

    @staticmethod
    def of(view: View) -> ClassGraph:
        """Contract a problem's ops to classes, in the view's order where that is topological or none is."""
        count, arcs = view.num_classes, view.op_class[view.problem.graph.edge_list[:, :2]].astype(np.int64)
        place = np.arange(count)
        if (arcs[:, 0] > arcs[:, 1]).any():
            order = _depth_first(count, _unique(arcs, count))
            if len(order) == count:
                place[order] = np.arange(count)
        arcs = place[arcs]
        return ClassGraph(view, place, _unique(arcs[arcs[:, 0] < arcs[:, 1]], count))

    def depth_first(self) -> ClassGraph:
        """Return the same in the order of a search that follows what it has just found."""
        count = len(self.place)
        renumbered = np.empty(count, np.int64)
        renumbered[_depth_first(count, self.edges)] = np.arange(count)
        return ClassGraph(self.view, renumbered[self.place], _unique(renumbered[self.edges], count))

    @cached_property
    def crossing_bytes(self) -> NDArray[np.float64]:
        """float64[K + 1], bytes that cross each position of the line, either way; once for each consumer."""
        graph, count = self.view.problem.graph, len(self.place)
        ends = np.sort(self.place[self.view.op_class[graph.edge_list[:, :2]]], axis=1)
        size = graph.tensor_bytes[graph.edge_list[:, 2]]
        steps = np.bincount(ends[:, 0] + 1, size, count + 2) - np.bincount(ends[:, 1] + 1, size, count + 2)
        return np.cumsum(steps)[: count + 1]


def _unique(edges: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    keys = np.unique(edges[:, 0] * count + edges[:, 1])
    keys = keys[keys // count != keys % count]
    return np.stack([keys // count, keys % count], axis=1)


def _offsets(keys: NDArray[np.integer], count: int) -> NDArray[np.int64]:
    """Return where each key below `count` begins when the keys are sorted, int64[count + 1]."""
    offsets = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(keys, minlength=count), out=offsets[1:])
    return offsets


def _depth_first(count: int, edges: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a topological order that goes on with what the last node has made ready; shorter where there is none."""
    by_source = edges[np.argsort(edges[:, 0], kind="stable")]
    waits = np.bincount(edges[:, 1], minlength=count)
    return _unwind_stack(_offsets(by_source[:, 0], count), np.ascontiguousarray(by_source[:, 1]), waits)


@_compile
def _unwind_stack(first, targets, waits):
    count = len(waits)
    stack, order = np.empty(count, np.int64), np.empty(count, np.int64)
    size, done = 0, 0
    for v in range(count - 1, -1, -1):
        if waits[v] == 0:
            stack[size] = v
            size += 1
    while size > 0:
        size -= 1
        v = stack[size]
        order[done] = v
        done += 1
        for k in range(first[v + 1] - 1, first[v] - 1, -1):
            waits[targets[k]] -= 1
            if waits[targets[k]] == 0:
                stack[size] = targets[k]
                size += 1
    return order[:done]


def build_nodes(view: View, node: NDArray[np.int64], count: int) -> Nodes:
    """Return the nodes and the tensors that leave them.

    Args:
        view: A problem.
        node: int64[K], node of every class.
        count: Number of nodes.
    """
    graph = view.problem.graph
    ends = node[view.op_class[graph.edge_list[:, :2]]]
    tensors = graph.edge_list[:, 2].astype(np.int64)
    leaves = ends[:, 0] != ends[:, 1]
    keys = np.unique(tensors[leaves] * count + ends[leaves, 1])
    tensors, consumers = keys // count, (keys % count).astype(np.int32)
    used, index = np.unique(tensors, return_inverse=True)
    producer = node[view.op_class[graph.tensor_producer[used]]].astype(np.int32)
    by_consumer = np.argsort(consumers, kind="stable")
    return Nodes(
        producer=producer,
        size=graph.tensor_bytes[used].astype(np.float64),
        first=_offsets(index, len(used)),
        consumers=consumers,
        out_first=_offsets(producer, count),
        out=np.argsort(producer, kind="stable").astype(np.int32),
        in_first=_offsets(consumers, count),
        into=index[by_consumer].astype(np.int32),
    )


def grid(
    graph: ClassGraph, most: int, around: NDArray[np.int64] | None = None, reach: int = 0
) -> tuple[NDArray[np.int64], int]:
    """Return positions of the line at which it may be cut, its two ends among them, ascending.

    Args:
        graph: The line.
        most: Positions wanted at most, 8 or more; all are returned where there are no more.
        around: Borders of a good cut: half of the positions are taken near them.
        reach: How near: at most so many positions away.

    Returns:
        Where there are too many, the position of each of as many equal cells that the fewest bytes cross; and the
        distance of neighbouring positions, near the borders if there are any: 1 = every position is there.
    """
    count = len(graph.place)
    if count + 1 <= most:
        return np.arange(count + 1), 1
    taken, cells, step = np.zeros(count + 1, np.bool_), most, -(-count // most)
    if around is not None and len(around):
        step = max(1, -(-4 * reach * len(around) // most))
        taken[np.clip(around[:, None] + np.arange(-reach, reach + 1, step), 0, count)] = True
        taken[around] = True
        cells = most // 2
    bounds = np.linspace(0, count + 1, cells + 1).astype(np.int64)
    cell = np.repeat(np.arange(cells), np.diff(bounds))
    taken[np.lexsort((graph.crossing_bytes, cell))[bounds[:-1]]] = True
    taken[[0, count]] = True
    return np.flatnonzero(taken), step


def ideals(edges: NDArray[np.int64], count: int, most: int) -> Lattice | None:
    """Enumerate the order ideals of a graph; None where there are more than `most`.

    Args:
        edges: int64[E, 2], (before, after), each once.
        count: Number of nodes.
        most: Bound on their number.
    """
    if count + 1 > most:
        return None
    order = np.argsort(edges[:, 0], kind="stable")
    targets, waits = np.ascontiguousarray(edges[order, 1]), np.bincount(edges[:, 1], minlength=count).astype(np.int32)
    marks = np.random.default_rng(0).integers(0, 2**63, count, dtype=np.uint64)
    found, member, links = _enumerate(_offsets(edges[:, 0], count), targets, waits, marks, most, _LINKS * most)
    if found == 0:
        return None
    by_ideal = np.argsort(links[:, 0], kind="stable")
    return Lattice(
        member=member[:found],
        below_first=_offsets(links[:, 0], found),
        below=np.ascontiguousarray(links[by_ideal, 1]),
        without=np.ascontiguousarray(links[by_ideal, 2]),
    )


@_compile
def _same_but(one, other, node):
    """Return whether `other` is `one` and the node besides."""
    same = other[node] and not one[node]
    for k in range(len(one)):
        same = same and (other[k] == one[k] or k == node)
    return same


@_compile
def _enumerate(first, targets, waits, marks, most, most_links):
    """Return the number of ideals (0 = too many), bool[most, K] members, and int32[L, 3] (ideal, smaller, node)."""
    count = len(waits)
    member, missing = np.zeros((most, count), np.bool_), np.zeros((most, count), np.int32)
    missing[0] = waits
    key = np.zeros(most, np.uint64)
    links = np.zeros((most_links, 3), np.int32)
    slots = 1
    while slots < 4 * most:
        slots *= 2
    table = np.full(slots, -1, np.int32)
    found, at, used = 1, 0, 0
    while at < found:
        for v in range(count):
            if member[at, v] or missing[at, v] > 0:
                continue
            mark = key[at] ^ marks[v]
            slot = np.int64(mark & np.uint64(slots - 1))
            while table[slot] >= 0:
                other = table[slot]
                if key[other] == mark and _same_but(member[at], member[other], v):
                    break
                slot = (slot + 1) & (slots - 1)
            if table[slot] < 0:
                if found == most:
                    return 0, member, links
                table[slot] = found
                key[found] = mark
                member[found] = member[at]
                member[found, v] = True
                missing[found] = missing[at]
                for k in range(first[v], first[v + 1]):
                    missing[found, targets[k]] -= 1
                found += 1
            if used == most_links:
                return 0, member, links
            links[used, 0], links[used, 1], links[used, 2] = table[slot], at, v
            used += 1
        at += 1
    return found, member, links[:used]
