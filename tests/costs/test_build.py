import os

import numpy as np
import pytest
import torch

from autoplace.costs import build
from autoplace.costs.build import build_problem
from autoplace.costs.roofline import assumed_peaks, scaled_ms
from autoplace.errors import InputError
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.problem import Objective, Semantics
from autoplace.workload import Workload


@pytest.fixture
def count_profiles(monkeypatch):
    """Names of the devices that were really measured."""
    seen, real = [], build.profile_groups

    def profile(workload, grouping, device, **options):
        seen.append(device.name)
        return real(workload, grouping, device, **options)

    monkeypatch.setattr(build, "profile_groups", profile)
    return seen


def test_inference_problem(sleepers, two_cpus, count_profiles):
    workload, grouping = sleepers({"fixed_ms": 2}, {"fixed_ms": 6})
    steps = []
    problem, report = build_problem(
        workload, grouping, two_cpus, objective=Objective(goal="throughput"), semantics=Semantics(queue="priority"),
        name="mine", progress=lambda *step: steps.append(step), repeats=1,
    )  # fmt: skip
    assert problem.graph.fingerprint == grouping.graph.fingerprint, "two ops in a row are in program order already"
    assert problem.name == "mine" and problem.batch_size == 4
    assert problem.objective.goal == "throughput" and problem.semantics.queue == "priority"
    assert problem.latency_ms.shape == problem.overhead_ms.shape == (2, 2)
    assert problem.latency_ms[1, 0] > 1.5 * problem.latency_ms[0, 0]
    assert (problem.latency_ms[:, 0] == problem.latency_ms[:, 1]).all()
    assert count_profiles == ["host0/cpu:0"]
    assert (report.labels == "measured").all() and report.labels.shape == (2, 2)
    assert report.total_ms["host0/cpu:1"] == pytest.approx(problem.latency_ms[:, 1].sum())
    assert steps == [("measured host0/cpu:0", 1, 1)]


def test_training_problem_has_backward_ops(sleepers, one_cpu):
    workload, grouping = sleepers({"fixed_ms": 2, "backward_ms": 9}, {"backward_ms": 3}, training=True)
    problem, report = build_problem(workload, grouping, one_cpu, repeats=1)
    assert problem.graph.names == ("a", "b", "~loss", "b~backward", "a~backward")
    assert problem.latency_ms[2, 0] == 0
    assert problem.latency_ms[4, 0] > 1.5 * problem.latency_ms[3, 0]
    assert report.labels.shape == (2, 1)


def test_measurements_are_cached_by_what_changes_them(sleepers, one_cpu, count_profiles):
    workload, grouping = sleepers({"fixed_ms": 1}, {})
    first, report = build_problem(workload, grouping, one_cpu, repeats=1)
    assert report.cache_hits == 0
    again, report = build_problem(workload, grouping, one_cpu, repeats=1)
    assert report.cache_hits == 1 and len(count_profiles) == 1
    assert (again.latency_ms == first.latency_ms).all() and again.fingerprint == first.fingerprint
    build_problem(workload, grouping, one_cpu, use_cache=False, repeats=1)
    assert len(count_profiles) == 2
    build_problem(Workload(model=workload.model, args=(torch.ones(6, 2),)), grouping, one_cpu, repeats=1)
    assert len(count_profiles) == 3


def test_cache_entries_that_do_not_fit_are_measured_again(sleepers, one_cpu, count_profiles, monkeypatch):
    workload, grouping = sleepers({}, {})
    bad = {"forward_ms": [1.0], "backward_ms": None, "forward_overhead_ms": [0.0], "backward_overhead_ms": None}
    monkeypatch.setattr(build.cache, "load", lambda key: bad | {"total_ms": 1.0, "notes": []})
    problem, report = build_problem(workload, grouping, one_cpu, repeats=1)
    assert report.cache_hits == 0 and len(count_profiles) == 1 and problem.latency_ms.shape == (2, 1)


