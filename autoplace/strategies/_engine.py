"""The inner loop of every search by local moves, compiled by numba: draw a move, try it, accept it or not.

Moves, memory and the prior are those of `_moves`; what a placement costs is the simulator's knowledge
(→ `simulate.local`). A worse candidate is accepted with probability exp(-(J - J_now) / T): S. Kirkpatrick, C. Gelatt,
M. Vecchi, "Optimization by simulated annealing", Science 220, 1983. The dice are thrown before the candidate is
simulated, so that the simulator may stop as soon as J is sure to be too high.
"""

from __future__ import annotations

import math
from pathlib import Path

from autoplace.jit import compiled, digest, uniform
from autoplace.simulate.local import begin, keep, local_version, trial
from autoplace.strategies._moves import (
    EVALUATIONS,
    GUIDED,
    VALUE,
    accept,
    draw,
    draw_class,
    fits,
    reach,
    remember,
    spread,
    take_back,
    turn,
    window_move,
)

__all__ = ["anneal", "engine_version", "set_out", "solve_windows"]

_TRIES = 2000
"""Draws in a row that may give no move before a walk ends: nothing else can be reached."""


def engine_version() -> int:
    """Return a number that changes with the sources of everything that the entries run, this file's apart."""
    return local_version() ^ digest([Path(__file__).with_name("_moves.py")])


def _entries(version):  # type: ignore[no-untyped-def]
    """Build the entries for one version of the simulator.

    What an entry closes over is part of its key in numba's cache, and only what it refers to is closed over: each must
    name the version, or it runs the simulator that it was compiled with.
    """

    @compiled
    def set_out(space, walk, local):
        """Stand on `walk.now`: simulate it; it becomes the best. Return its J; inf when infeasible.

        Costs one evaluation, which is not counted.
        """
        for d in range(len(walk.used)):
            walk.used[d] = 0.0
        for index in range(len(walk.now)):
            walk.used[walk.now[index]] += space.class_bytes[index]
            for m in range(space.member_offsets[index], space.member_offsets[index + 1]):
                local.plan[0, space.members[m]] = walk.now[index]
        walk.numbers[VALUE] = begin(local) if version else 0.0
        remember(walk)
        return walk.numbers[VALUE]

    @compiled
    def anneal(space, prior, walk, local, count, heat):
        """Try `count` moves at one temperature.

        Args:
            space, prior, walk, local: Where; `set_out` was called.
            count: Evaluations to spend.
            heat: Temperature, in units of J; 0 = never accept what is worse.

        Returns:
            Evaluations spent; fewer than `count` where no other placement can be reached.
        """
        numbers = walk.numbers
        if len(space.free) == 0 or version == 0:
            return 0
        for spent in range(count):
            size, tries = 0, 0
            while size == 0 and tries < _TRIES:
                size = draw(space, prior, walk)
                tries += 1
                if size > 0 and not fits(space, walk, size):
                    size = 0
            if size == 0:
                return spent
            dice = uniform(walk.random)
            limit = numbers[VALUE] - heat * math.log(max(dice, 1e-300))
            numbers[EVALUATIONS] += 1.0
            value = trial(local, walk.ops, walk.devices, spread(space, walk, size), limit)
            if value > limit or value == math.inf:
                take_back(space, walk, size)
                continue
            keep(local)
            accept(walk, size, value)
        return count

    @compiled
    def solve_windows(space, prior, walk, local, count, size):
        """Place `size` connected classes as well as can be, all placements of them tried, again and again.

        Args:
            space, prior, walk, local: Where; `set_out` was called.
            count: Evaluations to spend; the last window may be left half tried.
            size: Classes of a window.

        Returns:
            Evaluations spent.
        """
        numbers, spent, idle = walk.numbers, 0, 0 if version else _TRIES
        while spent < count and idle < _TRIES and len(space.free) > 0:
            guided = uniform(walk.random) < numbers[GUIDED]
            reached = reach(space, walk, draw_class(space, prior, walk, guided), size)
            for k in range(reached):
                walk.digits[0, k] = walk.now[walk.reached[k]]
            best, before = numbers[VALUE], spent
            tried = 0
            # The wheel starts at the present placement; it has gone round when it is there again.
            while spent < count:
                if not turn(space, walk, reached):
                    tried += 1
                same = True
                for k in range(reached):
                    same = same and walk.digits[0, k] == walk.now[walk.reached[k]]
                if same or tried > 1:
                    break
                moved = window_move(space, walk, reached, 0)
                if moved == 0 or not fits(space, walk, moved):
                    continue
                value = trial(local, walk.ops, walk.devices, spread(space, walk, moved), best)
                take_back(space, walk, moved)
                spent += 1
                if value < best:
                    best = value
                    for k in range(reached):
                        walk.digits[1, k] = walk.digits[0, k]
            idle = idle + 1 if spent == before else 0
            if best < numbers[VALUE]:
                moved = window_move(space, walk, reached, 1)
                if fits(space, walk, moved):
                    trial(local, walk.ops, walk.devices, spread(space, walk, moved), math.inf)
                    keep(local)
                    accept(walk, moved, best)
        numbers[EVALUATIONS] += float(spent)
        return spent

    return set_out, anneal, solve_windows


set_out, anneal, solve_windows = _entries(engine_version())
