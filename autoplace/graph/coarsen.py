"""`coarsen`: from ops to groups along module boundaries, so that executors can dispatch whole modules.

1. Cut the module tree: an antichain of called modules, → `ModuleTree.cut`.
2. Runs: consecutive ops (in execution order) of one cut module form a group. Ops that belong to no cut module (glue)
   join the run before them. Groups are intervals of a topological order, hence their graph has no cycle.
3. If there are too many runs, neighbours are merged, those under the deepest common parent first, → `_merge`.

Names: a group is named by its cut module's path, "." for the root; the k-th further run of one module gets "#k"; a
group of several modules joins their paths with "+". → `group_modules` reads a name back. Runs of one module, and groups
whose ops read one parameter, share a co-location id.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoplace.errors import InputError
from autoplace.graph.module_tree import ModuleTree, op_cost, prefixes
from autoplace.graph.opgraph import OpGraph

__all__ = ["DEFAULT_MIN_COST_FRACTION", "Grouping", "coarsen", "group_modules"]

DEFAULT_MIN_COST_FRACTION = 1 / 24
"""Gives a 12-layer encoder some 40 groups: attention and both halves of the MLP of every layer."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Grouping:
    """A coarse graph and where every op went."""

    graph: OpGraph
    """One op per group, in execution order."""
    group_of: NDArray[np.int32]
    """int32[N], group of every op of the fine graph."""


def group_modules(name: str) -> tuple[str, ...]:
    """Return the paths of the modules that a group's name stands for; "" is the root.

    >>> group_modules("encoder.layer.0#1"), group_modules("."), group_modules("h.0+h.1")
    (('encoder.layer.0',), ('',), ('h.0', 'h.1'))
    """
    path = name.rpartition("#")[0] if "#" in name else name
    return ("",) if path == "." else tuple("" if part == "." else part for part in path.split("+"))


def coarsen(
    graph: OpGraph,
    *,
    max_groups: int = 256,
    min_cost_fraction: float = DEFAULT_MIN_COST_FRACTION,
    called: Collection[str] | None = None,
) -> Grouping:
    """Group ops along module boundaries.

    Args:
        graph: Ops with their modules.
        max_groups: Most groups to make, 1 or more.
        min_cost_fraction: Modules cheaper than this part of the whole (FLOPs and bytes) are not divided.
        called: Paths of the modules that are called, as `Capture.called` says; None = guess.

    Returns:
        The coarse graph, with summed costs, and the group of every op.

    Raises:
        InputError: If `max_groups` is less than 1.
    """
    if max_groups < 1:
        raise InputError(f"max_groups is {max_groups}; use 1 or more")
    order = graph.topological_order
    tree = ModuleTree(graph, called)
    cut = tree.cut(max_groups, min_cost_fraction)
    owners = [_owner(graph.modules[op], cut) for op in order]
    runs = _merge(_runs(owners), op_cost(graph)[order], tree, [graph.modules[op] for op in order], max_groups)
    group_of = np.zeros(graph.num_ops, np.int32)
    for index, run in enumerate(runs):
        group_of[order[run.start : run.stop]] = index
    return Grouping(graph=_quotient(graph, runs, group_of), group_of=group_of)


@dataclass
class _Run:
    """Ops from `start` to `stop` in execution order and the cut modules among them."""

    start: int
    stop: int
    modules: tuple[str, ...]


def _owner(path: str, cut: set[str]) -> str | None:
    return next((prefix for prefix in prefixes(path) if prefix in cut), None)


def _runs(owners: Sequence[str | None]) -> list[_Run]:
    """Maximal runs of one cut module; glue joins the run before it, glue at the start the first run."""
    runs: list[_Run] = []
    for position, owner in enumerate(owners):
        if runs and owner is not None and not runs[-1].modules:
            runs[-1].modules = (owner,)
        if runs and (owner is None or runs[-1].modules == (owner,)):
            runs[-1].stop = position + 1
        else:
            runs.append(_Run(position, position + 1, () if owner is None else (owner,)))
    for run in runs:
        run.modules = run.modules or ("",)
    return runs


