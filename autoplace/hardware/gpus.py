"""CUDA devices as torch counts them (so `CUDA_VISIBLE_DEVICES` holds), with what the driver knows of each.

torch decides which GPUs there are and in which order; `hardware.nvml` adds power. The two count differently, so they
are matched by UUID, else by PCI bus id, never by index.

The memory of a GPU is what this process may take of it: `torch.cuda.set_per_process_memory_fraction` counts, and a part
is left for what no plan accounts for → `usable_bytes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from autoplace.hardware.cluster import Device
from autoplace.hardware.nvml import GpuInfo, Nvml
from autoplace.hardware.power import gpu_watts

__all__ = ["TorchGpu", "cuda_devices", "match_gpu", "torch_gpus", "usable_bytes"]

_RESERVED_SHARE, _RESERVED_BYTES = 0.05, 128 << 20
"""Left free on a GPU: fragments of the caching allocator, and the workspaces of cuBLAS (32 MiB a stream on Hopper, by
NVIDIA's documentation of `CUBLAS_WORKSPACE_CONFIG`)."""


@dataclass(frozen=True, kw_only=True)
class TorchGpu:
    """One CUDA device as torch sees it."""

    index: int
    """The number in `cuda:0`."""
    name: str
    memory_bytes: int
    """What plans may use of it."""
    uuid: str = ""
    """Without the driver's `GPU-` in front; empty when torch does not tell."""
    pci_bus_id: str = ""
    """As in `GpuInfo`; empty when torch does not tell."""


def torch_gpus() -> tuple[TorchGpu, ...]:
    """Return the CUDA devices that torch can use, in torch's order."""
    if not torch.cuda.is_available():
        return ()
    gpus = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        parts = [getattr(facts, key, None) for key in ("pci_domain_id", "pci_bus_id", "pci_device_id")]
        domain, bus, slot = parts
        pci = "" if domain is None or bus is None or slot is None else f"{domain:08x}:{bus:02x}:{slot:02x}.0"
        uuid = str(getattr(facts, "uuid", ""))
        gpus.append(
            TorchGpu(
                index=index,
                name=facts.name,
                memory_bytes=usable_bytes(int(facts.total_memory), _fraction(index)),
                uuid=uuid,
                pci_bus_id=pci,
            )
        )
    return tuple(gpus)


def usable_bytes(total_bytes: int, fraction: float = 1.0) -> int:
    """Return the bytes of a GPU that plans may use.

    Args:
        total_bytes: Its memory.
        fraction: The part of it that the process may take.
    """
    return max(0, int(total_bytes * min(1.0, fraction) * (1.0 - _RESERVED_SHARE)) - _RESERVED_BYTES)


def _fraction(index: int) -> float:
    """Return the part of a GPU that the process has allowed itself; 1 where an older torch cannot tell."""
    ask = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    return 1.0 if ask is None else float(ask(index))


def match_gpu(gpu: TorchGpu, infos: Sequence[GpuInfo]) -> GpuInfo | None:
    """Return what the driver says of torch's GPU; None when it shows no such GPU."""
    for info in infos:
        if gpu.uuid and info.uuid.lower().removeprefix("gpu-") == gpu.uuid.lower().removeprefix("gpu-"):
            return info
    for info in infos:
        if gpu.pci_bus_id and info.pci_bus_id.lower() == gpu.pci_bus_id.lower():
            return info
    return None


def cuda_devices(host: str, nvml: Nvml, gpus: Sequence[TorchGpu] | None = None) -> list[Device]:
    """Return torch's GPUs as devices `host/cuda:index`, with the driver's watts where it knows them.

    Args:
        host: Name of the host.
        nvml: The driver, or what stands in for it.
        gpus: torch's GPUs; None = ask torch.
    """
    infos = nvml.gpus()
    devices = []
    for gpu in torch_gpus() if gpus is None else gpus:
        info = match_gpu(gpu, infos)
        watts = gpu_watts(info, nvml)
        devices.append(
            Device(
                name=f"{host}/cuda:{gpu.index}",
                kind="cuda",
                memory_bytes=float(gpu.memory_bytes),
                idle_watts=watts.idle_w,
                busy_watts=watts.busy_w,
                watts_source=watts.source,
                model=gpu.name,
            )
        )
    return devices
