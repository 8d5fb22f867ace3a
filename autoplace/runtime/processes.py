"""Data parallelism on one host's cores in processes: for models whose Python code, not their operations, is the limit.

The caller's thread runs the first replica on the original model; every further replica has a process of its own,
pinned to its core group, that shares the parameters' memory (→ `shipping`) and follows the rest of the model
(→ `mirror`). Inputs, outputs and gradients go through shared memory (→ `slab`), words about them through a socket
(→ `channel`). In training each replica keeps its own graph; one node in the caller's graph stands for all of them
(→ `segments`).

1. What processes leave out: hooks, buffers that the model modifies (the check refuses such a plan), inputs modified in
   place, gradients of gradients, and objects of the program's main file.
2. Once shared, parameters stay in shared memory, also after `close`.
3. Random numbers: every pass in which the model draws some starts the processes from seeds that are drawn from the
   caller's generator. Python's and NumPy's generators are the processes' own.
4. Calls from several threads, forward or backward, take turns.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from autoplace.errors import ExecutionError
from autoplace.hardware.cluster import Cluster, Device
from autoplace.outcome import Span
from autoplace.plan import Plan

from . import routing
from ._base import Executor
from .batch import batch_size, part_sizes
from .mirror import Mirror
from .process_graph import Here, Later, Outputs, OwnSegment, RemoteSegment, There
from .process_link import LostProcessError, WorkerProcess
from .process_worker import Forward, Modes, Runner, Start
from .segments import Grads, alias, wait_all
from .shipping import Shipment, dump, ship_model, supported
from .sites import Call, Part, Rows, autocast_dtype, finish
from .tree import shared_object
from .worker import DeviceWorker, Ledger, group_cores, spread_busy

__all__ = ["ProcessReplicas", "supported"]


@dataclass(frozen=True)
class _Seat:
    """Where a replica runs."""

    device: Device
    cores: list[int]
    threads: int
    filled: float | None
    """Threads per core of the host, where it may use all its cores."""


@dataclass(frozen=True)
class _Work:
    """What a pass sends out."""

    structure: bytes
    tensors: list[torch.Tensor]
    """The call's sources, then others that the structure holds."""
    batched: list[bool]
    """Per tensor, whether it is split with the batch."""
    shares: list[list[int]]
    """Samples of every microbatch of every replica; the first replica has some."""