def _merge(
    runs: list[_Run], cost: NDArray[np.float64], tree: ModuleTree, modules: Sequence[str], max_groups: int
) -> list[_Run]:
    """Merge neighbours until few enough are left: deepest common parent first, then the cheapest pair."""
    total = np.concatenate([[0.0], np.cumsum(cost)])

    def key(pair: tuple[_Run, _Run]) -> tuple[int, float]:
        common = _common_parent([*pair[0].modules, *pair[1].modules])
        return -len(prefixes(common)), float(total[pair[1].stop] - total[pair[0].start])

    keys = [key(pair) for pair in itertools.pairwise(runs)]
    while len(runs) > max_groups:
        index = min(range(len(keys)), key=keys.__getitem__)
        first, second = runs[index : index + 2]
        merged = tuple(dict.fromkeys([*first.modules, *second.modules]))
        runs[index : index + 2] = [_Run(first.start, second.stop, merged)]
        del keys[index]
        for i in (index - 1, index):
            if 0 <= i < len(keys):
                keys[i] = key((runs[i], runs[i + 1]))
    for run in runs:
        if len(run.modules) > 1:
            run.modules = _whole_module(run, tree, modules)
    return runs


def _whole_module(run: _Run, tree: ModuleTree, modules: Sequence[str]) -> tuple[str, ...]:
    """The common parent alone, if it is called and the run holds every op in it; else the run's modules."""
    path = _common_parent(run.modules)
    inside = [position for position, module in enumerate(modules) if _within(module, path)]
    complete = run.start <= inside[0] and inside[-1] < run.stop
    return (path,) if tree.is_called(path) and complete else run.modules


def _within(path: str, module: str) -> bool:
    return not module or path == module or path.startswith(module + ".")


def _common_parent(paths: Sequence[str]) -> str:
    levels = zip(*(path.split(".") if path else [] for path in paths), strict=False)
    shared = itertools.takewhile(lambda level: len(set(level)) == 1, levels)
    return ".".join(level[0] for level in shared)


def _quotient(graph: OpGraph, runs: list[_Run], group_of: NDArray[np.int32]) -> OpGraph:
    count, cost = len(runs), op_cost(graph)
    heaviest = [-1] * count
    for op, group in enumerate(group_of):
        if heaviest[group] < 0 or cost[op] > cost[heaviest[group]]:
            heaviest[group] = op

    def summed(values: NDArray) -> NDArray:
        return np.bincount(group_of, weights=values.astype(np.float64), minlength=count)

    return OpGraph.build(
        names=_names(runs),
        edges=_tensors(graph, group_of),
        kinds=[graph.kinds[op] for op in heaviest],
        modules=[_common_parent(run.modules) for run in runs],
        flops=summed(graph.flops).tolist(),
        bytes_moved=summed(graph.bytes_moved).tolist(),
        weight_bytes=summed(graph.weight_bytes).astype(np.int64).tolist(),
        activation_bytes=summed(graph.activation_bytes).astype(np.int64).tolist(),
        frees=(np.bincount(group_of, weights=~graph.frees, minlength=count) == 0).tolist(),
        colocate=_colocate(graph, runs, group_of),
    )


def _names(runs: list[_Run]) -> list[str]:
    seen: dict[str, int] = {}
    names = []
    for run in runs:
        label = "+".join(path or "." for path in run.modules)
        count = seen.get(label, 0)
        seen[label] = count + 1
        names.append(f"{label}#{count}" if count else label)
    return names


def _tensors(graph: OpGraph, group_of: NDArray[np.int32]) -> list[tuple[int, list[int], float]]:
    """Tensors between groups; a tensor that several ops of one group need is sent there once."""
    edges = []
    for tensor, producer in enumerate(graph.tensor_producer):
        source = int(group_of[producer])
        consumers = graph.consumers[graph.consumer_offsets[tensor] : graph.consumer_offsets[tensor + 1]]
        targets = sorted({int(group) for group in group_of[consumers]} - {source})
        if targets:
            edges.append((source, targets, float(graph.tensor_bytes[tensor])))
    return edges


def _colocate(graph: OpGraph, runs: list[_Run], group_of: NDArray[np.int32]) -> list[int]:
    """Ids of groups that share a module, or whose ops share an id."""
    root = list(range(len(runs)))

    def find(group: int) -> int:
        while root[group] != group:
            group = root[group]
        return group

    first: dict[object, int] = {}
    claims = [(path, group) for group, run in enumerate(runs) for path in run.modules]
    claims += [(int(key), int(group_of[op])) for op, key in enumerate(graph.colocate) if key >= 0]  # type: ignore[misc]
    for claim, group in claims:
        one, other = find(first.setdefault(claim, group)), find(group)
        root[max(one, other)] = min(one, other)
    roots = [find(group) for group in range(len(runs))]
    numbers = itertools.count()
    keys = {key: next(numbers) if roots.count(key) > 1 else -1 for key in dict.fromkeys(roots)}
    return [keys[key] for key in roots]
