"""Clustering: groups of ops, joined step by step so that the graph of groups never has a cycle.

One rule at a time:

1. a group joins its only consumer. However many do so at once, no cycle closes: what leaves a joined group leaves it
   through the last of them;
2. a group joins its only producer, the mirror image;
3. groups of one depth (longest path from the start, in edges) that share a producer or a consumer join: between groups
   every edge still leads to a greater depth;
4. neighbours in a topological order join: edges between intervals of it lead forward.

Rules 1 and 2 together at once could close a cycle; alone they cannot. Where the goal is latency, joining ops that could
run at once costs time: the smaller one's, less the transfer that running elsewhere would take. Joins that lose nothing
come first, the heaviest tensors first among them, with a limit of size that doubles whenever they stall; then those
that lose little, then more, rule 3 among them; and rule 4 where that is not enough.

The idea of contracting by such conditions is that of acyclic partitioners: J. Herrmann et al., "Multilevel algorithms
for acyclic partitioning of directed acyclic graphs", SIAM J. Scientific Computing 41(4), 2019.

Ops that share a device stay groups of their own, as a backward op runs long after its forward op: joining two groups
joins the clusters of groups that have to share a device. Ops of kind `barrier` stay alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from autoplace.strategies._support import View

if TYPE_CHECKING:
    from autoplace.strategies._cluster_kernels import Groups

__all__ = ["Clustering", "mean_link"]

Pairs = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Groups to join, int64[P] each."""

_OVERSIZE = 1.5
"""Largest size of a group in mean sizes, before rule 4 has to allow more."""
_FLOOR = 0.05
"""Part of an op's size that every op has alike, so that ops of no latency do not pile up in one group."""
_STALL = 0.92
"""A pass that leaves more than this part of the groups has stalled."""
_CROWD = 1 / 16
"""Part of a device's memory that a joined cluster may take, while there is another choice."""
_LAST_TRIES = 10
"""Passes of rule 4, each with a limit half as large again."""


