"""Tasks with dependencies on worker threads: each starts once all that it waits for is done.

A finished task releases its successors from the worker's own thread, without a trip through the thread that waits for
all of them. Of the tasks that are ready for a worker the one with the smallest key goes first. Knows nothing of models.

1. The first task that raises ends the schedule: nothing new starts, and once the tasks that run have ended, its
   exception, with its own traceback, is the schedule's.
2. On GPUs a task waits for the events of the tasks before it, so that threads never wait for a GPU.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from autoplace.errors import ExecutionError

from .streams import mark_events, wait_events
from .worker import Ledger, TaskThread

__all__ = ["ReadyQueues", "Schedule", "Task"]


@dataclass(eq=False)
class Task:
    """Something to do on a worker, after other tasks."""

    key: tuple[int, ...]
    """Of the ready tasks of a worker the smallest goes first; unique among the tasks that share their queues."""
    worker: TaskThread
    label: str
    work: Callable[[], None]
    before: Sequence[Task] = ()
    """What must be done first; all of it stands before this task in the schedule's list."""
    after: list[Task] = field(default_factory=list, init=False)
    waits: int = field(default=0, init=False)
    events: list[torch.cuda.Event] = field(default_factory=list, init=False)


class ReadyQueues:
    """The ready tasks of every worker, by key. Several schedules that run in the same modes may share them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ready: dict[TaskThread, list[tuple[tuple[int, ...], Callable[[], None]]]] = {}

    def push(self, worker: TaskThread, key: tuple[int, ...], run: Callable[[], None]) -> None:
        """Add a task, and ask the worker to run the first one of its queue.

        Raises:
            ExecutionError: If the worker is closed.
        """
        entry = (key, run)
        with self._lock:  # held until the worker has been asked: every entry has one `_run_first` that is to come
            queue = self._ready.setdefault(worker, [])
            heapq.heappush(queue, entry)
            try:
                worker.submit(partial(self._run_first, worker))
            except ExecutionError:
                queue.remove(entry)
                heapq.heapify(queue)
                raise

    def _run_first(self, worker: TaskThread) -> None:
        with self._lock:
            _, run = heapq.heappop(self._ready[worker])
        run()


class Schedule:
    """One run of tasks in the order of their dependencies.

    Args:
        tasks: In a topological order.
        ledger: Gets the busy times.
        queues: Where ready tasks wait.
        finish: Called after the last task, in its thread; what it returns is the schedule's result.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        ledger: Ledger,
        queues: ReadyQueues | None = None,
        finish: Callable[[], Any] = lambda: None,
    ) -> None:
        self._tasks, self._ledger, self._finish = tasks, ledger, finish
        self._queues = queues or ReadyQueues()
        self._lock = threading.Lock()
        self._left = len(tasks)
        self._running = 0
        """Tasks that are queued or run."""
        self._stopped = False
        self._error: tuple[tuple[int, ...], BaseException] | None = None
        self.future: Future[Any] = Future()
        """Gets the result, or the exception of the task with the smallest key among those that raised."""
        for task in tasks:
            task.waits = len(task.before)
            for other in task.before:
                other.after.append(task)

    def start(self) -> Future[Any]:
        """Start the tasks that wait for nothing; returns `future`."""
        first = [task for task in self._tasks if task.waits == 0]
        if not first:
            self._end()
        with self._lock:
            self._running += len(first)
        for task in first:
            self._queue(task)
        return self.future

    def run_here(self) -> Future[Any]:
        """Run all tasks in the calling thread, one after another; returns `future`, which is done."""
        try:
            for task in self._tasks:
                task.work()
        except BaseException as error:
            self.future.set_exception(error)
        else:
            self._end()
        self._tasks = ()
        return self.future

    def cancel(self) -> None:
        """Start nothing more; `future` is done once the tasks that run have ended."""
        with self._lock:
            self._stopped = True

    def _queue(self, task: Task) -> None:
        try:
            self._queues.push(task.worker, task.key, partial(self._run, task))
        except ExecutionError as error:
            self._done(task, error)

    def _run(self, task: Task) -> None:
        error: BaseException | None = None
        if not self._stopped:
            try:
                for other in task.before:
                    wait_events(other.events)
                with _timed(task.worker, self._ledger, task.label):
                    task.work()
                task.events = mark_events()
            except BaseException as raised:  # whatever it is belongs to the one who waits
                error = raised
        self._done(task, error)

    def _done(self, task: Task, error: BaseException | None) -> None:
        """Count a task, queue what it released, and end the schedule after the last one."""
        released: list[Task] = []
        with self._lock:
            self._left -= 1
            if error is not None:
                self._stopped = True
                if self._error is None or task.key < self._error[0]:
                    self._error = (task.key, error)
            if not self._stopped:
                for other in task.after:
                    other.waits -= 1
                    if other.waits == 0:
                        released.append(other)
            self._running += len(released) - 1
            ended = self._running == 0
        for other in released:
            self._queue(other)
        if ended:
            self._end()

    def _end(self) -> None:
        """Set the future. Tasks refer to what they worked on, so they are let go first."""
        tasks, self._tasks = self._tasks, ()
        error = self._error[1] if self._error is not None else None
        self._error = None
        result = None
        if error is None and self._left > 0 and self._stopped:
            error = ExecutionError("the pass was interrupted")
        if error is None:
            try:
                for task in tasks:
                    wait_events(task.events)
                result = self._finish()
                self.future.events = mark_events()  # type: ignore[attr-defined]
            except BaseException as raised:
                error = raised
        for task in tasks:
            task.after, task.before, task.work = [], (), _nothing
        self._finish = _nothing
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)


def _nothing() -> None:
    return None


@contextmanager
def _timed(worker: TaskThread, ledger: Ledger, label: str) -> Iterator[None]:
    """Account for the time of what runs inside: by the clock on CPUs, by events on GPUs."""
    device = worker.torch_device
    if device is None or device.type != "cuda":
        start_s = time.perf_counter()
        try:
            yield
        finally:
            ledger.add_task(worker.name, label, start_s, time.perf_counter())
        return
    stream = torch.cuda.current_stream(device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record(stream)
    try:
        yield
    finally:
        end.record(stream)
        ledger.add_events(worker.name, start, end)
