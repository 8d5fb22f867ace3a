"""The whole model on one device, in the caller's own thread: nothing is handed over, the model itself is called.

Hooks, double backward, tensor attributes and random numbers are the model's own. On a CPU only the intra-op thread
count is another one while the model runs, forward and backward; on a GPU where the model lives already, nothing is.

1. The backward is no call of ours. A hook at the nodes that made the outputs sets the count when a backward reaches
   them, and a callback of the autograd engine puts it back when that backward ends; where it raises, the engine drops
   the callback, whose end then puts the count back. What the caller has upstream of the model runs in between.
2. The count belongs to the thread, but a thread that runs its first PyTorch operation during such a call starts with
   the plan's count and not the process's. Where CUDA is in use a backward may end in another thread, which could not
   put the count back: a CPU's backward then runs with the caller's count.
3. It is for device groups that need no pinning: one thread, all cores of the host, or a group of all cores that the
   process may use. Other groups have a worker. → `single`
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar

import torch

from autoplace.errors import ExecutionError
from autoplace.hardware.cluster import Cluster, Device
from autoplace.outcome import Span
from autoplace.plan import Plan
from autoplace.tracer import compiling_here

from . import routing
from ._base import Executor
from .compiling import Compiler
from .layout import call_channels_last
from .single import SingleDevice
from .sites import autocast_dtype
from .worker import Ledger, group_cores, spread_busy, torch_device

__all__ = ["InlineDevice", "runs_inline"]


def runs_inline(model: torch.nn.Module, plan: Plan, cluster: Cluster) -> bool:
    """Return whether a plan is for the whole model on one device, in one part, and needs no thread of its own.

    Raises:
        ExecutionError: If the plan names a module or device that does not exist, or a device that is not here.
    """
    return _seat(model, plan, cluster) is not None


@dataclass(frozen=True)
class _Seat:
    """Where an in-line plan runs."""

    device: Device
    torch_device: torch.device
    threads: int | None
    """Intra-op threads; None on a GPU."""
    filled: float | None
    """Threads per core of the host, where they may use all its cores; None = the work stays in the group."""


def _seat(model: torch.nn.Module, plan: Plan, cluster: Cluster) -> _Seat | None:
    if plan.shape != "single" or plan.microbatches != 1 or plan.engine != "threads":
        return None
    targets = routing.resolve(model, plan.replicas[0].assignment, cluster)
    if targets[0].module is not model:
        return None
    device = cluster.devices[cluster.index[plan.devices[0]]]
    place = torch_device(device)
    if any(tensor.device != place for tensor in (*model.parameters(), *model.buffers())):
        return None
    if place.type == "cuda":
        return _Seat(device, place, None, None)
    own = len(group_cores(device))
    host = {core for other in cluster.devices if other.host == device.host for core in other.cores}
    available = os.sched_getaffinity(0)
    cores = len(available & host) or len(available)
    threads = plan.threads.get(device.name, own)
    if threads > own:
        return _Seat(device, place, threads, threads / cores)
    return _Seat(device, place, threads, None) if threads == 1 or own == len(available) else None


class InlineDevice(Executor):
    """Calls the model in the caller's thread, with the plan's intra-op thread count.

    Inputs on another device than the GPU's take the way of `SingleDevice`, whose worker moves them there.

    Args:
        model: The model, all of it on the plan's device.
        plan: A plan for which `runs_inline` holds.
        cluster: Where the plan's device is described.

    Raises:
        ExecutionError: If the plan is none for this executor.
    """

    shapes: ClassVar[tuple[str, ...]] = ("single",)

    def __init__(self, model: torch.nn.Module, plan: Plan, cluster: Cluster) -> None:
        super().__init__(model, plan, cluster)
        seat = _seat(model, plan, cluster)
        if seat is None:
            raise ExecutionError("the plan needs a thread of its own; let build_executor choose")
        self._seat, self._device = seat, seat.torch_device
        self._dtype = autocast_dtype(plan.precision)
        self._compiler = Compiler(cpp_wrapper=plan.cpp_wrapper)
        self._call: Callable[..., Any] = self._compiler.wrap(model, whole=True) if plan.compiled else model
        self._plain = self._dtype is None and not plan.channels_last
        self._ledger = Ledger()
        self._backward = _Backward(seat, self._ledger)
        self._elsewhere: SingleDevice | None = None
        self._lock = threading.Lock()
        self._closed = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one pass; see `Executor.__call__`."""
        if self._closed:
            raise ExecutionError("this executor is closed; build it again")
        if compiling_here():
            return self.model(*args, **kwargs)
        if self._seat.threads is None:
            return self._on_gpu(args, kwargs)
        threads, before = self._seat.threads, torch.get_num_threads()
        start = time.perf_counter()
        try:
            if threads != before:
                torch.set_num_threads(threads)
            output = self._call(*args, **kwargs) if self._plain else self._with_knobs(args, kwargs)
        finally:
            if threads != before:
                torch.set_num_threads(before)
            self._ledger.add_task(self._seat.device.name, "model", start, time.perf_counter())
        if torch.is_grad_enabled() and not torch.cuda.is_initialized():
            self._backward.watch(output)
        return output

    def _on_gpu(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if any(isinstance(x, torch.Tensor) and x.device != self._device for x in (*args, *kwargs.values())):
            return self._worker()(*args, **kwargs)
        with torch.cuda.device(self._device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            try:
                output = self._call(*args, **kwargs) if self._plain else self._with_knobs(args, kwargs)
            finally:
                end.record()
                self._ledger.add_events(self._seat.device.name, start, end)
        if torch.is_grad_enabled():
            self._backward.watch(output)
        return output

    def _with_knobs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype is not None):
            if self.plan.channels_last:
                return call_channels_last(self._call, args, kwargs)
            return self._call(*args, **kwargs)

    def _worker(self) -> SingleDevice:
        with self._lock:
            if self._elsewhere is None:
                self._elsewhere = SingleDevice(self.model, self.plan, self.cluster)
            return self._elsewhere

    def busy_ms(self) -> dict[str, float]:
        """Return device name to milliseconds since the last call in which the model ran, forward or backward."""
        own = self._ledger.take().get(self._seat.device.name, 0.0)
        if self._elsewhere is not None:
            own += self._elsewhere.busy_ms().get(self._seat.device.name, 0.0)
        return spread_busy(self.cluster, self._seat.device, own, self._seat.filled)

    def timeline(self) -> tuple[Span, ...]:
        """Return what ran when on a CPU device since the last call."""
        return self._ledger.take_spans()

    def compile_s(self) -> float:
        """Return the wall seconds that calls of this executor have spent in `torch.compile`."""
        return self._compiler.seconds + (self._elsewhere.compile_s() if self._elsewhere is not None else 0.0)

    def close(self) -> None:
        """Refuse further calls; outputs keep their backward."""
        self._closed = True
        if self._elsewhere is not None:
            self._elsewhere.close()


class _Local(threading.local):
    def __init__(self) -> None:
        self.passes: dict[int, set[int]] = {}
        """Backward pass (graph task) of this thread to the `_Backward`s that it has met."""


_local = _Local()


class _Backward:
    """What a backward pass meets at the model's outputs.

    Args:
        seat: Where the model runs.
        ledger: Gets the time from the first output's node to the end of the backward.
    """

    def __init__(self, seat: _Seat, ledger: Ledger) -> None:
        self.seat, self.threads, self.ledger = seat, seat.threads, ledger

    def watch(self, output: Any) -> None:
        """Put this at the nodes that made the outputs."""
        nodes = {id(node): node for tensor in _tensors(output) if (node := tensor.grad_fn) is not None}
        for node in nodes.values():
            node.register_prehook(self)

    def __call__(self, _grads: Any) -> None:
        task = torch._C._current_graph_task_id()  # type: ignore[attr-defined]
        met = _local.passes.setdefault(task, set())
        before = torch.get_num_threads()
        if self.threads is not None and self.threads != before:
            torch.set_num_threads(self.threads)
        if id(self) in met:
            return
        first = not met
        met.add(id(self))
        end = _End(self, _local.passes, task, before if first and self.threads is not None else None)
        torch.autograd.Variable._execution_engine.queue_callback(end)


class _End:
    """The end of one backward pass; done once, when the engine calls it or, after an exception, drops it."""

    def __init__(self, backward: _Backward, passes: dict[int, set[int]], task: int, threads: int | None) -> None:
        self._done = False
        self._backward, self._passes, self._task, self._threads = backward, passes, task, threads
        self._thread = threading.get_ident()
        self._start = time.perf_counter()
        self._event = None if backward.threads is not None else self._mark()

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._backward.seat.torch_device))
        return event

    def __call__(self) -> None:
        if self._done:
            return
        self._done = True
        self._passes.pop(self._task, None)
        if self._threads is not None and threading.get_ident() == self._thread:
            torch.set_num_threads(self._threads)
        device, ledger = self._backward.seat.device.name, self._backward.ledger
        if self._event is None:
            ledger.add_task(device, "model backward", self._start, time.perf_counter())
        else:
            ledger.add_events(device, self._event, self._mark())

    def __del__(self) -> None:
        self()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in an output of nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name, None))
