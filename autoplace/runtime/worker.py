"""A thread per device: pinned to its core group with its own intra-op threads, or owning a CUDA stream.

It runs tasks one at a time, in the order of submission, in the submitter's grad, inference and autocast modes. It knows
nothing of models and plans.

1. OpenMP's thread count belongs to the calling thread, and the threads of its pool inherit the affinity that the thread
   has when they are made: a worker therefore pins itself before its first operation. `torch.set_num_threads` also sets
   the process-wide count that later threads start with; the creator puts that back.
2. A hand-over costs 8 us there and back on one core and 70 us to an idle core [measured: 2-core Xeon VM,
   `queue.SimpleQueue` and `concurrent.futures.Future`; a bare lock saves 2 us].
3. Worker threads are daemons: a task that never returns is left behind and does not keep the process alive. At exit
   they come to rest first: one that still lets go of its last task's tensors, in C++, while the interpreter finalizes
   aborts the process → `come_to_rest`.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures import wait as wait_for
from contextlib import ExitStack, suppress
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from autoplace.errors import ExecutionError
from autoplace.hands_off import hands_off, is_hands_off, stop_at_exit
from autoplace.hardware.cluster import Cluster, Device
from autoplace.outcome import Span

from .streams import Streams, mark_events, wait_events

__all__ = ["DeviceWorker", "Ledger", "TaskThread", "come_to_rest", "group_cores", "spread_busy", "torch_device"]

T = TypeVar("T")

_LOOK_UP_S = 0.2
"""A thread that waits comes back to Python so often, where it can be stopped → `measure.protocol.Guard`."""
_REST_LIMIT_S = 2.0
"""At exit, all threads together get this long to come to rest."""
_MAX_TASKS = 4096
"""Tasks that a ledger keeps for a timeline until they are asked for."""
_MAX_PENDING_EVENTS = 256
"""CUDA event pairs kept before their times are read."""


def torch_device(device: Device) -> torch.device:
    """Return the torch device behind a cluster's device.

    Raises:
        ExecutionError: If its kind is neither `cpu` nor `cuda`, or this machine has no such GPU.
    """
    if device.kind == "cpu":
        return torch.device("cpu")
    if device.kind != "cuda":
        raise ExecutionError(f"device {device.name!r} is of kind {device.kind!r}; only cpu and cuda devices run models")
    tail = device.name.rsplit(":", 1)[-1]
    index = int(tail) if tail.isdigit() else 0
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise ExecutionError(f"device {device.name!r} is not on this machine; discover the cluster again")
    return torch.device("cuda", index)


class Ledger:
    """What one user of workers kept them busy with, by device name; safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._busy_ms: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._tasks: list[tuple[str, str, float, float]] = []

    def add(self, device: str, busy_ms: float) -> None:
        """Add busy milliseconds of a device."""
        with self._lock:
            self._busy_ms[device] = self._busy_ms.get(device, 0.0) + busy_ms

    def add_task(self, device: str, label: str, start_s: float, end_s: float) -> None:
        """Add a task of a CPU device, by the clock `time.perf_counter`; also its busy time."""
        self.add(device, (end_s - start_s) * 1e3)
        with self._lock:
            if len(self._tasks) < _MAX_TASKS:
                self._tasks.append((device, label, start_s, end_s))

    def take_tasks(self) -> list[tuple[str, str, float, float]]:
        """Return (device, label, start, end) in seconds of the tasks since the last call; the first thousands."""
        with self._lock:
            taken, self._tasks = self._tasks, []
        return taken

    def add_events(self, device: str, start: torch.cuda.Event, end: torch.cuda.Event) -> None:
        """Add the time between two CUDA events, read when it is asked for."""
        with self._lock:
            self._events.append((device, start, end))
            full = len(self._events) > _MAX_PENDING_EVENTS
        if full:
            self._read_events(wait=False)

    def _read_events(self, *, wait: bool) -> None:
        """Add the times of the events; those of work that is not done are waited for, or left for later."""
        with self._lock:
            events, self._events = self._events, []
        for i, (device, start, end) in enumerate(events):
            if not wait and not end.query():
                with self._lock:
                    self._events = events[i:] + self._events
                return
            end.synchronize()
            self.add(device, start.elapsed_time(end))

    def take(self) -> dict[str, float]:
        """Return device name to busy milliseconds since the last call."""
        self._read_events(wait=True)
        with self._lock:
            taken, self._busy_ms = self._busy_ms, {}
        return taken

    def take_spans(self) -> tuple[Span, ...]:
        """Return the tasks since the last call as spans, in ms from the start of the first one."""
        tasks = sorted(self.take_tasks(), key=lambda task: task[2])
        return tuple(
            Span(
                resource=device,
                label=label,
                start_ms=(start_s - tasks[0][2]) * 1e3,
                end_ms=(end_s - tasks[0][2]) * 1e3,
            )
            for device, label, start_s, end_s in tasks
        )


