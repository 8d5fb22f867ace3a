"""`split`: an exported program and a device per op group become stages, fx modules that call each other's values.

1. In-place ops are made functional where that changes nothing, and what must run together is bound, → `effects`.
2. Every node gets the device of its module's group, or a neighbour's, → `nodes`.
3. Nodes become stages, → `stages`.
4. Every stage becomes a `GraphModule` from values (inputs, weights, scalars, other stages' values) to a tuple of them.

Numbers that follow from the inputs' sizes alone are computed once for all stages, by `Split.scalars`. Assertions about
shapes and types are dropped: `Split.accepts` holds the shapes, and types change under autocast. Knows nothing of
threads and autograd, and not how the program was exported.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Graph, GraphModule, Node

from autoplace.errors import CaptureError
from autoplace.graph.effects import bound_nodes, effects, make_functional
from autoplace.graph.nodes import DeviceOf, NodeCosts, label_of, node_devices
from autoplace.graph.stages import in_order, strong_components, to_stages

__all__ = ["Split", "Stage", "split"]

_SMALL_US = 60.0
"""Stages estimated shorter than a hand-over between threads are not worth one, → `runtime.worker`."""
_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size")
_NUMBERS = (bool, int, float, torch.SymBool, torch.SymFloat, torch.SymInt)


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """A piece of the program that runs on one device without waiting in between."""

    device: str
    label: str
    """The modules that it runs, for timelines."""
    module: GraphModule
    """Takes `inputs` by position and returns a tuple of `outputs`."""
    inputs: tuple[str, ...]
    """Names of values: inputs of the program, weights, constants, scalars, and outputs of other stages."""
    outputs: tuple[str, ...]
    written: tuple[str, ...]
    """The weights and constants among `inputs` that it writes (running statistics)."""
    before: tuple[int, ...]
    """Indices of the stages that must have run: those whose outputs it reads."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """A program as stages, in a topological order."""

    stages: tuple[Stage, ...]
    inputs: tuple[str, ...]
    """Names of the program's inputs."""
    weights: Mapping[str, str]
    """Value name to the parameter's or buffer's name in the exported module."""
    constants: Mapping[str, torch.Tensor]
    scalars: GraphModule
    """Takes the inputs and returns the numbers named by `scalar_names`."""
    scalar_names: tuple[str, ...]
    outputs: tuple[Any, ...]
    """Per output of the program the name of its value; what is no text is the output itself."""
    shapes: tuple[tuple[Any, ...], ...]
    """Per input its sizes: a number, or a sympy expression of symbols."""
    guards: tuple[Any, ...]
    """Sympy conditions on the symbols that must hold."""
    dtypes: tuple[torch.dtype, ...]
    _accepted: dict[tuple[Any, ...], bool] = field(default_factory=dict)

    def accepts(self, inputs: Sequence[torch.Tensor]) -> bool:
        """Return whether the stages are right for inputs of these shapes and types."""
        if tuple(t.dtype for t in inputs) != self.dtypes:
            return False
        sizes = tuple(tuple(t.shape) for t in inputs)
        if sizes not in self._accepted:
            if len(self._accepted) > 256:
                self._accepted.clear()
            self._accepted[sizes] = self._holds(sizes)
        return self._accepted[sizes]

    def _holds(self, sizes: tuple[tuple[int, ...], ...]) -> bool:
        bound: dict[Any, int] = {}
        if len(sizes) != len(self.shapes):
            return False
        for given, wanted in zip(sizes, self.shapes, strict=True):
            if len(given) != len(wanted):
                return False
            bound.update((w, g) for g, w in zip(given, wanted, strict=True) if getattr(w, "is_symbol", False))
        pairs = [pair for g, w in zip(sizes, self.shapes, strict=True) for pair in zip(g, w, strict=True)]
        same = all(g == (w if isinstance(w, int) else w.subs(bound)) for g, w in pairs)
        return same and all(bool(guard.subs(bound) == True) for guard in self.guards)  # noqa: E712 - sympy's true


def split(
    program: torch.export.ExportedProgram,
    device_of: DeviceOf,
    places: Mapping[str, torch.device],
    *,
    root: str = "",
) -> Split:
    """Cut an exported program into stages.

    Args:
        program: From `torch.export.export`, in-place operations kept. Its graph is changed.
        device_of: What the plan says; the names of devices.
        places: Device name to torch device, in the plan's order; factory operations are moved there.
        root: The submodule of the exported module that is the model: paths are told from there.

    Raises:
        CaptureError: With the reason, in one sentence, why the program cannot be cut.
    """
    return _Splitter(program, device_of, places, root).run()


