"""A model's calls as stage programs: exported, split, and kept by what they depend on.

A program holds for inputs of the same structure, the same values of everything that is no tensor, the same types and
devices, which inputs require gradients, the modes of gradients and autocast, and the modules' settings: flags and
numbers that are their attributes (`training`, a dropout's `p`) or in their `config`. Where export kept the batch free
it holds for other batch sizes too. Parameters and buffers are looked up in the live model at every call, so that new
values, and new objects of the same shape, are seen. Tensors that are plain attributes are constants.

Hooks of the model and activation checkpointing would be lost, and are refused; the hooks by which `transformers`
collects hidden states are part of its forward.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch

from autoplace.errors import CaptureError, ExecutionError
from autoplace.graph.coarsen import group_modules
from autoplace.graph.export_flat import export_flat
from autoplace.graph.module_tree import prefixes
from autoplace.graph.split import Split, split
from autoplace.graph.tracing import modules_to_trace

from .fitness import HOOKS, has_global_hooks, records_outputs
from .tree import Tree, shared_object

__all__ = ["Exports", "ProgramCache", "StageProgram"]

MAX_PROGRAMS = 8
"""Programs that a cache makes before it refuses more: each takes seconds."""
_AUTOCAST = ("cpu", "cuda")
_SIMPLE = (bool, int, float, str, type(None))
_NUMBERS = (torch.SymBool, torch.SymFloat, torch.SymInt)


class _Flat(torch.nn.Module):
    """The model as a function of its input tensors; its output is taken apart, and its structure kept in `outputs`."""

    def __init__(self, model: torch.nn.Module, inputs: Tree, outputs: list[Tree]) -> None:
        super().__init__()
        self.model = model
        self._call = (inputs, outputs)

    def forward(self, *tensors: torch.Tensor) -> tuple[Any, ...]:
        inputs, outputs = self._call
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in inputs.leaves]
        args, kwargs = inputs.build(leaves)
        output = Tree(self.model(*args, **kwargs), objects=True)
        outputs[:] = [output]
        return tuple(leaf for leaf in output.leaves if isinstance(leaf, (torch.Tensor, *_NUMBERS)))


class StageProgram:
    """A split program and what binds it to the live model.

    Args:
        model: The model.
        program: Its stages.
        output: The structure of its output, with any leaves.
    """

    def __init__(self, model: torch.nn.Module, program: Split, output: Tree) -> None:
        self.split = program
        self._output = output
        traced = iter(program.outputs)
        self.results = [
            next(traced) if isinstance(leaf, (torch.Tensor, *_NUMBERS)) else _Constant(leaf) for leaf in output.leaves
        ]
        """Per leaf of the output the name of its value, or what it is."""
        output.leaves = []
        modules = dict(model.named_modules(remove_duplicate=False))
        self._weights: dict[str, tuple[dict[str, Any], str]] = {}
        for name, path in program.weights.items():
            owner, _, attribute = path.removeprefix("model.").rpartition(".")
            module = modules[owner]
            holder = module._parameters if attribute in module._parameters else module._buffers
            self._weights[name] = (holder, attribute)

    def weight(self, name: str) -> torch.Tensor | None:
        """Return a live parameter or buffer, or a constant, by the name of its value; None if it is none of these."""
        if name in self._weights:
            holder, attribute = self._weights[name]
            tensor: torch.Tensor = holder[attribute]
            return tensor
        return self.split.constants.get(name)

    def output(self, values: Callable[[str], Any]) -> Tree:
        """Return the output's structure with new leaves.

        Args:
            values: Name of a value to the value.
        """
        tree = copy.copy(self._output)
        tree.leaves = [
            result.value if isinstance(result, _Constant) else values(result) if isinstance(result, str) else result
            for result in self.results
        ]
        return tree


class _Constant:
    """An output that is the same in every call."""

    def __init__(self, value: Any) -> None:
        self.value = value


Exports = dict[Any, list[tuple[torch.export.ExportedProgram, Tree]]]
"""What a call depends on, to the programs exported for it, and their outputs' structures."""