@dataclass(eq=False)
class Clustering:
    """Groups and the edges between them, on the way to fewer."""

    view: View
    group_of_op: NDArray[np.int64]
    """int64[N]."""
    first_op: NDArray[np.int64]
    """int64[G], least place in the topological order of a group's ops."""
    edges: NDArray[np.int64]
    """int64[E, 2], unique pairs of groups, by producer, then consumer."""
    weight: NDArray[np.float64]
    """float64[E], bytes."""
    groups: Groups
    cap: float
    """Largest size of a group."""
    spread: float
    """Largest size of a cluster in that of a group: ops a co-location class, on average."""
    start_ms: float
    """Of a transfer on the mean link."""
    ms_per_byte: float
    """Of a transfer on the mean link."""
    parallel: bool
    """Whether it matters that ops run at once: the goal is latency."""

    @staticmethod
    def start(view: View, max_groups: int) -> Clustering:
        """Return every op as a group of its own."""
        from autoplace.strategies._cluster_kernels import Groups

        problem, count = view.problem, view.problem.num_ops
        finite = np.isfinite(problem.latency_ms)
        mean = np.where(finite, problem.latency_ms, 0.0).sum(axis=1) / np.maximum(finite.sum(axis=1), 1)
        even = mean.sum() / count or 1.0
        size = (1 - _FLOOR) * mean + _FLOOR * even
        place = np.empty(count, np.int64)
        place[problem.graph.topological_order] = np.arange(count)
        able = np.ones((view.num_classes, problem.num_devices), np.bool_)
        able[view.op_class] = problem.can_run
        edges = problem.graph.edge_list
        start_ms, ms_per_byte = mean_link(view)
        made = Clustering(
            view=view,
            group_of_op=np.arange(count),
            first_op=place,
            edges=edges[:, :2].astype(np.int64),
            weight=problem.graph.tensor_bytes[edges[:, 2]],
            groups=Groups(
                parent=np.arange(count, dtype=np.int32),
                size=size,
                fixed=np.asarray([kind == "barrier" for kind in problem.graph.kinds], np.bool_),
                cluster=view.op_class.copy(),
                cluster_parent=np.arange(view.num_classes, dtype=np.int32),
                cluster_size=np.bincount(view.op_class, weights=size, minlength=view.num_classes).astype(np.float64),
                cluster_bytes=view.class_bytes.copy(),
                able=able,
                capacity=view.capacity * _CROWD,
            ),
            cap=_OVERSIZE * float(size.sum()) / max_groups,
            spread=max(1.0, count / view.num_classes),
            start_ms=start_ms,
            ms_per_byte=ms_per_byte,
            parallel=problem.objective.goal == "latency",
        )
        made._merge_edges()
        return made

    @property
    def count(self) -> int:
        """Number of groups G."""
        return len(self.first_op)

    def contract(self, max_groups: int) -> None:
        """Join groups until there are `max_groups` or nothing can be joined."""
        mean = float(self.groups.size.sum()) / self.count
        limit, loss = min(self.cap, 2.0 * mean), 0.0
        while self.count > max_groups:
            before = self.count
            for rule in (self._only_consumers, self._only_producers):
                self._join(*rule(loss), max_groups, limit)
            if self.count > _STALL * before and loss > 0.0:
                self._join(*self._siblings(loss), max_groups, limit)
            if self.count > _STALL * before:
                if limit >= self.cap and loss > self.cap:
                    break
                if limit >= self.cap:
                    loss = max(2.0 * loss, mean / 4)
                limit = min(2.0 * limit, self.cap)
        for attempt in range(_LAST_TRIES):
            if self.count <= max_groups:
                break
            self._join(*self._neighbours(), max_groups, limit, same_devices=attempt < 2)
            self._join(*self._only_consumers(np.inf), max_groups, limit, same_devices=attempt < 2)
            self.groups.capacity[:] = np.minimum(2.0 * self.groups.capacity, self.view.capacity)
            limit *= 1.5

    def result(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return the group of every op, int32[N], and the co-location id of every group, int32[G]."""
        order = np.argsort(self.first_op)
        rank = np.empty(self.count, np.int32)
        rank[order] = np.arange(self.count, dtype=np.int32)
        cluster = self.groups.cluster_parent[self.groups.cluster][order]
        _, inverse, sizes = np.unique(cluster, return_inverse=True, return_counts=True)
        colocate = np.where(sizes[inverse] > 1, inverse, -1)
        return rank[self.group_of_op], colocate.astype(np.int32)

    def _only_consumers(self, most_loss: float) -> Pairs:
        """Return pairs of a group and its only consumer; the group then waits for all that the consumer waits for."""
        out, into = self._degrees()
        only = out[self.edges[:, 0]] == 1
        pairs = self.edges[only]
        alone_ms = np.where(into[pairs[:, 1]] > 1, self.groups.size[pairs[:, 0]], 0.0)
        return self._ranked(pairs, self.weight[only], alone_ms, most_loss)

    def _only_producers(self, most_loss: float) -> Pairs:
        """Return pairs of a group and its only producer; the producer's other consumers then wait for the group."""
        out, into = self._degrees()
        only = into[self.edges[:, 1]] == 1
        pairs = self.edges[only]
        alone_ms = np.where(out[pairs[:, 0]] > 1, self.groups.size[pairs[:, 1]], 0.0)
        return self._ranked(pairs, self.weight[only], alone_ms, most_loss)

    def _degrees(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the number of consumers and of producers of every group."""
        out, into = (np.bincount(self.edges[:, side], minlength=self.count) for side in (0, 1))
        return out, into

    def _ranked(
        self, pairs: NDArray[np.int64], weight: NDArray[np.float64], alone_ms: NDArray[np.float64], most_loss: float
    ) -> Pairs:
        """Return pairs: those within a cluster first, then by what is lost, then the heaviest.

        What is lost is time that could pass elsewhere at once, less the transfer that this would take.
        """
        loss = np.maximum(0.0, alone_ms - self.start_ms - self.ms_per_byte * weight) if self.parallel else 0 * weight
        cluster = self.groups.cluster_parent[self.groups.cluster]
        apart = cluster[pairs[:, 0]] != cluster[pairs[:, 1]]
        order = np.lexsort((self.first_op[pairs[:, 0]], -weight, loss, apart))
        order = order[loss[order] <= most_loss]
        return pairs[order, 0], pairs[order, 1]

    def _siblings(self, most_loss: float) -> Pairs:
        """Return pairs of one depth that share a producer or a consumer, each next to the other in program order."""
        _, depth = self._walk()
        found, weights = [], []
        for near, far in ((1, 0), (0, 1)):
            # Every group once, with the first of its producers (consumers).
            by_group = np.lexsort((self.first_op[self.edges[:, far]], self.edges[:, near]))
            ends, index = np.unique(self.edges[by_group, near], return_index=True)
            shared, weight = self.edges[by_group, far][index], self.weight[by_group][index]
            order = np.lexsort((self.first_op[ends], shared, depth[ends]))
            ends, shared, weight = ends[order], shared[order], weight[order]
            alike = (shared[1:] == shared[:-1]) & (depth[ends[1:]] == depth[ends[:-1]])
            found.append(np.stack([ends[:-1], ends[1:]], axis=1)[alike])
            weights.append(np.minimum(weight[:-1], weight[1:])[alike])
        pairs = np.concatenate(found)
        return self._ranked(
            pairs, np.concatenate(weights), self.groups.size[pairs].min(axis=1, initial=np.inf), most_loss
        )

    def _neighbours(self) -> Pairs:
        """Return neighbours in a topological order."""
        order, _ = self._walk()
        return order[:-1], order[1:]

    def _walk(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        from autoplace.strategies._cluster_kernels import walk

        starts = np.zeros(self.count + 1, np.int64)
        np.cumsum(np.bincount(self.edges[:, 0], minlength=self.count), out=starts[1:])
        return walk(starts, np.ascontiguousarray(self.edges[:, 1]), np.bincount(self.edges[:, 1], minlength=self.count))

    def _join(
        self,
        first: NDArray[np.int64],
        second: NDArray[np.int64],
        max_groups: int,
        limit: float,
        *,
        same_devices: bool = True,
    ) -> None:
        """Join what the limits allow of pairs that close no cycle, and number the groups anew."""
        from autoplace.strategies._cluster_kernels import join_pairs

        most = max(0, self.count - max_groups)
        if not join_pairs(
            self.groups,
            np.ascontiguousarray(first),
            np.ascontiguousarray(second),
            limit,
            limit * self.spread,
            same_devices,
            most,
        ):
            return
        old = self.groups
        roots, new = np.unique(old.parent, return_inverse=True)
        first_op = np.full(len(roots), np.iinfo(np.int64).max)
        np.minimum.at(first_op, new, self.first_op)
        self.first_op = first_op
        self.group_of_op = new[self.group_of_op]
        self.edges = new[self.edges]
        self.groups = old._replace(
            parent=np.arange(len(roots), dtype=np.int32),
            size=old.size[roots],
            fixed=old.fixed[roots],
            cluster=old.cluster_parent[old.cluster[roots]],
        )
        self._merge_edges()

    def _merge_edges(self) -> None:
        """Drop edges within groups and add up those between the same two."""
        between = self.edges[:, 0] != self.edges[:, 1]
        keys = self.edges[between, 0] * self.count + self.edges[between, 1]
        unique, inverse = np.unique(keys, return_inverse=True)
        self.weight = np.bincount(inverse, weights=self.weight[between], minlength=len(unique)).astype(np.float64)
        self.edges = np.stack([unique // self.count, unique % self.count], axis=1)


def mean_link(view: View) -> tuple[float, float]:
    """Return latency, ms, and ms per byte of the mean link; zeros where no pair can talk."""
    latency, per_byte = view.transfer
    pairs = np.isfinite(latency) & ~np.eye(len(latency), dtype=bool)
    return (float(latency[pairs].mean()), float(per_byte[pairs].mean())) if pairs.any() else (0.0, 0.0)
