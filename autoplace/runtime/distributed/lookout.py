"""Who of the ranks is still there: heartbeats in torchrun's key-value store, and sentences about those who are not.

Every rank counts up a key of its own, twice a second, from a thread; beside the count stands what it does (its stage,
the step it is in, whether a collective failed, and the error or verdict that ends it). A rank whose count stands still
for `patience_s` is lost. What a failing collective says is only that some connection broke; `explain` waits until the
heartbeats tell whose, and the first verdict is that of all.

Time-outs: a rank that dies is reported after `patience_s` and a second at most, since its connections break at once;
one that hangs, or is cut off, after the group's own time-out (`Session.timeout_s`) and the same.

The store itself is on the first host. Its operations have no time-out where a cable is pulled [torch 2.13], so only the
thread speaks to it; how long it has not come back says that the store is out of reach.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from autoplace.errors import AutoplaceError, ExecutionError, in_one_line

from .session import Session

__all__ = ["Lookout"]

_BEAT_S = 0.5
_PATIENCE_S = 4.0
_TELL_S = 1.0


@dataclass(frozen=True, kw_only=True)
class _Beat:
    """What a rank writes."""

    count: int
    role: str
    step: int
    broken: bool = False
    """Whether a collective failed there in this step."""
    failure: str = ""
    """The error of its own that ends it."""
    verdict: str = ""
    """What it found out about another rank."""


class Lookout:
    """The heartbeats of one rank, and what it sees of the others'.

    Args:
        session: The group.
        role: What this rank does, for the others' sentences: `stage 1`, for example.
        patience_s: Seconds without a beat after which a rank is lost.
    """

    def __init__(self, session: Session, role: str = "", *, patience_s: float = _PATIENCE_S) -> None:
        self.session, self.patience_s = session, patience_s
        self._role = role
        self.step = 0
        """Steps that this rank has begun."""
        self._broken, self._failure, self._verdict = False, "", ""
        self._seen: dict[int, tuple[_Beat, float]] = {}
        """Rank to the last beat and when it came, by `time.monotonic`."""
        self._contact_s = time.monotonic()
        """When the store last answered."""
        self._lock = threading.Lock()
        self._news = self._told_news = 0
        self._wake, self._stopped = threading.Event(), False
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=max(patience_s, 1.0)),
        )
        self._store = dist.PrefixStore(f"autoplace/{session.attempt}/beats", store)
        self._thread = threading.Thread(target=self._run, name="autoplace heartbeat", daemon=True)
        self._thread.start()

    @property
    def role(self) -> str:
        """What this rank does; the others hear of a change at once."""
        return self._role

    @role.setter
    def role(self, role: str) -> None:
        self._role = role
        self._wake.set()

    def _run(self) -> None:
        count = 0
        while not self._stopped:
            news = self._news
            try:
                self._beat(count)
                self._look()
            except Exception:  # the store's host is gone; `_contact_s` says since when
                time.sleep(_BEAT_S / 2)
            else:
                self._contact_s, self._told_news = time.monotonic(), news
            count += 1
            self._wake.wait(_BEAT_S)
            self._wake.clear()

    def _beat(self, count: int) -> None:
        own = _Beat(
            count=count,
            role=self.role,
            step=self.step,
            broken=self._broken,
            failure=self._failure,
            verdict=self._verdict,
        )
        self._store.set(str(self.session.rank), json.dumps(asdict(own)))

    def _look(self) -> None:
        for rank in range(self.session.world_size):
            if rank == self.session.rank or not self._store.check([str(rank)]):
                continue
            beat = _Beat(**json.loads(self._store.get(str(rank))))
            with self._lock:
                if rank not in self._seen or self._seen[rank][0] != beat:
                    self._seen[rank] = (beat, time.monotonic())

    @contextmanager
    def watching(self, *, step: bool = True) -> Iterator[None]:
        """Turn an error of the engine into a sentence about the rank that is the cause.

        Args:
            step: Whether this is a step of the training, which all ranks count.

        Raises:
            ExecutionError: Naming the rank, its device and its stage.
        """
        self.step += step
        self._broken, self._failure, self._verdict = False, "", ""
        try:
            yield
        except AutoplaceError as error:
            if not self._verdict:
                self._fail(str(error))
            raise
        except Exception as error:
            if isinstance(error, RuntimeError) and _is_transport(error):
                raise ExecutionError(self.explain(error)) from error
            self._fail(in_one_line(error))
            raise

    def _fail(self, sentence: str) -> None:
        self._failure = sentence[:300]
        self._tell()

    def _tell(self) -> None:
        """Have the others hear of a change at once; where the store is out of reach, nobody is left to tell."""
        self._news += 1
        self._wake.set()
        end = time.monotonic() + _TELL_S
        while self._told_news < self._news and time.monotonic() < end and self._thread.is_alive():
            time.sleep(0.01)

    def explain(self, error: Exception) -> str:
        """Return a sentence about who is gone; waits until the heartbeats can tell."""
        self._broken = True
        self._tell()
        end = time.monotonic() + self.patience_s + 2 * _BEAT_S
        while not (sentence := self._found()) and time.monotonic() < end:
            time.sleep(_BEAT_S / 5)
        if not sentence:
            first = (str(error).strip().splitlines() or [""])[0]
            sentence = self._behind() or (
                f"the connection between the ranks broke though all of them answer ({first[:200]}); check the network"
            )
        self._verdict = sentence
        self._tell()
        return sentence

    def _found(self) -> str:
        """Return who failed or was lost, as far as the heartbeats tell."""
        now, contact_s = time.monotonic(), self._contact_s
        with self._lock:
            seen = dict(self._seen)
        for rank, (beat, _) in sorted(seen.items()):
            if beat.failure:
                return f"{self._name(rank, beat)} failed: {beat.failure}"
        own = f"rank {self.session.rank} "
        for _, (beat, _) in sorted(seen.items()):
            if beat.verdict and not beat.verdict.startswith(own):
                return beat.verdict
        if now - contact_s > self.patience_s:
            first = self._name(0, seen[0][0]) if 0 in seen else f"rank 0 ({self.session.members[0]})"
            return (
                f"the host of {first} was lost, or the network to it: it has not answered for {now - contact_s:.0f} s; "
                "start again from the last checkpoint"
            )
        # Ranks that ended because of it stand still too, but later.
        silent = [(when, rank, beat) for rank, (beat, when) in seen.items() if contact_s - when > self.patience_s]
        if not silent:
            return ""
        when, rank, beat = min(silent, key=lambda found: found[0])
        return (
            f"{self._name(rank, beat)} was lost: it has not answered for {now - when:.0f} s; "
            "start again from the last checkpoint"
        )

    def _behind(self) -> str:
        """Return who answers and still keeps the others waiting."""
        with self._lock:
            seen = dict(self._seen)
        late = [(rank, beat) for rank, (beat, _) in sorted(seen.items()) if beat.step < self.step]
        waited_for = late or [(rank, beat) for rank, (beat, _) in sorted(seen.items()) if not beat.broken]
        if len(waited_for) != 1 and not late:
            return ""
        rank, beat = waited_for[0]
        return (
            f"{self._name(rank, beat)} answers but did not come {'to' if late else 'through'} step {self.step} within "
            f"{self.session.timeout_s:.0f} s; it hangs, or is far slower than the plan expects"
        )

    def _name(self, rank: int, beat: _Beat) -> str:
        return f"rank {rank} ({self.session.members[rank]}{', ' + beat.role if beat.role else ''})"

    def close(self) -> None:
        """End the thread."""
        self._stopped = True
        self._wake.set()
        self._thread.join(timeout=2 * _BEAT_S)


_SIGNS = ("gloo", "nccl", "connection", "peer", "timed out", "timeout", "socket", "broken pipe", "store")


def _is_transport(error: Exception) -> bool:
    """Return whether an error is of the engine and not of the model: it then tells of some other rank."""
    if isinstance(error, dist.DistError):
        return True
    causes: list[BaseException | None] = [error, error.__cause__, error.__context__]
    return any(c is not None and any(sign in str(c).lower() for sign in _SIGNS) for c in causes)