class ProcessReplicas(Executor):
    """Splits the batch by the replicas' shares, runs all but the first in processes, and merges the outputs.

    Args:
        model: The model; its parameters are moved to shared memory, in place.
        plan: A plan of several replicas, each on one CPU core group of this host.
        cluster: Where the plan's devices are described.

    Raises:
        ExecutionError: If the plan names a device that is no core group of this host, or the model cannot run in other
            processes → `shipping.supported`.
    """

    shapes: ClassVar[tuple[str, ...]] = ("replicas",)
    answer_limit_s: ClassVar[float] = 600.0
    """How long a process may take for one pass before it is taken for dead; compiling counts."""

    def __init__(self, model: torch.nn.Module, plan: Plan, cluster: Cluster) -> None:
        super().__init__(model, plan, cluster)
        if plan.shape not in self.shapes:
            raise ExecutionError(
                f"processes run plans of shape replicas, not {plan.shape!r}; let build_executor choose"
            )
        autocast_dtype(plan.precision)  # refuses an unknown one before anything is started
        if reason := supported(model):
            raise ExecutionError(reason)
        for replica in plan.replicas:
            routing.resolve(model, replica.assignment, cluster)
        self._seats = [self._seat(replica.devices[0]) for replica in plan.replicas]
        self._ledger = Ledger()
        self._lock = threading.RLock()
        self._inside = False
        self._synced = False
        """Whether every process follows the model as of the last pass."""
        self._random = False
        """Whether the last pass drew random numbers."""
        self._compile_s: dict[str, float] = {}
        self._outputs = Outputs()
        self._pid = os.getpid()
        knobs: dict[str, Any] = {
            "precision": plan.precision,
            "compiled": plan.compiled,
            "cpp_wrapper": plan.cpp_wrapper,
            "channels_last": plan.channels_last,
        }
        self._runner = Runner(model, **knobs)
        shipment = ship_model(model)
        self._mirror = Mirror(model)
        self._processes: list[WorkerProcess] = []
        self._finalizer = weakref.finalize(self, _end_all, self._processes, self._pid)
        _live.add(self)
        with ExitStack() as stack:
            stack.callback(self.close)
            for i, seat in enumerate(self._seats[1:], 1):
                seed = (torch.initial_seed() + i) % 2**63
                start = partial(_start, shipment=shipment, threads=seat.threads, seed=seed, **knobs)
                self._processes.append(WorkerProcess(seat.device.name, seat.cores, start, self.answer_limit_s))
            self._worker, self._here = self._own_place(self._seats[0])
            for process in self._processes:
                process.ready()
            stack.pop_all()

    def _seat(self, name: str) -> _Seat:
        device = self.cluster.devices[self.cluster.index[name]]
        if device.kind != "cpu":
            raise ExecutionError(f"processes run on CPU core groups alone, and {name!r} is none; use a plan of threads")
        if device.host != self.cluster.devices[self.cluster.index[self.plan.devices[0]]].host:
            raise ExecutionError("the plan uses devices of more than one host; processes share the memory of one")
        own = group_cores(device)
        threads = self.plan.threads.get(name, len(own))
        if threads <= len(own):
            return _Seat(device, own, threads, None)
        host = {core for other in self.cluster.devices if other.host == device.host for core in other.cores}
        available = os.sched_getaffinity(0)
        wide = sorted(available & host) or sorted(available)
        return _Seat(device, wide, threads, threads / len(wide))

    def _own_place(self, seat: _Seat) -> tuple[DeviceWorker | None, Any]:
        """Return the worker, if one is needed, and what runs the first replica.

        One thread, or all cores, need none: the calling thread does it. Several threads on some of the cores are a
        pool that has to be pinned when it is made, and so has a thread of its own.
        """
        if seat.threads == 1 or set(seat.cores) == os.sched_getaffinity(0):
            self._pin = frozenset(seat.cores)
            return None, Here(seat.device.name, seat.threads)
        self._pin = frozenset()
        worker = DeviceWorker(seat.device, seat.threads)
        return worker, worker

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one pass; see `Executor.__call__`."""
        self._refuse_foreign()
        call = Call(self.model, self.model, args, kwargs, self._mirror.parameters)
        work = self._split(call, args, kwargs)
        with self._alone():
            synced, self._synced = self._synced, False  # an exception on the way leaves it so
            used = [process for process, share in zip(self._processes, work.shares[1:], strict=True) if share]
            if used:
                self._ask(call, work, everything=not synced)
            self._random = False
            known: list[bool] = []
            own = self._here.submit(partial(self._own, call, work, known), self._ledger, call.label)
            remote = [Later(partial(self._take, call, process, len(work.tensors), known)) for process in used]
            parts: list[Part] = wait_all([own, *remote])  # type: ignore[list-item]
            self._synced = len(used) == len(self._processes)
            batched = iter(work.batched)
            rows: list[Rows] = [
                (0, 0) if isinstance(leaf, torch.Tensor) and next(batched) else None for leaf in call.tree.leaves
            ]  # `finish` asks which inputs were split, not where
            return finish(call, parts, [sum(share) for share in work.shares if share], rows)

    def _split(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Work:
        shared = shared_object(call.tree.leaves)
        if shared is not None:
            raise ExecutionError(
                f"an input of type {type(shared).__name__} cannot be split with the batch; use a plan with one part"
            )
        batch = batch_size(call.tree.leaves)
        shares: list[list[int]] = [[] for _ in self.plan.replicas]
        for replica, size in part_sizes(self.plan, batch):
            shares[replica].append(size)
        first = next(i for i, share in enumerate(shares) if share)
        shares[0], shares[first] = shares[first], shares[0]  # a batch that is too small for all is run from here first
        if any(tensor.layout != torch.strided for tensor in call.sources):
            raise ExecutionError("a sparse input cannot be split for other processes; use a plan with one part")
        structure, tensors = dump((args, kwargs), call.sources)
        batched = [i < len(call.sources) and t.dim() > 0 and t.shape[0] == batch for i, t in enumerate(tensors)]
        return _Work(structure, tensors, batched, shares)

    def _ask(self, call: Call, work: _Work, *, everything: bool) -> None:
        """Send the processes their shares of a pass."""
        changes, buffers = self._mirror.changes(everything=everything)
        seeds = self._seeds(changed=bool(changes.attributes))
        modes = Modes.of_caller()
        requires = [call.graph and tensor.requires_grad for tensor in work.tensors]
        start = sum(work.shares[0])
        for process, sizes, seed in zip(self._processes, work.shares[1:], seeds, strict=True):
            if not sizes:
                continue
            samples = sum(sizes)
            slices = [
                tensor.detach().narrow(0, start, samples) if split else tensor
                for tensor, split in zip(work.tensors, work.batched, strict=True)
            ]
            places = process.inputs.pack([*buffers, *slices])
            forward = Forward(0, [], changes, seed, modes, work.structure, places, work.batched, requires, sizes)
            process.ask(forward)
            start += samples

    def _seeds(self, *, changed: bool) -> list[int | None]:
        """Return the processes' seeds for one pass; drawn only where random numbers were drawn last time, or may be.

        Args:
            changed: Whether the model's flags or attributes are other ones than last time.
        """
        if not (self._random or (changed and self._mirror.training)):
            return [None] * len(self._processes)
        return list(torch.randint(2**62, (len(self._processes),)).tolist())

    def _own(self, call: Call, work: _Work, known: list[bool]) -> Part:
        """Run the first replica, on the model itself."""
        sizes = work.shares[0]
        alone = not any(work.shares[1:])
        leaves: Grads = []
        seen: list[torch.Tensor] = []
        values: list[Any] = []
        split: list[bool] = []
        for value in call.tree.leaves:
            cut = isinstance(value, torch.Tensor) and work.batched[len(seen)]
            if isinstance(value, torch.Tensor):
                rows = (0, sum(sizes)) if cut and not alone else None
                leaf, value = alias(value, rows) if call.graph else (None, value.narrow(0, *rows) if rows else value)
                leaves.append(leaf)
                seen.append(value)
            values.append(value)
            split.append(cut)
        output = self._runner.run(call.tree.build, values, split, sizes)
        if not call.graph:
            return Part(output, seen, None)
        modified = [i for i, tensor in enumerate(seen) if not tensor.is_inference() and tensor._version > 0]
        thread: Any = self._here
        parameters: list[torch.Tensor] = list(call.parameters)
        segment = OwnSegment(thread, self._ledger, leaves, parameters, [], call.label, guard=self._alone, known=known)
        return Part(output, seen, segment, modified)

    def _take(self, call: Call, process: WorkerProcess, tensors: int, known: list[bool]) -> Part:
        """Return what came of one process's share."""
        answer = process.take()
        self._ledger.add_task(process.device, call.label, *answer.span)
        self._random = self._random or answer.random
        self._compile_s[process.device] = answer.compile_s
        if answer.modified:
            raise ExecutionError(
                "the model modifies an input in place, which other processes cannot do for the caller; "
                "use a plan of threads"
            )
        views = [
            process.outputs.look(place).detach().requires_grad_(requires)
            for place, requires in zip(answer.tensors, answer.requires_grad, strict=True)
            if place is not None
        ]
        output = self._outputs.tree(answer.structure, views)
        if not call.graph:
            return Part(output, [], None)
        thread: Any = There(process.device)
        segment = RemoteSegment(
            thread,
            self._ledger,
            [None] * len(call.sources),
            [],
            [],
            call.label,
            process=process,
            number=answer.number,
            views={id(view): i for i, view in enumerate(views)},
            extras=slice(len(call.sources), tensors),
            known=known,
        )
        if any(answer.requires_grad):
            weakref.finalize(segment, process.dropped.append, answer.number).atexit = False
        return Part(output, [], segment)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the processes for one pass, forward or backward."""
        self._refuse_foreign()
        with self._lock, _pinned(self._pin):
            if self._inside:
                raise ExecutionError(
                    "the model called the plan that runs it, which its processes cannot answer; use a plan of threads"
                )
            if not self._finalizer.alive:
                raise ExecutionError("this executor is closed, and its graphs with it; build it again")
            self._inside = True
            try:
                for process in self._processes:
                    process.settle()
                yield
            except LostProcessError:
                self.close()
                raise
            finally:
                self._inside = False

    def _refuse_foreign(self) -> None:
        if os.getpid() != self._pid:
            raise ExecutionError(
                "this process was forked from the one that started the plan's processes; build the executor again here"
            )

    def busy_ms(self) -> dict[str, float]:
        """Return device name to busy milliseconds since the last call."""
        busy = {seat.device.name: 0.0 for seat in self._seats}
        own = self._ledger.take()
        for seat in self._seats:
            spread = spread_busy(self.cluster, seat.device, own.pop(seat.device.name, 0.0), seat.filled)
            for name, device_ms in spread.items():
                busy[name] = busy.get(name, 0.0) + device_ms
        return busy

    def timeline(self) -> tuple[Span, ...]:
        """Return what ran when since the last call, from the start of the first task."""
        return self._ledger.take_spans()

    def compile_s(self) -> float:
        """Return the wall seconds spent in `torch.compile`: the most of any process, as they compile at one time."""
        return max([self._runner.compile_s, *self._compile_s.values()])

    def close(self) -> None:
        """End the processes; calling it twice does nothing more. Graphs that wait for their backward are lost."""
        self._finalizer()
        worker = getattr(self, "_worker", None)
        if worker is not None:
            worker.close()


def _start(inputs_fd: int, outputs_fd: int, *, shipment: Shipment, **knobs: Any) -> Start:
    return Start(shipment=shipment, inputs_fd=inputs_fd, outputs_fd=outputs_fd, **knobs)


@contextmanager
def _pinned(cores: frozenset[int]) -> Iterator[None]:
    """Keep the calling thread on these cores; it would be in the processes' way on theirs. Empty = where it is."""
    before = os.sched_getaffinity(0)
    if not cores or cores == before:
        yield
        return
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _end_all(processes: list[WorkerProcess], pid: int) -> None:
    """End an executor's processes: on `close`, when it is collected, or at exit."""
    if os.getpid() != pid:
        return
    for process in processes:
        process.shut()
    for process in processes:
        process.end()


_live: weakref.WeakSet[ProcessReplicas] = weakref.WeakSet()


def _forget_all() -> None:
    """After a fork, in the child: the connections are the parent's, and must close when the parent ends."""
    for executor in list(_live):
        for process in executor._processes:
            process.forget()


os.register_at_fork(after_in_child=_forget_all)
