"""The inner loops of coarsening, compiled by numba: joining groups along given pairs, and walking a graph of groups.

They see flat arrays only. Which pairs may be joined at once without closing a cycle is the caller's knowledge
(→ `_cluster`); these kernels hold the limits: size, memory, devices.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoplace.jit import compiled

__all__ = ["Groups", "join_pairs", "walk"]


class Groups(NamedTuple):
    """Groups of ops, which union-find joins, and clusters of groups that share a device. G groups, K clusters."""

    parent: NDArray[np.int32]
    """int32[G], union-find."""
    size: NDArray[np.float64]
    """float64[G], of the group at a root."""
    fixed: NDArray[np.bool_]
    """bool[G], groups that stay alone."""
    cluster: NDArray[np.int32]
    """int32[G], some cluster of the union-find below."""
    cluster_parent: NDArray[np.int32]
    """int32[K], union-find."""
    cluster_size: NDArray[np.float64]
    """float64[K], of the cluster at a root."""
    cluster_bytes: NDArray[np.float64]
    """float64[K], memory of the cluster at a root."""
    able: NDArray[np.bool_]
    """bool[K, D], devices on which all of the cluster at a root can run."""
    capacity: NDArray[np.float64]
    """float64[D], bytes that a joined cluster may have on each device."""


_compile = partial(compiled, allocates=True)


@_compile
def _root(parent, one):
    while parent[one] != one:
        parent[one] = parent[parent[one]]
        one = parent[one]
    return one


@_compile
def _room(groups, one, other, same_devices):
    """Return whether some device can run two clusters and has room for both."""
    size = groups.cluster_bytes[one] + groups.cluster_bytes[other]
    found = False
    for device in range(len(groups.capacity)):
        if same_devices and groups.able[one, device] != groups.able[other, device]:
            return False
        if groups.able[one, device] and groups.able[other, device] and size <= groups.capacity[device]:
            found = True
    return found


@_compile
def join_pairs(
    groups: Groups,
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    cap: float,
    cluster_cap: float,
    same_devices: bool,
    most: int,
) -> int:
    """Join pairs of groups in the order given, where the limits allow it.

    Args:
        groups: What there is; `parent`, sizes, bytes and `able` are changed in place.
        first, second: int64[P], the pairs.
        cap: Largest size of a joined group.
        cluster_cap: Largest size of a joined cluster.
        same_devices: Join only clusters that can run on the same devices.
        most: Stop after so many joins.

    Returns:
        Number of joins made.
    """
    joins = 0
    for pair in range(len(first)):
        if joins >= most:
            break
        one, other = _root(groups.parent, first[pair]), _root(groups.parent, second[pair])
        if one == other or groups.fixed[one] or groups.fixed[other] or groups.size[one] + groups.size[other] > cap:
            continue
        here, there = (
            _root(groups.cluster_parent, groups.cluster[one]),
            _root(groups.cluster_parent, groups.cluster[other]),
        )
        if here != there:
            if groups.cluster_size[here] + groups.cluster_size[there] > cluster_cap:
                continue
            if not _room(groups, here, there, same_devices):
                continue
            groups.cluster_parent[there] = here
            groups.cluster_size[here] += groups.cluster_size[there]
            groups.cluster_bytes[here] += groups.cluster_bytes[there]
            for device in range(len(groups.capacity)):
                groups.able[here, device] &= groups.able[there, device]
        groups.parent[other] = one
        groups.size[one] += groups.size[other]
        joins += 1
    for index in range(len(groups.parent)):
        groups.parent[index] = _root(groups.parent, index)
    for index in range(len(groups.cluster_parent)):
        groups.cluster_parent[index] = _root(groups.cluster_parent, index)
    return joins


@_compile
def walk(
    starts: NDArray[np.int64], targets: NDArray[np.int64], indegree: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Walk a graph without cycles, deep before wide.

    Args:
        starts: int64[G + 1], ranges into `targets`.
        targets: int64[E].
        indegree: int64[G].

    Returns:
        A topological order in which branches stay together, int64[G], and the longest path from any start to each
        group, in edges, int64[G].
    """
    count = len(indegree)
    missing = indegree.copy()
    order = np.empty(count, np.int64)
    depth = np.zeros(count, np.int64)
    stack = np.empty(count, np.int64)
    height = 0
    for index in range(count - 1, -1, -1):
        if missing[index] == 0:
            stack[height] = index
            height += 1
    done = 0
    while height > 0:
        height -= 1
        one = stack[height]
        order[done] = one
        done += 1
        for edge in range(starts[one + 1] - 1, starts[one] - 1, -1):
            target = targets[edge]
            depth[target] = max(depth[target], depth[one] + 1)
            missing[target] -= 1
            if missing[target] == 0:
                stack[height] = target
                height += 1
    return order[:done], depth
