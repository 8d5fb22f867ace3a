"""Synthetic clusters of real device types: published peak figures, and the roofline latencies that follow from them.

    latency = max(flops / (peak * efficiency of the op's kind), bytes / (bandwidth * 0.8)) + launch   → `roofline`

Peaks are the vendors' for dense work. Efficiencies, launch times and idle watts are assumptions, drawn in ranges that
profilers usually show. Which cluster has which devices and links is drawn, → `draw_hardware`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Cluster, Device, Link

__all__ = ["PROFILES", "DeviceProfile", "draw_hardware", "roofline"]


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """Published figures of a device type."""

    name: str
    kind: str
    tflops: float
    """Float32 operations outside matrix units, 10^12 a second."""
    half_tflops: float
    """Matrix products in half precision with float32 sums, dense, 10^12 a second."""
    gbytes: float
    """Memory bandwidth, 10^9 bytes a second."""
    memory_gib: float
    watts: float
    """Design power, W."""
    nvlink_gbytes: float = 0.0
    """One direction between two of them, 10^9 bytes a second; 0 = PCIe alone."""


def _gpu(
    name: str, tflops: float, half: float, gbytes: float, memory: float, watts: float, link: float = 0.0
) -> DeviceProfile:
    return DeviceProfile(
        name=name, kind="cuda", tflops=tflops, half_tflops=half, gbytes=gbytes, memory_gib=memory, watts=watts,
        nvlink_gbytes=link,
    )  # fmt: skip


PROFILES: dict[str, DeviceProfile] = {
    p.name: p
    for p in (
        # NVIDIA data sheets: "H100 Tensor Core GPU", "A100 Tensor Core GPU", "Tesla V100", "Tesla P100", "T4 Tensor
        # Core GPU", "L4 Tensor Core GPU", "A10 Tensor Core GPU"; RTX 3090: "Ampere GA102 GPU architecture" whitepaper.
        _gpu("H100-SXM", 67.0, 989.0, 3350.0, 80.0, 700.0, 450.0),
        _gpu("A100-SXM", 19.5, 312.0, 1555.0, 40.0, 400.0, 300.0),
        _gpu("V100-SXM2", 15.7, 125.0, 900.0, 16.0, 300.0, 150.0),
        _gpu("P100-PCIe", 9.3, 18.7, 732.0, 16.0, 250.0),
        _gpu("T4", 8.1, 65.0, 320.0, 16.0, 70.0),
        _gpu("L4", 30.3, 121.0, 300.0, 24.0, 72.0),
        _gpu("A10", 31.2, 125.0, 600.0, 24.0, 150.0),
        _gpu("RTX-3090", 35.6, 71.0, 936.0, 24.0, 350.0),
        # 16 cores x clock x float32 operations a cycle; bandwidth of all memory channels; Intel ARK, AMD product pages:
        # Xeon Gold 6226R 2.9 GHz x 64 (AVX-512), 6 x DDR4-2933; EPYC 7302 3.0 GHz x 32 (AVX2), 8 x DDR4-3200.
        DeviceProfile(name="Xeon-6226R", kind="cpu", tflops=2.97, half_tflops=2.97, gbytes=140.8, memory_gib=192.0,
                      watts=150.0),
        DeviceProfile(name="EPYC-7302", kind="cpu", tflops=1.54, half_tflops=1.54, gbytes=204.8, memory_gib=256.0,
                      watts=155.0),
    )
}  # fmt: skip
"""Name to published figures."""

_GPUS = tuple(name for name, p in PROFILES.items() if p.kind == "cuda")
_CPUS = tuple(name for name, p in PROFILES.items() if p.kind == "cpu")
_MATRIX_KINDS = frozenset({"linear", "matmul", "conv", "mm", "bmm", "addmm", "baddbmm", "grouped_mm",
                           "grouped_mm_fallback", "scaled_dot_product_attention"})  # fmt: skip

_PCIE = (Link(latency_ms=0.015, bytes_per_ms=12e6), Link(latency_ms=0.012, bytes_per_ms=25e6))
"""PCIe 3 and 4 x16: 15.75 and 31.5 GB/s by specification, about four fifths of it in copies."""
_ETHERNET = (Link(latency_ms=0.06, bytes_per_ms=1.1e6), Link(latency_ms=0.02, bytes_per_ms=11e6))
"""10 and 100 Gbit/s."""


def draw_hardware(random: Generator, family: str, count: int) -> tuple[Cluster, list[DeviceProfile]]:
    """Draw devices and links; memory is not limited.

    Args:
        random: Source of what is drawn.
        family: `equal` (one GPU type), `unequal` (two or three), `accelerated` (a CPU and GPUs of one type) or `hosts`
            (two to four hosts on Ethernet).
        count: Number of devices, 2 or more.

    Returns:
        The cluster, and the type of every device.
    """
    types = [PROFILES[str(name)] for name in _types(random, family, count)]
    hosts = min(count, int(random.integers(2, 5))) if family == "hosts" else 1
    devices = tuple(
        Device(
            name=f"host{i * hosts // count}/{p.kind}:{i}",
            kind=p.kind,
            idle_watts=round(p.watts * 0.15, 1),
            busy_watts=p.watts,
            watts_source="design power; idle assumed 15% of it",
            model=p.name,
        )
        for i, p in enumerate(types)
    )
    pcie, ethernet = (_either(random, pair) for pair in (_PCIE, _ETHERNET))
    nvlink = random.random() < 0.7
    links = {}
    for one, a in zip(devices, types, strict=True):
        for other, b in zip(devices, types, strict=True):
            if one is other or one.host != other.host:
                continue
            speed = min(a.nvlink_gbytes, b.nvlink_gbytes)
            fast = Link(latency_ms=0.006, bytes_per_ms=speed * 0.8e6)
            links[one.name, other.name] = fast if nvlink and speed > 0.0 else pcie
    return Cluster(devices=devices, links=links, default_link=ethernet), types


def _types(random: Generator, family: str, count: int) -> list[str]:
    gpu = str(random.choice(_GPUS))
    if family == "equal":
        return [gpu] * count
    if family == "accelerated":
        return [str(random.choice(_CPUS)), *[gpu] * (count - 1)]
    kinds = random.choice(_GPUS, size=int(random.integers(2, 4)), replace=False).tolist()
    if family == "hosts" and random.random() < 0.4:
        kinds = [gpu]
    return sorted([*kinds, *random.choice(kinds, size=count).tolist()][:count], key=_GPUS.index)


def _either(random: Generator, pair: tuple[Link, Link]) -> Link:
    return pair[int(random.integers(2))]


def roofline(
    random: Generator, graph: OpGraph, types: list[DeviceProfile], *, half: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return every op's latency on every device and the part of it that is launch overhead, float64[N, D] ms each.

    Devices of one type are equal. Ops of kind `barrier` take no time.

    Args:
        random: Source of the efficiencies, one per kind and device type, and of a launch time per device type.
        graph: The ops, in bytes of the precision asked for.
        types: Type of every device.
        half: Whether matrix products run in half precision.
    """
    kinds, index = np.unique(graph.kinds, return_inverse=True)
    matrix = np.asarray([kind in _MATRIX_KINDS for kind in kinds])
    columns: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
    for profile in types:
        if profile.name in columns:
            continue
        base = random.uniform(0.35, 0.75)
        efficiency = np.clip(base * np.exp(random.normal(0.0, 0.2, len(kinds))), 0.05, 0.95)
        peak = np.where(matrix, profile.half_tflops if half else profile.tflops, profile.tflops) * 1e9
        launch = random.uniform(0.003, 0.010) if profile.kind == "cuda" else random.uniform(0.001, 0.003)
        work = np.maximum(graph.flops / (peak * efficiency)[index], graph.bytes_moved / (profile.gbytes * 0.8e6))
        real = np.asarray([kind != "barrier" for kind in graph.kinds])
        columns[profile.name] = np.where(real, work + launch, 0.0), np.where(real, launch, 0.0)
    latency, overhead = (np.stack([columns[p.name][part] for p in types], axis=1) for part in (0, 1))
    return latency, overhead
