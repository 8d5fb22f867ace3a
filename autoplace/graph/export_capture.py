"""First rung of capture: `torch.export`, non-strict, gives the whole graph with shapes and no execution.

The exported program shares the model's own parameters. Train and eval graphs are separate because export fixes the
mode. `Dim.AUTO` leaves the batch free where the model allows it and fixes it silently where it does not.
"""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from autoplace.graph.op_costs import (
    bytes_moved,
    concrete,
    concrete_int,
    is_copy,
    op_flops,
    op_kind,
    tensor_bytes,
    tensors_of,
)
from autoplace.graph.opgraph import OpGraph
from autoplace.graph.recorder import Recorder, Value
from autoplace.graph.tracing import traces_alone
from autoplace.hands_off import is_hands_off, silent
from autoplace.workload import Workload

__all__ = ["capture_by_export"]

_INLINED = ("wrap_with_set_grad_enabled", "wrap_with_autocast")
"""Higher-order ops that only wrap a block; its ops are recorded as if it were not there."""


def capture_by_export(workload: Workload, kwargs: Mapping[str, Any]) -> tuple[OpGraph, set[str], bool]:
    """Export the model and turn its graph into an OpGraph.

    Args:
        workload: The model and its positional inputs; the model is already in the workload's mode.
        kwargs: Keyword inputs, caches off.

    Returns:
        The graph, the paths of the modules that were called, and whether the batch stayed dynamic.

    Raises:
        CaptureError: If the model runs no operation.
        Exception: Whatever export raises.
    """
    try:
        program = _export(workload, kwargs, dynamic=True)
    except Exception:
        program = _export(workload, kwargs, dynamic=False)
    reader = _Reader(program, workload)
    return reader.read(), reader.recorder.called, _is_dynamic(program)


def _export(workload: Workload, kwargs: Mapping[str, Any], *, dynamic: bool) -> torch.export.ExportedProgram:
    size = workload.batch_size

    def spec(leaf: Any) -> Any:
        batched = isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == size
        return {0: torch.export.Dim.AUTO} if batched else None

    shapes = None
    if dynamic and size > 1:
        shapes = _dynamic_shapes(workload, kwargs, spec)
    with traces_alone(), _quiet(), _unmarked((workload.args, kwargs)), torch.set_grad_enabled(workload.training):
        return torch.export.export(workload.model, workload.args, dict(kwargs), strict=False, dynamic_shapes=shapes)


