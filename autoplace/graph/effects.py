"""Which nodes of an exported graph share memory, which write to it, and what must therefore stay together.

Export keeps the model's in-place operations. Where nobody looks at the old value any more, `make_functional` replaces
them by their functional twins (`relu_` by `relu`), which can be cut apart anywhere. What is left is grouped by
`bound_nodes`: the writers of a piece of memory, all its views, and the readers that come before the last write. Knows
nothing of devices and stages.

An op writes and aliases what its schema says, and besides:

1. batch and instance norm in training write their running statistics, which no schema says;
2. dropout in eval mode hands back its input;
3. a higher-order op with one block (`wrap_with_autocast`) does what its block does; one with several (`cond`) may hand
   back any operand and writes to none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from autoplace.errors import CaptureError

__all__ = ["bound_nodes", "effects", "make_functional"]

_ANSWERS = frozenset({"eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor", "logical_not"})
"""Ops whose functional form gives booleans, while in place they keep the type that is there."""

_STATISTICS = {"batch_norm": (3, 4, 5), "instance_norm": (3, 4, 5)}
"""Op to the positions of running mean, running variance and the flag that says they are written."""


class _Storages:
    """Sets of nodes that may share memory, by union and find."""

    def __init__(self, graph: Graph) -> None:
        self._parent: dict[Node, Node] = {}
        self.writes: dict[Node, list[Node]] = {}
        """Writing node to the nodes whose memory it writes."""
        for node in graph.nodes:
            written, aliased = effects(node)
            if written:
                self.writes[node] = written
            for other in aliased:
                self._parent[self.root(node)] = self.root(other)

    def root(self, node: Node) -> Node:
        while node in self._parent and self._parent[node] is not node:
            node = self._parent[node]
        return node

    def classes(self, graph: Graph) -> dict[Node, list[Node]]:
        members = defaultdict(list)
        for node in graph.nodes:
            members[self.root(node)].append(node)
        return members


def effects(node: Node) -> tuple[list[Node], list[Node]]:
    """Return the nodes that a node writes to, and those whose memory its value may share."""
    if node.op != "call_function":
        return [], []
    if getattr(node.target, "__name__", "") == "getitem":
        return [], list(node.all_input_nodes)
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return _block_effects(node)
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return [], []
    written: list[Node] = []
    aliased: list[Node] = []
    for position, formal in enumerate(schema.arguments):
        actual = node.args[position] if position < len(node.args) else node.kwargs.get(formal.name)
        if formal.alias_info is not None:
            (written if formal.alias_info.is_write else aliased).extend(_nodes(actual))
    name = schema.name.partition("::")[2]
    if name in _STATISTICS:
        mean, variance, flag = _STATISTICS[name]
        written += _nodes(node.args[mean : variance + 1]) if len(node.args) > flag and node.args[flag] else []
        return written, []
    if "dropout" in name and False in node.args:
        aliased += _nodes(node.args[:1])
    shares = any(r.alias_info is not None for r in schema.returns)
    return written, [*aliased, *(written if shares else [])]


def _nodes(value: Any) -> list[Node]:
    found: list[Node] = []
    torch.fx.node.map_arg(value, found.append)
    return found


def _block_effects(node: Node) -> tuple[list[Node], list[Node]]:
    """Return the operands that the blocks of a higher-order op write to, and those that they may hand back."""
    targets = [str(n.target) for n in node.args if isinstance(n, Node) and n.op == "get_attr"]
    blocks = [getattr(node.graph.owning_module, target, None) for target in targets]
    operands = [n for n in node.all_input_nodes if n.op != "get_attr"]
    if len(blocks) != 1 or not isinstance(blocks[0], GraphModule):
        return [], operands
    block = blocks[0].graph
    start = next(i for i, n in enumerate(node.args) if isinstance(n, Node) and n.op == "get_attr")
    storages = _Storages(block)
    written = {storages.root(n) for nodes in storages.writes.values() for n in nodes}
    returned = {storages.root(n) for n in block.output_node().all_input_nodes}
    formals = [storages.root(n) for n in block.nodes if n.op == "placeholder"]
    pairs = [(a, f) for a, f in zip(node.args[start + 1 :], formals, strict=False) if isinstance(a, Node)]
    return [a for a, f in pairs if f in written], [a for a, f in pairs if f in returned]


def make_functional(graph: Graph) -> None:
    """Replace in-place ops by functional ones where nothing reads the memory afterwards but through their result."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    storages = _Storages(graph)
    classes = storages.classes(graph)
    for node in list(storages.writes):
        twin = _twin(node)
        members = classes[storages.root(node)]
        if twin is None or any(member.op == "placeholder" for member in members):
            continue
        later = (user for member in members if order[member] < order[node] for user in member.users)
        if all(order[user] <= order[node] for user in later):
            node.target = twin
    graph.lint()


def _twin(node: Node) -> torch._ops.OpOverload | None:
    """Return the functional op that computes the same value with the same type, if there is one."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not isinstance(node.args[0], Node):
        return None
    name = target._schema.name.partition("::")[2]
    if not name.endswith("_") or target.namespace != "aten" or name[:-1] in _ANSWERS:
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    twin = getattr(packet, target._overloadname, None) if packet is not None else None
    if twin is None or twin._schema.is_mutable:
        return None
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return None
    others = [n.meta.get("val") for n in node.all_input_nodes[1:]]
    promotes = any(isinstance(v, torch.Tensor) and v.dtype != before.dtype and v.dtype != torch.bool for v in others)
    floats = before.is_floating_point() or not any(isinstance(a, float) for a in node.args)
    same_formals = [a.name for a in twin._schema.arguments] == [a.name for a in target._schema.arguments]
    return twin if same_formals and floats and not promotes else None


def bound_nodes(graph: Graph, inputs: Iterable[Node]) -> list[set[Node]]:
    """Return the sets of nodes that must run together, in program order, because one writes what another sees.

    Args:
        graph: An exported graph.
        inputs: The placeholders of the user's inputs.

    Raises:
        CaptureError: If an input of the model is written.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    storages, given = _Storages(graph), set(inputs)
    writers = defaultdict(list)
    for node, written in storages.writes.items():
        for other in written:
            writers[storages.root(other)].append(node)
    bound = []
    for root, members in storages.classes(graph).items():
        if root not in writers:
            continue
        if given.intersection(members):
            raise CaptureError("the model modifies an input in place, which stages cannot; clone it first")
        last = max(order[node] for node in writers[root])
        held = any(member.op == "placeholder" for member in members)
        readers = {user for member in members for user in member.users if held or order[user] < last}
        together = {*members, *writers[root], *readers}
        bound.append({node for node in together if node.op == "call_function"})
    return [nodes for nodes in bound if nodes]
