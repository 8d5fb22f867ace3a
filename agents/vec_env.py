"""`PlacementVecEnv`: `PlacementVectorEnv` behind stable-baselines3's face. Adds nothing of its own."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from autoplace.envs import PlacementVectorEnv

__all__ = ["PlacementVecEnv"]


class PlacementVecEnv(VecEnv):
    """Steps a batch of placements for stable-baselines3."""

    def __init__(self, envs: PlacementVectorEnv) -> None:
        """Wrap a batch.

        Args:
            envs: Made with `copy=False` it is faster; the learner copies what it keeps.
        """
        self.envs = envs
        self._actions: NDArray[np.int64] | None = None
        self._running = [{} for _ in range(envs.num_envs)]  # type: list[dict[str, Any]]
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

    def reset(self) -> NDArray[np.float32]:
        """Start an episode everywhere, with the seeds that → `seed` set."""
        observations, _ = self.envs.reset(seed=self._seeds)
        self._reset_seeds()
        self._reset_options()
        return observations

    def step_async(self, actions: NDArray[np.int64]) -> None:
        """Take the actions for → `step_wait`."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Step; infos are those of `PlacementEnv`, empty while an episode goes on."""
        assert self._actions is not None
        observations, rewards, dones, ended = self.envs.advance(self._actions)
        infos = self._running.copy()
        for index, info in ended:
            infos[index] = info | {"TimeLimit.truncated": False}
        return observations, rewards.astype(np.float32), dones, infos

    def close(self) -> None:
        """Close the batch."""
        self.envs.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Return an attribute of the batch, once per environment."""
        return [getattr(self.envs, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the batch."""
        setattr(self.envs, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> Any:
        """Call a method of the batch and return each environment's part of the result."""
        found = getattr(self.envs, method_name)(*method_args, **method_kwargs)
        return found if indices is None else [found[i] for i in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """Return False per environment: no wrapper stands between."""
        return [False] * len(list(self._get_indices(indices)))