class ProgramCache:
    """The stage programs of one model under one assignment.

    Args:
        model: The model.
        assignment: Op group name to device name.
        places: Device name to torch device.
        exports: Programs that several caches of this model are to share, each cutting them in its own way; the model
            must not change meanwhile. None = this one's are its own.

    Raises:
        ExecutionError: If the assignment names a module that the model lacks.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        assignment: Mapping[str, str],
        places: Mapping[str, torch.device],
        exports: Exports | None = None,
    ) -> None:
        self._model, self._places, self._exports = model, places, exports
        first = {id(module): path for path, module in model.named_modules()}
        self._canonical = {path: first[id(m)] for path, m in model.named_modules(remove_duplicate=False)}
        self._own: dict[str, dict[int, str]] = {}
        for name, device in assignment.items():
            number = name.rpartition("#")[2] if "#" in name else "0"
            for path in group_modules(name) if "~" not in name else ():
                if path not in self._canonical or not number.isdigit():
                    raise ExecutionError(
                        f"the plan names {name!r}, which the model does not have; tune again for this model"
                    )
                self._own.setdefault(self._canonical[path], {})[int(number)] = device
        modules = list(model.modules())
        self._hooks = [getattr(module, name) for module in modules for name in HOOKS if hasattr(module, name)]
        self._settings = _Settings(modules)
        self._programs: dict[Any, list[StageProgram]] = {}
        self._refused: dict[Any, str] = {}
        self._count = 0
        self._lock = threading.Lock()

    def find(self, inputs: Tree, tensors: Sequence[torch.Tensor], batch: int | None) -> StageProgram:
        """Return the program for a call, made on its first one.

        Args:
            inputs: (args, kwargs) of the call, taken apart.
            tensors: The tensors among the leaves, as the program will see them.
            batch: Size of the batch; None = unknown.

        Raises:
            ExecutionError: If the model has hooks, cannot be exported or split, or wants too many programs.
        """
        if has_global_hooks() or any(
            not records_outputs(hook) for hooks in self._hooks if hooks for hook in hooks.values()
        ):
            raise ExecutionError(
                "the model has hooks, which an exported graph does not call; use another engine than graph"
            )
        key = self._key(inputs, tensors)
        program = self._known(key, tensors)
        if program is None:
            with self._lock:
                program = self._known(key, tensors) or self._new(key, inputs, tensors, batch)
        return program

    def _known(self, key: Any, tensors: Sequence[torch.Tensor]) -> StageProgram | None:
        return next((p for p in self._programs.get(key, ()) if p.split.accepts(tensors)), None)

    def _new(self, key: Any, inputs: Tree, tensors: Sequence[torch.Tensor], batch: int | None) -> StageProgram:
        sizes = tuple(tuple(t.shape) for t in tensors)
        if (key, sizes) in self._refused:
            raise ExecutionError(self._refused[key, sizes])
        for exported, output in self._exports.get(key, ()) if self._exports is not None else ():
            program = self._cut(_twin(exported), output)
            if program.split.accepts(tensors):
                self._programs.setdefault(key, []).append(program)
                return program
        if self._count >= MAX_PROGRAMS:
            raise ExecutionError(
                f"the calls of this model differ in more than {MAX_PROGRAMS} ways, and each takes an export; "
                "use another engine than graph"
            )
        self._count += 1
        try:
            program = self._make(key, inputs, tensors, batch)
            if not program.split.accepts(tensors):
                raise CaptureError("the exported graph does not take the inputs that it was made of")
        except CaptureError as error:
            self._refused[key, sizes] = f"the model does not split into stages: {error}"
            raise ExecutionError(self._refused[key, sizes]) from error
        self._programs.setdefault(key, []).append(program)
        return program

    def _key(self, inputs: Tree, tensors: Sequence[torch.Tensor]) -> Any:
        strange = shared_object(inputs.leaves)
        if strange is not None:
            raise ExecutionError(
                f"an input is a {type(strange).__name__}, which a graph cannot take; use another engine than graph"
            )
        others = tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in inputs.leaves)
        kinds = tuple((t.dtype, t.device, t.requires_grad, t.dim()) for t in tensors)
        structure = (inputs._spec, *((i, type(pattern)) for i, (pattern, _, _) in inputs._nested.items()))
        values = tuple((type(other), other) for other in others)
        autocasts = tuple(torch.get_autocast_dtype(kind) for kind in _AUTOCAST if torch.is_autocast_enabled(kind))
        return structure, values, kinds, torch.is_grad_enabled(), autocasts, self._settings.read()

    def _make(self, key: Any, inputs: Tree, tensors: Sequence[torch.Tensor], batch: int | None) -> StageProgram:
        outputs: list[Tree] = []
        with modules_to_trace(self._model) as model:
            flat = _Flat(model, inputs, outputs)
            flat.training = model.training
            program = export_flat(flat, tensors, batch=batch)
        if self._exports is not None:
            self._exports.setdefault(key, []).append((program, outputs[0]))
            program = _twin(program)
        return self._cut(program, outputs[0])

    def _cut(self, program: torch.export.ExportedProgram, output: Tree) -> StageProgram:
        stages = split(program, self._device_of, self._places, root="model")
        return StageProgram(self._model, stages, copy.copy(output))

    def _device_of(self, modules: Sequence[tuple[str, int]]) -> str | None:
        for path, number in reversed(modules):
            for prefix in reversed(prefixes(self._canonical.get(path, path))):
                if calls := self._own.get(prefix):
                    return calls.get(number) or next(iter(calls.values()))
        return None


def _twin(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Return a program with a graph of its own, which may be changed; all tensors are shared."""
    twin = copy.copy(program)
    graph = copy.deepcopy(program.graph_module.graph)
    twin._graph_module = torch.fx.GraphModule(program.graph_module, graph)
    return twin


class _Settings:
    """Flags and numbers that modules keep as attributes, read quickly at every call."""

    def __init__(self, modules: Sequence[torch.nn.Module]) -> None:
        self._modules = modules
        self._getters: list[tuple[Callable[[Any], Any], dict[str, Any]]] = []
        self._index()

    def _index(self) -> None:
        self._getters = []
        seen: set[int] = set()
        for module in self._modules:
            for holder in (module, getattr(module, "config", None)):
                if holder is None or id(holder) in seen or not hasattr(holder, "__dict__"):
                    continue
                seen.add(id(holder))
                kinds = (bool, float) if holder is module else _SIMPLE
                attributes = vars(holder)
                names = [name for name, value in attributes.items() if isinstance(value, kinds)]
                if names:
                    self._getters.append((itemgetter(*names), attributes))

    def read(self) -> tuple[Any, ...]:
        """Return them all."""
        try:
            return tuple(get(attributes) for get, attributes in self._getters)
        except KeyError:  # an attribute is gone
            self._index()
            return tuple(get(attributes) for get, attributes in self._getters)