def group_cores(device: Device) -> list[int]:
    """Return the cores of a CPU core group that this process may use.

    Raises:
        ExecutionError: If there are none.
    """
    available = os.sched_getaffinity(0)
    own = sorted(available & set(device.cores)) if device.cores else sorted(available)
    if not own:
        raise ExecutionError(
            f"this process may use none of the cores {list(device.cores)} of {device.name!r}; discover again"
        )
    return own


def spread_busy(cluster: Cluster, device: Device, busy_ms: float, filled: float | None) -> dict[str, float]:
    """Return device name to the busy milliseconds that a device's work means.

    Args:
        cluster: The devices.
        device: Whose work it was.
        busy_ms: How long it took.
        filled: Threads per core of the host, where a CPU group worked on all its host's cores: the work then keeps all
            CPU groups of the host busy, by that part. None = the work stayed on the device.
    """
    if filled is None:
        return {device.name: busy_ms}
    groups = [d.name for d in cluster.devices if d.kind == "cpu" and d.host == device.host]
    return dict.fromkeys(groups, busy_ms * min(1.0, filled))


class _Modes:
    """The grad, inference, autocast and hands-off modes of the thread that makes it, to be entered in another."""

    __slots__ = ("autocasts", "cache", "grad", "hands_off", "inference")

    def __init__(self) -> None:
        self.hands_off = is_hands_off()
        self.grad = torch.is_grad_enabled()
        self.inference = torch.is_inference_mode_enabled()
        kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
        self.autocasts = [(kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)]
        self.cache = torch.is_autocast_cache_enabled()

    def run(self, fn: Callable[[], T]) -> T:
        if self.inference or self.autocasts or self.hands_off:
            with ExitStack() as stack:
                if self.hands_off:
                    stack.enter_context(hands_off())
                stack.enter_context(torch.inference_mode(self.inference))
                for kind, dtype in self.autocasts:
                    stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=self.cache))
                with torch.set_grad_enabled(self.grad):
                    return fn()
        with torch.set_grad_enabled(self.grad):
            return fn()


@dataclass(slots=True)
class _Task:
    future: Future
    fn: Callable[[], Any]
    modes: _Modes
    ledger: Ledger | None
    label: str
    events: list[torch.cuda.Event]


