"""Sums of gradients: how long one takes on a ring, how gradients fill buckets, how buckets follow each other.

The formulas are those of → `collectives`. Knows nothing of plans.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from autoplace.hardware.buckets import slowest_of_ring
from autoplace.hardware.cluster import Cluster

__all__ = ["Reduction", "allreduce_ms", "buckets_of", "finish_ms", "scatter_ms"]


class Reduction(NamedTuple):
    """One all-reduce of a bucket."""

    ready_ms: float
    """When its bytes are ready on all its devices."""
    took_ms: float
    devices: tuple[int, ...]
    """Indices of the holders."""


def allreduce_ms(size_bytes: float, devices: Sequence[int], cluster: Cluster) -> float:
    """Return what one ring all-reduce over some devices takes, ms; inf where two neighbours cannot talk.

    Args:
        size_bytes: Of the gradients on each device.
        devices: Indices; they form the ring in the cluster's order.
        cluster: The devices.
    """
    count = len(set(devices))
    return _sent_ms(size_bytes, devices, cluster, messages=2 * (count - 1), parts=2 * (count - 1))


def scatter_ms(size_bytes: float, devices: Sequence[int], cluster: Cluster) -> float:
    """Return what a bucket takes to its owner, or from it to the others, where owners take turns, ms.

    Args:
        size_bytes: Of the gradients, or values.
        devices: Indices; see → `allreduce_ms`, whose links it reckons with, as every rank sends as much as on a ring.
        cluster: The devices.
    """
    return _sent_ms(size_bytes, devices, cluster, messages=1, parts=len(set(devices)) - 1)


def _sent_ms(size_bytes: float, devices: Sequence[int], cluster: Cluster, *, messages: int, parts: int) -> float:
    """Return what messages take, one after the other, that carry some parts of the bytes, one a device, ms."""
    count = len(set(devices))
    if count < 2 or size_bytes <= 0.0:
        return 0.0
    latency_ms, bytes_per_ms = slowest_of_ring(devices, cluster)
    if bytes_per_ms <= 0.0:
        return float("inf")
    return messages * latency_ms + parts / count * size_bytes / bytes_per_ms


def buckets_of(size: float, bucket_bytes: float) -> list[float]:
    """Return the sizes of the buckets that bytes of gradients fill, the last one maybe in part."""
    full = int(size // bucket_bytes)
    rest = size - full * bucket_bytes
    return [float(bucket_bytes)] * full + ([rest] if rest > 0 else [])


def finish_ms(
    reductions: Sequence[Reduction], tell: Callable[[Reduction, float, float], None] = lambda *_: None
) -> float:
    """Return when the last reduction ends: each starts when it is ready and its holders have ended those before it."""
    free: dict[int, float] = {}
    last = 0.0
    for reduction in reductions:
        start = max([reduction.ready_ms, *(free.get(device, 0.0) for device in reduction.devices)])
        end = start + reduction.took_ms
        free.update(dict.fromkeys(reduction.devices, end))
        last = max(last, end)
        tell(reduction, start, end)
    return last
