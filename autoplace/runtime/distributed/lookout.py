"""Who of the ranks is still there: heartbeats in torchrun's key-value store, and sentences about those who are not.

Every rank counts up a key of its own, twice a second, from a thread; beside the count stands what it does (its stage,
the step it is in, or the error that ended it). A rank whose count stands still for `patience_s` is lost. What a failing
collective says is only that some connection broke; `explain` waits until the heartbeats tell whose.

Time-outs: a rank that dies is reported after `patience_s` at most, since its connections break at once; one that hangs,
or is cut off, after the group's own time-out (`Session.timeout_s`) and `patience_s`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from autoplace.errors import AutoplaceError, ExecutionError, in_one_line

from .session import Session

__all__ = ["Lookout"]

_BEAT_S = 0.5
_PATIENCE_S = 4.0


class Lookout:
    """The heartbeats of one rank, and what it sees of the others'.

    Args:
        session: The group.
        role: What this rank does, for the others' sentences: `stage 1`, for example.
        patience_s: Seconds without a beat after which a rank is lost.
    """

    def __init__(self, session: Session, role: str = "", *, patience_s: float = _PATIENCE_S) -> None:
        self.session, self.role, self.patience_s = session, role, patience_s
        self.step = 0
        """Steps that this rank has begun."""
        self._failure = ""
        self._seen: dict[int, tuple[str, float]] = {}
        """Rank to the last beat and when it came, by `time.monotonic`."""
        self._lock = threading.Lock()
        self._unreachable_since: float | None = None
        self._stop = threading.Event()
        prefix = (
            f"autoplace/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{os.environ.get('TORCHELASTIC_RUN_ID')}"
        )
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=max(patience_s, 1.0)),
        )
        self._store = dist.PrefixStore(prefix, store)
        self._beat(0)
        self._thread = threading.Thread(target=self._run, name="autoplace heartbeat", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        number = 0
        while not self._stop.wait(_BEAT_S):
            number += 1
            try:
                self._beat(number)
                self._look()
                self._unreachable_since = None
            except Exception:  # the store's host is gone, or the network to it
                if self._unreachable_since is None:
                    self._unreachable_since = time.monotonic()

    def _beat(self, number: int) -> None:
        self._store.set(f"beat/{self.session.rank}", "|".join((str(number), str(self.step), self.role, self._failure)))

    def _look(self) -> None:
        for rank in range(self.session.world_size):
            key = f"beat/{rank}"
            if rank == self.session.rank or not self._store.check([key]):
                continue
            beat = self._store.get(key).decode()
            with self._lock:
                if self._seen.get(rank, ("", 0.0))[0] != beat:
                    self._seen[rank] = (beat, time.monotonic())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count one step, and turn an error of the engine in it into a sentence about the rank that is the cause.

        Raises:
            ExecutionError: Naming the rank, its device and its stage.
        """
        self.step += 1
        try:
            yield
        except AutoplaceError as error:
            self._fail(str(error))
            raise
        except (dist.DistError, RuntimeError) as error:
            if not _is_transport(error):
                self._fail(in_one_line(error))
                raise
            raise ExecutionError(self.explain(error)) from error
        except Exception as error:
            self._fail(in_one_line(error))
            raise

    def _fail(self, sentence: str) -> None:
        """Tell the others why this rank ends."""
        self._failure = sentence.replace("|", "/")[:300]
        try:
            self._beat(-1)
        except Exception:  # nobody is left to tell
            return

    def explain(self, error: Exception) -> str:
        """Return a sentence about who is gone; waits until the heartbeats can tell."""
        end = time.monotonic() + self.patience_s + 2 * _BEAT_S
        while time.monotonic() < end:
            sentence = self._told()
            if sentence:
                return sentence
            time.sleep(_BEAT_S / 2)
        behind = self._behind()
        if behind:
            return behind
        first = (str(error).strip().splitlines() or [""])[0]
        return f"the connection between the ranks broke though all of them answer ({first[:200]}); check the network"

    def _told(self) -> str:
        now = time.monotonic()
        with self._lock:
            seen = dict(self._seen)
        for rank, (beat, _) in sorted(seen.items()):
            failure = beat.split("|", 3)[3]
            if failure:
                return f"{self._name(rank, beat)} failed: {failure}"
        for rank, (beat, when) in sorted(seen.items()):
            if now - when > self.patience_s and self._unreachable_since is None:
                return (
                    f"{self._name(rank, beat)} was lost: it has not answered for {now - when:.0f} s; "
                    "start again from the last checkpoint"
                )
        if self._unreachable_since is not None and now - self._unreachable_since > self.patience_s:
            return (
                f"the host of rank 0 ({self.session.members[0]}) was lost, or the network to it: it has not answered "
                f"for {now - self._unreachable_since:.0f} s; start again from the last checkpoint"
            )
        return ""

    def _behind(self) -> str:
        with self._lock:
            seen = dict(self._seen)
        for rank, (beat, _) in sorted(seen.items()):
            step = int(beat.split("|", 3)[1])
            if step < self.step:
                return (
                    f"{self._name(rank, beat)} answers but did not come to step {self.step} within "
                    f"{self.session.timeout_s:.0f} s; it hangs, or is far slower than the plan expects"
                )
        return ""

    def _name(self, rank: int, beat: str) -> str:
        role = beat.split("|", 3)[2]
        return f"rank {rank} ({self.session.members[rank]}{', ' + role if role else ''})"

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join(timeout=2 * _BEAT_S)


_SIGNS = ("gloo", "nccl", "connection", "peer", "timed out", "timeout", "socket", "broken pipe", "store")


def _is_transport(error: Exception) -> bool:
    """Return whether an error is of the engine and not of the model: it then tells of some other rank."""
    if isinstance(error, dist.DistError):
        return True
    causes: list[BaseException | None] = [error, error.__cause__, error.__context__]
    return any(c is not None and any(sign in str(c).lower() for sign in _SIGNS) for c in causes)
