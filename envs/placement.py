"""`PlacementEnv`: placing a model as a Gymnasium environment. Knows problems and evaluators; no agent, no network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from autoplace.errors import InputError
from autoplace.outcome import Evaluator
from autoplace.policy.features import FEATURE_LIMIT, NUM_FEATURES, PartialPlacement
from autoplace.problem import Problem

from .cache import INFEASIBLE_REWARD, ProblemCache, Sampler, example, sampler_of

__all__ = ["PlacementEnv"]


class PlacementEnv(gym.Env[NDArray[np.float32], np.int64]):
    """Place a model's ops on devices, one co-location class a step.

    ## Description
    A `Problem` is an op graph, a cluster, every op's latency on every device and an objective J = latency^(1-w) *
    energy^w (or steady-state time in place of latency). An episode builds one assignment, one co-location class (an op,
    or all ops that must share a device) a step. The order is the problem's own: descending upward rank, a class ranking
    as high as its first op, so that producers come before consumers; neither the actions nor the seed change it. When
    the last class is placed, the evaluator, simulated or measured, says what the plan costs.

    ## Action Space
    `Discrete(max_devices)`: the device of the current class, an index into `problem.cluster.devices`.
    `action_masks()` returns bool[max_devices], the hard mask: true where the class can run, its memory fits, its
    neighbours can be reached, and the rest can still be placed (`policy.partial.fill_mask` has the exact rule).
    Co-located ops move as one. An action that the hard mask forbids ends the episode as infeasible. With
    `hard_masks=False` the mask, and the column that shows it, offer every device that can run the class; what then
    turns out not to fit is merely punished, at the end.

    ## Observation Space
    `Box(-10, 10, (max_devices, F), float32)`: a row per device, then rows of zeros. Columns, all ratios, flags and log
    ratios:

    | columns | shape | min | max | meaning |
    |---|---|---|---|---|
    | 0 | (max_devices,) | 0 | 1 | the device exists |
    | 1 | (max_devices,) | 0 | 1 | the mask allows it |
    | 2-12 | (max_devices, 11) | -10 | 10 | partial schedule: start, finish, path to the end, objective, transfers |
    | 13-23 | (max_devices, 11) | -10 | 10 | loads of the device and its links, room until the balanced load, idleness |
    | 24-29 | (max_devices, 6) | 0 | 1 | neighbours, work at the same depth and the last decisions on the device |
    | 30-32 | (max_devices, 3) | -5 | 5 | memory left on the device |
    | 33-42 | (max_devices, 10) | -5 | 10 | hardware against this class and what comes next: latency, energy, links |
    | 43-54 | (max_devices, 12) | -1 | 10 | the same carried over the graph, 1 to 4 hops on and back, and all ahead |
    | 55-63 | (max_devices, 9) | -5 | 8 | progress, balance, memory, traffic |
    | 64-77 | (max_devices, 14) | -10 | 10 | the class: criticality, weight, fan-in and fan-out, width around it |
    | 78-93 | (max_devices, 16) | -5 | 8 | the same carried over the graph |
    | 94-107 | (max_devices, 14) | -5 | 8 | objective, semantics, size and shape of the problem |

    `autoplace.policy.features.FEATURES` names every column. The last observation of an episode is all zeros.

    So every row says what the hardware is like now: the device's speed for this class, on the whole and for what comes
    next, the energy it takes, its present load, the memory left, and the links to it and from it with their own loads.

    ## Rewards
    The sum of an episode's rewards is log(J_reference / J): 0 for a plan as good as the reference, log 2 for one twice
    as good. With `shaping`, the potential is an optimistic guess at log J from the partial schedule (`policy.partial.
    estimate`): a step's reward is the fall of the guess, and the last step pays the remainder, log(J_reference / J)
    less what was paid, so that the sum stays exact whatever the guess was worth. Without, all comes at the end. An
    infeasible episode (no device allowed, a forbidden action, a plan that the evaluator finds infeasible) sums to
    `INFEASIBLE_REWARD` = -5. Use a discount of 1.

    ## Starting State
    An empty placement of the next problem: drawn from the sequence by the environment's seeded generator, or by the
    sampler from it. `reset(options={"problem": problem})` sets the problem of one episode.

    ## Episode End
    Termination after the last class, or when an episode turns infeasible. No truncation. The last step's `info` holds
    `problem` (its name), `objective` (J; inf if infeasible), `log_ratio` (the sum of rewards), `feasible`, `reason`,
    `assignment` (int32[N]; -1 where an infeasible episode left ops undecided) and, where the evaluator returned one,
    `outcome`.

    ## Arguments
    - `problems`: a Problem, a sequence of them, or a sampler from a numpy Generator to a Problem. None = a small
      example of three ops on two devices.
    - `evaluator_factory`: Problem to Evaluator; default `SimulatedEvaluator`. `MeasuredEvaluator` gives real runs.
    - `max_devices`: rows of the observation; problems with more devices are refused.
    - `reference`: Problem to J_reference, in the evaluator's terms; default the best of single device, chunks, HEFT,
      m-ETF and the pipeline dynamic programme, simulated (where none is feasible, an optimistic bound). Asked once per
      problem.
    - `shaping`: whether rewards come on the way.
    - `hard_masks`: whether `action_masks()` is the hard mask; False for ablations.
    - `cache`: a `ProblemCache` shared with other environments, in place of `evaluator_factory` and `reference`.

    ```python
    import gymnasium, autoplace.envs
    env = gymnasium.make("autoplace/Placement-v0", problems=problem)
    many = gymnasium.make_vec("autoplace/Placement-v0", num_envs=32, problems=problems)  # `PlacementVectorEnv`
    ```

    ## Version History
    - v0: features of version 2; a policy names the version that it was trained on and is refused with another
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - Gymnasium's own declaration

    def __init__(
        self,
        problems: Problem | Sequence[Problem] | Sampler | None = None,
        *,
        evaluator_factory: Callable[[Problem], Evaluator] | None = None,
        max_devices: int = 16,
        reference: Callable[[Problem], float] | None = None,
        shaping: bool = True,
        hard_masks: bool = True,
        cache: ProblemCache | None = None,
        render_mode: str | None = None,
    ) -> None:
        """Prepare the environment, see the class.

        Raises:
            InputError: If there is no problem.
        """
        if render_mode is not None:
            raise InputError(f"render_mode {render_mode!r} is not offered; leave it out")
        if problems is None:
            problems = example()
        self._sampler = sampler_of(problems)
        self._cache = cache or ProblemCache(evaluator_factory, reference)
        self.max_devices = max_devices
        self.shaping = shaping
        self.hard_masks = hard_masks
        self.action_space: spaces.Discrete = spaces.Discrete(max_devices)
        self.observation_space = spaces.Box(-FEATURE_LIMIT, FEATURE_LIMIT, (max_devices, NUM_FEATURES), np.float32)
        self._placement: PartialPlacement | None = None
        self._paid = 0.0
        self._start_estimate = 0.0

    @property
    def problem(self) -> Problem:
        """The problem of this episode."""
        return self.placement.problem

    @property
    def placement(self) -> PartialPlacement:
        """The placement being built."""
        if self._placement is None:
            raise InputError("the environment has no episode yet; call reset() first")
        return self._placement

    def action_masks(self) -> NDArray[np.bool_]:
        """Return bool[max_devices], the devices offered for the current class; all false after the last."""
        mask, allowed = np.zeros(self.max_devices, np.bool_), self.placement.mask
        mask[: len(allowed)] = allowed
        return mask

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start an episode.

        Args:
            seed: Of the generator that draws problems.
            options: `problem`: the Problem of this episode.

        Raises:
            InputError: If the problem has more devices than `max_devices`.
        """
        super().reset(seed=seed)
        chosen = (options or {}).get("problem")
        problem = self._sampler(self.np_random) if chosen is None else chosen
        if problem.num_devices > self.max_devices:
            raise InputError(
                f"problem {problem.name!r} has {problem.num_devices} devices and the environment was made for "
                f"{self.max_devices}; pass a larger max_devices"
            )
        self._placement = PartialPlacement(problem, self._cache.entry(problem).tables, masks=self.hard_masks)
        self._paid = 0.0
        self._start_estimate = self.placement.log_estimate
        return self._observation(), {"problem": self.problem.name}

    def step(self, action: np.int64 | int) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Place the current class; see the class for rewards and info."""
        placement, device = self.placement, int(action)
        if placement.done:
            raise InputError("the episode is over; call reset()")
        if not 0 <= device < len(placement.mask) or not placement.mask[device]:
            reason = f"device {device} is not allowed at step {placement.step}"
            return self._end(INFEASIBLE_REWARD, {"objective": math.inf, "feasible": False, "reason": reason})
        placement.place(device)
        if placement.done:
            return self._end(*self._cache.judge(self.problem, placement.assignment[None, :])[0])
        if placement.stuck:
            names = self.problem.graph.names
            reason = f"no device is left for op {names[int(placement.current_ops[0])]!r}"
            return self._end(INFEASIBLE_REWARD, {"objective": math.inf, "feasible": False, "reason": reason})
        reward = 0.0
        if self.shaping:
            reward = (self._start_estimate - placement.log_estimate) - self._paid
            self._paid += reward
        return self._observation(), reward, False, False, {}

    def _observation(self) -> NDArray[np.float32]:
        observation = np.zeros((self.max_devices, NUM_FEATURES), np.float32)
        observation[: len(self.placement.features)] = self.placement.features
        return observation

    def _end(
        self, log_ratio: float, info: dict[str, Any]
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Pay what is left of the episode's sum."""
        empty = np.zeros((self.max_devices, NUM_FEATURES), np.float32)
        info |= {"log_ratio": log_ratio, "assignment": self.placement.assignment.copy()}
        info |= {"problem": self.problem.name}
        return empty, log_ratio - self._paid, True, False, info
