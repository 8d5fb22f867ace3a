import ast
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from autoplace.errors import ExecutionError, InputError
from autoplace.hardware import nvml as nvml_module
from autoplace.hardware.nvml import _MEANING, NullNvml, RealNvml, ReplayNvml, open_nvml

pynvml = pytest.importorskip("pynvml")


class FakeLibrary:
    """pynvml's face over one GPU; `answers` overrides a question with a value or a vendor's code."""

    NVMLError = pynvml.NVMLError

    def __init__(self, **answers):
        self._answers = {
            "nvmlDeviceGetCount": 1,
            "nvmlDeviceGetHandleByIndex": "handle",
            "nvmlDeviceGetUUID": b"GPU-5f",
            "nvmlDeviceGetName": "Fake",
            "nvmlDeviceGetPciInfo": SimpleNamespace(busId=b"00000000:3B:00.0"),
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=16 << 30),
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=25),
            "nvmlDeviceGetMigMode": [0, 0],
            "nvmlDeviceGetEnforcedPowerLimit": 250_000,
            "nvmlDeviceGetPowerUsage": 61_500,
            "nvmlDeviceGetTotalEnergyConsumption": 5_000,
        } | answers

    def __getattr__(self, name):
        answer = self._answers[name]

        def question(*_):
            if isinstance(answer, pynvml.NVMLError):
                raise answer
            return answer

        return question


def test_a_gpu_is_described_in_our_units():
    nvml = RealNvml(FakeLibrary())
    (gpu,) = nvml.gpus()
    assert (gpu.uuid, gpu.name, gpu.pci_bus_id) == ("GPU-5f", "Fake", "00000000:3b:00.0")
    assert gpu.memory_bytes == 16 << 30
    assert gpu.power_limit_w == 250.0
    assert gpu.utilization == 0.25
    assert not gpu.sliced
    assert nvml.power_w("GPU-5f") == 61.5
    assert nvml.energy_j("GPU-5f") == 5.0
    assert nvml.power_w("GPU-unknown") is None


def test_what_the_driver_does_not_support_is_none():
    refused = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
    questions = ("EnforcedPowerLimit", "MigMode", "UtilizationRates", "TotalEnergyConsumption", "MemoryInfo")
    nvml = RealNvml(FakeLibrary(**{f"nvmlDeviceGet{q}": refused for q in questions}))
    (gpu,) = nvml.gpus()
    assert (gpu.power_limit_w, gpu.utilization, gpu.memory_bytes, gpu.sliced) == (None, None, None, False)
    assert nvml.energy_j(gpu.uuid) is None


@pytest.mark.parametrize("code", ["GPU_IS_LOST", "RESET_REQUIRED", "UNKNOWN"])
def test_a_lost_gpu_is_our_error(code):
    lost = pynvml.NVMLError(getattr(pynvml, f"NVML_ERROR_{code}"))
    nvml = RealNvml(FakeLibrary(nvmlDeviceGetPowerUsage=lost))
    with pytest.raises(ExecutionError, match="GPU-5f"):
        nvml.power_w("GPU-5f")


def test_the_table_holds_the_vendor_codes():
    names = ["INVALID_ARGUMENT", "NOT_SUPPORTED", "NO_PERMISSION", "NOT_FOUND", "TIMEOUT", "FUNCTION_NOT_FOUND"]
    names += ["GPU_IS_LOST", "RESET_REQUIRED", "NO_DATA", "DEPRECATED", "NOT_READY"]
    assert set(_MEANING) == {getattr(pynvml, f"NVML_ERROR_{name}") for name in names}


def test_without_driver_or_library_there_are_no_gpus(monkeypatch):
    def fail():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert isinstance(open_nvml(), NullNvml)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    null = open_nvml()
    assert null.gpus() == ()
    assert null.power_w("GPU-5f") is None and null.energy_j("GPU-5f") is None


def test_a_replay_gives_its_readings_in_order(tmp_path):
    gpu = {"uuid": "GPU-a", "name": "Recorded", "power_w": [40, 80], "energy_j": []}
    path = tmp_path / "recording.json"
    path.write_text(json.dumps({"format": "autoplace.nvml-replay/1", "gpus": [gpu]}))
    nvml = ReplayNvml(path)
    assert nvml.gpus()[0].name == "Recorded"
    assert [nvml.power_w("GPU-a") for _ in range(3)] == [40, 80, 80]
    assert nvml.energy_j("GPU-a") is None
    assert nvml.power_w("GPU-b") is None


def test_a_replay_of_another_format_is_refused():
    with pytest.raises(InputError, match="nvml-replay/1"):
        ReplayNvml({"format": "something else", "gpus": []})


def test_one_file_alone_imports_the_library_and_only_inside_functions():
    root = Path(nvml_module.__file__).parents[1]
    for path in root.rglob("*.py"):
        parsed = ast.parse(path.read_text())
        for part in parsed.body if path.name == "nvml.py" else [parsed]:
            if isinstance(part, ast.FunctionDef):
                continue
            imported = [n for n in ast.walk(part) if isinstance(n, ast.Import | ast.ImportFrom)]
            names = {alias.name for n in imported for alias in n.names} | {getattr(n, "module", "") for n in imported}
            assert "pynvml" not in names, f"{path} imports pynvml"
