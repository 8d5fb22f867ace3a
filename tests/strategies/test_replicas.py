"""Shares balance the devices, and replicas are whole models."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.problem import Problem
from autoplace.strategies._base import Budget
from autoplace.strategies.replicas import ReplicasStrategy, balanced_shares
from autoplace.strategies.threads import ThreadsStrategy


def _problem(latency_ms, *, batch_size=8, overhead_ms=None, thread_scale=None):
    latency = np.asarray(latency_ms, float)
    ops, devices = latency.shape
    graph = OpGraph.build(names=[f"op{i}" for i in range(ops)], edges=[(i, [i + 1], 8.0) for i in range(ops - 1)])
    cluster = Cluster(
        devices=tuple(Device(name=f"host0/cpu:{d}", kind="cpu") for d in range(devices)),
        default_link=Link(latency_ms=0.01, bytes_per_ms=1e6),
    )
    return Problem(
        graph=graph,
        cluster=cluster,
        latency_ms=latency,
        overhead_ms=None if overhead_ms is None else np.asarray(overhead_ms, float),
        batch_size=batch_size,
        thread_scale=thread_scale or {},
    )


@given(
    st.lists(st.tuples(st.floats(0, 5), st.floats(0.1, 50)), min_size=1, max_size=6),
)
def test_balanced_shares_finish_together(costs):
    fixed, scaling = np.array([c[0] for c in costs]), np.array([c[1] for c in costs])
    shares = balanced_shares(fixed, scaling)
    assert shares.sum() == pytest.approx(1.0)
    used = shares > 1e-9
    finish = (fixed + shares * scaling)[used]
    assert finish.max() - finish.min() <= 1e-6 * max(1.0, finish.max())
    assert (fixed[~used] >= finish.max() - 1e-6).all()


def test_unequal_devices_get_unequal_whole_samples():
    plans = ReplicasStrategy().propose(_problem([[1.0, 3.0], [1.0, 3.0]]), budget=Budget())
    assert [r.share for r in plans[0].replicas] == [0.75, 0.25]
    assert [r.share for r in plans[1].replicas] == [0.5, 0.5]
    assert all(len(r.devices) == 1 for p in plans for r in p.replicas)


def test_one_sample_has_no_replicas():
    assert ReplicasStrategy().propose(_problem([[1.0, 1.0]], batch_size=1), budget=Budget()) == []


def test_a_device_that_cannot_run_an_op_gets_no_replica():
    plans = ReplicasStrategy().propose(_problem([[1.0, np.inf, 1.0]]), budget=Budget())
    assert {d for p in plans for d in p.devices} == {"host0/cpu:0", "host0/cpu:2"}


def test_thread_counts_are_ranked_by_the_measured_scale():
    scale = {"host0/cpu:0": {1: 1.0, 4: 0.4, 2: 0.6}}
    plans = ThreadsStrategy().propose(_problem([[1.0], [1.0]], thread_scale=scale), budget=Budget())
    assert [dict(p.threads) for p in plans] == [{"host0/cpu:0": 4}, {"host0/cpu:0": 2}, {"host0/cpu:0": 1}]
