"""Which modules a device runs, in few words: the largest modules that lie wholly on it, and ranges of their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from autoplace.graph.coarsen import group_modules

__all__ = ["module_ranges", "paths_on"]


def paths_on(device: str, assignment: Mapping[str, str]) -> list[str]:
    """Return the largest modules whose op groups are all on one device; a module split by call keeps its `#k`."""
    groups = {name: place for name, place in assignment.items() if "~" not in name}
    places: dict[str, set[str]] = {}
    for name, place in groups.items():
        for path in group_modules(name):
            parts = path.split(".") if path else []
            for depth in range(len(parts) + 1):
                places.setdefault(".".join(parts[:depth]), set()).add(place)
    found: dict[str, None] = {}
    for name, place in groups.items():
        if place != device:
            continue
        for path in group_modules(name):
            parts = path.split(".") if path else []
            above = [".".join(parts[:depth]) for depth in range(len(parts) + 1)]
            whole = next((p for p in above if len(places[p]) == 1), None)
            found[whole if whole is not None else name] = None
    return list(found)


def module_ranges(paths: Sequence[str]) -> list[str]:
    """Collapse paths that differ in one number into ranges.

    >>> module_ranges(["embed", "layer.0", "layer.1", "layer.2", "layer.5", "head"])
    ['embed', 'layer.0-2,5', 'head']
    """
    items = [tuple(path.split(".")) for path in paths]
    for position in reversed(range(max(map(len, items), default=0))):
        merged: dict[tuple[Any, ...], list[int]] = {}
        for item in items:
            number = item[position] if position < len(item) else ""
            if number.isdigit():
                merged.setdefault((item[:position], item[position + 1 :]), []).append(int(number))
            else:
                merged.setdefault((item,), [])
        items = [(*key[0], _runs(numbers), *key[1]) if len(key) == 2 else key[0] for key, numbers in merged.items()]
    return [".".join(item) for item in items]


def _runs(numbers: Sequence[int]) -> str:
    """Write numbers as ranges: 0-3,7."""
    runs = []
    for _, run in groupby(enumerate(sorted(set(numbers))), key=lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        runs.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return ",".join(runs)
