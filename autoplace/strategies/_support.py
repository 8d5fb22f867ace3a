"""What every placement strategy needs of a Problem: co-location classes, memory, links and ranks, as arrays.

Ops that share a co-location id form a class and are placed as one; every other op is a class of its own. Classes are
numbered by their first op in topological order. Memory is counted before any schedule is known: every activation held
to the end is the upper bound, none of those that are freed the lower one. A placement within the upper bound is
feasible in every schedule; one beyond the lower bound in none.

A `View` does not know what a placement costs: that is the evaluator's knowledge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoplace.problem import Problem

if TYPE_CHECKING:
    from autoplace.strategies._kernels import Flat

__all__ = ["Ends", "View", "list_schedules"]

_MOST_GROUPS = 16
"""Groups of devices that list schedulers try one by one."""


class Ends(NamedTuple):
    """Times of a transfer between any two devices, row = source."""

    latency_ms: NDArray[np.float64]
    """float64[D, D]; 0 on the diagonal, inf where a pair cannot talk."""
    ms_per_byte: NDArray[np.float64]
    """float64[D, D]; 0 on the diagonal and where a pair cannot talk."""


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """A problem as a placement strategy sees it: K classes of ops on D devices."""

    problem: Problem
    op_class: NDArray[np.int32]
    """int32[N], class of every op."""
    allowed: NDArray[np.bool_]
    """bool[K, D], devices on which every op of the class can run and which hold its memory."""
    class_bytes: NDArray[np.float64]
    """float64[K], memory that strategies count, bytes: the upper bound, or the lower one in a `relaxed` view."""
    held_bytes: NDArray[np.float64]
    """float64[K], the lower bound: weights, and activations that are never freed."""
    capacity: NDArray[np.float64]
    """float64[D], memory of the devices, bytes."""

    @staticmethod
    def of(problem: Problem) -> View:
        """Look at a problem, with the upper bound of memory."""
        graph = problem.graph
        op_class = _classes(graph.colocate, graph.topological_order)
        count = int(op_class.max()) + 1 if len(op_class) else 0
        whole = graph.weight_bytes + graph.activation_bytes
        held = graph.weight_bytes + np.where(graph.frees, 0, graph.activation_bytes)
        class_bytes = np.bincount(op_class, weights=whole, minlength=count).astype(np.float64)
        capacity = np.asarray([d.memory_bytes for d in problem.cluster.devices], np.float64)
        allowed = np.ones((count, problem.num_devices), np.bool_)
        np.logical_and.at(allowed, op_class, problem.can_run)
        return View(
            problem=problem,
            op_class=op_class,
            allowed=allowed & (class_bytes[:, None] <= capacity),
            class_bytes=class_bytes,
            held_bytes=np.bincount(op_class, weights=held, minlength=count).astype(np.float64),
            capacity=capacity,
        )

    def relaxed(self) -> View | None:
        """Return the view that counts the lower bound of memory; None when that is the upper bound too.

        What is placed in it must be checked by the evaluator, which knows when activations are freed.
        """
        if np.array_equal(self.class_bytes, self.held_bytes):
            return None
        allowed = np.ones_like(self.allowed)
        np.logical_and.at(allowed, self.op_class, self.problem.can_run)
        allowed &= self.held_bytes[:, None] <= self.capacity
        return replace(self, class_bytes=self.held_bytes, allowed=allowed)

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return len(self.class_bytes)

    @cached_property
    def class_latency_ms(self) -> NDArray[np.float64]:
        """float64[K, D], time of the class's ops in one pass, all microbatches, ms; inf where it is not allowed."""
        latency, overhead = self.problem.latency_ms, self.problem.overhead_ms
        if overhead is not None:
            latency = latency + (self.problem.semantics.microbatches - 1) * np.minimum(overhead, latency)
        total = np.zeros(self.allowed.shape)
        np.add.at(total, self.op_class, latency)
        return np.where(self.allowed, total, np.inf)

    @cached_property
    def ends(self) -> tuple[Ends, Ends]:
        """What a transfer costs its sender and its receiver; with the route `direct` both see the whole of it."""
        from autoplace.simulate.arrays import link_matrices

        cluster, host = self.problem.cluster, self.problem.semantics.route == "host"
        latency, per_byte = link_matrices(cluster, host=host)
        count = cluster.num_devices
        per_byte[np.isinf(latency)] = 0.0
        if not host:
            whole = Ends(latency[:count, :count], per_byte[:count, :count])
            return whole, whole
        apart = ~np.eye(count, dtype=bool)
        up = [np.where(apart, leg[:count, count][:, None], 0.0) for leg in (latency, per_byte)]
        down = [np.where(apart, leg[count, :count][None, :], 0.0) for leg in (latency, per_byte)]
        return Ends(*up), Ends(*down)

    @cached_property
    def transfer(self) -> Ends:
        """What a tensor takes from one device to another: one link, or two legs through the host's memory."""
        sender, receiver = self.ends
        if sender is receiver:
            return sender
        return Ends(sender.latency_ms + receiver.latency_ms, sender.ms_per_byte + receiver.ms_per_byte)

    @cached_property
    def talks(self) -> NDArray[np.bool_]:
        """bool[D, D], pairs that can send to each other both ways."""
        one_way = np.isfinite(self.transfer.latency_ms)
        return one_way & one_way.T

    @cached_property
    def groups(self) -> tuple[NDArray[np.int64], ...]:
        """Sets of devices of which all can talk to all, largest first; one set when every pair can talk.

        Grown greedily from every device in turn: each device is in one set at least.
        """
        found: dict[tuple[int, ...], None] = {}
        for start in range(len(self.capacity)):
            able = self.talks[start].copy()
            group = {start}
            for other in range(len(self.capacity)):
                if able[other]:
                    group.add(other)
                    able &= self.talks[other]
            found[tuple(sorted(group))] = None
        return tuple(np.asarray(g) for g in sorted(found, key=lambda g: (-len(g), g)))

    def masks(self) -> Iterator[NDArray[np.bool_]]:
        """Yield `allowed`, and where not every pair can talk, `allowed` within each of the largest groups that can."""
        yield self.allowed
        if not self.talks.all():
            for group in self.groups[:_MOST_GROUPS]:
                inside = np.zeros(len(self.capacity), np.bool_)
                inside[group] = True
                yield self.allowed & inside

    @cached_property
    def predecessors(self) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float64]]:
        """Offsets int64[N+1], producers int32[C] and bytes float64[C] of every op's inputs."""
        edges = self.problem.graph.edge_list
        by_consumer = np.argsort(edges[:, 1], kind="stable")
        offsets = np.zeros(len(self.op_class) + 1, np.int64)
        np.cumsum(np.bincount(edges[:, 1], minlength=len(self.op_class)), out=offsets[1:])
        edges = edges[by_consumer]
        return offsets, np.ascontiguousarray(edges[:, 0]), self.problem.graph.tensor_bytes[edges[:, 2]]

    @cached_property
    def upward_rank_ms(self) -> NDArray[np.float64]:
        """float64[N], longest path to the end with mean latencies and mean transfers, ms (Topcuoglu 2002, eq. 8)."""
        from autoplace.strategies._kernels import upward_rank

        latency = self.problem.latency_ms
        finite = np.isfinite(latency)
        mean = np.where(finite, latency, 0.0).sum(axis=1) / np.maximum(finite.sum(axis=1), 1)
        pairs = np.isfinite(self.transfer.latency_ms) & ~np.eye(len(self.capacity), dtype=bool)
        start = float(self.transfer.latency_ms[pairs].mean()) if pairs.any() else 0.0
        per_byte = float(self.transfer.ms_per_byte[pairs].mean()) if pairs.any() else 0.0
        offsets, producers, sizes = self.predecessors
        return upward_rank(self.problem.graph.topological_order, mean, offsets, producers, start + per_byte * sizes)

    @cached_property
    def rank_order(self) -> NDArray[np.int64]:
        """int64[N], ops by falling upward rank, ties in topological order; producers come first."""
        position = np.empty(len(self.op_class), np.int64)
        position[self.problem.graph.topological_order] = np.arange(len(position))
        return np.lexsort((position, -self.upward_rank_ms))

    def flat(self, allowed: NDArray[np.bool_]) -> Flat:
        """Return what the list schedulers read, with a bool[K, D] of the devices that each class may use."""
        from autoplace.strategies._kernels import Flat

        offsets, producers, sizes = self.predecessors
        return Flat(
            order=self.rank_order,
            latency=np.ascontiguousarray(self.problem.latency_ms),
            offsets=offsets,
            producers=producers,
            sizes=sizes,
            latency_ms=np.ascontiguousarray(self.transfer.latency_ms),
            ms_per_byte=np.ascontiguousarray(self.transfer.ms_per_byte),
            op_class=self.op_class,
            allowed=np.ascontiguousarray(allowed),
            class_bytes=self.class_bytes,
            capacity=self.capacity,
        )

    def spread(self, class_device: NDArray[np.integer]) -> NDArray[np.int32]:
        """Return the device of every op, int32[N], from the device of every class, int[K]."""
        return np.asarray(class_device, np.int32)[self.op_class]

    def gather(self, assignment: NDArray[np.integer]) -> NDArray[np.int32]:
        """Return the device of every class, int32[K], from the device of every op, int[N]."""
        class_device = np.zeros(self.num_classes, np.int32)
        class_device[self.op_class] = assignment
        return class_device

    def fits(self, class_device: NDArray[np.integer]) -> bool:
        """Return whether the memory that this view counts fits on every device."""
        used = np.bincount(class_device, weights=self.class_bytes, minlength=len(self.capacity))
        return bool((used <= self.capacity).all())

    def pack(
        self, allowed: NDArray[np.bool_], preference: NDArray[np.float64] | None = None
    ) -> NDArray[np.int32] | None:
        """Place classes so that memory fits: fewest choices first, then largest first, each where it is preferred most.

        Args:
            allowed: bool[K, D], devices to choose from.
            preference: float64[K, D], lowest wins among the devices with room; None = most free memory wins.

        Returns:
            int32[K] device of every class, or None when one found no room.
        """
        free = self.capacity.copy()
        placed = np.full(self.num_classes, -1, np.int32)
        for index in np.lexsort((-self.class_bytes, allowed.sum(axis=1))):
            room = allowed[index] & (self.class_bytes[index] <= free)
            if not room.any():
                return None
            cost = -free if preference is None else preference[index]
            device = int(np.where(room, cost, np.inf).argmin()) if np.isfinite(cost[room]).any() else int(room.argmax())
            placed[index] = device
            free[device] -= self.class_bytes[index]
        return placed


