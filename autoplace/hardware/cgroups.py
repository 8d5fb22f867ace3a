"""What this process may use of its host: memory and CPU time, as cgroups (v1, v2, hybrid) and the kernel say.

Knows nothing of devices. Every reader takes the roots of `/sys` and `/proc`, so that tests read recorded trees.
Limits bind at every level, so a group's own file and those of all its parents are read and the least one counts. Inside
a container without a cgroup namespace the path in `/proc/self/cgroup` is the host's while the mount shows the
container's own files at its root; walking up to the root covers that too.
Source: https://docs.kernel.org/admin-guide/cgroup-v2.html and https://docs.kernel.org/admin-guide/cgroup-v1/memory.html.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from autoplace.hardware._sysfs import read_words

__all__ = ["cpu_quota_cores", "memory_held_bytes", "memory_limit_bytes"]


def memory_limit_bytes(*, sys_root: str | Path = "/sys", proc_root: str | Path = "/proc") -> float:
    """Return the most bytes that this process may hold: the least of the host's memory and the cgroups' limits.

    This is a limit, not what is free now, so that it is the same on every call.

    Returns:
        Bytes; infinite when neither the host nor a cgroup tells.
    """
    limits = [_mem_total_bytes(Path(proc_root))]
    for directory in _group_directories(Path(sys_root), Path(proc_root), ("memory",)):
        for name in ("memory.max", "memory.limit_in_bytes"):
            value = read_words(directory / name)
            if value.isdigit():
                limits.append(float(value))
    return min(limits)


def memory_held_bytes(*, sys_root: str | Path = "/sys", proc_root: str | Path = "/proc") -> float:
    """Return what the group with the least limit holds, all its processes together, less what the kernel can take back.

    That is the files that it has read; those which are mapped, as libraries are, count as such.

    Returns:
        Bytes; 0 where no group's limit is less than the host's memory.
    """
    least, held = _mem_total_bytes(Path(proc_root)), 0.0
    for directory in _group_directories(Path(sys_root), Path(proc_root), ("memory",)):
        for limit, usage, prefix in (
            ("memory.max", "memory.current", ""),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ):
            value, used = read_words(directory / limit), read_words(directory / usage)
            if value.isdigit() and used.isdigit() and float(value) < least:
                words = read_words(directory / "memory.stat").split()
                facts = dict(zip(words[::2], words[1::2], strict=False))
                files = sum(int(facts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
                least, held = float(value), float(max(0, int(used) - files))
    return held


def cpu_quota_cores(*, sys_root: str | Path = "/sys", proc_root: str | Path = "/proc") -> float:
    """Return how many cores' worth of CPU time the cgroups grant; infinite when there is no quota."""
    quotas = [math.inf]
    for directory in _group_directories(Path(sys_root), Path(proc_root), ("cpu", "cpu,cpuacct")):
        quota, _, period = read_words(directory / "cpu.max").partition(" ")
        if not quota:
            quota, period = read_words(directory / "cpu.cfs_quota_us"), read_words(directory / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period) > 0 and int(quota) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas)


def _group_directories(sys_root: Path, proc_root: Path, controllers: tuple[str, ...]) -> Iterator[Path]:
    """Yield the directories of this process's groups and of all their parents, for v2 and for v1 `controllers`."""
    base = sys_root / "fs" / "cgroup"
    for line in read_words(proc_root / "self" / "cgroup").splitlines():
        parts = line.split(":", 2)
        if len(parts) < 3:
            continue
        names, path = parts[1], parts[2]
        if not names:
            mounts = [base, base / "unified"]
        elif set(names.split(",")) & set(controllers):
            mounts = [base / name for name in dict.fromkeys((*controllers, names))]
        else:
            continue
        for mount in mounts:
            group = Path(path.strip("/"))
            for level in (group, *group.parents):
                yield mount / level


def _mem_total_bytes(proc_root: Path) -> float:
    for line in read_words(proc_root / "meminfo").splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "MemTotal:" and words[1].isdigit():
            return float(words[1]) * 1024
    return math.inf
