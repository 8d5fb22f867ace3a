"""`ModuleTree`: the modules of a graph with their costs, and where to cut it. Knows only what `OpGraph.modules` says.

Only modules that are called can be dispatched. A container (`ModuleList`, `ModuleDict`) is not, no hook ever sees it;
it is transparent: its children stand in for it. Capture knows which modules were called; where nobody says, a module
without operations of its own whose children are numbered is taken for a container.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from autoplace.graph.opgraph import OpGraph

__all__ = ["ModuleTree", "op_cost"]

_FLOPS_PER_BYTE = 8.0
"""Weighs bytes against FLOPs in a cost without a device; the balance of a CPU core or a GPU is of this order."""

_DOMINANT = 0.9
"""A module is not divided when a leaf child would keep more than this share of it."""


def op_cost(graph: OpGraph) -> NDArray[np.float64]:
    """Return a device-free cost of every op, float64[N]: FLOPs plus 8 for each byte moved."""
    return graph.flops + _FLOPS_PER_BYTE * graph.bytes_moved


class ModuleTree:
    """Costs and weights of all modules that own or contain ops, by path; "" is the root.

    Args:
        graph: Ops with their modules.
        called: Paths of the modules that are called; None = guess.
    """

    def __init__(self, graph: OpGraph, called: Collection[str] | None = None) -> None:
        self.cost: dict[str, float] = {"": 0.0}
        self.weight_bytes: dict[str, int] = {"": 0}
        self.runs: dict[str, int] = {"": 1}
        """How many stretches of execution a module has; consecutive calls are one."""
        self._own, self._called = set(graph.modules), called
        self.children: dict[str, list[str]] = {"": []}
        for path, cost, weight in zip(graph.modules, op_cost(graph), graph.weight_bytes, strict=True):
            for prefix in prefixes(path):
                if prefix not in self.cost:
                    self.cost[prefix], self.weight_bytes[prefix], self.children[prefix] = 0.0, 0, []
                    self.children[parent(prefix)].append(prefix)
                self.cost[prefix] += float(cost)
                self.weight_bytes[prefix] += int(weight)

        self._count_runs([graph.modules[op] for op in graph.topological_order])

    def _count_runs(self, modules: Sequence[str]) -> None:
        latest: dict[str, str] = {}
        for module in modules:
            fresh = False
            for path in prefixes(module)[1:]:
                above = parent(path)
                fresh = fresh or latest.get(above) != path
                latest[above] = path
                self.runs[path] = self.runs.get(path, 0) + int(fresh)

    def is_called(self, path: str) -> bool:
        """Whether a module is called, as far as is known."""
        if path in self._own or path == "":
            return True
        if self._called is not None:
            return path in self._called
        return not all(child.rpartition(".")[2].isdigit() for child in self.children[path])

    def parts(self, path: str, least_cost: float) -> list[str]:
        """Return the modules that a divided module falls into; cheap ones without weights are left to the glue."""
        found: list[str] = []
        for child in self.children[path]:
            if self.is_called(child):
                if self.weight_bytes[child] or self.cost[child] >= least_cost:
                    found.append(child)
            else:
                found += self.parts(child, least_cost)
        return found

    def cut(self, max_groups: int, min_cost_fraction: float) -> set[str]:
        """Return an antichain of called modules, dividing the costliest module first.

        Args:
            max_groups: More runs than this are made only by dividing a list of modules that run once each, when there
                are half as many or fewer; `coarsen` then merges neighbours.
            min_cost_fraction: Modules cheaper than this part of the model are not divided.
        """
        least = min_cost_fraction * self.cost[""]
        chosen, count = {""}, 1
        heap: list[tuple[float, str]] = [(-self.cost[""], "")]
        while heap and max_groups > 1:
            _, path = heapq.heappop(heap)
            parts = self.parts(path, least / 8)
            more = sum(self.runs[part] for part in parts) - self.runs[path]
            once = all(self.runs[part] == 1 for part in parts)
            fits = count + more <= max_groups or (once and 2 * count <= max_groups)
            if self.cost[path] < least or not fits or not self._worthwhile(path, parts):
                continue
            count += more
            chosen.remove(path)
            chosen.update(parts)
            for part in parts:
                heapq.heappush(heap, (-self.cost[part], part))
        return chosen

    def _worthwhile(self, path: str, parts: list[str]) -> bool:
        if not parts:
            return False
        largest = max(parts, key=lambda part: self.cost[part])
        return bool(self.children[largest]) or self.cost[largest] <= _DOMINANT * self.cost[path]


def parent(path: str) -> str:
    """Return the path of the enclosing module."""
    return path.rpartition(".")[0]


def prefixes(path: str) -> list[str]:
    """Return a module path's ancestors and itself, the root first."""
    parts = path.split(".") if path else []
    return ["", *(".".join(parts[: i + 1]) for i in range(len(parts)))]
