"""From an atomic graph with a device per node to stages: the largest sets that make nobody wait for what it needs not.

Two nodes of one device belong to one stage when they depend on the same hand-overs between devices and the same
hand-overs depend on them. No stage then waits for a value that only another stage needs, and the graph of stages has no
cycle:

- Along an edge the set of hand-overs upstream never shrinks and the set downstream never grows. Around a cycle of
  stages both stay the same.
- A hand-over on the cycle would belong to the upstream set of its own producer. So the cycle lies on one device with
  equal sets, and is one stage.

Stages too short to be worth a hand-over to a thread join their one successor, or their one predecessor, on the same
device; nothing else can lie between them. Knows nothing of models and tensors.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["in_order", "strong_components", "to_stages"]


def strong_components(successors: Sequence[set[int]]) -> list[list[int]]:
    """Return the strongly connected components of a graph, each sorted, in topological order (Tarjan 1972).

    Args:
        successors: Per node, the nodes that it has an edge to.
    """
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    open_nodes: list[int] = []
    is_open: set[int] = set()
    found: list[list[int]] = []
    for root in range(len(successors)):
        if root in index:
            continue
        walk = [(root, iter(sorted(successors[root])))]
        index[root] = low[root] = len(index)
        open_nodes.append(root)
        is_open.add(root)
        while walk:
            node, rest = walk[-1]
            following = next(rest, None)
            if following is None:
                walk.pop()
                if walk:
                    low[walk[-1][0]] = min(low[walk[-1][0]], low[node])
                if low[node] == index[node]:
                    start = open_nodes.index(node)
                    component, open_nodes = open_nodes[start:], open_nodes[:start]
                    is_open.difference_update(component)
                    found.append(sorted(component))
            elif following not in index:
                index[following] = low[following] = len(index)
                open_nodes.append(following)
                is_open.add(following)
                walk.append((following, iter(sorted(successors[following]))))
            elif following in is_open:
                low[node] = min(low[node], index[following])
    return found[::-1]


@dataclass
class _Stage:
    members: list[int]
    device: str
    cost: float
    before: set[int]
    after: set[int]


def to_stages(
    successors: Sequence[set[int]], devices: Sequence[str], costs: Sequence[float], small: float
) -> list[list[int]]:
    """Group the nodes of an acyclic graph into stages.

    Args:
        successors: Per node, the nodes that it has an edge to; every edge goes to a higher index.
        devices: Per node, its device.
        costs: Per node, what it takes, in any unit.
        small: Stages of at most this cost join a neighbour where that holds nobody up for longer.

    Returns:
        The nodes of every stage, ascending; the stages in a topological order.
    """
    up, down = _hand_overs(successors, devices)
    number: dict[tuple[str, int, int], int] = {}
    of = [number.setdefault((devices[n], up[n], down[n]), len(number)) for n in range(len(successors))]
    stages = {i: _Stage([], device, 0.0, set(), set()) for (device, _, _), i in number.items()}
    for node, number_of in enumerate(of):
        stages[number_of].members.append(node)
        stages[number_of].cost += costs[node]
        stages[number_of].after |= {of[s] for s in successors[node]} - {number_of}
    for i, stage in stages.items():
        for other in stage.after:
            stages[other].before.add(i)
    _merge(stages, small)
    return in_order([stage.members for stage in stages.values()], successors)


def _hand_overs(successors: Sequence[set[int]], devices: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return per node the hand-overs upstream and downstream of it, as bits of an integer each."""
    numbers: dict[tuple[int, str], int] = {}
    up, down = [0] * len(successors), [0] * len(successors)
    for node in range(len(successors)):
        for other in successors[node]:
            bit = 0
            if devices[node] != devices[other]:
                bit = 1 << numbers.setdefault((node, devices[other]), len(numbers))
            up[other] |= up[node] | bit
    for node in reversed(range(len(successors))):
        for other in successors[node]:
            bit = 1 << numbers[node, devices[other]] if devices[node] != devices[other] else 0
            down[node] |= down[other] | bit
    return up, down


def _merge(stages: dict[int, _Stage], small: float) -> None:
    changed = True
    while changed:
        changed = False
        for i in list(stages):
            stage = stages.get(i)
            if stage is None or stage.cost > small:
                continue
            for neighbours in (stage.after, stage.before):
                only = next(iter(neighbours)) if len(neighbours) == 1 else None
                if only is not None and stages[only].device == stage.device:
                    _join(stages, i, only)
                    changed = True
                    break
            else:
                alone = not stage.after and not stage.before
                beside = (j for j, other in stages.items() if j != i and other.device == stage.device)
                if alone and (other := next(beside, None)) is not None:
                    _join(stages, i, other)
                    changed = True


def _join(stages: dict[int, _Stage], gone: int, kept: int) -> None:
    old, new = stages.pop(gone), stages[kept]
    new.members = sorted([*new.members, *old.members])
    new.cost += old.cost
    new.before = (new.before | old.before) - {gone, kept}
    new.after = (new.after | old.after) - {gone, kept}
    for i in new.before:
        stages[i].after = (stages[i].after - {gone}) | {kept}
    for i in new.after:
        stages[i].before = (stages[i].before - {gone}) | {kept}


def in_order(groups: Sequence[Sequence[int]], successors: Sequence[set[int]]) -> list[list[int]]:
    """Order groups of nodes topologically; of those that may come next, the one with the earliest node.

    Args:
        groups: Every node once; the graph of groups has no cycle.
        successors: Per node, the nodes that it has an edge to.
    """
    of = {node: i for i, group in enumerate(groups) for node in group}
    after = [{of[s] for node in group for s in successors[node]} - {i} for i, group in enumerate(groups)]
    waits = [0] * len(groups)
    for others in after:
        for other in others:
            waits[other] += 1
    ready = [(min(group), i) for i, group in enumerate(groups) if not waits[i]]
    heapq.heapify(ready)
    ordered: list[list[int]] = []
    while ready:
        _, i = heapq.heappop(ready)
        ordered.append(sorted(groups[i]))
        for other in after[i]:
            waits[other] -= 1
            if not waits[other]:
                heapq.heappush(ready, (min(groups[other]), other))
    return ordered
