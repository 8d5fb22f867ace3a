from dataclasses import replace

import pytest

from autoplace.errors import ExecutionError
from autoplace.hardware.cluster import Cluster, Device
from autoplace.hardware.energy import (
    CombinedMeter,
    EnergyMeter,
    ModelMeter,
    NullMeter,
    NvmlMeter,
    RaplMeter,
    best_meter,
)
from autoplace.hardware.nvml import NullNvml


class CpuClock:
    """A process clock that is set by hand, s."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture(params=["null", "rapl", "nvml", "combined", "model"])
def meter(request, powercap, replay, cpu_cluster):
    rapl = RaplMeter(sys_root=powercap(1))
    nvml = NvmlMeter(replay(energy_j=[1.0, 1.0, 3.0, 3.0, 6.0]), ["GPU-a"])
    meters = {"null": NullMeter(), "rapl": rapl, "nvml": nvml, "combined": CombinedMeter([nvml, rapl])}
    return meters.get(request.param) or ModelMeter(cpu_cluster)


def test_contract(meter, powercap):
    """Every meter: names its source, gives joules above 0 or None, can be begun again, and not ended twice."""
    assert isinstance(meter, EnergyMeter)
    assert meter.source in ("none", "rapl", "nvml", "nvml+rapl", "model")
    for counter in (10, 20):
        meter.begin()
        powercap(counter)
        energy_j = meter.end(50.0, {})
        assert (energy_j is None) == (meter.source == "none")
        assert energy_j is None or energy_j > 0
    if meter.source != "none":
        with pytest.raises(ExecutionError, match="begin"):
            meter.end(50.0)


def test_model_of_core_groups_takes_the_process_cpu_time(cpu_cluster):
    clock = CpuClock()
    meter = ModelMeter(cpu_cluster, cpu_clock_s=clock)
    meter.begin()
    clock.now_s += 1.5
    # 4 W idle for 1 s; 8 W of dynamic power for 2 cores is 4 W a core, for 1.5 core-seconds.
    assert meter.end(1000.0) == pytest.approx(4.0 + 1.5 * 4.0)


def test_model_never_exceeds_all_cores_busy(cpu_cluster):
    clock = CpuClock()
    meter = ModelMeter(cpu_cluster, cpu_clock_s=clock)
    meter.begin()
    clock.now_s += 99.0
    assert meter.end(1000.0) == pytest.approx(20.0)


def test_model_of_a_gpu_takes_its_busy_time(mixed_cluster):
    clock = CpuClock()
    meter = ModelMeter(mixed_cluster, cpu_clock_s=clock)
    meter.begin()
    assert meter.end(1000.0, {"host0/cuda:0": 500.0}) == pytest.approx(4.0 + 40.0 + 0.5 * 260.0)
    meter.begin()
    assert meter.end(1000.0, {"host0/cpu:0": 500.0}) is None, "the GPU's busy time is not known"


def test_model_of_another_host_takes_busy_time(cpu_cluster):
    far = Device(name="host1/cpu:0", kind="cpu", idle_watts=1.0, busy_watts=5.0, cores=(0,))
    meter = ModelMeter(Cluster(devices=(*cpu_cluster.devices, far)), cpu_clock_s=CpuClock())
    meter.begin()
    assert meter.end(1000.0, {"host1/cpu:0": 250.0}) == pytest.approx(4.0 + 1.0 + 0.25 * 4.0)


def test_combined_is_none_when_a_part_is(cpu_cluster):
    meter = CombinedMeter([ModelMeter(cpu_cluster), NullMeter()])
    meter.begin()
    assert meter.end(10.0) is None


def test_best_is_rapl_for_core_groups_where_it_can_be_read(cpu_cluster, powercap, tmp_path):
    assert best_meter(cpu_cluster, sys_root=tmp_path).source == "model"
    assert best_meter(cpu_cluster, sys_root=powercap(1)).source == "rapl"


def test_best_of_a_mixed_cluster_covers_all_or_falls_to_the_model(mixed_cluster, powercap, replay, tmp_path):
    uuids = {"host0/cuda:0": "GPU-a"}

    def best(**options):
        return best_meter(mixed_cluster, **{"nvml": replay(), "gpu_uuids": uuids, "sys_root": tmp_path, **options})

    assert best().source == "model", "no RAPL: the GPU's counter alone would leave the cores out"
    root = powercap(1)
    assert best(sys_root=root).source == "nvml+rapl"
    assert best(sys_root=root, nvml=NullNvml()).source == "model"
    assert best(sys_root=root, gpu_uuids={}).source == "model"


def test_best_of_gpus_alone_is_nvml(mixed_cluster, replay):
    gpus = Cluster(devices=mixed_cluster.devices[:1])
    assert best_meter(gpus, nvml=replay(), gpu_uuids={"host0/cuda:0": "GPU-a"}).source == "nvml"


def test_counters_here_do_not_cover_other_hosts(cpu_cluster, powercap):
    far = replace(cpu_cluster.devices[0], name="host1/cpu:0")
    cluster = Cluster(devices=(*cpu_cluster.devices, far))
    assert best_meter(cluster, sys_root=powercap(1)).source == "model"


def test_unknown_watts_and_no_counters_leave_nothing(tmp_path):
    cluster = Cluster(devices=(Device(name="host0/cpu:0", kind="cpu", cores=(0,)),))
    meter = best_meter(cluster, sys_root=tmp_path)
    meter.begin()
    assert meter.source == "none" and meter.end(1.0) is None