@contextmanager
def _unmarked(inputs: Any) -> Iterator[None]:
    """Take the marks off the inputs that an export that fails leaves on them.

    They would make the next export dynamic, and the user's own `torch.compile`.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    marks = [dict(vars(tensor)) for tensor in tensors]
    try:
        yield
    finally:
        for tensor, own in zip(tensors, marks, strict=True):
            for name in [name for name in vars(tensor) if "_dynamo_" in name]:
                delattr(tensor, name)
            for name, mark in own.items():
                setattr(tensor, name, mark)


def _dynamic_shapes(
    workload: Workload, kwargs: Mapping[str, Any], spec: Any
) -> tuple[Any, ...] | dict[str, Any] | None:
    """Shapes in the form that export wants: by argument name, or None where they cannot be bound to a signature."""
    try:
        bound = inspect.signature(workload.model.forward).bind(*workload.args, **kwargs).arguments
    except (TypeError, ValueError):
        return None
    return {name: pytree.tree_map(spec, value) for name, value in bound.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence export's warnings, logs and prints: a failed rung is told in one sentence, by the ladder.

    And let `torch.distributions` take their arguments unseen: looking at values is what export cannot. In hands-off
    threads prints and checks stay, since `sys.stderr` and that switch are everybody's.
    """
    if is_hands_off():
        with silent():
            yield
        return
    distribution = torch.distributions.Distribution
    validates = distribution._validate_args
    loggers = [logging.getLogger(name) for name in ("torch", "torch.export", "torch.fx.experimental.symbolic_shapes")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    distribution.set_default_validate_args(False)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        distribution.set_default_validate_args(validates)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _is_dynamic(program: torch.export.ExportedProgram) -> bool:
    inputs = {s.arg.name for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in inputs and isinstance(value, torch.Tensor) and value.dim():
            return isinstance(value.shape[0], torch.SymInt)
    return False


class _Reader:
    """Walks an exported graph and writes it to a Recorder."""

    def __init__(self, program: torch.export.ExportedProgram, workload: Workload) -> None:
        self.program = program
        self.recorder = Recorder(workload.model, frees=not workload.training)
        self.canonical = {
            path: self.recorder.paths[id(module)]
            for path, module in workload.model.named_modules(remove_duplicate=False)
        }
        self.tensors: dict[str, torch.Tensor] = {
            **dict(workload.model.named_parameters(remove_duplicate=False)),
            **dict(workload.model.named_buffers(remove_duplicate=False)),
        }
        self.flop_cache: dict[str, float] = {}
        self.module = ""

    def read(self) -> OpGraph:
        targets = {
            s.arg.name: s.target
            for s in self.program.graph_signature.input_specs
            if s.kind in (InputKind.PARAMETER, InputKind.BUFFER)
        }
        values: dict[torch.fx.Node, Any] = {}
        known: dict[int, Value] = {}
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                values[node] = self._placeholder(node, targets.get(node.name), known)
        self._walk(self.program.graph_module, values)
        return self.recorder.build()

    def _placeholder(self, node: torch.fx.Node, target: str | None, known: dict[int, Value]) -> Any:
        tensor = self.tensors.get(target) if target else None
        if tensor is None:
            example = node.meta.get("val")
            return self.recorder.source(tensor_bytes(example)) if isinstance(example, torch.Tensor) else None
        if id(tensor) not in known:
            known[id(tensor)] = self.recorder.weight([tensor])
        return known[id(tensor)]

    def _walk(self, graph_module: torch.fx.GraphModule, values: dict[torch.fx.Node, Any]) -> Any:
        """Record every call of a graph; returns what its output node returns, as values."""
        for node in graph_module.graph.nodes:
            if node.op == "call_function":
                self.module = self._module_of(node)
                values[node] = self._call(node, graph_module, values)
            elif node.op == "get_attr" and node not in values:
                constant = _attribute(graph_module, node.target)
                values[node] = (
                    self.recorder.source(tensor_bytes(constant)) if isinstance(constant, torch.Tensor) else None
                )
            elif node.op == "output":
                return torch.fx.node.map_aggregate(
                    node.args[0], lambda a: values.get(a) if isinstance(a, torch.fx.Node) else None
                )
        return None

    def _module_of(self, node: torch.fx.Node) -> str:
        stack = node.meta.get("nn_module_stack")
        if not stack:
            return self.module
        paths = [self.canonical.get(entry[0].split("@", 1)[0]) for entry in stack.values()]
        self.recorder.called.update(path for path in paths if path is not None)
        return self.module if paths[-1] is None else paths[-1]

    def _call(self, node: torch.fx.Node, owner: torch.fx.GraphModule, values: dict[torch.fx.Node, Any]) -> Any:
        if getattr(node.target, "__name__", "") == "getitem":
            container = values.get(node.all_input_nodes[0])
            return container[int(node.args[1])] if isinstance(container, list | tuple) else container  # type: ignore[arg-type]
        kind = op_kind(node.target)
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            if kind in _INLINED:
                return self._inline(node, owner, values)
            return self._higher_order(node, owner, values, kind)
        outputs = tensors_of(node.meta.get("val"))
        if not outputs:
            return None
        reads = [values[n] for n in node.all_input_nodes if isinstance(values.get(n), Value)]
        for n in node.all_input_nodes:
            if isinstance(values.get(n), list | tuple):
                reads += [v for v in pytree.tree_leaves(values[n], is_leaf=_is_value) if isinstance(v, Value)]
        if kind == "dropout" and len(node.args) > 2 and node.args[2] is False:
            return values.get(node.all_input_nodes[0])
        return self._record(node, kind, reads, outputs, values)

    def _record(
        self,
        node: torch.fx.Node,
        kind: str,
        reads: list[Value],
        outputs: list[torch.Tensor],
        values: dict[torch.fx.Node, Any],
    ) -> Any:
        args, kwargs = _examples(node)
        example = concrete(node.meta["val"])
        many = isinstance(node.meta["val"], list | tuple)
        written, alias = _effects(node)
        if alias is not None and not written and isinstance(values.get(alias), Value):
            first = tensors_of(example)[0]
            if many or not is_copy(node.target, args, first):
                views = [self.recorder.view(values[alias], tensor_bytes(t), self.module) for t in outputs]
                return views if many else views[0]
        flops = op_flops(node.target, args, kwargs, example, self.flop_cache)
        targets = [values[n] for n in written if isinstance(values.get(n), Value)]
        new = self.recorder.op(
            kind,
            self.module,
            reads=reads,
            writes=targets,
            outputs=[] if targets else [tensor_bytes(t) for t in outputs],
            flops=flops,
            bytes_moved=bytes_moved(kind, tensors_of((args, kwargs)), tensors_of(example)),
            name=node.name,
        )
        if targets:
            return targets * len(outputs) if many else targets[0]
        return new if many else new[0]

    def _inline(self, node: torch.fx.Node, owner: torch.fx.GraphModule, values: dict[torch.fx.Node, Any]) -> Any:
        position = next(i for i, a in enumerate(node.args) if _is_node(a) and a.op == "get_attr")  # type: ignore[union-attr]
        block = _attribute(owner, node.args[position].target)  # type: ignore[union-attr]
        operands = node.args[position + 1 :]
        inner = [n for n in block.graph.nodes if n.op == "placeholder"]
        scope = {p: values.get(a) if _is_node(a) else None for p, a in zip(inner, operands, strict=False)}  # type: ignore[arg-type]
        return self._walk(block, scope)

    def _higher_order(
        self, node: torch.fx.Node, owner: torch.fx.GraphModule, values: dict[torch.fx.Node, Any], kind: str
    ) -> Any:
        """Record control flow as one op that costs what its blocks cost once."""
        flops = 0.0
        for operand in node.all_input_nodes:
            block = _attribute(owner, operand.target) if operand.op == "get_attr" else None
            if isinstance(block, torch.fx.GraphModule):
                flops += sum(self._inner_flops(n) for n in block.graph.nodes if n.op == "call_function")
        outputs = [tensor_bytes(t) for t in tensors_of(node.meta.get("val"))]
        reads = [values[n] for n in node.all_input_nodes if isinstance(values.get(n), Value)]
        moved = float(sum(outputs) + sum(v.base.num_bytes for v in reads))
        return self.recorder.op(
            kind, self.module, reads=reads, outputs=outputs, flops=flops, bytes_moved=moved, name=node.name
        )

    def _inner_flops(self, node: torch.fx.Node) -> float:
        if not tensors_of(node.meta.get("val")) or isinstance(node.target, torch._ops.HigherOrderOperator):
            return 0.0
        args, kwargs = _examples(node)
        return op_flops(node.target, args, kwargs, concrete(node.meta["val"]), self.flop_cache)


def _is_node(value: Any) -> bool:
    return isinstance(value, torch.fx.Node)


def _is_value(value: Any) -> bool:
    return isinstance(value, Value)


def _attribute(owner: Any, target: Any) -> Any:
    for part in str(target).split("."):
        owner = getattr(owner, part, None)
    return owner


def _examples(node: torch.fx.Node) -> tuple[Any, dict[str, Any]]:
    """The node's arguments with every node replaced by its concrete meta example."""

    def example(argument: Any) -> Any:
        return concrete(argument.meta.get("val")) if _is_node(argument) else _number(argument)

    args = torch.fx.node.map_aggregate(node.args, example)
    return args, dict(torch.fx.node.map_aggregate(node.kwargs, example))  # type: ignore[arg-type]


def _number(argument: Any) -> Any:
    return concrete_int(argument) if isinstance(argument, torch.SymInt) else argument


def _effects(node: torch.fx.Node) -> tuple[list[torch.fx.Node], torch.fx.Node | None]:
    """The arguments that an op writes in place, and the one that its output may be a view of."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return [], None
    written: list[torch.fx.Node] = []
    alias: torch.fx.Node | None = None
    returns_alias = any(r.alias_info is not None for r in schema.returns)
    for position, formal in enumerate(schema.arguments):
        actual = node.args[position] if position < len(node.args) else node.kwargs.get(formal.name)
        if formal.alias_info is None or not isinstance(actual, torch.fx.Node):
            continue
        if formal.alias_info.is_write:
            written.append(actual)
        elif returns_alias and alias is None:
            alias = actual
    return written, alias
