"""Estimated latencies where a group cannot be run: a roofline with peaks that were measured, or are assumed.

    latency = max(flops / flops_per_ms, bytes_moved / bytes_per_ms) + launch_ms        → `roofline_ms`

Reference: Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance model". Where the groups
were measured on another device, its measurements are carried over by the ratio of both rooflines → `scaled_ms`.
It knows nothing of caches, of tensor cores, or of how well a kernel uses the peak.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Device
from autoplace.runtime.worker import DeviceWorker, torch_device

__all__ = ["Peaks", "assumed_peaks", "measure_peaks", "roofline_ms", "scaled_ms"]


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """What a device can do at best."""

    flops_per_ms: float
    """float32 operations per ms in a matrix product."""
    bytes_per_ms: float
    """Bytes read and written per ms in a copy."""
    launch_ms: float
    """Time of the smallest op, ms."""


def measure_peaks(device: Device, worker: DeviceWorker) -> Peaks:
    """Measure a device's peaks with a small matrix product, a copy and a tiny op (under a second on a CPU core).

    Args:
        device: The device; its kind decides the sizes.
        worker: The device's worker.
    """
    side, count = (4096, 1 << 26) if device.kind == "cuda" else (512, 1 << 22)

    def run() -> Peaks:
        with torch.no_grad():
            where = torch_device(device)
            a, b, c = (torch.ones(side, side, device=where) for _ in range(3))
            source, target = torch.ones(count, device=where), torch.empty(count, device=where)
            tiny = torch.ones(1, device=where)
            product = _best_ms(lambda: torch.mm(a, b, out=c), where, 5)
            copied = _best_ms(lambda: target.copy_(source), where, 5)
            launch = _best_ms(lambda: [tiny.add_(1.0) for _ in range(100)], where, 5) / 100
        return Peaks(flops_per_ms=2.0 * side**3 / product, bytes_per_ms=8.0 * count / copied, launch_ms=launch)

    return worker.run(run)


def _best_ms(work: object, device: torch.device, repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()  # type: ignore[operator]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, (time.perf_counter() - start) * 1e3)
    return max(best, 1e-6)


def assumed_peaks(device: Device) -> Peaks:
    """Return round figures for a device that is not here: assumptions, to be labelled as such, never measurements."""
    if device.kind == "cuda":
        return Peaks(flops_per_ms=1e10, bytes_per_ms=5e8, launch_ms=0.005)
    cores = max(1, len(device.cores))
    return Peaks(flops_per_ms=3e7 * cores, bytes_per_ms=1e7, launch_ms=0.002)


def roofline_ms(graph: OpGraph, peaks: Peaks) -> NDArray[np.float64]:
    """Return the roofline's latency of every op, ms, float64[N]."""
    compute, memory = graph.flops / peaks.flops_per_ms, graph.bytes_moved / peaks.bytes_per_ms
    return np.maximum(compute, memory) + peaks.launch_ms


def scaled_ms(measured_ms: NDArray[np.float64], graph: OpGraph, reference: Peaks, target: Peaks) -> NDArray[np.float64]:
    """Carry latencies measured on one device over to another, ms, float64[N].

    Args:
        measured_ms: float64[N] on the reference device.
        graph: The ops.
        reference: Peaks of the device that was measured.
        target: Peaks of the other device.
    """
    return measured_ms * roofline_ms(graph, target) / roofline_ms(graph, reference)