def _classes(colocate: NDArray[np.int32], order: NDArray[np.int32]) -> NDArray[np.int32]:
    """Number co-location classes by their first op in topological order."""
    alone = np.arange(len(colocate)) + int(colocate.max(initial=-1)) + 1
    keys = np.where(colocate >= 0, colocate, alone)
    _, first, inverse = np.unique(keys[order], return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int32)
    rank[np.argsort(first)] = np.arange(len(first), dtype=np.int32)
    op_class = np.empty(len(colocate), np.int32)
    op_class[order] = rank[inverse]
    return op_class


def list_schedules(
    view: View, schedule: Callable[[Flat], tuple[NDArray[np.int32], NDArray[np.float64]]]
) -> list[NDArray[np.int32]]:
    """Run a list scheduler on all devices and, where not all can talk, on each group that can.

    Args:
        view: What to place.
        schedule: From flat arrays to the device of every op (-1 = found none) and its finish time, ms.

    Returns:
        The complete assignments int32[N] whose memory fits, earliest finish first.
    """
    found = []
    for allowed in view.masks():
        if not allowed.any(axis=1).all():
            continue
        assignment, finish = schedule(view.flat(allowed))
        if (assignment >= 0).all() and view.fits(view.gather(assignment)):
            found.append((float(finish.max(initial=0.0)), assignment))
    return [assignment for _, assignment in sorted(found, key=lambda pair: pair[0])]
