import pytest
import torch

from autoplace.hardware.gpus import TorchGpu, cuda_devices, match_gpu, torch_gpus, usable_bytes
from autoplace.hardware.nvml import GpuInfo, NullNvml, open_nvml

FIRST = GpuInfo(uuid="GPU-AA", pci_bus_id="00000000:01:00.0")
SECOND = GpuInfo(uuid="GPU-bb", pci_bus_id="00000000:02:00.0")


def gpu(**facts):
    return TorchGpu(**{"index": 0, "name": "T", "memory_bytes": 1 << 30, **facts})


def test_matching_goes_by_uuid_then_by_bus_never_by_index():
    assert match_gpu(gpu(uuid="bb"), (FIRST, SECOND)) is SECOND
    assert match_gpu(gpu(uuid="aa", pci_bus_id=SECOND.pci_bus_id), (FIRST, SECOND)) is FIRST
    assert match_gpu(gpu(pci_bus_id="00000000:02:00.0"), (FIRST, SECOND)) is SECOND
    assert match_gpu(gpu(), (FIRST,)) is None


def test_devices_take_memory_from_torch_and_watts_from_the_driver(replay):
    (device,) = cuda_devices("hostx", replay(), [gpu(index=3, uuid="a", name="Card")])
    assert (device.name, device.kind, device.model) == ("hostx/cuda:3", "cuda", "Card")
    assert device.memory_bytes == 1 << 30
    assert (device.idle_watts, device.busy_watts) == (40.0, 300.0)
    assert "nvml" in device.watts_source


def test_a_gpu_that_the_driver_does_not_show_has_no_watts():
    (device,) = cuda_devices("host0", NullNvml(), [gpu(uuid="zz")])
    assert (device.idle_watts, device.busy_watts, device.watts_source) == (None, None, None)


def test_without_cuda_there_are_no_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_devices("host0", NullNvml()) == []


def test_plans_may_use_what_the_process_may_take_less_a_reserve():
    assert usable_bytes(80 << 30) < 80 << 30
    assert usable_bytes(80 << 30) == pytest.approx(0.95 * (80 << 30) - (128 << 20), abs=1)
    assert usable_bytes(80 << 30, 0.5) == usable_bytes(40 << 30)
    assert usable_bytes(1 << 20) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(not hasattr(torch.cuda, "get_per_process_memory_fraction"), reason="torch cannot tell the fraction")
def test_the_fraction_that_a_process_allows_itself_counts():
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction(0.25, 0)
        assert torch_gpus()[0].memory_bytes == usable_bytes(total, 0.25) < total / 4
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_real_gpus_are_found_and_matched():
    gpus = torch_gpus()
    assert len(gpus) == torch.cuda.device_count()
    assert all(match_gpu(g, open_nvml().gpus()) for g in gpus)
