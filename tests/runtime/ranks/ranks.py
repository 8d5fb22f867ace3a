"""Processes of a gloo group that stay for a whole test session and run functions on all ranks.

A function is named by module file and name, since ranks import it; it gets the rank's `Session` first, and what it
returns is pickled back. A rank that raises tells its error; the group is started again after one, or after a time-out.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import socket
import struct
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LIMIT_S = 120.0


class Failed(Exception):
    """Raised when some rank raised; says which, and what."""

    def __init__(self, errors: dict[int, tuple[str, str, str]]) -> None:
        super().__init__("\n".join(f"rank {r}: {kind}: {text}\n{trace}" for r, (kind, text, trace) in errors.items()))
        self.errors = {rank: (kind, text) for rank, (kind, text, _) in errors.items()}


class Ranks:
    """A group of processes on this machine.

    Args:
        count: Number of ranks.
        prefixes: Words before each rank's command, where they run on hosts of their own.
        environment: More variables; `{rank}` in a value is the rank.
    """

    def __init__(self, count: int, *, prefixes: Sequence[Sequence[str]] = (), **environment: str) -> None:
        self.count, self._environment = count, environment
        self._prefixes = prefixes or [()] * count
        self._processes: list[subprocess.Popen[bytes]] = []

    def run(self, function: Any, *args: Any, limit_s: float = LIMIT_S, deaf: Sequence[int] = ()) -> list[Any]:
        """Return what the function returned, by rank; nobody waits for the answer of those that are `deaf`.

        Raises:
            Failed: If a rank raised or did not answer in time.
        """
        if not self._processes:
            self._start()
        order = pickle.dumps((function.__code__.co_filename, function.__name__, args))
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(struct.pack("<q", len(order)) + order)
            process.stdin.flush()
        results: list[Any] = [None] * self.count
        errors: dict[int, tuple[str, str, str]] = {}
        for rank, process in enumerate(self._processes):
            if rank in deaf:
                continue
            told = _read(process, limit_s)
            if told is None:
                errors[rank] = ("Timeout", f"no answer within {limit_s:g} s, or it died", "")
                continue
            good, value = pickle.loads(told)
            if good:
                results[rank] = value
            else:
                errors[rank] = value
        if errors:
            self.close()
            raise Failed(errors)
        return results

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(self.count):
            own = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.count),
                "LOCAL_WORLD_SIZE": str(self.count),
                "GROUP_RANK": "0",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "AUTOPLACE_TIMEOUT_S": "20",
            }
            own |= {key: value.format(rank=rank) for key, value in self._environment.items()}
            self._processes.append(
                subprocess.Popen(
                    [*self._prefixes[rank], sys.executable, str(Path(__file__).resolve())],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env={**os.environ, **own},
                )
            )

    def signal(self, rank: int, number: int) -> None:
        """Signal one rank."""
        self._processes[rank].send_signal(number)

    def close(self) -> None:
        """End all."""
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes = []


def _read(process: subprocess.Popen[bytes], limit_s: float) -> bytes | None:
    import select

    assert process.stdout is not None
    wanted = struct.calcsize("<q")
    data = b""
    size: int | None = None
    while True:
        ready, _, _ = select.select([process.stdout], [], [], limit_s)
        if not ready:
            return None
        chunk = os.read(process.stdout.fileno(), 1 << 20 if size is not None else wanted - len(data))
        if not chunk:
            return None
        data += chunk
        if size is None and len(data) == wanted:
            (size,), data = struct.unpack("<q", data), b""
        if size is not None and len(data) >= size:
            return data


def _serve() -> None:
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what functions print is not an answer
    import torch

    torch.set_num_threads(1)
    from autoplace.runtime.distributed.session import Session

    session = Session.join()
    modules: dict[str, Any] = {}
    while head := sys.stdin.buffer.read(8):
        file, name, args = pickle.loads(sys.stdin.buffer.read(struct.unpack("<q", head)[0]))
        try:
            if file not in modules:
                spec = importlib.util.spec_from_file_location(Path(file).stem, file)
                assert spec is not None and spec.loader is not None
                modules[file] = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(modules[file])
            told = pickle.dumps((True, getattr(modules[file], name)(session, *args)))
        except Exception as error:
            told = pickle.dumps((False, (type(error).__name__, str(error), traceback.format_exc())))
        output.write(struct.pack("<q", len(told)) + told)
        output.flush()


if __name__ == "__main__":
    _serve()
