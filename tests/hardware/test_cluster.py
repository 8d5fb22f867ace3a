import math
from dataclasses import replace

import numpy as np
import pytest

from autoplace.errors import ClusterFileError
from autoplace.hardware.cluster import Cluster, Device, Host, Link

A, B = Device(name="host0/cpu:0", kind="cpu"), Device(name="host1/cpu:0", kind="cpu")


def test_matrices_hold_links_default_and_missing():
    link = Link(latency_ms=1.0, bytes_per_ms=10.0)
    cluster = Cluster(devices=(A, B), links={(A.name, B.name): link})
    np.testing.assert_array_equal(cluster.link_latency_ms, [[0.0, 1.0], [math.inf, 0.0]])
    np.testing.assert_array_equal(cluster.link_bytes_per_ms, [[math.inf, 10.0], [0.0, math.inf]])
    with_default = replace(cluster, default_link=Link(latency_ms=2.0, bytes_per_ms=5.0))
    assert with_default.link_latency_ms[1, 0] == 2.0


def test_names_and_links_are_checked():
    with pytest.raises(ClusterFileError, match="no devices"):
        Cluster(devices=())
    with pytest.raises(ClusterFileError, match="listed twice"):
        Cluster(devices=(A, A))
    with pytest.raises(ClusterFileError, match="not in the cluster"):
        Cluster(devices=(A,), links={(A.name, "x"): Link(latency_ms=0, bytes_per_ms=1)})
    with pytest.raises(ClusterFileError, match="host 'a' is listed twice"):
        Cluster(devices=(A,), hosts=(Host(name="a"), Host(name="a")))


def test_fingerprint_holds_facts_not_measurements():
    cluster = Cluster(devices=(A, B))
    measured = Cluster(devices=(replace(A, idle_watts=3.0), B), default_link=Link(latency_ms=1, bytes_per_ms=1))
    assert measured.fingerprint == cluster.fingerprint
    assert Cluster(devices=(A, B), hosts=(Host(name="host0"),)).fingerprint == cluster.fingerprint
    assert Cluster(devices=(replace(A, memory_bytes=1e9), B)).fingerprint != cluster.fingerprint
    assert Cluster(devices=(B, A)).fingerprint != cluster.fingerprint


def test_devices_of_a_host_come_in_order():
    other = Device(name="host0/cpu:1", kind="cpu")
    assert Cluster(devices=(A, B, other)).on("host0") == (A, other)
    assert Cluster(devices=(A,)).on("nobody") == ()


def test_host_and_index():
    assert (B.host, Cluster(devices=(A, B)).index[B.name]) == ("host1", 1)


def test_a_part_keeps_order_links_and_hosts():
    devices = tuple(Device(name=name, kind="cpu") for name in ("b/cpu:0", "a/cpu:0", "c/cpu:0"))
    link = Link(latency_ms=1, bytes_per_ms=2)
    links = {("a/cpu:0", "b/cpu:0"): link, ("a/cpu:0", "c/cpu:0"): link}
    hosts = tuple(Host(name=name) for name in "abc")
    whole = Cluster(devices=devices, links=links, default_link=link, hosts=hosts)
    part = whole.part(["a/cpu:0", "b/cpu:0"])
    assert [d.name for d in part.devices] == ["b/cpu:0", "a/cpu:0"] and [h.name for h in part.hosts] == ["a", "b"]
    assert list(part.links) == [("a/cpu:0", "b/cpu:0")] and part.default_link == link
    assert whole.part(["a/cpu:0", "b/cpu:0", "c/cpu:0"]) == whole
