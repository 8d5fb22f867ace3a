"""How large the buckets of gradients are: small on slow links, never larger than DDP's."""

from __future__ import annotations

from autoplace.hardware.buckets import BUCKET_BYTES, bucket_bytes_of
from autoplace.hardware.cluster import Cluster, Device, Link


def cluster(bytes_per_ms, links=None):
    devices = tuple(Device(name=f"h{i}/cpu:0", kind="cpu") for i in range(3))
    return Cluster(devices=devices, default_link=Link(latency_ms=0.1, bytes_per_ms=bytes_per_ms), links=links or {})


def test_a_fast_link_has_the_buckets_of_ddp():
    assert bucket_bytes_of(1e9, [0, 1], cluster(1e7)) == BUCKET_BYTES


def test_a_slow_link_has_an_eighth_of_the_gradients_but_no_crumbs():
    assert bucket_bytes_of(80e6, [0, 1], cluster(12_500)) == 10e6
    assert bucket_bytes_of(1e6, [0, 1], cluster(12_500)) == 250_000


def test_the_slowest_link_of_the_ring_decides():
    slow = {("h1/cpu:0", "h2/cpu:0"): Link(latency_ms=0.1, bytes_per_ms=12_500)}
    found = cluster(1e7, slow)
    assert bucket_bytes_of(1e6, [2, 0, 1], found) == 250_000
    assert bucket_bytes_of(1e6, [1, 0], found) == BUCKET_BYTES


def test_one_device_sends_nothing():
    assert bucket_bytes_of(1e6, [1], cluster(12_500)) == BUCKET_BYTES
