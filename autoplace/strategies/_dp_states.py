"""The devices of the pipeline dynamic programme: which are used so far, and what a piece knows of its neighbours.

Three kinds of states, the first that is exact and not too large is taken:

1. `sets`: how many devices of each type are used. Enough where what a transfer costs a device does not depend on the
   other end: transfers that cost nothing, the route `host`, links that are all alike, and any two devices.
2. `sequences`: the set of devices used, the last of them and, where sending is load, the one that comes next.
3. `orders`: a position in one of a few orders of the devices (→ `chunks.device_orders`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoplace.strategies._dp_kernels import FROM_AFTER, FROM_BEFORE, TO_AFTER, TO_BEFORE, Moves
from autoplace.strategies._support import View
from autoplace.strategies.chunks import device_orders

__all__ = ["States", "plan_states"]

_MOST_MOVES = 512
"""Moves between states beyond which devices are laid along orders."""
_NOBODY = -1


@dataclass(frozen=True, eq=False)
class States:
    """States, the moves between them, and the profiles of the pieces that moves lay."""

    moves: Moves
    device: NDArray[np.int64]
    """int64[R], device of every profile."""
    start_ms: NDArray[np.float64]
    """float64[R, 4], of a tensor in one microbatch, by column of traffic."""
    ms_per_byte: NDArray[np.float64]
    """float64[R, 4]."""
    alike: dict[int, list[int]]
    """Device of a profile to those that it stands for, in the order in which they are used."""

    def work_ns(self) -> float:
        """Return what a pair of ideals costs about, ns [measured: one core, 2026-11]."""
        return 15.0 + 9.0 * len(self.device) + 1.5 * len(self.moves.source)


class _Builder:
    """Collects states, profiles and moves under names of any kind."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._states: dict[object, int] = {}
        self._profiles: dict[tuple[int, int, int], int] = {}
        self._moves: list[tuple[int, int, int]] = []

    def state(self, name: object) -> int:
        return self._states.setdefault(name, len(self._states))

    def move(self, source: object, target: object, device: int, last: int = _NOBODY, following: int = _NOBODY) -> None:
        profile = self._profiles.setdefault((device, last, following), len(self._profiles))
        self._moves.append((self.state(source), self.state(target), profile))

    def build(self, alike: dict[int, list[int]]) -> States:
        shape = (len(self._profiles), 4)
        start, per_byte = np.zeros(shape), np.zeros(shape)
        for (device, last, following), row in self._profiles.items():
            for column, other in (
                (FROM_BEFORE, last),
                (TO_BEFORE, last),
                (FROM_AFTER, following),
                (TO_AFTER, following),
            ):
                start[row, column], per_byte[row, column] = _rate(self._view, device, other, column)
        source, target, profile = np.ascontiguousarray(np.asarray(self._moves, np.int64).reshape(-1, 3).T)
        return States(
            moves=Moves(source, target, profile, len(self._states)),
            device=np.asarray([d for d, _, _ in self._profiles], np.int64),
            start_ms=start,
            ms_per_byte=per_byte,
            alike=alike,
        )


def _rate(view: View, device: int, other: int, column: int) -> tuple[float, float]:
    """Return what a tensor and a byte cost a device, ms; the mean over the others it can talk to if none is named."""
    sender, receiver = view.ends
    receives = column in (FROM_BEFORE, FROM_AFTER)
    start = receiver.latency_ms[:, device] if receives else sender.latency_ms[device]
    per_byte = receiver.ms_per_byte[:, device] if receives else sender.ms_per_byte[device]
    if other != _NOBODY:
        return float(start[other]), float(per_byte[other])
    apart = np.arange(len(start)) != device
    able = apart & np.isfinite(start)
    if not able.any():
        return (np.inf if apart.any() else 0.0), 0.0
    return float(start[able].mean()), float(per_byte[able].mean())


def plan_states(view: View) -> States:
    """Return the states for a problem's devices."""
    usable = [d for d in range(len(view.capacity)) if view.allowed[:, d].any()]
    if _apart_is_alike(view, usable):
        types = _types(view, usable)
        size = int(np.prod([len(t) + 1.0 for t in types]))
        return _sets(view, types) if size * len(types) <= _MOST_MOVES else _orders(view, skip=True)
    if len(usable) <= 4:
        return _sequences(view, usable)
    return _orders(view, skip=False)


def _apart_is_alike(view: View, usable: Sequence[int]) -> bool:
    """Return whether what a transfer costs a device is the same whatever device is at the other end."""
    semantics, goal = view.problem.semantics, view.problem.objective.goal
    if not view.talks[np.ix_(usable, usable)].all() and semantics.route == "direct" and len(usable) > 2:
        return False
    if goal == "throughput" and (semantics.transfers, semantics.contention) == ("overlapped", "none"):
        return True
    for one in usable:
        others = [d for d in usable if d != one]
        sender, receiver = view.ends
        for row in (
            sender.latency_ms[one], sender.ms_per_byte[one], receiver.latency_ms[:, one], receiver.ms_per_byte[:, one],
        ):  # fmt: skip
            if len(set(row[others].tolist())) > 1:
                return False
    return True


def _types(view: View, usable: Sequence[int]) -> list[list[int]]:
    """Return the devices that may stand for each other: same latencies, memory, watts and ways to the others."""
    found: dict[tuple, list[int]] = {}
    for one in usable:
        device = view.problem.cluster.devices[one]
        rates = [_rate(view, one, _NOBODY, column) for column in range(4)]
        column = view.class_latency_ms[:, one].tobytes()
        found.setdefault((column, view.capacity[one], device.idle_watts, device.busy_watts, *rates), []).append(one)
    return list(found.values())


def _sets(view: View, types: Sequence[Sequence[int]]) -> States:
    builder = _Builder(view)
    builder.state((0,) * len(types))
    for used in itertools.product(*(range(len(t) + 1) for t in types)):
        for index, members in enumerate(types):
            if used[index] < len(members):
                more = (*used[:index], used[index] + 1, *used[index + 1 :])
                builder.move(used, more, members[0])
    return builder.build({t[0]: list(t) for t in types})


def _sequences(view: View, usable: Sequence[int]) -> States:
    foresees = view.problem.semantics.transfers == "blocking"
    builder = _Builder(view)
    start: tuple[frozenset[int], int, int] = (frozenset(), _NOBODY, _NOBODY)
    builder.state(start)
    seen, waiting = {start}, [start]
    while waiting:
        state = used, last, promised = waiting.pop()
        for device in usable:
            if device in used or promised not in (_NOBODY, device) or (foresees and used and promised == _NOBODY):
                continue
            more = used | {device}
            rest = [d for d in usable if d not in more]
            for following in (*rest, _NOBODY) if foresees else (_NOBODY,):
                target = (more, device, following)
                builder.move(state, target, device, last, following)
                if target not in seen:
                    seen.add(target)
                    waiting.append(target)
    return builder.build({d: [d] for d in usable})


def _orders(view: View, *, skip: bool) -> States:
    """Return positions in the longest orders; with `skip`, devices of an order may be left out."""
    orders = list(device_orders(view))
    longest = max(len(o) for o in orders)
    builder = _Builder(view)
    builder.state(())
    for order in (o for o in orders if len(o) == longest):
        for at, device in enumerate(order):
            if skip:
                for size in range(at + 1):
                    builder.move(order[:size], order[: at + 1], device)
            else:
                following = order[at + 1] if at + 1 < len(order) else _NOBODY
                last = order[at - 1] if at else _NOBODY
                builder.move(order[:at], order[: at + 1], device, last, following)
    return builder.build({d: [d] for d in range(len(view.capacity))})