class _Splitter:
    def __init__(
        self,
        program: torch.export.ExportedProgram,
        device_of: DeviceOf,
        places: Mapping[str, torch.device],
        root: str,
    ) -> None:
        self.program, self.places, self.root = program, places, root
        self.owner, self.graph = program.graph_module, program.graph_module.graph
        self.device_of = device_of
        self.kinds: dict[str, Any] = {s.arg.name: s for s in program.graph_signature.input_specs if _named(s.arg)}
        self.results = _results(program)
        self._drop_checks()
        make_functional(self.graph)
        placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        self.inputs = [n for n in placeholders if self._kind(n) is InputKind.USER_INPUT]
        if strange := [n for n in placeholders if self._kind(n) in (InputKind.CUSTOM_OBJ, InputKind.TOKEN, None)]:
            raise CaptureError(f"the model uses {strange[0].name!r}, an object that stages cannot share")
        self.numbers = self._numbers()
        self.nodes = [n for n in self.graph.nodes if n.op == "call_function" and n not in self.numbers]

    def _kind(self, node: Node) -> InputKind | None:
        spec = self.kinds.get(node.name)
        return None if spec is None else spec.kind

    def _drop_checks(self) -> None:
        for node in reversed(list(self.graph.nodes)):
            name = getattr(getattr(node.target, "_schema", None), "name", "").partition("::")[2]
            if node.op == "call_function" and name in _CHECKS and not node.users:
                self.graph.erase_node(node)

    def _numbers(self) -> set[Node]:
        """Return the nodes that compute numbers from nothing but the inputs' sizes."""
        known: set[Node] = set()
        given = set(self.inputs)
        for node in self.graph.nodes:
            if node.op == "call_function" and isinstance(node.meta.get("val"), _NUMBERS):
                sizes = "sym_" in str(node.target)
                if all(n in known or (sizes and n in given) for n in node.all_input_nodes):
                    known.add(node)
        return known

    def run(self) -> Split:
        if not self.nodes:
            raise CaptureError("the model runs no operation")
        atoms, successors = self._atoms()
        device = node_devices(self.nodes, self.device_of, self.root, next(iter(self.places)))
        cost = NodeCosts(self.owner)
        costs = [sum(cost.us(n) for n in atom) for atom in atoms]
        devices = [_majority([(device[n], cost.us(n)) for n in atom]) for atom in atoms]
        groups = [sorted(n for a in g for n in atoms[a]) for g in to_stages(successors, devices, costs, _SMALL_US)]
        home = {n: i for i, group in enumerate(groups) for n in group}
        of_atom = {n: devices[i] for i, atom in enumerate(atoms) for n in atom}
        stages = tuple(self._stage(group, i, home, of_atom[group[0]]) for i, group in enumerate(groups))
        shapes, guards = _shapes(self.inputs)
        names = tuple(n.name for n in self.graph.nodes if n in self.numbers)
        return Split(
            stages=stages,
            inputs=tuple(n.name for n in self.inputs),
            weights={
                name: spec.target
                for name, spec in self.kinds.items()
                if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER)
            },
            constants={
                name: self.program.constants[spec.target]
                for name, spec in self.kinds.items()
                if spec.kind is InputKind.CONSTANT_TENSOR
            },
            scalars=self._scalars(names),
            scalar_names=names,
            outputs=self.results,
            shapes=shapes,
            guards=guards,
            dtypes=tuple(n.meta["val"].dtype for n in self.inputs),
        )

    def _atoms(self) -> tuple[list[list[Node]], list[set[int]]]:
        """Return what cannot be cut, in a topological order, and the edges between."""
        bound = bound_nodes(self.graph, self.inputs)
        for node in self.nodes:  # the parts of a tuple stay with the op that returns it
            if node.target is operator.getitem:
                bound.append({node, node.all_input_nodes[0]})
        number = {node: i for i, node in enumerate(self.nodes)}
        successors: list[set[int]] = [set() for _ in self.nodes]
        for node in self.nodes:
            for other in node.all_input_nodes:
                if other in number:
                    successors[number[other]].add(number[node])
        for together in bound:
            circle = sorted(number[n] for n in together if n in number)
            for a, b in zip(circle, [*circle[1:], circle[0]], strict=True):
                if a != b:
                    successors[a].add(b)
        components = in_order(strong_components(successors), successors)
        atom_of = {n: i for i, component in enumerate(components) for n in component}
        edges: list[set[int]] = [set() for _ in components]
        for node, others in enumerate(successors):
            edges[atom_of[node]] |= {atom_of[o] for o in others} - {atom_of[node]}
        return [[self.nodes[n] for n in component] for component in components], edges

    def _stage(self, group: list[Node], index: int, home: Mapping[Node, int], device: str) -> Stage:
        inside = set(group)
        wanted = {name for name in self.results if isinstance(name, str)}
        given = dict.fromkeys(
            n for node in group for n in node.all_input_nodes if n not in inside and n.op != "get_attr"
        )
        outputs = [n for n in group if n.name in wanted or any(user not in inside and user in home for user in n.users)]
        graph = Graph()
        copies: dict[Node, Node] = {n: graph.placeholder(n.name) for n in given}
        root: dict[str, Any] = {}
        for node in group:
            for other in node.all_input_nodes:
                if other.op == "get_attr" and other not in copies:
                    root[str(other.target)] = self._block(other, self.places[device])
                    copies[other] = graph.get_attr(str(other.target))
            copies[node] = graph.node_copy(node, copies.__getitem__)
            _move(copies[node], self.places[device])
        graph.output(tuple(copies[n] for n in outputs))
        held = {n for node in group for n in effects(node)[0]} & set(given)
        return Stage(
            device=device,
            label=label_of(group, self.root),
            module=_module(root, graph),
            inputs=tuple(n.name for n in given),
            outputs=tuple(n.name for n in outputs),
            written=tuple(n.name for n in given if n in held and n.op == "placeholder"),
            before=tuple(sorted({home[n] for n in given if n in home})),
        )

    def _block(self, node: Node, place: torch.device) -> Any:
        """Return a higher-order op's block, its factory operations moved to the device."""
        block = copy.deepcopy(getattr(self.owner, str(node.target)))
        if isinstance(block, GraphModule):
            for inner in block.graph.nodes:
                _move(inner, place)
            block.recompile()
        return block

    def _scalars(self, names: Sequence[str]) -> GraphModule:
        graph = Graph()
        copies = {n: graph.placeholder(n.name) for n in self.inputs}
        for node in self.graph.nodes:
            if node in self.numbers:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        by_name = {n.name: copy for n, copy in copies.items()}
        graph.output(tuple(by_name[name] for name in names))
        return _module({}, graph)


