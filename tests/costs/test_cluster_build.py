"""Problems over several ranks: one fake session, and two real ranks under gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from autoplace.costs import cluster_build
from autoplace.costs.cluster_build import profile_cluster, steady_ms
from autoplace.costs.footprint import Footprint
from autoplace.errors import ExecutionError, InputError
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.problem import Objective
from autoplace.workload import Workload


class Alone:
    """A session of one rank, with no process group; `others` are what further ranks would say."""

    rank = 0

    def __init__(self, cluster, others=()):
        self.cluster, self.device, self.others = cluster, cluster.devices[0], others
        self.stated = None

    def gather(self, value):
        return [value, *self.others]

    def broadcast(self, value, source=0):
        return value

    def together(self, work):
        try:
            return work()
        except (ExecutionError, InputError):
            raise
        except Exception as error:
            raise ExecutionError(f"rank 0: {type(error).__name__}: {error}") from None

    def agree(self, facts, *, what):
        self.stated = facts


def test_one_rank_measures_its_own_device(sleepers, one_cpu):
    workload, grouping = sleepers({"fixed_ms": 2, "backward_ms": 6}, {"fixed_ms": 6, "backward_ms": 2}, training=True)
    session = Alone(one_cpu)
    problem, report = profile_cluster(
        workload, grouping, session, repeats=3, window_s=0.05, objective=Objective(energy_weight=0.0), name="mine"
    )
    assert problem.graph.names == ("a", "b", "~loss", "b~backward", "a~backward")
    assert problem.cluster is one_cpu and problem.batch_size == 4 and problem.name == "mine"
    assert problem.latency_ms.shape == problem.overhead_ms.shape == (5, 1)
    assert problem.latency_ms[:, 0].sum() == pytest.approx(16, rel=0.4)
    assert (problem.overhead_ms <= problem.latency_ms + 1e-9).all()
    assert (report.labels == "measured").all() and report.labels.shape == (2, 1)
    assert report.total_ms["host0/cpu:0"] == pytest.approx(problem.latency_ms.sum())
    assert session.stated["the model's groups"] == grouping.graph.fingerprint


def test_a_throttled_rank_is_as_slow_as_it_is_on_average(sleepers, one_cpu):
    """Every fifth pass is stopped for 40 ms, as by a quota: medians of passes do not see it."""
    workload, grouping = sleepers({"fixed_ms": 2}, {"fixed_ms": 2})
    calls = [0]

    def throttle(*_):
        calls[0] += 1
        if calls[0] % 5 == 0:
            time.sleep(0.04)

    handle = workload.model.register_forward_pre_hook(throttle)
    try:
        blind, _ = profile_cluster(workload, grouping, Alone(one_cpu), repeats=3, window_s=0.0)
        seeing, _ = profile_cluster(workload, grouping, Alone(one_cpu), repeats=3, window_s=0.25)
    finally:
        handle.remove()
    assert blind.latency_ms.sum() < 9.0
    assert seeing.latency_ms.sum() == pytest.approx(4.0 + 40 / 5, rel=0.35)
    ratio = seeing.latency_ms[:, 0] / seeing.latency_ms.sum()
    assert ratio == pytest.approx([0.5, 0.5], abs=0.2)


def test_the_steady_time_of_long_passes_is_theirs(sleepers, one_cpu):
    workload, _ = sleepers({"fixed_ms": 30}, {})
    assert steady_ms(workload, one_cpu.devices[0], window_s=0.01, windows=2) == pytest.approx(30, rel=0.4)


def measured(device, times, pace=1.0, why=""):
    return cluster_build._Measured(device=device, times=times, pace=pace, why=why)


def times_of(forward):
    forward = np.asarray(forward, float)
    return cluster_build.GroupTimes(
        forward_ms=forward, forward_overhead_ms=0.25 * forward, total_ms=float(forward.sum())
    )


def three(core):
    devices = tuple(Device(name=f"host{i}/cpu:0", kind="cpu", cores=(core,)) for i in range(3))
    return Cluster(devices=devices, default_link=Link(latency_ms=0.1, bytes_per_ms=1e5))


def test_ranks_are_put_together_in_the_cluster_s_order(sleepers, one_cpu):
    workload, grouping = sleepers({"fixed_ms": 1}, {"fixed_ms": 1})
    cluster = three(one_cpu.devices[0].cores[0])
    others = [
        measured("host2/cpu:0", times_of([8.0, 4.0]), pace=1.5),
        measured("host1/cpu:0", None, why="too small"),
    ]
    problem, report = profile_cluster(workload, grouping, Alone(cluster, others), repeats=1, window_s=0.0)
    assert problem.latency_ms[:, 2].tolist() == [12.0, 6.0] and problem.overhead_ms[:, 2].tolist() == [3.0, 1.5]
    assert problem.latency_ms[:, 1] == pytest.approx(problem.latency_ms[:, 0])  # alike, by assumed peaks
    assert report.labels[0].tolist() == ["measured", "estimated", "measured"]
    assert any("host1/cpu:0 are estimated from host0/cpu:0 (too small)" in note for note in report.notes)


def test_a_device_that_no_rank_runs_can_run_nothing(sleepers, one_cpu):
    workload, grouping = sleepers({}, {})
    cluster = three(one_cpu.devices[0].cores[0])
    others = [measured("host1/cpu:0", times_of([1.0, 1.0]))]
    problem, report = profile_cluster(workload, grouping, Alone(cluster, others), repeats=1, window_s=0.0)
    assert problem.can_run.any(axis=0).tolist() == [True, True, False]
    assert "host2/cpu:0" not in report.total_ms
    assert any("no process runs host2/cpu:0" in note for note in report.notes)


def test_a_model_that_fits_nowhere_is_an_error(sleepers, one_cpu, monkeypatch):
    workload, grouping = sleepers({}, {})

    def full(*_args, **_options):
        raise torch.OutOfMemoryError("no room\nmore words")

    monkeypatch.setattr(cluster_build, "profile_groups", full)
    with pytest.raises(InputError, match=r"fits on none of the devices \(no room\)"):
        profile_cluster(workload, grouping, Alone(one_cpu))


def limited(one_cpu, room_bytes, monkeypatch):
    """One device, whose process leaves that much of it to plans."""
    device = replace(one_cpu.devices[0], memory_bytes=1000.0 + room_bytes)
    monkeypatch.setattr(cluster_build, "resting_bytes", lambda *_, **__: 1000.0)
    return Cluster(devices=(device,))


def heavy(sleepers, **options):
    """Four samples; by the graph, 100 bytes each and 8 of weights."""
    workload, grouping = sleepers({"sample_ms": 5}, {"sample_ms": 5}, training=True, **options)
    graph = replace(grouping.graph, activation_bytes=np.asarray([200, 200]))
    return workload, replace(grouping, graph=graph)


def never(*_):
    raise AssertionError("nothing was to be tried")


def test_where_the_graph_s_estimate_fits_the_whole_batch_runs(sleepers, one_cpu, monkeypatch):
    workload, grouping = heavy(sleepers)
    monkeypatch.setattr(cluster_build, "measure_footprint", never)
    cluster = limited(one_cpu, 408.0, monkeypatch)
    problem, report = profile_cluster(workload, grouping, Alone(cluster), repeats=1, window_s=0.02)
    assert problem.resting_bytes == {"host0/cpu:0": 1000.0} and not report.notes
    assert problem.graph.activation_bytes.sum() == 400
    assert problem.cluster is cluster


def test_where_memory_is_short_fewer_samples_run_and_stand_for_the_batch(sleepers, one_cpu, monkeypatch):
    workload, grouping = heavy(sleepers)
    sizes = []
    handle = workload.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    measured = Footprint(fixed_bytes=8.0, sample_bytes=50.0, measured=True)
    monkeypatch.setattr(cluster_build, "measure_footprint", lambda *_: measured)
    session = Alone(limited(one_cpu, 150.0, monkeypatch))
    problem, report = profile_cluster(workload, grouping, session, repeats=1, window_s=0.02)
    handle.remove()
    assert max(sizes) == 2
    assert problem.graph.activation_bytes.sum() == 200  # as measured
    assert problem.latency_ms.sum() == pytest.approx(40.0, rel=0.5)
    assert any("times of 4 samples follow from passes of 2" in note for note in report.notes)


def test_where_no_sample_fits_nothing_is_tried(sleepers, one_cpu, monkeypatch):
    workload, grouping = heavy(sleepers)
    monkeypatch.setattr(workload.model, "forward", never)
    with pytest.raises(InputError, match=r"fits on none of the devices \(1\.11e\+03 bytes have no room for a pass"):
        profile_cluster(workload, grouping, Alone(limited(one_cpu, 107.0, monkeypatch)), repeats=1)


def test_an_error_for_memory_halves_the_samples(sleepers, one_cpu, monkeypatch):
    """As a GPU's."""
    workload, grouping = heavy(sleepers)
    real, tried = cluster_build.profile_groups, []

    def small(*args, samples, **options):
        tried.append(samples)
        if samples > 1:
            raise torch.OutOfMemoryError("no room")
        return real(*args, samples=samples, **options)

    monkeypatch.setattr(cluster_build, "profile_groups", small)
    problem, _ = profile_cluster(workload, grouping, Alone(one_cpu), repeats=1, window_s=0.02)
    assert tried == [4, 2, 1] and problem.latency_ms.sum() == pytest.approx(40.0, rel=0.7)


