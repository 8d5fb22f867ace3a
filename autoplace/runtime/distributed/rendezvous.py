"""torchrun's c10d rendezvous, in which hosts may be missing, with two manners of ours.

1. An agent whose rank died asks for another attempt, and all other agents would end their own ranks within a second,
   which then cannot say any more whom they missed, and in which stage. Here they get `GRACE_S` to end by themselves.
   What still runs after that hangs, or does not take part, and is ended.
2. An agent that lost the store does not close the rendezvous on its way out: the others may go on without it.

The store is in the first host's agent, so that host has to stay.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

__all__ = ["BACKEND", "PatientRendezvous", "register"]

T = TypeVar("T")

BACKEND = "autoplace-c10d"
"""What torchrun's `--rdzv-backend` calls it."""
GRACE_S = 8.0
"""Longer than a lookout takes from a broken connection to its verdict."""


def register() -> None:
    """Make the backend known to torchrun in this process."""

    def create(parameters: RendezvousParameters) -> RendezvousHandler:
        backend, store = create_backend(parameters)
        return PatientRendezvous(create_handler(store, backend, parameters))

    rendezvous_handler_registry.register(BACKEND, create)


class PatientRendezvous(RendezvousHandler):
    """Wraps torch's handler; see the module's docstring.

    Args:
        inner: Does the work.
        grace_s: Seconds for which other hosts wait before this agent learns of it.
    """

    def __init__(self, inner: RendezvousHandler, *, grace_s: float = GRACE_S) -> None:
        self._inner, self._grace_s = inner, grace_s
        self._asked_s: float | None = None
        self._cut_off = False

    def get_backend(self) -> str:
        """Return the name under which torchrun asked for it."""
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        """Whether the ranks use the agent's store."""
        return self._inner.use_agent_store

    def next_rendezvous(self) -> RendezvousInfo:
        """Meet the others."""
        self._asked_s = None
        return self._reached(self._inner.next_rendezvous)

    def is_closed(self) -> bool:
        """Return whether nobody may come any more."""
        return self._reached(self._inner.is_closed)

    def set_closed(self) -> None:
        """Let nobody come any more."""
        self._reached(self._inner.set_closed)

    def num_nodes_waiting(self) -> int:
        """Return how many hosts want another attempt, once they have waited for the grace."""
        waiting = self._reached(self._inner.num_nodes_waiting)
        now = time.monotonic()
        if not waiting:
            self._asked_s = None
        elif self._asked_s is None:
            self._asked_s = now
        return waiting if self._asked_s is not None and now - self._asked_s >= self._grace_s else 0

    def get_run_id(self) -> str:
        """Return torchrun's id of the job."""
        return self._inner.get_run_id()

    def shutdown(self) -> bool:
        """End the rendezvous for all hosts, unless they were lost."""
        return False if self._cut_off else self._inner.shutdown()

    def _reached(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except RendezvousConnectionError:
            self._cut_off = True
            raise
