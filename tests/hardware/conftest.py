"""Recorded trees of /sys and /proc, a recorded GPU, and small clusters."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from autoplace.hardware.cluster import Cluster, Device
from autoplace.hardware.nvml import ReplayNvml

Tree = Callable[[Mapping[str, object]], Path]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Write files, path to content, under one root; return the root."""

    def write(files: Mapping[str, object]) -> Path:
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")
        return tmp_path

    return write


@pytest.fixture
def replay() -> Callable[..., ReplayNvml]:
    """Make a recording of one GPU, `GPU-a`, with some facts and readings changed."""

    def make(**facts: Any) -> ReplayNvml:
        gpu = {"uuid": "GPU-a", "name": "Recorded", "power_limit_w": 300.0, "utilization": 0.0, "power_w": [40.0]}
        return ReplayNvml({"format": "autoplace.nvml-replay/1", "gpus": [{**gpu, **facts}]})

    return make


@pytest.fixture
def cpu_cluster() -> Cluster:
    """Two core groups of two cores each: 2 W idle and 10 W busy apiece."""
    return Cluster(
        devices=tuple(
            Device(name=f"host0/cpu:{i}", kind="cpu", idle_watts=2.0, busy_watts=10.0, cores=(2 * i, 2 * i + 1))
            for i in range(2)
        )
    )


@pytest.fixture
def mixed_cluster(cpu_cluster: Cluster) -> Cluster:
    """One GPU (40 W idle, 300 W busy) and the two core groups."""
    gpu = Device(name="host0/cuda:0", kind="cuda", idle_watts=40.0, busy_watts=300.0)
    return Cluster(devices=(gpu, *cpu_cluster.devices))


@pytest.fixture
def powercap(tree: Tree) -> Callable[..., Path]:
    """Write a powercap tree of two packages with the given counters, µJ; return the root of sysfs."""

    def write(*counters_uj: int, **more: object) -> Path:
        files: dict[str, object] = {}
        for i, counter in enumerate(counters_uj):
            zone = f"class/powercap/intel-rapl:{i}"
            files |= {f"{zone}/name": f"package-{i}", f"{zone}/energy_uj": counter}
            files |= {f"{zone}/max_energy_range_uj": 1_000_000_000}
        return tree({**files, **more})

    return write
