"""How many samples a device has room for: by the graph, by passes that ran, and by what is held at rest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from autoplace.costs import footprint
from autoplace.costs.footprint import (
    Footprint,
    few_samples,
    measure_footprint,
    resting_bytes,
    samples_on,
    scaled_activations,
)
from autoplace.graph.backward import with_backward
from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Cluster, Device
from autoplace.measure.memory import process_bytes
from autoplace.problem import Problem
from autoplace.workload import Workload

MIB = 1 << 20


def graph(weights=1000, activations=(600, 200)):
    return OpGraph.build(
        names=["a", "b"], edges=[(0, [1], 8.0)], weight_bytes=[weights, 0], activation_bytes=list(activations)
    )


def test_a_graph_s_footprint_is_gradients_and_activations():
    assert Footprint.of_graph(graph(), 8, training=True) == Footprint(fixed_bytes=1000.0, sample_bytes=100.0)
    assert Footprint.of_graph(graph(), 8, training=False).bytes_of(8) == 800.0


@pytest.mark.parametrize(("room", "samples"), [(1800, 8), (1799, 4), (1399, 2), (1150, 1), (1099, 0), (0, 0)])
def test_the_most_that_fits_of_the_batch_s_halves(room, samples):
    assert Footprint(fixed_bytes=1000.0, sample_bytes=100.0).samples_in(room, 8) == samples


def test_a_line_goes_through_the_last_two_peaks():
    assert Footprint.through([(2, 30.0)]).bytes_of(4) == 60.0
    line = Footprint.through([(2, 90.0), (4, 100.0), (8, 140.0)])
    assert (line.fixed_bytes, line.sample_bytes, line.measured) == (60.0, 10.0, True)


@pytest.mark.parametrize(("room", "ran"), [(1e9, [2, 4, 8]), (400.0, [2, 4]), (390.0, [2, 4]), (260.0, [2])])
def test_passes_grow_only_while_the_line_says_that_they_fit(room, ran):
    """Peaks are 50 + 50 n; the first point's line, from zero, expects 300 of four samples, and finds 250."""
    sizes = []

    def peak(size):
        sizes.append(size)
        return 50.0 + 50.0 * size

    guess = Footprint(fixed_bytes=0.0, sample_bytes=80.0)
    found = footprint._climbed(peak, 2, 8, room, guess)
    assert sizes == ran and found.measured
    assert all(found.bytes_of(size) <= room for size in sizes[1:])


def test_a_system_that_does_not_tell_leaves_the_guess():
    guess = Footprint(fixed_bytes=0.0, sample_bytes=1.0)
    assert footprint._climbed(lambda _: 0.0, 2, 8, 100.0, guess) is guess


class Held(nn.Module):
    """Keeps 4 MiB a sample for its backward."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.sizes = []

    def forward(self, x):
        self.sizes.append(len(x))
        return (x[:, None] * self.scale).expand(-1, 512 * 1024).tanh().tanh()


def test_real_passes_are_measured(one_cpu):
    model = Held()
    workload = Workload(model=model, args=(torch.ones(16),), training=True)
    guess = Footprint(fixed_bytes=4.0, sample_bytes=40.0 * MIB)
    found = measure_footprint(workload, one_cpu.devices[0], 100.0 * MIB, guess)
    if not found.measured:
        pytest.skip("the system does not tell peaks of memory")
    assert model.sizes[0] == 2 and max(model.sizes) < 16
    assert 4 * MIB < found.sample_bytes < 32 * MIB
    assert model.scale.grad is None
    model.sizes.clear()
    assert measure_footprint(workload, one_cpu.devices[0], 30.0 * MIB, guess) is guess
    assert model.sizes == []  # not even one is sure to fit


def test_what_a_process_holds_is_not_for_plans():
    device = Device(name="host0/cpu:0", kind="cpu", memory_bytes=64.0 * (1 << 30))
    follower, planner = resting_bytes(device), resting_bytes(device, planner=True)
    assert process_bytes() < follower < planner < device.memory_bytes
    assert resting_bytes(Device(name="host0/cpu:0", kind="cpu", memory_bytes=1.0)) >= process_bytes() * 0.9


def test_activations_are_scaled_to_what_was_measured():
    scaled = scaled_activations(graph(), 8, 50.0)
    assert scaled.activation_bytes.tolist() == [300, 100]
    assert scaled.weight_bytes.tolist() == [1000, 0]
    bare = graph(activations=(0, 0))
    assert scaled_activations(bare, 8, 50.0) is bare


def problem(memory, resting):
    devices = tuple(Device(name=f"h{i}/cpu:0", kind="cpu", memory_bytes=m) for i, m in enumerate(memory))
    return Problem(
        graph=with_backward(graph()),
        cluster=Cluster(devices=devices),
        latency_ms=np.ones((5, len(memory))),
        batch_size=8,
        resting_bytes=resting,
    )


def test_samples_of_the_whole_model_on_a_device():
    resting = {"h0/cpu:0": 5000.0, "h1/cpu:0": 5000.0}
    found = problem([6800.0, 6400.0, float("inf"), 2400.0], resting)
    assert [samples_on(found, d.name) for d in found.cluster.devices] == [8, 4, 8, 4]
    assert samples_on(problem([6050.0], resting), "h0/cpu:0") == 0


def test_few_samples_run_where_memory_is_limited():
    workload = Workload(model=nn.Identity(), args=(torch.ones(8, 2),))
    free, limited = (Device(name=f"h{i}/cpu:0", kind="cpu", memory_bytes=m) for i, m in enumerate((float("inf"), 1e9)))
    assert few_samples(workload, Cluster(devices=(free,))) is workload
    assert few_samples(workload, Cluster(devices=(free, limited))).batch_size == 2