def test_devices_that_are_not_here_are_estimated(sleepers, one_cpu):
    workload, grouping = sleepers({"fixed_ms": 2}, {"fixed_ms": 2})
    strangers = (
        Device(name="host1/cuda:0", kind="cuda", model="far GPU"),
        Device(name="host1/cpu:0", kind="cpu", cores=(0,)),
        Device(name="host0/npu:0", kind="npu"),
    )
    cluster = Cluster(devices=(*one_cpu.devices, *strangers), default_link=Link(latency_ms=1, bytes_per_ms=1e6))
    problem, report = build_problem(workload, grouping, cluster, repeats=1)
    assert report.labels[0].tolist() == ["measured", "estimated", "estimated", "estimated"]
    assert np.isfinite(problem.latency_ms).all()
    peaks = [assumed_peaks(device) for device in cluster.devices[:2]]
    assert problem.latency_ms[:, 1].tolist() == scaled_ms(problem.latency_ms[:, 0], grouping.graph, *peaks).tolist()
    assert (problem.latency_ms[:, 2] == problem.latency_ms[:, 0]).all()  # like the one here
    assert any("host1/cuda:0 are estimated" in note and "assumed peaks" in note for note in report.notes)


def test_a_device_that_fails_is_estimated_from_measured_peaks(sleepers, two_cpus, monkeypatch):
    workload, grouping = sleepers({"fixed_ms": 2}, {})
    real = build.profile_groups
    small = Device(name="host0/cpu:1", kind="cpu", cores=two_cpus.devices[0].cores, model=build.cpu_model())

    def profile(workload, grouping, device, **options):
        if device is small:
            raise torch.OutOfMemoryError("too small")
        return real(workload, grouping, device, **options)

    monkeypatch.setattr(build, "profile_groups", profile)
    cluster = Cluster(devices=(two_cpus.devices[0], small), default_link=two_cpus.default_link)
    _, report = build_problem(workload, grouping, cluster, repeats=1)
    assert report.labels[0].tolist() == ["measured", "estimated"]
    (note,) = report.notes
    assert "measured peaks" in note and "too small" in note


def test_no_device_that_runs_is_an_error(sleepers):
    workload, grouping = sleepers({}, {})
    with pytest.raises(InputError, match="no device of the cluster is here"):
        build_problem(workload, grouping, Cluster(devices=(Device(name="h/npu:0", kind="npu"),)), repeats=1)


def test_a_model_that_fails_everywhere_is_an_error(sleepers, one_cpu):
    workload, grouping = sleepers({}, {})
    broken = Workload(model=workload.model, args=("no tensor",))
    with pytest.raises(InputError, match=r"runs on none of the devices of this machine \(TypeError"):
        build_problem(broken, grouping, one_cpu, repeats=1)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_all_cores_of_the_host_are_tried(sleepers):
    first, second = sorted(os.sched_getaffinity(0))[:2]
    devices = tuple(Device(name=f"host0/cpu:{i}", kind="cpu", cores=(c,)) for i, c in enumerate((first, second)))
    cluster = Cluster(devices=devices, default_link=Link(latency_ms=0.01, bytes_per_ms=1e6))
    workload, grouping = sleepers({"fixed_ms": 5}, {"fixed_ms": 5})
    problem, report = build_problem(workload, grouping, cluster, repeats=3)
    scale = problem.thread_scale
    assert scale.keys() == {"host0/cpu:0", "host0/cpu:1"}
    assert scale["host0/cpu:0"] == scale["host0/cpu:1"] and scale["host0/cpu:0"].keys() == {2}
    assert 0.4 < scale["host0/cpu:0"][2] < 2.5  # sleeping does not get faster
    again, report = build_problem(workload, grouping, cluster, repeats=3)
    assert report.cache_hits == 2 and again.thread_scale == scale


def test_a_single_core_group_has_no_thread_scale(sleepers, one_cpu):
    workload, grouping = sleepers({}, {})
    assert build_problem(workload, grouping, one_cpu, repeats=1)[0].thread_scale == {}