def _module(root: dict[str, Any], graph: Graph) -> GraphModule:
    for node in graph.nodes:  # examples and stack traces of the exported program would be kept alive
        node.meta = {}
    return GraphModule(root, graph)


def _named(argument: Any) -> bool:
    return getattr(argument, "name", None) is not None


def _results(program: torch.export.ExportedProgram) -> tuple[Any, ...]:
    results: list[Any] = []
    for spec in program.graph_signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise CaptureError(f"the model replaces {spec.target!r} as it runs, which stages cannot")
        constant = not _named(spec.arg) or not hasattr(spec.arg, "name") or hasattr(spec.arg, "value")
        results.append(spec.arg.value if constant else spec.arg.name)
    return tuple(results)


def _majority(weighted: Sequence[tuple[str, float]]) -> str:
    """Return the device with the largest weight; of equals the first."""
    total: dict[str, float] = {}
    for device, weight in weighted:
        total[device] = total.get(device, 0.0) + weight
    return max(total, key=lambda device: total[device])


def _move(node: Node, place: torch.device) -> None:
    """Let a factory operation make its tensor on the stage's device."""
    swap = partial(torch.fx.node.map_aggregate, fn=lambda a: place if isinstance(a, torch.device) else a)
    node.args, node.kwargs = swap(node.args), swap(node.kwargs)  # type: ignore[assignment]


def _shapes(inputs: Sequence[Node]) -> tuple[tuple[tuple[Any, ...], ...], tuple[Any, ...]]:
    """Return the sizes of the inputs, and what must hold of the symbols in them."""
    shapes, guards = [], []
    environment = None
    for node in inputs:
        value = node.meta["val"]
        for size in value.shape:
            if isinstance(size, torch.SymInt):
                environment = size.node.shape_env
        shapes.append(tuple(s.node.expr if isinstance(s, torch.SymInt) else int(s) for s in value.shape))
    if environment is not None:
        free = {s for shape in shapes for e in shape if not isinstance(e, int) for s in e.free_symbols}
        for symbol, bounds in environment.var_to_range.items():
            if symbol in free:
                guards += [symbol >= bounds.lower, symbol <= bounds.upper]
        guards += [g.expr for g in environment.guards if g.expr.free_symbols <= free]
    plain = [tuple(int(e) if getattr(e, "is_number", False) else e for e in shape) for shape in shapes]
    return tuple(plain), tuple(guards)
