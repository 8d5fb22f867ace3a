"""A thread that stays on the cores of one group and runs what is posted to it, one call after another."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from autoplace.errors import ExecutionError

__all__ = ["PinnedThread"]

T = TypeVar("T")


class PinnedThread:
    """One thread, pinned to some cores, with as many intra-op threads of torch as there are cores.

    Threads inherit the cores of the one that starts them, so torch's intra-op threads stay on the group too. torch
    keeps one number of threads for all threads that start later: whoever makes these sets it back afterwards.
    """

    def __init__(self, name: str, cores: Sequence[int]) -> None:
        """Start the thread.

        Args:
            name: Device name, for messages.
            cores: CPU ids to stay on; empty = anywhere.

        Raises:
            ExecutionError: If the process may not use one of the cores.
        """
        self._name, self._cores = name, tuple(cores)
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(started,), name=f"autoplace {name}", daemon=True)
        self._thread.start()
        try:
            started.result()
        except OSError:
            raise ExecutionError(
                f"{name} names cores {list(cores)}, which this process may not use; profile this machine again"
            ) from None

    def post(self, call: Callable[[], None]) -> None:
        """Hand a call over and return at once; the call must not raise."""
        self._inbox.put(call)

    def run(self, call: Callable[[], T]) -> T:
        """Run a call on the thread and return what it returns, or raise what it raises."""
        done: Future[T] = Future()

        def answer() -> None:
            try:
                done.set_result(call())
            except BaseException as cause:
                done.set_exception(cause)

        self.post(answer)
        return done.result()

    def close(self) -> None:
        """End the thread after what was posted before; calling it twice does nothing more."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self, started: Future[None]) -> None:
        try:
            if self._cores:
                os.sched_setaffinity(0, self._cores)
                torch.set_num_threads(len(self._cores))
        except BaseException as cause:
            started.set_exception(cause)
            return
        started.set_result(None)
        while (call := self._inbox.get()) is not None:
            call()

    def __enter__(self) -> PinnedThread:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
