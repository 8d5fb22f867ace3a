"""One part of a pass through a stage program: its values, and per stage the piece of graph that the backward runs.

Forward, a stage takes its values cut off the graph of the stage that made them, and its outputs wait until their last
reader is done. With gradients on it leaves a `_Piece`: leaves for its inputs, the leaves of its weights and the edges
of its outputs. Backward, the same stages run in reverse: the gradient of a value is the sum of what its readers give,
in the order of the stages, and a weight's gradient likewise. → `segments` for the traps of autograd across threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .schedule import ReadyQueues, Schedule, Task
from .segments import Grads, Segment, alias
from .stage_program import StageProgram
from .streams import record_streams
from .worker import Ledger, TaskThread

__all__ = ["PartRun", "PartSegment", "Place"]


class Place(Protocol):
    """Where stages run: a device's worker, with its copies of weights, precision and compiled stages."""

    worker: TaskThread
    device: torch.device

    def weight(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a weight as this device has it."""

    def write_back(self, tensor: torch.Tensor) -> None:
        """Give a weight what was written to it here."""

    def function(self, module: torch.fx.GraphModule) -> Callable[..., tuple[Any, ...]]:
        """Return what to call for a stage."""

    def enter(self) -> AbstractContextManager[Any]:
        """Return the context of a stage's forward."""

    def arrange(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return an input of the model as this plan lays it out."""

    def restore(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return an output of the model in the usual layout."""


@dataclass
class _Piece:
    """What a stage computed with gradients on."""

    leaves: dict[str, torch.Tensor] = field(default_factory=dict)
    """Per input value that requires a gradient, the leaf that stands for it."""
    weights: dict[int, torch.Tensor] = field(default_factory=dict)
    """Position among the call's parameters to leaf."""
    edges: list[tuple[str, bool, GradientEdge]] = field(default_factory=list)
    """(name, whether it is the result at home rather than the value for other stages, edge) of every output."""


class PartRun:
    """One part's way through a program.

    Args:
        program: The stages.
        places: Where each stage's device is run.
        sources: The call's tensors, or this part's rows of them: pairs from `segments.alias`.
        parameters: Parameter id to its position among the call's; empty while gradients are off.
        graph: Whether gradients are on.
        home: Where results belong.
        number: The part's number: earlier parts go first.
    """

    def __init__(
        self,
        program: StageProgram,
        places: Mapping[str, Place],
        sources: Sequence[tuple[torch.Tensor | None, torch.Tensor]],
        parameters: Mapping[int, int],
        *,
        graph: bool,
        home: torch.device,
        number: int,
    ) -> None:
        self.program, self.places, self.parameters = program, places, parameters
        self.graph, self.home, self.number = graph, home, number
        split = program.split
        self.seen = [value for _, value in sources]
        self.leaves = [leaf for leaf, _ in sources]
        self.results: dict[str, Any] = dict(zip(split.inputs, self.seen, strict=True))
        self._values: dict[str, Any] = dict(self.results)
        numbers = split.scalars.forward(*self.seen) if split.scalar_names else ()
        self.numbers: dict[str, Any] = dict(zip(split.scalar_names, numbers, strict=True))
        self._values.update(self.numbers)
        self._lock = threading.Lock()
        self.pieces: list[_Piece | None] = [None] * len(split.stages)
        self._readers: dict[str, int] = {}
        for stage in split.stages:
            for name in stage.inputs:
                self._readers[name] = self._readers.get(name, 0) + 1
        self.wanted = {name for name in program.results if isinstance(name, str)}

    def result(self, name: str) -> Any:
        """Return a result of a part that has run: of a stage, an input, a number or a weight."""
        if name in self.results:
            return self.results[name]
        weight = self.program.weight(name)
        return self.numbers[name] if weight is None else weight

    def tasks(self) -> list[Task]:
        """Return the forward tasks, in the order of the stages."""
        tasks: list[Task] = []
        for i, stage in enumerate(self.program.split.stages):
            before = [tasks[j] for j in stage.before]
            worker = self.places[stage.device].worker
            tasks.append(Task((self.number, i), worker, stage.label, partial(self._forward, i), before))
        return tasks

    def _forward(self, index: int) -> None:
        stage = self.program.split.stages[index]
        place = self.places[stage.device]
        piece = _Piece()
        arguments = [self._argument(name, place, piece) for name in stage.inputs]
        record_streams(arguments)
        function = place.function(stage.module)
        with place.enter():
            outputs = function(*arguments)
        del arguments
        for name in stage.written:
            weight = self.program.weight(name)
            if weight is not None:
                place.write_back(weight)
        for name, value in zip(stage.outputs, outputs, strict=True):
            self._keep(name, value, place, piece)
        if self.graph:
            self.pieces[index] = piece
        for name in stage.inputs:
            self._release(name)

    def _argument(self, name: str, place: Place, piece: _Piece) -> Any:
        weight = self.program.weight(name)
        if weight is not None:
            local = place.weight(weight)
            if id(weight) in self.parameters and local.requires_grad:
                piece.weights[self.parameters[id(weight)]] = local
            return local
        value = self._values[name]
        if not isinstance(value, torch.Tensor):
            return value
        if self.graph:
            leaf, value = alias(value)
            if leaf is not None:
                piece.leaves[name] = leaf
        if value.device != place.device:
            value = value.to(place.device, non_blocking=True)
        return place.arrange(value) if name in self.results and value.dim() == 4 else value

    def _keep(self, name: str, value: Any, place: Place, piece: _Piece) -> None:
        if self._readers.get(name):
            self._values[name] = value
            if self.graph and _has_graph(value):
                piece.edges.append((name, False, get_gradient_edge(value)))
        if name in self.wanted:
            result = place.restore(value.to(self.home)) if isinstance(value, torch.Tensor) else value
            self.results[name] = result
            if self.graph and _has_graph(result):
                piece.edges.append((name, True, get_gradient_edge(result)))

    def _release(self, name: str) -> None:
        """Count one reader less of a value, and let it go after the last."""
        with self._lock:
            self._readers[name] -= 1
            if self._readers[name] <= 0:
                self._values.pop(name, None)


def _has_graph(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


class _Starter:
    """Stands for a thread where `segments` gives a part's backward to one: it starts the tasks and returns at once."""

    name = ""

    @staticmethod
    def submit(fn: Callable[[], Future[Grads]], ledger: Ledger | None = None, label: str = "") -> Future[Grads]:
        """Call `fn`, which returns a future, and return that."""
        return fn()


@dataclass
class PartSegment(Segment):
    """A part's graph as `segments.join` wants it: its backward runs the stages in reverse and gives a future."""

    run: PartRun = field(kw_only=True)
    queues: ReadyQueues = field(kw_only=True)
    """Shared by the parts of a pass, so that earlier parts go first."""
    names: dict[int, str] = field(init=False)
    """Id of a result to its name."""

    def __post_init__(self) -> None:
        results = [(name, self.run.result(name)) for name in self.run.wanted]
        self.names = {id(value): name for name, value in results if _has_graph(value)}
        self.run.results = {}  # what the segment holds of them, in `outputs`, is for its owner to say

    def backward(self, grads: Grads, keep: bool) -> Future[Grads]:  # type: ignore[override]
        """Start the backward; the future gets the gradients of `leaves` and `parameters`."""
        given: dict[str, Grads] = {}
        for output, grad in zip(self.outputs, grads, strict=True):
            if output is not None and grad is not None:
                given.setdefault(self.names[id(output)], []).append(grad)
        assert self.ledger is not None  # the executor gives its own
        backward = _Backward(self, {name: _total(some) for name, some in given.items()}, keep)
        schedule = Schedule(backward.tasks(), self.ledger, self.queues, backward.finish)
        alive = all(place.worker.alive for place in self.run.places.values())
        return schedule.start() if alive else schedule.run_here()

    @staticmethod
    def of(run: PartRun, parameters: Sequence[torch.Tensor], ledger: Ledger, queues: ReadyQueues) -> PartSegment:
        """Return the segment of a part whose forward is done."""
        starter: Any = _Starter()
        return PartSegment(starter, ledger, run.leaves, list(parameters), [], run=run, queues=queues)


class _Backward:
    """One backward of a part."""

    def __init__(self, segment: PartSegment, given: Mapping[str, torch.Tensor | None], keep: bool) -> None:
        self._segment, self._run, self._given, self._keep = segment, segment.run, given, keep
        self._received: dict[str, dict[int, torch.Tensor]] = {}
        """Value to the gradients that stages gave for it."""
        self._weights: dict[int, dict[int, torch.Tensor]] = {}
        """Parameter to the gradients that stages gave for it."""

    def tasks(self) -> list[Task]:
        """Return a task per stage that has a graph, in reverse order."""
        run = self._run
        stages = run.program.split.stages
        readers: dict[str, list[Task]] = {}
        tasks: list[Task] = []
        for i in reversed(range(len(stages))):
            piece = run.pieces[i]
            if piece is None or not piece.edges:
                continue
            before = {id(t): t for name, home, _ in piece.edges if not home for t in readers.get(name, ())}
            worker = run.places[stages[i].device].worker
            task = Task(
                (run.number, len(stages) - i),
                worker,
                f"{stages[i].label} backward",
                partial(self._stage, i),
                list(before.values()),
            )
            tasks.append(task)
            for name in piece.leaves:
                readers.setdefault(name, []).append(task)
        return tasks

    def _stage(self, index: int) -> None:
        piece = self._run.pieces[index]
        assert piece is not None  # only those with one have tasks
        edges, grads = [], []
        for name, home, edge in piece.edges:
            grad = self._given.get(name) if home else self._sum(self._received.pop(name, {}))
            if grad is not None:
                edges.append(edge)
                grads.append(grad)
        targets = [*piece.leaves.values(), *piece.weights.values()]
        if not edges or not targets:
            return
        record_streams(grads)
        with torch.autograd.set_multithreading_enabled(False):
            found = torch.autograd.grad(edges, targets, grads, retain_graph=self._keep, allow_unused=True)
        if not self._keep:
            self._run.pieces[index] = None
        received = [self._received.setdefault(name, {}) for name in piece.leaves]
        weights = [self._weights.setdefault(position, {}) for position in piece.weights]
        for grad, slot in zip(found, [*received, *weights], strict=True):
            if grad is not None:
                slot[index] = grad

    @staticmethod
    def _sum(by_stage: Mapping[int, torch.Tensor]) -> torch.Tensor | None:
        record_streams(by_stage.values())
        return _total([by_stage[i] for i in sorted(by_stage)])

    def finish(self) -> Grads:
        """Return the gradients of the part's leaves and parameters."""
        found: Grads = []
        for name, leaf in zip(self._run.program.split.inputs, self._segment.leaves, strict=True):
            passed = self._given.get(name)
            own = self._sum(self._received.get(name, {}))
            found.append(None if leaf is None else _total([own, passed]))
        returned = {id(self._run.program.weight(name)): grad for name, grad in self._given.items()}
        for position, parameter in enumerate(self._segment.parameters):
            by_stage = self._weights.get(position, {})
            record_streams(by_stage.values())
            here = [by_stage[i].to(parameter.device) for i in sorted(by_stage)]
            found.append(_total([*here, returned.get(id(parameter))]))
        return found


def _total(grads: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Add up in order; only what this function allocated is added to in place."""
    given = [grad for grad in grads if grad is not None]
    if len(given) < 2:
        return given[0] if given else None
    total = given[0] + given[1]
    for grad in given[2:]:
        total = total.add_(grad) if total.layout == grad.layout == torch.strided else total + grad
    return total
