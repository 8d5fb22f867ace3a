"""What the policy sees of one decision: float32[D, F], one row per device, for the current co-location class.

Every feature is a ratio, a flag or a log ratio, so that one set of weights fits any unit, number of ops and number of
devices. → `policy.columns` names them, → `policy.fill` computes them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoplace.errors import InfeasibleError
from autoplace.jit import compiled, inline
from autoplace.policy._compile import sources_version
from autoplace.policy.columns import FEATURE_LIMIT, FEATURE_VERSION, FEATURES, NUM_FEATURES, NUM_PAIR
from autoplace.policy.fill import fill_features
from autoplace.policy.mask import fill_mask
from autoplace.policy.partial import STEP, commit, current_estimate, new_state, reset
from autoplace.policy.tables import Tables, build_tables
from autoplace.problem import Problem

__all__ = ["FEATURES", "FEATURE_LIMIT", "FEATURE_VERSION", "NUM_FEATURES", "NUM_PAIR", "PartialPlacement"]


@inline
def begin(tables, state, mask, out):
    """Empty the placement and look at its first decision; return whether any device is allowed."""
    reset(tables, state)
    found = fill_mask(tables, state, mask)
    fill_features(tables, state, mask, out)
    return found


@inline
def advance(tables, state, device, mask, out):
    """Decide the current class and look at the next; return whether any device is allowed for it."""
    commit(tables, state, device)
    if int(state.numbers[STEP]) >= tables.need.shape[0]:
        mask[:] = False
        return True
    found = fill_mask(tables, state, mask)
    fill_features(tables, state, mask, out)
    return found


def _entries(version: int) -> Any:
    """Compile the entries for one version of the sources: what they close over is part of their key in the cache."""

    @compiled
    def go(tables, state, device, mask, out):
        """As → `begin` where the device is negative, else as → `advance`."""
        # Each kernel is called in one place, for it is compiled into every place that calls it.
        if device < 0 or not version:
            reset(tables, state)
        else:
            commit(tables, state, device)
        if int(state.numbers[STEP]) >= tables.need.shape[0]:
            mask[:] = False
            return True
        found = fill_mask(tables, state, mask)
        fill_features(tables, state, mask, out)
        return found

    @compiled
    def guess(tables, state):
        """→ `current_estimate`."""
        return current_estimate(tables, state) if version else 0.0

    return go, guess


_go, _guess = _entries(sources_version())


class PartialPlacement:
    """A placement being built, one co-location class after another."""

    def __init__(self, problem: Problem, tables: Tables | None = None, *, masks: bool = True) -> None:
        """Prepare an empty placement.

        Args:
            problem: What to place.
            tables: Its tables, where they are known already.
            masks: Whether the mask is hard; False = it only asks whether a device can run the class, and placements
                that do not fit into memory or that cannot talk may come out.
        """
        self.problem = problem
        self.tables = build_tables(problem) if tables is None else tables
        self.state = new_state(self.tables, masks=masks)
        classes, devices = self.tables.can_run.shape
        self.num_steps = classes
        """Decisions in a whole placement."""
        self.features = np.zeros((devices, NUM_FEATURES), np.float32)
        """float32[D, F] of the current decision."""
        self.mask = np.zeros(devices, np.bool_)
        """bool[D]: the devices allowed; all false when the placement has failed or is done."""
        self.stuck = False
        """Whether no device is allowed for the current class."""
        self.reset()

    def reset(self) -> None:
        """Take every decision back."""
        self.stuck = not _go(self.tables, self.state, -1, self.mask, self.features)

    def place(self, device: int) -> None:
        """Decide the current class.

        Raises:
            InfeasibleError: If the placement is done or the mask forbids the device.
        """
        if self.done or not 0 <= device < len(self.mask) or not self.mask[device]:
            raise InfeasibleError(
                f"device {device} is not allowed at step {self.step}; choose one that the mask allows"
            )
        self.stuck = not _go(self.tables, self.state, int(device), self.mask, self.features)

    @property
    def step(self) -> int:
        """Number of decisions taken."""
        return int(self.state.numbers[STEP])

    @property
    def done(self) -> bool:
        """Whether every class is decided."""
        return self.step >= self.num_steps

    @property
    def log_estimate(self) -> float:
        """Guess at the final log J (J in the problem's units), from what is decided and optimism about the rest."""
        return float(_guess(self.tables, self.state))

    @property
    def current_ops(self) -> NDArray[np.int32]:
        """The ops of the current class."""
        offsets = self.tables.class_offsets
        return self.tables.class_members[offsets[self.step] : offsets[self.step + 1]]

    @property
    def assignment(self) -> NDArray[np.int32]:
        """int32[N], device index of every op; -1 where undecided."""
        return self.state.device_of[self.tables.class_of]

    def actions(self, assignment: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the decisions, int32[C], that lead to an assignment, int32[N]."""
        return np.asarray(assignment, np.int32)[self.tables.class_members[self.tables.class_offsets[:-1]]]
