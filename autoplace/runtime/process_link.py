"""The caller's end of a worker process: starts it, sends messages, takes answers in order, ends it.

What the messages mean is `processes`' and `process_worker`'s matter.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence

from autoplace.errors import ExecutionError

from .channel import Channel
from .process_worker import Answer, Backward, Failure, Forward, Start
from .slab import Slab

__all__ = ["LostProcessError", "WorkerProcess"]

_START_LIMIT_S = 120.0
"""How long a process may take to import what the model needs."""
_END_LIMIT_S = 2.0
_BOOT = (
    "import json, os, sys; start = json.loads(sys.argv[1]); os.sched_setaffinity(0, start['cores']); "
    "sys.path[:] = start['path']; from autoplace.runtime.process_worker import serve; "
    "serve(start['socket'], start['parent'])"
)
"""Run by `python -c`: nothing of the caller's main file is imported, and the first thread already is on its cores."""


class _RemoteTraceback(Exception):
    """The traceback of an exception in another process, as the cause of the exception that is raised here."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n{self.text}"


class LostProcessError(ExecutionError):
    """Raised when a process is gone; the executor is then closed."""


class WorkerProcess:
    """The caller's end of one worker process.

    Args:
        device: Where it runs.
        cores: CPU ids to stay on.
        start: Descriptors of the slabs for inputs and outputs to the first message.
        limit_s: Seconds to wait for an answer.
    """

    def __init__(self, device: str, cores: Sequence[int], start: Callable[[int, int], Start], limit_s: float) -> None:
        self.device = device
        self.inputs, self.outputs = Slab(), Slab()
        self.dropped: deque[int] = deque()
        """Numbers of passes whose graphs may go; filled by finalizers, at any time and in any thread."""
        self._limit_s = limit_s
        self._last = 0
        self._waiting: list[int] = [0]
        """Numbers of the messages that have not been answered, in order."""
        first = start(self.inputs.fd, self.outputs.fd)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self.popen = _spawn(first, theirs.fileno(), cores)
        self._channel = Channel(ours)
        self._send(pickle.dumps(first))

    def ready(self) -> None:
        """Wait until the worker has its copy of the model.

        Raises:
            ExecutionError: If it cannot make one.
        """
        try:
            self._receive(_START_LIMIT_S)
        except ExecutionError:
            raise
        except Exception as error:
            raise ExecutionError(
                f"another process cannot rebuild the model ({type(error).__name__}: {error}); use a plan of threads"
            ) from error

    def ask(self, message: Forward | Backward) -> None:
        """Send a message, under the next number; `take` gives the answer."""
        self._last += 1
        dropped = [self.dropped.popleft() for _ in range(len(self.dropped))]
        data = pickle.dumps(message._replace(number=self._last, dropped=dropped), pickle.HIGHEST_PROTOCOL)
        self._waiting.append(self._last)
        self._send(data)

    def take(self) -> Answer:
        """Return the answer to the oldest open message; raise what was raised there."""
        return self._receive(self._limit_s)

    def settle(self) -> None:
        """Wait for answers that an interrupted pass did not take, so that the slabs are free."""
        while self._waiting:
            self.dropped.append(self._waiting[0])
            try:
                self._receive(self._limit_s)
            except LostProcessError:
                raise
            except Exception:  # it belonged to the interrupted pass
                continue

    def _send(self, data: bytes) -> None:
        try:
            self._channel.send(data)
        except OSError:
            raise self._lost("ended") from None

    def _receive(self, limit_s: float) -> Answer:
        try:
            answer: Answer | Failure = pickle.loads(self._channel.receive(limit_s))
        except EOFError:
            raise self._lost("ended") from None
        except TimeoutError:
            raise self._lost(f"gave no answer for {limit_s:.0f} s") from None
        if answer.number != self._waiting.pop(0):
            raise self._lost("answered another question")
        if isinstance(answer, Failure):
            raise _exception(answer)
        return answer

    def _lost(self, how: str) -> LostProcessError:
        return LostProcessError(f"the process of the replica on {self.device!r} {how}; build the executor again")

    def shut(self) -> None:
        """Close the connection, which ends the process, whatever it is doing."""
        self._channel.shut()

    def end(self) -> None:
        """End the process and wait for that."""
        self.shut()
        try:
            self.popen.wait(_END_LIMIT_S)
        except subprocess.TimeoutExpired:  # it is stopped, say
            self.popen.kill()
            self.popen.wait()

    def forget(self) -> None:
        """Let go of the connection without a word: for the child after a fork."""
        self._channel.forget()


def _spawn(start: Start, fd: int, cores: Sequence[int]) -> subprocess.Popen:
    word = json.dumps({"cores": list(cores), "path": sys.path, "socket": fd, "parent": os.getpid()})
    storages = [of for of, size in start.shipment.storages if size]
    threads = str(start.threads)
    return subprocess.Popen(
        [sys.executable, "-c", _BOOT, word],
        pass_fds=(fd, start.inputs_fd, start.outputs_fd, *storages),
        stdin=subprocess.DEVNULL,
        # The compiler is to make no pool of processes of its own in each of ours.
        env={
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        },
    )


def _exception(failure: Failure) -> BaseException:
    error: BaseException
    if failure.pickled:
        error = pickle.loads(failure.pickled)
    else:
        error = ExecutionError(f"the model raised in a replica's process: {failure.summary}")
    error.__cause__ = _RemoteTraceback(failure.text)
    return error
