"""A place where module calls run: a device's worker with its stand-ins, precision and compiled callables, or a control
thread that runs the code between the modules.

A `Call` is what is to run and on which inputs; a `Part` what came of it on one site; `finish` makes the parts one
result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from autoplace.errors import ExecutionError

from .batch import CAT, MEAN, join_kinds
from .compiling import Compiler
from .copies import Copies
from .layout import lay_out, take_back
from .segments import Grads, Join, Segment, alias, join
from .streams import record_streams
from .tree import Tree
from .worker import Ledger, TaskThread

__all__ = ["PRECISIONS", "Call", "Part", "Site", "autocast_dtype", "finish"]

PRECISIONS: dict[str, torch.dtype | None] = {
    "float32": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Values of `Plan.precision` to the autocast dtype; None = as the model and the caller have it."""

Rows = tuple[int, int] | None


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Return the autocast dtype of a plan's precision; None = as the model and the caller have it.

    Raises:
        ExecutionError: If the precision is unknown.
    """
    if precision not in PRECISIONS:
        raise ExecutionError(f"precision {precision!r} is unknown; use one of {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


class Call:
    """A module call: what is to run, on which inputs.

    Args:
        module: The module whose parameters the call uses.
        function: What to call; `module` itself, or its original `forward`.
        args, kwargs: The inputs.
        parameters: The module's parameters.
        label: What it is, for timelines.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        parameters: Iterable[torch.nn.Parameter],
        label: str = "model",
    ) -> None:
        self.label = label
        self.turn: Callable[[], AbstractContextManager[None]] = nullcontext
        """Entered around the call's own work, forward and backward, where parts take turns on devices."""
        self.channels_last = False
        """Whether image inputs are laid out channels last. → `layout`"""
        self.module = module
        self.function = function
        self.tree = Tree((args, kwargs))
        self.graph = torch.is_grad_enabled()
        self.sources = [leaf for leaf in self.tree.leaves if isinstance(leaf, torch.Tensor)]
        self.parameters = [p for p in parameters if p.requires_grad] if self.graph else []

    @property
    def home(self) -> torch.device:
        """Where the outputs belong: the device of the first input tensor, else of the first parameter, else the CPU."""
        first = self.sources[0] if self.sources else next(self.module.parameters(), None)
        return torch.device("cpu") if first is None else first.device


@dataclass
class Part:
    """What came of a call, or of a slice of its batch, on one site."""

    output: Tree
    inputs: list[torch.Tensor]
    """The tensors that the module saw, one per source of the call."""
    segment: Segment | None
    """Its graph; `outputs` are filled in by `finish`."""
    modified: list[int] = field(default_factory=list)
    """Positions of the sources that the module modified in place."""


class Site:
    """A thread, and how module calls run in it.

    Args:
        thread: A device's worker, or a control thread.
        ledger: Gets the busy time; None = nobody's.
        precision: A key of `PRECISIONS`.
        compiler: Compiles what is called; None = calls it as it is.
    """

    def __init__(
        self,
        thread: TaskThread,
        ledger: Ledger | None = None,
        *,
        precision: str = "float32",
        compiler: Compiler | None = None,
    ) -> None:
        self.thread = thread
        self.ledger = ledger
        self._dtype = autocast_dtype(precision)
        self._copies = Copies(thread.torch_device) if thread.torch_device is not None else None
        self._compiler = compiler
        self._compiled: dict[tuple[int, bool], Callable[..., Any]] = {}

    def start(self, call: Call, rows: Sequence[Rows] = ()) -> Future[Part]:
        """Start a call.

        Args:
            call: What to run.
            rows: Per leaf of the call's inputs (start, length) along dimension 0, or None for all; empty = all whole.
        """
        return self.thread.submit(partial(self._run, call, rows), self.ledger, call.label)

    def _run(self, call: Call, rows: Sequence[Rows]) -> Part:
        leaves: Grads = []
        seen: list[torch.Tensor] = []
        values: list[Any] = []
        for i, value in enumerate(call.tree.leaves):
            if isinstance(value, torch.Tensor):
                cut = rows[i] if rows else None
                leaf, value = (
                    alias(value, cut) if call.graph else (None, value if cut is None else value.narrow(0, *cut))
                )
                leaves.append(leaf)
                seen.append(value)
                value = self._here(value)
            values.append(value)
        record_streams(values)
        function, parameters, done = self._callable(call)
        laid = lay_out(values) if call.channels_last else []
        args, kwargs = call.tree.build(values)
        with self._autocast():
            output = Tree(function(*args, **kwargs), objects=True, keep=call.tree.leaves)
        take_back(laid, output.leaves)
        done()
        self._bring_home(output, call.home)
        if not call.graph:
            return Part(output, seen, None)
        modified = [i for i, tensor in enumerate(seen) if not tensor.is_inference() and tensor._version > 0]
        return Part(
            output, seen, Segment(self.thread, self.ledger, leaves, parameters, [], call.label, call.turn), modified
        )

    def _here(self, value: torch.Tensor) -> torch.Tensor:
        device = self.thread.torch_device
        return value if device is None or value.device == device else value.to(device, non_blocking=True)

    def _bring_home(self, output: Tree, home: torch.device) -> None:
        device = self.thread.torch_device
        if device is not None and device != home:
            output.leaves = [
                leaf.to(home) if isinstance(leaf, torch.Tensor) and leaf.device == device else leaf
                for leaf in output.leaves
            ]

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._dtype is None or self.thread.torch_device is None:
            return nullcontext()
        return torch.autocast(self.thread.torch_device.type, dtype=self._dtype)

    def _callable(self, call: Call) -> tuple[Callable[..., Any], list[torch.Tensor], Callable[[], None]]:
        """Return what to call here, the leaves of the call's parameters, and what to do after."""
        function, whole = call.function, call.function is call.module
        parameters: list[torch.Tensor] = list(call.parameters)
        done: Callable[[], None] = _nothing
        key = call.module
        if self._copies is not None and self._copies.needed(call.module):
            standin = self._copies.of(call.module)
            local = {id(source): leaf for source, leaf in standin.parameters}
            parameters = [local[id(p)] for p in call.parameters]
            key, done = standin.module, standin.write_back
            function = standin.module if whole else standin.module.forward
        if self._compiler is not None and self._copies is not None:
            if (id(key), whole) not in self._compiled:
                self._compiled[id(key), whole] = self._compiler.wrap(key, function)
            function = self._compiled[id(key), whole]
        return function, parameters, done


