"""Buckets that gradients are summed in: how large, over which links. The runtime makes them, the simulator foretells.

Knows nothing of plans.
"""

from __future__ import annotations

from collections.abc import Sequence

from autoplace.hardware.cluster import Cluster

__all__ = ["BUCKET_BYTES", "bucket_bytes_of"]

BUCKET_BYTES = 25 << 20
"""Of DistributedDataParallel's buckets, if nobody says otherwise."""
_BUCKETS = 8
"""What is reduced while the backward still runs is seven eighths, then."""
_LEAST_MS = 20.0
"""A bucket's time on the link, beside which what every reduction costs anew is little: 3.6 ms between two processes
without a GPU [measured: gloo, two hosts of one and half a core, 2026-11-28]."""


def bucket_bytes_of(size_bytes: float, devices: Sequence[int], cluster: Cluster) -> float:
    """Return how large the buckets of data parallelism are, bytes: small on slow links, so that most of them overlap.

    Args:
        size_bytes: Of all gradients on each device.
        devices: Indices; they form the ring in the cluster's order.
        cluster: The devices.
    """
    ring = sorted(set(devices))
    if len(ring) < 2:
        return float(BUCKET_BYTES)
    bytes_per_ms = float(cluster.link_bytes_per_ms[ring, ring[1:] + ring[:1]].min())
    return min(float(BUCKET_BYTES), max(size_bytes / _BUCKETS, _LEAST_MS * bytes_per_ms))
