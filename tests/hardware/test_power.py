import pytest

from autoplace.hardware.power import cpu_watts, gpu_watts, rapl_packages


def limits(package, **constraints):
    files = {}
    for key, value in constraints.items():
        files[f"class/powercap/intel-rapl:{package}/{key}"] = value
    return files


def long_term(package, microwatts, maximum=None):
    files = limits(package, constraint_0_name="long_term", constraint_0_power_limit_uw=microwatts)
    return files | ({} if maximum is None else limits(package, constraint_0_max_power_uw=maximum))


def test_generic_figures_where_there_is_no_rapl(tmp_path):
    watts = cpu_watts(4, sys_root=tmp_path)
    assert (watts.idle_w, watts.busy_w) == pytest.approx((4 * 0.74, 4 * 3.5))
    assert "Cloud Carbon Footprint" in watts.source


def test_rapl_limits_are_shared_out_by_cores(powercap):
    more = long_term(0, 100_000_000) | long_term(1, 999, maximum=60_000_000)
    root = powercap(0, 0, **more, **{"devices/system/cpu/online": "0-15"})
    watts = cpu_watts(4, sys_root=root)
    assert watts.busy_w == pytest.approx(160.0 * 4 / 16)
    assert watts.idle_w == pytest.approx(40.0 * 0.74 / 3.5)
    assert "rapl" in watts.source


@pytest.mark.parametrize("microwatts", [0, 4_095_000_000, "garbage"])
def test_a_limit_that_is_none_falls_to_the_generic_figures(powercap, microwatts):
    root = powercap(0, **long_term(0, microwatts), **{"devices/system/cpu/online": "0-3"})
    assert cpu_watts(2, sys_root=root).busy_w == pytest.approx(7.0)


def test_only_packages_count(powercap):
    root = powercap(5, 6, **{"class/powercap/intel-rapl:0:0/name": "core", "class/powercap/intel-rapl:9/name": "psys"})
    assert [p.name for p in rapl_packages(root)] == ["intel-rapl:0", "intel-rapl:1"]


def test_gpu_at_rest(replay):
    nvml = replay()
    watts = gpu_watts(nvml.gpus()[0], nvml)
    assert (watts.idle_w, watts.busy_w) == (40.0, 300.0)


@pytest.mark.parametrize("facts", [{"utilization": 0.8}, {"utilization": None}, {"power_w": []}])
def test_a_gpu_that_is_not_at_rest_has_no_idle_watts(replay, facts):
    nvml = replay(**facts)
    watts = gpu_watts(nvml.gpus()[0], nvml)
    assert (watts.idle_w, watts.busy_w) == (None, 300.0)


@pytest.mark.parametrize("facts", [{"sliced": True}, {"power_limit_w": None}])
def test_a_sliced_or_silent_gpu_has_no_watts(replay, facts):
    nvml = replay(**facts)
    assert gpu_watts(nvml.gpus()[0], nvml).busy_w is None
