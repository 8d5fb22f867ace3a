"""Turns on devices: what makes microbatches follow each other from stage to stage.

A part of a batch that calls several placed modules on one device keeps the device from its first call there to its
last: it gives it up when it goes on to another device, or ends. Without turns the device would take the next part's
module while the first part is on its way back from the last one; all parts would move in step and overlap nothing. Of
the parts that wait for a device the earliest goes first. A part holds one device at most, so none can wait in a circle.

Knows nothing of workers; a turn is a promise among the control threads of one executor.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Turns", "take_turn"]


class Turns:
    """Who holds which device, among the parts of one executor's passes."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holder: dict[str, tuple[int, int]] = {}
        self._waiting: dict[str, list[tuple[int, int]]] = {}
        self._passes = 0

    def new_pass(self) -> int:
        """Return a number for one pass, so that equal parts of different passes are told apart."""
        with self._changed:
            self._passes += 1
            return self._passes

    @contextmanager
    def part(self, number: int, of_pass: int) -> Iterator[None]:
        """Let the calling thread work on a part: `take_turn` asks in its name; its device is given up at the end."""
        before = _local.turn
        _local.turn = (self, (number, of_pass))
        try:
            yield
        finally:
            _local.turn = before
            with self._changed:
                self._give_up((number, of_pass))

    def take(self, device: str, part: tuple[int, int]) -> None:
        """Wait until the part holds the device, giving up the one that it holds."""
        with self._changed:
            if self._holder.get(device) == part:
                return
            self._give_up(part)
            queue = self._waiting.setdefault(device, [])
            bisect.insort(queue, part)
            try:
                self._changed.wait_for(lambda: device not in self._holder and queue[0] == part)
                self._holder[device] = part
            finally:
                queue.remove(part)

    def _give_up(self, part: tuple[int, int]) -> None:
        for device in [d for d, holder in self._holder.items() if holder == part]:
            del self._holder[device]
            self._changed.notify_all()


class _Local(threading.local):
    turn: tuple[Turns, tuple[int, int]] | None = None


_local = _Local()


def take_turn(device: str) -> None:
    """Wait for the device in the name of the part that this thread works on; at once where it works on none."""
    if _local.turn is not None:
        turns, part = _local.turn
        turns.take(device, part)
