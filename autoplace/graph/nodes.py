"""What is known of the nodes of an exported graph: the modules around them, what they cost, and where they are to run.

Costs are orders of magnitude for one CPU core: enough to tell what is worth a hand-over between threads.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
from torch.fx import GraphModule, Node

from autoplace.graph.effects import effects
from autoplace.graph.op_costs import bytes_moved, concrete, op_flops, op_kind, tensors_of

__all__ = ["DeviceOf", "NodeCosts", "label_of", "node_devices"]

DeviceOf = Callable[[Sequence[tuple[str, int]]], str | None]
"""The modules around a node, outermost first, each with the number of its call, to a device; None = no matter."""

_CALL_US, _FLOPS_PER_US, _BYTES_PER_US = 5.0, 2e4, 1e4
"""A CPU core's order of magnitude: what an op takes at least, and what it gets done in a microsecond."""


def modules_of(node: Node, root: str) -> list[tuple[str, int]]:
    """Return the modules around a node, from `root` inwards, each with the number of its call."""
    found = []
    for key, entry in (node.meta.get("nn_module_stack") or {}).items():
        path = str(entry[0]).split("@", 1)[0]
        number = str(key).rpartition("@")[2] if "@" in str(key) else "0"
        if root and path != root and not path.startswith(root + "."):
            continue
        found.append((path[len(root) :].lstrip("."), int(number) if number.isdigit() else 0))
    return found


def label_of(nodes: Sequence[Node], root: str) -> str:
    """Return the first and the last module that the nodes belong to, as one text; `glue` where there are none."""
    stacks = [stack for node in nodes if (stack := modules_of(node, root))]
    paths = list(dict.fromkeys(stack[-1][0] for stack in stacks if stack[-1][0]))
    if not paths:
        return "glue"
    return paths[0] if len(paths) == 1 else f"{paths[0]} … {paths[-1]}"


def node_devices(nodes: Sequence[Node], device_of: DeviceOf, root: str, default: str) -> dict[Node, str]:
    """Return a device for every node.

    Nodes of which the plan says nothing go where the first one that needs them is, if anything that they read is there
    or they read nothing; else where the last value that they read is. What reads nothing but inputs says nothing of
    where it has to be, so the loss is where the scores are, and not where the labels are first touched.

    Args:
        nodes: In execution order.
        device_of: What the plan says.
        root: The submodule whose paths `device_of` knows.
        default: Where nothing tells.
    """
    order = {node: i for i, node in enumerate(nodes)}
    devices: dict[Node, str] = {}
    for node in nodes:
        device = device_of(modules_of(node, root))
        if device is not None:
            devices[node] = device
    asked: dict[Node, str] = {}
    for node in reversed(nodes):
        users = sorted((n for n in node.users if n in devices or n in asked), key=lambda n: order.get(n, 0))
        if users and node not in devices:
            asked[node] = devices.get(users[0]) or asked[users[0]]
    free: list[Node] = []
    for node in nodes:
        if node not in devices:
            read = sorted((n for n in node.all_input_nodes if n in devices), key=order.__getitem__)
            known = [devices[n] for n in read]
            wish = asked.get(node)
            if wish is None and not known:
                free.append(node)
            else:
                devices[node] = wish if wish is not None and (wish in known or not known) else known[-1]
    for node in reversed(free):
        users = sorted((n for n in node.users if n in devices), key=lambda n: order.get(n, 0))
        devices[node] = devices[users[0]] if users else default
    return devices


class NodeCosts:
    """Estimates what nodes take, each once.

    Args:
        owner: The module whose attributes are the blocks of higher-order ops.
    """

    def __init__(self, owner: GraphModule) -> None:
        self._owner = owner
        self._known: dict[Node, float] = {}
        self._flops: dict[str, float] = {}

    def us(self, node: Node) -> float:
        """Return the microseconds that a node takes; a higher-order op what its blocks take."""
        if node not in self._known:
            self._known[node] = self._estimate_us(node)
        return self._known[node]

    def _estimate_us(self, node: Node) -> float:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            blocks = [getattr(self._owner, str(n.target), None) for n in node.all_input_nodes if n.op == "get_attr"]
            inner = [n for b in blocks if isinstance(b, GraphModule) for n in b.graph.nodes if n.op == "call_function"]
            return sum(self.us(n) for n in inner)
        value = concrete(node.meta.get("val"))
        if not tensors_of(value) or node.target is operator.getitem:
            return 0.0
        args = concrete(torch.fx.node.map_arg(node.args, lambda n: n.meta.get("val")))
        kwargs = concrete(torch.fx.node.map_arg(node.kwargs, lambda n: n.meta.get("val")))
        try:
            flops = op_flops(node.target, args, kwargs, value, self._flops)
        except (RuntimeError, TypeError, ValueError, IndexError):  # no formula for this form of the op
            flops = float(sum(t.numel() for t in tensors_of(value)))
        _, aliased = effects(node)
        moved = 0.0 if aliased else bytes_moved(op_kind(node.target), tensors_of((args, kwargs)), tensors_of(value))
        return _CALL_US + flops / _FLOPS_PER_US + moved / _BYTES_PER_US
