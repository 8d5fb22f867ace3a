"""What the evaluator puts into Outcomes besides times: reasons, busy time of the plain plan, memory needed and used."""

from __future__ import annotations

import torch

from autoplace.errors import AutoplaceError
from autoplace.hardware.cluster import Cluster, Device
from autoplace.plan import Plan
from autoplace.workload import Workload

from .memory import PeakMemory, host_free_bytes

__all__ = ["memory_reason", "peak_bytes", "plain_busy_ms", "sentence"]


def sentence(error: Exception) -> str:
    """Return an exception as one sentence: our own as it stands, others with their type."""
    if isinstance(error, AutoplaceError):
        return str(error)
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else "no message"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in text:
        return f"it ran out of memory: {text}"
    return f"it raised {type(error).__name__}: {text}"


def plain_busy_ms(model: torch.nn.Module, cluster: Cluster, elapsed_ms: float) -> dict[str, float]:
    """Return the busy time of the devices that plain PyTorch uses: those of the kind where the parameters live.

    CPU core groups count by the part of all cores that the process's intra-op threads can fill.
    """
    first = next(model.parameters(), None)
    home = torch.device("cpu") if first is None else first.device
    cores = sum(len(d.cores) for d in cluster.devices if d.kind == "cpu")
    filled = min(1.0, torch.get_num_threads() / cores) if cores else 1.0
    if home.type == "cpu":
        return {d.name: elapsed_ms * filled for d in cluster.devices if d.kind == "cpu"}
    return {d.name: elapsed_ms for d in cluster.devices if d.kind == "cuda" and _gpu_index(d) == (home.index or 0)}


def _gpu_index(device: Device) -> int:
    tail = device.name.rsplit(":", 1)[-1]
    return int(tail) if tail.isdigit() else 0


def _bytes_of(tensors: list[torch.Tensor], kind: str | None = None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if kind is None or t.device.type == kind)


def memory_reason(workload: Workload, cluster: Cluster, plan: Plan, activation_bytes: int) -> str:
    """Return why a plan cannot fit in memory, in one sentence, or nothing.

    On the host: what the whole batch keeps for the backward, and one set of gradients per part and their sum. On a GPU:
    at least the weights of a replica that lies wholly there. Weights on the host are there already, and all its core
    groups share them.

    Args:
        workload: Model and inputs.
        cluster: The devices.
        plan: The plan to be tried.
        activation_bytes: What one plain pass keeps for the backward; 0 in inference.
    """
    parameters: list[torch.Tensor] = list(workload.model.parameters())
    weights = _bytes_of([*parameters, *workload.model.buffers()])
    for replica in plan.replicas:
        for device in cluster.devices:
            if device.kind == "cuda" and replica.devices == (device.name,) and weights > device.memory_bytes:
                return f"the weights need {_gib(weights)} and {device.name!r} has {_gib(device.memory_bytes)}"
    needed = float(activation_bytes)
    if workload.training:
        parts = len(plan.replicas) * plan.microbatches
        needed += _bytes_of([p for p in parameters if p.requires_grad]) * (parts + 1 if parts > 1 else 1)
    free = host_free_bytes()
    if needed <= free or all(d.kind == "cuda" for d in cluster.devices if d.name in plan.devices):
        return ""
    return f"it needs {_gib(needed)} besides the weights and the host has {_gib(free)} free"


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def peak_bytes(model: torch.nn.Module, cluster: Cluster, plan: Plan, memory: PeakMemory) -> dict[str, float]:
    """Return device name to peak bytes: a GPU's own count; of the host its weights and the growth above them.

    The host's figure stands under the first CPU device that the plan uses; the plain plan uses all devices.
    """
    used = plan.devices or tuple(d.name for d in cluster.devices)
    weights = _bytes_of([*model.parameters(), *model.buffers()], "cpu")
    devices = [d for d in cluster.devices if d.name in used]
    peaks = {d.name: memory.cuda_bytes.get(_gpu_index(d), 0.0) for d in devices if d.kind == "cuda"}
    for device in [d for d in devices if d.kind == "cpu"][:1]:
        peaks[device.name] = weights + memory.host_bytes
    return peaks
