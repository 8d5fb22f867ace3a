"""Two CPU devices on whatever cores there are, and plans over them."""

import os

import pytest
import torch

from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.plan import Plan, Replica

A, B = "host0/cpu:0", "host0/cpu:1"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_cluster():
    def make(**watts):
        cores = sorted(os.sched_getaffinity(0))
        return Cluster(
            devices=(
                Device(name=A, kind="cpu", cores=(cores[0],), **watts),
                Device(name=B, kind="cpu", cores=(cores[-1],), **watts),
            ),
            default_link=Link(latency_ms=0.0, bytes_per_ms=1e9),
        )

    return make


@pytest.fixture
def cluster(make_cluster):
    return make_cluster()


@pytest.fixture
def make_plan():
    def make(*replicas, **knobs):
        """A plan of assignments in equal shares; a device name alone stands for the whole model on it."""
        assignments = [{".": r} if isinstance(r, str) else r for r in replicas]
        share = 1.0 / len(replicas)
        return Plan(replicas=tuple(Replica(assignment=a, share=share) for a in assignments), strategy="test", **knobs)

    return make
