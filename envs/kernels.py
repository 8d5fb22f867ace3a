"""Steps of many placements in one compiled call, for `PlacementVectorEnv`. Knows tables and states; no rewards.

A typed list holds the tables and the state of every environment: passing its one pointer takes no time, where passing
the fifty arrays of each environment takes longer than a decision.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numba
from numba.typed import List

import autoplace.policy
from autoplace.jit import digest
from autoplace.policy.features import advance, begin
from autoplace.policy.partial import STEP, current_estimate

__all__ = ["FINISHED", "FORBIDDEN", "RUNNING", "STUCK", "new_slots", "start_slot", "step_slots"]

RUNNING, FINISHED, STUCK, FORBIDDEN = 0, 1, 2, 3
"""What a step came to: goes on, all placed, no device left for the next class, an action that the mask forbids."""


def _sources_version() -> int:
    """Return a number that changes with the kernels called: numba's cache on disk sees this file alone."""
    return digest(sorted(Path(str(autoplace.policy.__file__)).parent.glob("*.py")))


@numba.njit(cache=True)
def new_slots(tables, state, count):
    """Return a typed list of `count` slots (tables, state), all alike."""
    slots = List()
    for _ in range(count):
        slots.append((tables, state))
    return slots


def _entries(version: int) -> tuple[Any, Any]:
    """Compile the entries; a closure's values are part of the cache's key."""

    @numba.njit(cache=True)
    def start_slot(slots, index, tables, state, allowed, features):
        """Begin a placement in a slot.

        Args:
            slots: From → `new_slots`.
            index: Of the slot.
            tables, state: Of the problem; the state is emptied.
            allowed: bool[B, D], a row filled: the hard mask.
            features: float32[B, D, F], a row filled.

        Returns:
            The guess at log J of the empty placement.
        """
        slots[index] = (tables, state)
        devices = tables.can_run.shape[1]
        allowed[index] = False
        features[index] = 0.0
        begin(tables, state, allowed[index][:devices], features[index][:devices])
        return current_estimate(tables, state) if version else 0.0

    @numba.njit(cache=True)
    def step_slots(slots, actions, allowed, features, estimates, status):
        """Decide one class in every slot.

        Args:
            slots: From → `new_slots`, all of them started.
            actions: int64[B], devices.
            allowed: bool[B, D], the hard masks of this decision, replaced by those of the next.
            features: float32[B, D, F], filled; zeros where the placement has ended.
            estimates: float64[B], filled with guesses at log J where the placement goes on.
            status: int8[B], filled.
        """
        for i in range(len(slots)):
            tables, state = slots[i]
            devices, device = tables.can_run.shape[1], actions[i]
            if device < 0 or device >= devices or not allowed[i, device]:
                features[i] = 0.0
                status[i] = FORBIDDEN
                continue
            features[i, devices:] = 0.0
            found = advance(tables, state, device, allowed[i][:devices], features[i][:devices])
            if int(state.numbers[STEP]) >= tables.need.shape[0]:
                status[i] = FINISHED
            elif not found:
                status[i] = STUCK
            else:
                status[i] = RUNNING
                estimates[i] = current_estimate(tables, state)
                continue
            features[i] = 0.0

    return start_slot, step_slots


start_slot, step_slots = _entries(_sources_version())
