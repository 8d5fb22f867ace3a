import numpy as np
import pytest

from autoplace.costs.roofline import Peaks, assumed_peaks, measure_peaks, roofline_ms, scaled_ms
from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Device
from autoplace.runtime.worker import DeviceWorker


@pytest.fixture
def graph():
    return OpGraph.build(names=["compute", "memory"], edges=[], flops=[1000.0, 10.0], bytes_moved=[10.0, 1000.0])


def test_the_slower_of_compute_and_memory_counts(graph):
    peaks = Peaks(flops_per_ms=100.0, bytes_per_ms=50.0, launch_ms=0.5)
    assert roofline_ms(graph, peaks).tolist() == [10.5, 20.5]


def test_measurements_are_carried_over_by_the_ratio(graph):
    slow = Peaks(flops_per_ms=100.0, bytes_per_ms=100.0, launch_ms=0.0)
    fast = Peaks(flops_per_ms=1000.0, bytes_per_ms=200.0, launch_ms=0.0)
    assert scaled_ms(np.asarray([20.0, 12.0]), graph, slow, fast).tolist() == pytest.approx([2.0, 6.0])
    assert scaled_ms(np.asarray([20.0, 12.0]), graph, slow, slow).tolist() == [20.0, 12.0]


def test_peaks_of_a_core_are_plausible(one_cpu):
    worker = DeviceWorker(one_cpu.devices[0])
    try:
        peaks = measure_peaks(one_cpu.devices[0], worker)
    finally:
        worker.close()
    assert 1e5 < peaks.flops_per_ms < 1e10
    assert 1e4 < peaks.bytes_per_ms < 1e9
    assert 0 < peaks.launch_ms < 5


def test_assumed_peaks_grow_with_cores():
    one, four = (assumed_peaks(Device(name="h/cpu:0", kind="cpu", cores=tuple(range(n)))) for n in (1, 4))
    assert four.flops_per_ms == 4 * one.flops_per_ms
    assert assumed_peaks(Device(name="h/cuda:0", kind="cuda")).flops_per_ms > four.flops_per_ms
