import time

import pytest

from autoplace.errors import ExecutionError
from autoplace.hardware.counters import NvmlMeter, RaplMeter
from autoplace.hardware.nvml import Nvml


def test_rapl_adds_up_the_packages(powercap):
    root = powercap(100_000_000, 200_000_000)
    meter = RaplMeter(sys_root=root)
    assert meter.readable
    meter.begin()
    powercap(103_000_000, 204_000_000)
    assert meter.end(1000.0) == pytest.approx(7.0)


def test_rapl_wraps_around(powercap):
    meter = RaplMeter(sys_root=powercap(999_000_000, 0))
    meter.begin()
    powercap(2_000_000, 1_000_000)
    assert meter.end(1000.0) == pytest.approx(3.0 + 1.0)


def test_rapl_without_a_known_range_tells_nothing_of_a_wrap(powercap):
    unknown = {"class/powercap/intel-rapl:0/max_energy_range_uj": ""}
    meter = RaplMeter(sys_root=powercap(999_000_000, **unknown))
    meter.begin()
    powercap(2_000_000, **unknown)
    assert meter.end(1000.0) is None


def test_rapl_counter_that_did_not_move_is_no_figure(powercap):
    meter = RaplMeter(sys_root=powercap(5))
    meter.begin()
    assert meter.end(0.1) is None


def test_rapl_that_may_not_be_read(powercap):
    meter = RaplMeter(sys_root=powercap(5, **{"class/powercap/intel-rapl:0/energy_uj": ""}))
    assert not meter.readable
    with pytest.raises(ExecutionError, match="RAPL"):
        meter.begin()


def test_no_packages_are_not_readable(tmp_path):
    assert not RaplMeter(sys_root=tmp_path).readable


def test_nvml_counts_by_its_counter(replay):
    # One reading to see whether there is a counter, one at begin, one at end.
    meter = NvmlMeter(replay(energy_j=[10.0, 11.0, 15.5]), ["GPU-a"])
    assert meter.readable
    meter.begin()
    assert meter.end(100.0) == pytest.approx(4.5)


def test_nvml_counter_that_did_not_move_is_no_figure(replay):
    meter = NvmlMeter(replay(energy_j=[10.0]), ["GPU-a"])
    meter.begin()
    assert meter.end(0.1) is None


def test_nvml_integrates_power_where_there_is_no_counter(replay):
    meter = NvmlMeter(replay(power_w=[120.0]), ["GPU-a"])
    assert meter.readable
    meter.begin()
    time.sleep(0.05)
    assert meter.end(500.0) == pytest.approx(120.0 * 0.5)


def test_nvml_integrates_changing_power_by_the_trapezoid_rule(replay):
    # Readings: whether it tells at all, begin, end; nothing in between.
    meter = NvmlMeter(replay(power_w=[0.0, 100.0, 200.0]), ["GPU-a"])
    assert meter.readable
    meter.begin()
    assert meter.end(1000.0) == pytest.approx(150.0)


def test_a_gpu_lost_in_between_is_no_figure():
    class Lost(Nvml):
        def __init__(self):
            self.lost = False

        def gpus(self):
            return ()

        def energy_j(self, uuid):
            return None

        def power_w(self, uuid):
            if self.lost:
                raise ExecutionError("GPU-a is gone")
            return 50.0

    nvml = Lost()
    meter = NvmlMeter(nvml, ["GPU-a"])
    meter.begin()
    nvml.lost = True
    assert meter.end(100.0) is None


def test_no_gpus_are_not_readable(replay):
    assert not NvmlMeter(replay(), []).readable
    assert not NvmlMeter(replay(power_w=[]), ["GPU-a"]).readable
