"""Stage functions cut from the exported graph, on several devices: any DAG of stages, branches at the same time.

The model's call is exported and split into stages (→ `stage_program`, `autoplace.graph.split`). Every microbatch of
every replica runs each stage as a task on its device's worker as soon as its inputs are there (→ `schedule`), so that
branches of one model run at once, microbatches follow each other, and the backward is overlapped as the forward is. A
pass with gradients is one node in the caller's graph. A value is freed when its last reader is done; a stage's inputs
live as long as the stage runs.

Exported graphs are not the model's own code: hooks and activation checkpointing are refused, and so is what cannot be
exported, when the first call comes. Random operations draw other numbers than plain PyTorch's, statistically the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, ClassVar

import torch

from autoplace.errors import ExecutionError
from autoplace.hardware.cluster import Cluster
from autoplace.outcome import Span
from autoplace.plan import Plan

from ._base import Executor
from .batch import batch_size, part_sizes
from .compiling import Compiler
from .layout import lay_out
from .schedule import ReadyQueues, Schedule
from .segments import alias
from .sites import Call, Part, Rows, autocast_dtype, finish
from .stage_program import ProgramCache
from .stage_run import PartRun, PartSegment
from .standins import Standins
from .worker import DeviceWorker, TaskThread
from .workers import Workers

__all__ = ["StageGraph"]


class _Place:
    """A device's worker and how stages run there; see `stage_run.Place`."""

    def __init__(self, worker: DeviceWorker, plan: Plan, compiler: Compiler) -> None:
        self.worker: TaskThread = worker
        self.device = worker.torch_device or torch.device("cpu")
        self._dtype = autocast_dtype(plan.precision)
        self._compiler = compiler if plan.compiled else None
        self._channels_last = plan.channels_last
        self._standins = Standins(self.device)

    def weight(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._standins.of(tensor)

    def write_back(self, tensor: torch.Tensor) -> None:
        self._standins.write_back(tensor)

    def function(self, module: torch.fx.GraphModule) -> Callable[..., tuple[Any, ...]]:
        if self._compiler is not None:
            return self._compiler.wrap(module)
        forward: Callable[..., tuple[Any, ...]] = module.forward  # past what prints a graph's code when it raises
        return forward

    def enter(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._dtype is None else torch.autocast(self.device.type, dtype=self._dtype)

    def arrange(self, tensor: torch.Tensor) -> torch.Tensor:
        values: list[Any] = [tensor]
        if self._channels_last:
            lay_out(values)
        arranged: torch.Tensor = values[0]
        return arranged

    def restore(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous() if self._channels_last and tensor.dim() == 4 else tensor


class StageGraph(Executor):
    """Runs the stages of a plan as a graph of tasks on the devices' workers.

    Args:
        model: The model; it is exported when it is first called, its parameters are shared.
        plan: A plan of stages, or of replicas some of which are.
        cluster: Where the plan's devices are described.

    Raises:
        ExecutionError: If the plan does not fit the model, the cluster or this machine, or the model has hooks.
    """

    shapes: ClassVar[tuple[str, ...]] = ("stages", "hybrid")

    def __init__(self, model: torch.nn.Module, plan: Plan, cluster: Cluster) -> None:
        super().__init__(model, plan, cluster)
        if plan.shape not in self.shapes:
            raise ExecutionError(
                f"{type(self).__name__} runs plans of shape {', '.join(self.shapes)}, not {plan.shape!r}; "
                "let build_executor choose"
            )
        autocast_dtype(plan.precision)  # refuses an unknown one before any thread starts
        self._closed = False
        self._members = [m._parameters for m in model.modules() if m._parameters]
        self._workers = Workers(plan, cluster, plan.devices)
        self._compiler = Compiler(cpp_wrapper=plan.cpp_wrapper)
        self._places = {name: _Place(w, plan, self._compiler) for name, w in self._workers.by_name.items()}
        with ExitStack() as stack:
            stack.callback(self.close)
            self._caches = self._program_caches()
            stack.pop_all()

    def _parameters(self) -> Iterable[torch.nn.Parameter]:
        """Return the model's parameters, each once; its modules are looked up once, which takes longer than a call."""
        return dict.fromkeys(p for own in self._members for p in own.values() if p is not None)

    def _program_caches(self) -> list[ProgramCache]:
        """Return one per replica; replicas of equal assignments share theirs."""
        caches: dict[frozenset[tuple[str, str]], ProgramCache] = {}
        for replica in self.plan.replicas:
            key = frozenset(replica.assignment.items())
            if key not in caches:
                places = {name: self._places[name].device for name in replica.devices}
                caches[key] = ProgramCache(self.model, replica.assignment, places)
        return [caches[frozenset(replica.assignment.items())] for replica in self.plan.replicas]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one pass; see `Executor.__call__`."""
        if self._closed:
            raise ExecutionError("this executor is closed; build it again")
        # Equal calls are one program, in whatever order their keywords come.
        call = Call(self.model, self.model, args, dict(sorted(kwargs.items())), self._parameters())
        batch, sizes, start = None, [], 0
        parts = [(0, 0)]
        if len(self._caches) > 1 or self.plan.microbatches > 1:
            size = batch_size(call.tree.leaves)
            parts = part_sizes(self.plan, size)
            batch = size if len(parts) > 1 else None
        rows: list[Rows] = []
        runs: list[PartRun] = []
        for number, (replica, size) in enumerate(parts):
            if batch is not None:
                rows = [(start, size) if _splits(leaf, batch) else None for leaf in call.tree.leaves]
            runs.append(self._part(call, replica, number, rows))
            sizes.append(size)
            start += size
        queues = ReadyQueues()
        schedule = Schedule([task for run in runs for task in run.tasks()], self._workers.ledger, queues)
        try:
            TaskThread.wait(schedule.start())
        except BaseException:
            schedule.cancel()
            raise
        made = [self._finished(call, run, queues) for run in runs]
        return finish(call, made) if batch is None else finish(call, made, sizes, rows)

    def _part(self, call: Call, replica: int, number: int, rows: list[Rows]) -> PartRun:
        cuts = [rows[i] if rows else None for i, x in enumerate(call.tree.leaves) if isinstance(x, torch.Tensor)]
        tensors = [t if cut is None else t.narrow(0, *cut) for t, cut in zip(call.sources, cuts, strict=True)]
        size = next((int(t.shape[0]) for t in tensors if t.dim() > 0), None)
        with self._autocast():
            program = self._caches[replica].find(call.tree, tensors, size)
        pairs = [(None, tensor) for tensor in tensors]
        return PartRun(
            program,
            {name: self._places[name] for name in self.plan.replicas[replica].devices},
            [alias(s, cut) for s, cut in zip(call.sources, cuts, strict=True)] if call.graph else pairs,
            {id(p): i for i, p in enumerate(call.parameters)},
            graph=call.graph,
            home=call.home,
            number=number,
        )

    def _autocast(self) -> ExitStack:
        """Enter the plan's autocast on every kind of device, as stages will run under it."""
        stack = ExitStack()
        for place in self._places.values():
            stack.enter_context(place.enter())
        return stack

    def _finished(self, call: Call, run: PartRun, queues: ReadyQueues) -> Part:
        output = run.program.output(run.result)
        segment = PartSegment.of(run, call.parameters, self._workers.ledger, queues) if call.graph else None
        return Part(output, run.seen, segment)

    def busy_ms(self) -> dict[str, float]:
        """Return device name to busy milliseconds since the last call; see `Workers.busy_ms`."""
        return self._workers.busy_ms()

    def timeline(self) -> tuple[Span, ...]:
        """Return what ran when on the CPU devices since the last call, from the start of the first task."""
        return self._workers.ledger.take_spans()

    def compile_s(self) -> float:
        """Return the wall seconds that calls of this executor have spent in `torch.compile`, over all workers."""
        return self._compiler.seconds

    def close(self) -> None:
        """End the threads; calling it twice does nothing more."""
        if not self._closed:
            self._closed = True
            self._workers.close()


def _splits(leaf: Any, batch: int) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch
