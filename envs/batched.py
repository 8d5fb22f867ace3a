"""`PlacementVectorEnv`: many placements stepped together in compiled code. Knows what `PlacementEnv` knows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from autoplace.errors import InputError
from autoplace.outcome import Evaluator
from autoplace.policy.features import FEATURE_LIMIT, NUM_FEATURES
from autoplace.policy.partial import STEP, State
from autoplace.problem import Problem

from .cache import INFEASIBLE_REWARD, Entry, ProblemCache, Sampler, example, sampler_of
from .kernels import FINISHED, STUCK, new_slots, start_slot, step_slots

__all__ = ["PlacementVectorEnv"]

Ended = list[tuple[int, dict[str, Any]]]
"""(environment, last info) of the episodes that ended in a step."""


class PlacementVectorEnv(gym.vector.VectorEnv[NDArray[np.float32], NDArray[np.int64], NDArray[Any]]):
    """Place B models at once, one co-location class of each a step.

    ## Description
    B episodes of `PlacementEnv`, see there, with the same observations, masks, rewards and infos for the same seeds and
    actions. All classes of a step are placed in one compiled call, and finished plans of one problem are evaluated in
    one call, in the order of the environments.

    ## Action Space
    `MultiDiscrete([max_devices] * B)`. `action_masks()` returns bool[B, max_devices].

    ## Observation Space
    `Box(-10, 10, (B, max_devices, F), float32)`, each a `PlacementEnv`'s.

    ## Rewards
    float64[B], each a `PlacementEnv`'s.

    ## Starting State
    An empty placement in every environment. Environment i draws its problems with a generator of its own, of seed
    `seed + i`. `reset(options={"problem": problem})` sets the problem of all first episodes.

    ## Episode End
    As in `PlacementEnv`. An environment whose episode ends begins the next one in the same step (autoreset
    `SAME_STEP`): its row of the observation and of the mask is the next episode's, `infos["final_info"]` holds the last
    info, with arrays of one entry per environment, and `infos["final_obs"]` zeros.

    ## Arguments
    - `num_envs`: B.
    - `copy`: whether observations and masks are copies. Without, a step's observations are overwritten by the next step
      but one, and the masks by the next.
    - All others as in `PlacementEnv`.

    ## Version History
    - v0: first version
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012 - Gymnasium's own

    def __init__(
        self,
        problems: Problem | Sequence[Problem] | Sampler | None = None,
        num_envs: int = 1,
        *,
        evaluator_factory: Callable[[Problem], Evaluator] | None = None,
        max_devices: int = 16,
        reference: Callable[[Problem], float] | None = None,
        shaping: bool = True,
        hard_masks: bool = True,
        cache: ProblemCache | None = None,
        copy: bool = True,
        render_mode: str | None = None,
    ) -> None:
        """Prepare the environments, see the class.

        Raises:
            InputError: If there is no problem, or no environment.
        """
        if render_mode is not None:
            raise InputError(f"render_mode {render_mode!r} is not offered; leave it out")
        if num_envs < 1:
            raise InputError(f"num_envs is {num_envs}; use 1 or more")
        self._sampler = sampler_of(example() if problems is None else problems)
        self._cache = cache or ProblemCache(evaluator_factory, reference)
        self.num_envs, self.max_devices = num_envs, max_devices
        self.shaping, self.hard_masks, self.copy = shaping, hard_masks, copy
        self.single_action_space: spaces.Discrete = spaces.Discrete(max_devices)
        self.single_observation_space = spaces.Box(
            -FEATURE_LIMIT, FEATURE_LIMIT, (max_devices, NUM_FEATURES), np.float32
        )
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._generators: list[np.random.Generator] = []
        self._entries: list[Entry] = []
        self._states: list[State] = []
        self._slots: Any = None
        self._allocate()

    def _allocate(self) -> None:
        count, rows = self.num_envs, self.max_devices
        # Two, for learners keep the last observation until they have seen the next.
        self._observations = np.zeros((2, count, rows, NUM_FEATURES), np.float32)
        self._current = 0
        self._allowed = np.zeros((count, rows), np.bool_)
        self._start_estimate, self._estimate, self._paid = np.zeros((3, count))
        self._status = np.zeros(count, np.int8)

    @property
    def problems(self) -> list[Problem]:
        """The problem of every environment's episode."""
        return [entry.problem for entry in self._entries]

    def action_masks(self) -> NDArray[np.bool_]:
        """Return bool[B, max_devices], the devices offered for the current classes."""
        return self._allowed.copy() if self.copy else self._allowed

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start an episode everywhere.

        Args:
            seed: Environment i gets `seed + i`; or a seed per environment. None = the generators go on.
            options: `problem`: the Problem of these episodes.

        Raises:
            InputError: If a problem has more devices than `max_devices`, or the seeds are not one per environment.
        """
        self._seed(seed)
        chosen = (options or {}).get("problem")
        self._entries = [self._draw(i) if chosen is None else self._entry(chosen) for i in range(self.num_envs)]
        self._states = [entry.take_state(masks=self.hard_masks) for entry in self._entries]
        self._slots = new_slots(self._entries[0].tables, self._states[0], self.num_envs)
        infos: dict[str, Any] = {}
        for index, entry in enumerate(self._entries):
            self._start(index)
            self._add_info(infos, {"problem": entry.problem.name}, index)
        return self._seen(), infos

    def step(
        self, actions: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Place one class in every environment; see the class for infos."""
        observations, rewards, terminations, ended = self.advance(actions)
        infos: dict[str, Any] = {}
        # One object each, for assignments of different problems have different lengths.
        assignments = np.full(self.num_envs, None, object)
        for index, info in ended:
            empty = np.zeros((self.max_devices, NUM_FEATURES), np.float32)
            assignments[index] = info.pop("assignment")
            self._add_info(infos, {"final_obs": empty, "final_info": info}, index)
            self._add_info(infos, {"problem": self._entries[index].problem.name}, index)
        if ended:
            infos["final_info"] |= {"assignment": assignments, "_assignment": terminations}
        return observations, rewards, terminations, np.zeros(self.num_envs, np.bool_), infos

    def advance(
        self, actions: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.bool_], Ended]:
        """Place one class in every environment; what → `step` does, the infos in a list.

        Args:
            actions: int64[B].

        Returns:
            Observations, rewards, terminations, and (environment, last info) of every episode that ended.

        Raises:
            InputError: If there was no reset, or the number of actions is another.
        """
        if self._slots is None:
            raise InputError("the environments have no episodes yet; call reset() first")
        actions = np.ascontiguousarray(actions, np.int64)
        if actions.shape != (self.num_envs,):
            raise InputError(f"actions have shape {actions.shape}; give one for each of {self.num_envs} environments")
        self._current = 1 - self._current
        step_slots(self._slots, actions, self._allowed, self._observations[self._current], self._estimate, self._status)
        terminations = self._status != 0
        rewards = np.zeros(self.num_envs)
        if self.shaping:
            rewards = np.where(terminations, 0.0, (self._start_estimate - self._estimate) - self._paid)
            self._paid += rewards
        ended = self._end(np.flatnonzero(terminations), actions, rewards)
        for index, _ in ended:
            self._entries[index].states[self.hard_masks].append(self._states[index])
            self._entries[index] = self._draw(index)
            self._states[index] = self._entries[index].take_state(masks=self.hard_masks)
            self._start(index)
        return self._seen(), rewards, terminations, ended

    def _seen(self) -> NDArray[np.float32]:
        observations = self._observations[self._current]
        return observations.copy() if self.copy else observations

    def _seed(self, seed: int | Sequence[int | None] | None) -> None:
        seeds: list[int | None]
        if seed is None or isinstance(seed, (int, np.integer)):
            seeds = [None if seed is None else int(seed) + i for i in range(self.num_envs)]
        else:
            seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise InputError(f"{len(seeds)} seeds were given for {self.num_envs} environments; give one for each")
        for index, own in enumerate(seeds):
            if own is not None or len(self._generators) <= index:
                self._generators[index : index + 1] = [seeding.np_random(own)[0]]

    def _draw(self, index: int) -> Entry:
        """Draw an environment's next problem."""
        return self._entry(self._sampler(self._generators[index]))

    def _entry(self, problem: Problem) -> Entry:
        if problem.num_devices > self.max_devices:
            raise InputError(
                f"problem {problem.name!r} has {problem.num_devices} devices and the environment was made for "
                f"{self.max_devices}; pass a larger max_devices"
            )
        return self._cache.entry(problem)

    def _start(self, index: int) -> None:
        """Begin an episode; its first observation goes into the current buffer."""
        tables, state = self._entries[index].tables, self._states[index]
        target = self._observations[self._current]
        self._start_estimate[index] = start_slot(self._slots, index, tables, state, self._allowed, target)
        self._paid[index] = 0.0

    def _end(self, indices: NDArray[np.int64], actions: NDArray[np.int64], rewards: NDArray[np.float64]) -> Ended:
        """Judge the episodes that ended, pay what is left of their sums, and return their last infos."""
        verdicts: dict[int, tuple[float, dict[str, Any]]] = {}
        finished: dict[int, list[int]] = {}
        assignments = {int(i): self._assignment(int(i)) for i in indices}
        for index in assignments:
            if self._status[index] == FINISHED:
                finished.setdefault(id(self._entries[index]), []).append(index)
            else:
                info = {"objective": math.inf, "feasible": False, "reason": self._reason(index, int(actions[index]))}
                verdicts[index] = INFEASIBLE_REWARD, info
        for group in finished.values():
            plans = np.stack([assignments[i] for i in group])
            verdicts |= zip(group, self._cache.judge(self._entries[group[0]].problem, plans), strict=True)
        ended = []
        for index, assignment in assignments.items():
            log_ratio, info = verdicts[index]
            rewards[index] = log_ratio - self._paid[index]
            info |= {"log_ratio": log_ratio, "assignment": assignment, "problem": self._entries[index].problem.name}
            ended.append((index, info))
        return ended

    def _assignment(self, index: int) -> NDArray[np.int32]:
        return self._states[index].device_of[self._entries[index].tables.class_of]

    def _reason(self, index: int, action: int) -> str:
        """Say why an episode is infeasible."""
        entry, step = self._entries[index], int(self._states[index].numbers[STEP])
        if self._status[index] == STUCK:
            op = entry.tables.class_members[entry.tables.class_offsets[step]]
            return f"no device is left for op {entry.problem.graph.names[int(op)]!r}"
        return f"device {action} is not allowed at step {step}"
