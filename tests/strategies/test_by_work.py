"""Placements of ops as shares of the batch, and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoplace.graph.backward import with_backward
from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.problem import Problem
from autoplace.strategies.by_work import as_row, as_shares
from autoplace.strategies.pipelines import settled
from autoplace.strategies.weighted import replicas_plan

OPS = 10


def build(speeds=(1.0, 3.0), batch=40):
    graph = OpGraph.build(
        names=[f"op{i}" for i in range(OPS)],
        edges=[(i, [i + 1], 1000.0) for i in range(OPS - 1)],
        weight_bytes=[1000] * OPS,
        activation_bytes=[1000] * OPS,
    )
    devices = tuple(Device(name=f"h{i}/cpu:0", kind="cpu") for i in range(len(speeds)))
    cluster = Cluster(devices=devices, default_link=Link(latency_ms=0.01, bytes_per_ms=1e8))
    times = np.asarray([1.0] * OPS + [0.0] + [2.0] * OPS)
    return Problem(graph=with_backward(graph), cluster=cluster, latency_ms=np.outer(times, speeds), batch_size=batch)


def test_shares_are_parts_of_the_work():
    problem = build()
    row = settled(problem, np.asarray([0, 1, 0, 0, 1, 0, 0, 0, 1, 0]))
    plan = as_shares(problem, row, strategy="mine", sharded=0.5)
    assert [(r.devices, r.share) for r in plan.replicas] == [(("h0/cpu:0",), 0.7), (("h1/cpu:0",), 0.3)]
    assert plan.strategy == "mine" and plan.sharded == 0.5


def test_one_device_has_nothing_to_share():
    problem = build()
    assert as_shares(problem, settled(problem, np.zeros(OPS, int)), strategy="mine") is None
    few = build(batch=2)
    one = np.zeros(OPS, int)
    one[3] = 1
    assert as_shares(few, settled(few, one), strategy="mine") is None, "a tenth of two samples is none"
    unable = problem.with_(
        latency_ms=np.where(np.arange(2 * OPS + 1)[:, None] == 3, [[1.0, np.inf]], problem.latency_ms)
    )
    assert as_shares(unable, settled(unable, one), strategy="mine") is None


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=4))
def test_there_and_back(counts):
    problem = build(speeds=tuple(range(1, len(counts) + 1)), batch=sum(counts))
    plan = replicas_plan(problem, range(len(counts)), tuple(counts), strategy="mine")
    row = as_row(problem, plan)
    again = as_shares(problem, row, strategy="mine")
    found = {} if again is None else {r.devices[0]: r.share for r in again.replicas}
    for replica in plan.replicas:
        assert found.get(replica.devices[0], 0.0) == pytest.approx(replica.share, abs=1.5 / OPS + 1 / sum(counts))
