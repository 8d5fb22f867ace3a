"""What tests of several verbs share."""

from __future__ import annotations

import os

import pytest

from autoplace.hardware.cluster import Cluster, Device, Host, Link


@pytest.fixture
def cluster_file(tmp_path):
    core = min(os.sched_getaffinity(0))
    devices = tuple(Device(name=f"{host}/cpu:0", kind="cpu", cores=(core,)) for host in ("a", "b"))
    link = Link(latency_ms=0.1, bytes_per_ms=1e6)
    path = tmp_path / "cluster.yaml"
    Cluster(devices=devices, default_link=link, hosts=(Host(name="a"), Host(name="b"))).save(path)
    return path