class TaskThread:
    """A daemon thread that runs tasks one at a time, in the order of submission.

    Args:
        name: Name of the thread, for debuggers.
        threads: Intra-op threads of the operations it runs; None = what the process uses.
        cores: CPU ids to stay on; empty = wherever the process may run.
        device: The torch device of its operations; None when it has none of its own.
    """

    def __init__(
        self,
        name: str,
        *,
        threads: int | None = None,
        cores: Sequence[int] = (),
        device: torch.device | None = None,
    ) -> None:
        self.name = name
        self.cores = tuple(cores)
        self.threads = threads
        self.torch_device = device
        self._queue: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._ledger = Ledger()
        self._streams = Streams()
        self._closed = self._busy = False
        self._lock = threading.Lock()
        ready: Future[None] = Future()
        before = torch.get_num_threads()
        self._thread = threading.Thread(target=self._loop, args=(ready,), name=name, daemon=True)
        self._thread.start()
        ready.result()
        _threads.add(self)
        # Same count for this thread, and again the count that threads to come start with (see note 1).
        torch.set_num_threads(before)

    @property
    def ident(self) -> int:
        """Identifier of the thread, as `threading.get_ident` gives it there."""
        assert self._thread.ident is not None  # it is started where it is made
        return self._thread.ident

    def submit(self, fn: Callable[[], T], ledger: Ledger | None = None, label: str = "") -> Future[T]:
        """Queue a task, to run in the caller's grad, inference and autocast modes and with its context variables.

        Args:
            fn: The task.
            ledger: Gets the task's busy time, besides the worker's own count.
            label: What the task is, for timelines.

        Returns:
            A future with the task's result or its exception, original traceback included.

        Raises:
            ExecutionError: If the worker is closed.
        """
        task = _Task(Future(), partial(copy_context().run, fn), _Modes(), ledger, label, mark_events())
        with self._lock:
            if self._closed:
                raise ExecutionError(f"the worker {self.name!r} is closed; build the executor again")
            self._queue.put(task)
        return task.future

    @staticmethod
    def wait(future: Future[T]) -> T:
        """Return a task's result, with the caller's CUDA streams ordered behind the task; raise what it raised."""
        result = _patiently(future) if isinstance(future, Future) else future.result()
        wait_events(getattr(future, "events", ()))
        return result

    def run(self, fn: Callable[[], T], ledger: Ledger | None = None) -> T:
        """Run a task and wait for its result; in the worker's own thread, run it at once."""
        if threading.current_thread() is self._thread:
            return fn()
        return self.wait(self.submit(fn, ledger))

    def busy_ms(self) -> float:
        """Return the milliseconds spent in tasks since the last call."""
        return sum(self._ledger.take().values())

    @property
    def alive(self) -> bool:
        """Whether it takes tasks."""
        return not self._closed and self._thread.is_alive()

    def close(self) -> None:
        """End the thread once the queued tasks are done; calling it twice does nothing more."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
                if self._busy:  # for long perhaps: a run that was given up
                    stop_at_exit(self.ident)

    def rest(self, limit_s: float) -> None:
        """Wait until the thread has let go of every task that it was given, or has ended; at most for some seconds."""
        if self.alive:
            with suppress(ExecutionError):  # closed in this moment
                wait_for([self.submit(lambda: None)], limit_s)
                return
        self._thread.join(limit_s)

    def _account(self, fn: Callable[[], T], ledgers: Sequence[Ledger], label: str) -> T:
        start = time.perf_counter()
        try:
            return fn()
        finally:
            end = time.perf_counter()
            for ledger in ledgers:
                ledger.add_task(self.name, label, start, end)

    def _loop(self, ready: Future[None]) -> None:
        try:
            if self.cores:
                os.sched_setaffinity(0, self.cores)
            torch.get_num_threads()  # a thread's first look at the count sets it to the process's; have that behind us
            if self.threads is not None:
                torch.set_num_threads(self.threads)
        except OSError as error:
            ready.set_exception(ExecutionError(f"cannot pin {self.name!r} to cores {self.cores}: {error}"))
            return
        ready.set_result(None)
        while (task := self._queue.get()) is not None:
            self._busy = True
            self._run_one(task)
            self._busy = False
            del task  # its tensors must not live until the next one

    def _run_one(self, task: _Task) -> None:
        future = task.future
        if not future.set_running_or_notify_cancel():
            return
        ledgers = [self._ledger] if task.ledger is None else [self._ledger, task.ledger]
        try:
            with self._streams.current(self.torch_device):
                wait_events(task.events)
                result = self._account(lambda: task.modes.run(task.fn), ledgers, task.label)
                future.events = mark_events()  # type: ignore[attr-defined]
        except BaseException as error:  # whatever it is belongs to the submitter
            future.set_exception(error)
        else:
            future.set_result(result)


_threads: weakref.WeakSet[TaskThread] = weakref.WeakSet()
"""All that may still run."""


def come_to_rest(limit_s: float = _REST_LIMIT_S) -> None:
    """Wait until no worker thread holds a task, for so many seconds at most."""
    deadline = time.monotonic() + limit_s
    for thread in list(_threads):
        if thread.ident != threading.get_ident():
            thread.rest(max(0.0, deadline - time.monotonic()))


atexit.register(come_to_rest)
os.register_at_fork(after_in_child=lambda: _threads.clear())  # the child has none of them


def _patiently(future: Future[T]) -> T:
    """Return a future's result, coming back to Python while it is not there."""
    while True:
        try:
            return future.result(timeout=_LOOK_UP_S)
        except FutureTimeoutError:
            if future.done():  # in this moment, or with a timeout of its own
                return future.result()


class DeviceWorker(TaskThread):
    """The thread of one device.

    Args:
        device: A CPU core group or a GPU.
        threads: Intra-op threads of a CPU device; None = one per core. More than the group has cores lets the worker
            use `host_cores`.
        host_cores: All cores of the device's host; empty = all that the process may use.

    Raises:
        ExecutionError: If the device is not on this machine.
    """

    def __init__(self, device: Device, threads: int | None = None, host_cores: Sequence[int] = ()) -> None:
        self.device = device
        place = torch_device(device)
        self.wide = False
        """Whether it may use all cores of its host."""
        if place.type == "cuda":
            torch.cuda.init()
            super().__init__(device.name, threads=1, device=place)
            return
        available, own = os.sched_getaffinity(0), group_cores(device)
        count = len(own) if threads is None else threads
        self.wide = count > len(own)
        cores = sorted(available & set(host_cores)) or sorted(available) if self.wide else own
        super().__init__(device.name, threads=count, cores=cores, device=place)

    def _account(self, fn: Callable[[], T], ledgers: Sequence[Ledger], label: str) -> T:
        if self.torch_device is None or self.torch_device.type == "cpu":
            return super()._account(fn, ledgers, label)
        stream = torch.cuda.current_stream(self.torch_device)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(stream)
        try:
            return fn()
        finally:
            end.record(stream)
            for ledger in ledgers:
                ledger.add_events(self.name, start, end)
