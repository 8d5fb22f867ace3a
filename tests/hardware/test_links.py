import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoplace.errors import InputError
from autoplace.hardware import links as links_module
from autoplace.hardware.cluster import Device, Link
from autoplace.hardware.cores import available_cores
from autoplace.hardware.links import fit_link, measure_links
from autoplace.hardware.nvml import open_nvml

SIZES = (1 << 10, 1 << 14, 1 << 18, 1 << 22, 1 << 24)


def groups(count):
    cores = available_cores()
    return [Device(name=f"host0/cpu:{i}", kind="cpu", cores=(cores[i % len(cores)],)) for i in range(count)]


@given(latency_ms=st.floats(1e-4, 10.0), bytes_per_ms=st.floats(1e5, 1e9))
def test_fit_finds_the_line_that_made_the_times(latency_ms, bytes_per_ms):
    link = fit_link(SIZES, [latency_ms + s / bytes_per_ms for s in SIZES], handover_ms=0.5)
    assert link.latency_ms == pytest.approx(0.5 + latency_ms, rel=1e-3)
    assert link.bytes_per_ms == pytest.approx(bytes_per_ms, rel=1e-3)


@given(st.lists(st.floats(1e-6, 1e4), min_size=5, max_size=5))
def test_fit_of_any_times_is_a_link(times_ms):
    link = fit_link(SIZES, times_ms)
    assert link.latency_ms >= 0
    assert 0 < link.bytes_per_ms < float("inf")


def test_fit_through_the_origin_where_the_latency_would_be_negative():
    link = fit_link([10.0, 100.0], [0.5, 10.0])
    assert link.latency_ms == 0.0
    assert 100 / 10.0 < link.bytes_per_ms < 10 / 0.5


def test_fit_refuses_what_is_no_line():
    with pytest.raises(InputError):
        fit_link([8.0, 8.0], [1.0, 2.0])
    with pytest.raises(InputError):
        fit_link([8.0, 16.0], [0.0, 2.0])


def test_links_between_two_core_groups_are_measured():
    before, steps = torch.get_num_threads(), []
    start = time.perf_counter()
    links = measure_links(groups(2), budget_s=0.2, progress=lambda done, total, label: steps.append((done, total)))
    seconds = time.perf_counter() - start
    assert set(links) == {("host0/cpu:0", "host0/cpu:1"), ("host0/cpu:1", "host0/cpu:0")}
    for link in links.values():
        assert 1e-4 < link.latency_ms < 100, "a hand-over takes microseconds, and not a tenth of a second"
        assert 1e4 < link.bytes_per_ms < 1e9, "between 10 MB/s and 1 TB/s"
    assert steps == [(0, 2), (1, 2), (2, 2)]
    assert torch.get_num_threads() == before
    assert seconds < 10


def test_many_devices_of_a_kind_share_one_measurement(monkeypatch):
    measured = []
    monkeypatch.setattr(links_module, "_measure", lambda route, budget_s: measured.append(route) or Link(**FAST))
    devices = [*groups(5), replace(groups(1)[0], name="host1/cpu:0")]
    links = measure_links(devices)
    assert len(measured) == 1
    assert len(links) == 5 * 4, "every pair on a host, none across"


FAST = {"latency_ms": 0.01, "bytes_per_ms": 1e7}


def test_one_device_has_no_links():
    assert measure_links(groups(1)) == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_links_to_a_gpu_are_measured():
    from autoplace.hardware.gpus import cuda_devices

    devices = [*cuda_devices("host0", open_nvml())[:2], *groups(1)]
    links = measure_links(devices)
    assert len(links) == len(devices) * (len(devices) - 1)
    assert all(1e5 < link.bytes_per_ms < 1e10 for link in links.values())
