"""CPU core groups of this host, the devices of kind `cpu`: NUMA nodes, else shared L3 caches, else halves.

Knows nothing of memory, watts or links. Every reader takes the roots of `/sys` and `/proc`, so that tests read recorded
trees. Where a cgroup grants fewer cores' worth of time than there are cores, only that many cores are grouped: more
threads than that would only be throttled.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

from autoplace.hardware._sysfs import read_words

__all__ = ["available_cores", "core_groups", "cpu_model", "parse_cpu_list"]


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """Return the CPU ids of a kernel list such as `0-3,8`, ascending; empty when the text is no such list."""
    cores: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            continue
        cores.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(cores))


def available_cores(*, quota_cores: float = math.inf) -> tuple[int, ...]:
    """Return the CPU ids that this process may run on, at most `quota_cores` (rounded up) of them, ascending."""
    cores = sorted(os.sched_getaffinity(os.getpid()))
    return tuple(cores if math.isinf(quota_cores) else cores[: max(1, math.ceil(quota_cores))])


def core_groups(available: Sequence[int], *, sys_root: str | Path = "/sys") -> list[tuple[int, ...]]:
    """Return the available cores in groups: by NUMA node, else by shared L3 cache, else in two halves.

    A rule that gives a single group is passed over for the next one, so that there are two devices to place on. Halves
    keep the hyperthreads of a core together where there are two cores or more.

    Args:
        available: CPU ids that may be used.
        sys_root: Where sysfs is.

    Returns:
        Disjoint groups that together hold every available core, each ascending, ordered by first core. One group when
        there is one core.
    """
    wanted = set(available)
    root = Path(sys_root) / "devices" / "system"
    for candidates in (_numa_nodes(root), _shared_l3(root, wanted)):
        groups = _within(candidates, wanted)
        if len(groups) > 1:
            return groups
    return _halves(root, wanted)


def cpu_model(*, proc_root: str | Path = "/proc") -> str:
    """Return what the CPU calls itself, or the architecture where the kernel gives no name."""
    text = read_words(Path(proc_root) / "cpuinfo")
    for key in ("model name", "Model", "Hardware"):
        for line in text.splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key and value.strip():
                return value.strip()
    return platform.machine()


def _numa_nodes(root: Path) -> list[tuple[int, ...]]:
    return [parse_cpu_list(read_words(path)) for path in sorted((root / "node").glob("node[0-9]*/cpulist"))]


def _shared_l3(root: Path, wanted: Iterable[int]) -> list[tuple[int, ...]]:
    groups = set()
    for core in wanted:
        for cache in (root / "cpu" / f"cpu{core}" / "cache").glob("index[0-9]*"):
            if read_words(cache / "level") == "3":
                groups.add(parse_cpu_list(read_words(cache / "shared_cpu_list")))
    return list(groups)


def _within(candidates: Iterable[tuple[int, ...]], wanted: set[int]) -> list[tuple[int, ...]]:
    """Return the candidates cut down to wanted cores; nothing when they overlap or leave a wanted core out."""
    cut = [tuple(sorted(wanted & set(group))) for group in candidates]
    groups = sorted(group for group in cut if group)
    return groups if sorted(core for group in groups for core in group) == sorted(wanted) else []


def _halves(root: Path, wanted: set[int]) -> list[tuple[int, ...]]:
    siblings: dict[tuple[int, ...], list[int]] = {}
    for core in sorted(wanted):
        key = parse_cpu_list(read_words(root / "cpu" / f"cpu{core}" / "topology" / "thread_siblings_list")) or (core,)
        siblings.setdefault(key, []).append(core)
    units = list(siblings.values()) if len(siblings) > 1 else [[core] for core in sorted(wanted)]
    middle = (len(units) + 1) // 2
    halves = [tuple(sorted(core for unit in part for core in unit)) for part in (units[:middle], units[middle:])]
    return sorted(half for half in halves if half)