def _nothing() -> None:
    return None


def finish(call: Call, parts: Sequence[Part], sizes: Sequence[int] = (1,), rows: Sequence[Rows] = ()) -> Any:
    """Make the parts' outputs the call's one result, with one node in the caller's graph when gradients are on.

    Raises:
        ExecutionError: If the parts cannot be merged.
    """
    for part in parts:
        record_streams(part.output.leaves)
    if len(parts) == 1:
        return _finish_one(call, parts[0])
    if any(part.modified and call.sources[i].requires_grad for part in parts for i in part.modified):
        raise ExecutionError("the model modifies an input in place, so its batch cannot be split; use a one-part plan")
    kinds = join_kinds([part.output for part in parts], sizes)
    columns = list(zip(*(part.output.leaves for part in parts), strict=True))
    total = sum(sizes)
    merged: list[Any] = []
    with torch.no_grad():
        for kind, values in zip(kinds, columns, strict=True):
            if kind == CAT:
                merged.append(torch.cat(list(values)))
            elif kind == MEAN:
                merged.append(sum(v.detach() * (n / total) for v, n in zip(values, sizes, strict=True)))
            else:
                merged.append(values[0])
    graph = [j for j, (k, vs) in enumerate(zip(kinds, columns, strict=True)) if k in (CAT, MEAN) and _has_graph(vs)]
    if call.graph and graph:
        for part in parts:
            _set_outputs(part, [part.output.leaves[j] for j in graph])
        plan = Join(
            call.sources,
            call.parameters,
            [part.segment for part in parts if part.segment is not None],
            sizes=sizes,
            split=[
                cut is not None
                for cut, leaf in zip(rows, call.tree.leaves, strict=True)
                if isinstance(leaf, torch.Tensor)
            ],
            cat=[kinds[j] == CAT for j in graph],
        )
        for j, value in zip(graph, join(plan, [merged[j] for j in graph]), strict=True):
            merged[j] = value
    return parts[0].output.build(merged)


def _finish_one(call: Call, part: Part) -> Any:
    leaves = list(part.output.leaves)
    if part.segment is None:
        return part.output.build(leaves)
    same = {id(tensor): i for i, tensor in enumerate(part.inputs)}
    graph = [j for j, leaf in enumerate(leaves) if _has_graph((leaf,)) and id(leaf) not in same]
    dirty = [i for i in part.modified if part.inputs[i].requires_grad]
    for i in set(part.modified) - set(dirty):
        torch.autograd.graph.increment_version(call.sources[i])
    for j, leaf in enumerate(leaves):
        if id(leaf) in same:
            leaves[j] = call.sources[same[id(leaf)]]
    if graph or dirty:
        _set_outputs(part, [*(leaves[j] for j in graph), *(part.inputs[i] for i in dirty)])
        plan = Join(call.sources, call.parameters, [part.segment], dirty=dirty)
        for j, value in zip(graph, join(plan, [leaves[j].detach() for j in graph]), strict=True):
            leaves[j] = value
    return part.output.build(leaves)


def _set_outputs(part: Part, values: Sequence[torch.Tensor]) -> None:
    assert part.segment is not None  # a call with gradients on has one in every part
    part.segment.outputs = [value if value.requires_grad else None for value in values]


def _has_graph(values: Sequence[Any]) -> bool:
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)
