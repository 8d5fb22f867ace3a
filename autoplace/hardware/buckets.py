"""Buckets that gradients are summed in: how large, over which links. The runtime makes them, the simulator foretells.

Knows nothing of plans.
"""

from __future__ import annotations

from collections.abc import Sequence

from autoplace.hardware.cluster import Cluster

__all__ = ["BUCKET_BYTES", "bucket_bytes_of", "slowest_of_ring"]

BUCKET_BYTES = 25 << 20
"""Of DistributedDataParallel's buckets, if nobody says otherwise."""
_BUCKETS = 8
"""What is reduced while the backward still runs is seven eighths, then."""
_SHARDED_BUCKETS = 16
"""Of sharded gradients: values come back in them, and the forward waits for the first."""
_LEAST_MS = 20.0
"""A bucket's time on the link, beside which what every reduction costs anew is little: 3.6 ms between two processes
without a GPU [measured: gloo, two hosts of one and half a core, 2026-11-28]."""


def slowest_of_ring(devices: Sequence[int], cluster: Cluster) -> tuple[float, float]:
    """Return the largest latency, ms, and the least bandwidth, bytes per ms, of the links of a ring.

    Args:
        devices: Indices, two or more; they form the ring in the cluster's order.
        cluster: The devices.
    """
    ring = sorted(set(devices))
    onward = ring[1:] + ring[:1]
    return float(cluster.link_latency_ms[ring, onward].max()), float(cluster.link_bytes_per_ms[ring, onward].min())


_SHARDED_LEAST_MS = 5.0
"""The same for a message from rank to rank, which nobody else takes part in."""


def bucket_bytes_of(size_bytes: float, devices: Sequence[int], cluster: Cluster, *, sharded: bool = False) -> float:
    """Return how large the buckets of data parallelism are, bytes: small on slow links, so that most of them overlap.

    Args:
        size_bytes: Of all gradients on each device.
        devices: Indices; they form the ring in the cluster's order.
        cluster: The devices.
        sharded: Whether they go to owners, at least in part.
    """
    if len(set(devices)) < 2:
        return float(BUCKET_BYTES)
    _, bytes_per_ms = slowest_of_ring(devices, cluster)
    most, least_ms = (_SHARDED_BUCKETS, _SHARDED_LEAST_MS) if sharded else (_BUCKETS, _LEAST_MS)
    return min(float(BUCKET_BYTES), max(size_bytes / most, least_ms * bytes_per_ms))