def test_other_failures_are_raised(sleepers, one_cpu):
    workload, grouping = sleepers({}, {})
    broken = Workload(model=workload.model, args=("no tensor",))
    with pytest.raises(ExecutionError, match="rank 0: "):
        profile_cluster(broken, grouping, Alone(one_cpu))


RANK = """
    import dataclasses, json, os, sys, time
    import torch
    from torch import nn
    from autoplace.costs.cluster_build import profile_cluster
    from autoplace.errors import AutoplaceError
    from autoplace.graph.coarsen import coarsen
    from autoplace.graph.opgraph import OpGraph
    from autoplace.hardware.cluster import Cluster, Device, Link
    from autoplace.runtime.distributed.session import Session
    from autoplace.workload import Workload

    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    core = min(os.sched_getaffinity(0))
    devices = tuple(Device(name=f"host0/cpu:{i}", kind="cpu", cores=(core,)) for i in range(2))
    session = Session.join(Cluster(devices=devices, default_link=Link(latency_ms=0.1, bytes_per_ms=1e5)))

    class Layer(nn.Linear):
        def forward(self, x):
            time.sleep(0.004 * (1 + 2 * rank))
            return super().forward(x)

    model = nn.Sequential(Layer(4, 4), Layer(4, 4))
    graph = OpGraph.build(
        names=["one", "two"], modules=["0", "1"], edges=[(0, [1], 64.0)], flops=[64.0, 64.0], weight_bytes=[80, 80]
    )
    grouping = coarsen(graph)
    workload = Workload(model=model, args=(torch.ones(4, 4),), training=True)
    problem, report = profile_cluster(workload, grouping, session, repeats=2, window_s=0.05)
    result = {
        "fingerprint": problem.fingerprint,
        "totals": problem.latency_ms.sum(axis=0).tolist(),
        "names": [d.name for d in problem.cluster.devices],
    }
    broken = dataclasses.replace(workload, args=(torch.ones(4, 4 if rank == 0 else 5),))
    try:
        profile_cluster(broken, grouping, session, repeats=1, window_s=0.0)
    except AutoplaceError as error:
        result["error"] = str(error)
    other = dataclasses.replace(workload, args=(torch.ones(4 + rank, 4),))
    try:
        profile_cluster(other, grouping, session, repeats=1, window_s=0.0)
    except AutoplaceError as error:
        result["disagree"] = str(error)
    session.close()
    print("RESULT", json.dumps(result))
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_ranks_agree_on_one_problem(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(RANK))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={**os.environ, **shared, "RANK": str(i), "LOCAL_RANK": str(i), "AUTOPLACE_HOST": "host0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    results = []
    for process in ranks:
        try:
            out, err = process.communicate(timeout=100)
        finally:
            process.kill()
        assert process.returncode == 0, err
        results.append(json.loads(out.split("RESULT ")[1]))
    first, second = results
    assert first == second
    assert first["names"] == ["host0/cpu:0", "host0/cpu:1"]
    assert first["totals"][1] > 2.0 * first["totals"][0]
    assert first["error"].startswith("rank 1 (host0/cpu:1): RuntimeError")
    assert "the batch size is '4' on rank 0 and '5' on rank 1" in first["disagree"]
