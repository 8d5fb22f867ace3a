"""PPO on `PlacementEnv`: MaskablePPO (sb3-contrib) in chunks that can be stopped and resumed between any two.

A chunk is a fresh MaskablePPO with the weights and the optimizer state of the chunk before and a seed made from the
run's seed and the chunk's number; so a run that was interrupted and resumed equals one that was not. Discount 1, for
the shaped rewards telescope. Schulman et al. 2017, "Proximal policy optimization algorithms"; Huang and Ontañón 2020,
"A closer look at invalid action masking".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.buffers import MaskableRolloutBuffer, MaskableRolloutBufferSamples
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecNormalize

from autoplace.envs import PlacementVectorEnv, ProblemCache
from autoplace.policy.network import PolicyNetwork
from autoplace.problem import Problem

from .actor_critic import PlacementActorCritic
from .vec_env import PlacementVecEnv

__all__ = ["PpoConfig", "PpoTrainer"]


NEVER = 10**9
"""Interval at which stable-baselines3 would clear what was logged."""


@dataclass(frozen=True, kw_only=True)
class PpoConfig:
    """Hyperparameters of PPO."""

    learning_rate: float = 1e-3
    envs: int = 16
    """Environments stepped together."""
    steps: int = 256
    """Steps of each environment between two updates."""
    batch_size: int = 512
    """Steps in one gradient step."""
    epochs: int = 4
    """Passes over the collected steps."""
    gae_lambda: float = 0.97
    clip_range: float = 0.2
    entropy: float = 0.004
    """Weight of the entropy bonus."""
    value: float = 0.5
    """Weight of the value loss."""
    target_kl: float | None = 0.03
    """KL divergence at which an update stops early."""
    warmup_updates: int = 4
    """First updates, which teach the critic alone: one that knows nothing would spoil a cloned actor."""
    updates_per_chunk: int = 5
    """Updates between two checkpoints."""

    @property
    def chunk_steps(self) -> int:
        """Environment steps of one chunk."""
        return self.envs * self.steps * self.updates_per_chunk


class PpoTrainer:
    """Runs chunks of PPO on a set of problems.

    Args:
        network: Trained in place.
        problems: What to place; drawn evenly.
        config: Hyperparameters.
        max_devices: Rows of the observations.
        cache: Evaluators and references; None = simulated.
        report: Called after every update with metrics.
        on_episode: Called with the last info of every episode.
        hard_masks: See `PlacementEnv`; None = what the network's configuration says, else hard masks.
    """

    def __init__(
        self,
        network: PolicyNetwork,
        problems: Sequence[Problem],
        config: PpoConfig,
        *,
        max_devices: int,
        cache: ProblemCache | None = None,
        report: Callable[[dict[str, float]], None] | None = None,
        on_episode: Callable[[dict[str, Any]], None] | None = None,
        hard_masks: bool | None = None,
    ) -> None:
        self.network = network
        self.config = config
        self.updates = 0
        """Updates done, those of earlier chunks included."""
        self.optimizer_state: Mapping[str, Any] | None = None
        """State of Adam after the last chunk; None before the first."""
        self._report = report
        self._on_episode = on_episode
        self._envs = PlacementVecEnv(
            PlacementVectorEnv(
                problems,
                config.envs,
                max_devices=max_devices,
                hard_masks=getattr(network.config, "masks", True) if hard_masks is None else hard_masks,
                cache=cache,
                copy=False,
            )
        )

    def run_chunk(self, seed: int, *, learning_rate: float | None = None) -> None:
        """Train for one chunk.

        Args:
            seed: Of everything random in it.
            learning_rate: For this chunk; None = the configuration's.
        """
        config = self.config
        model = MaskablePPO(
            PlacementActorCritic,
            self._envs,
            learning_rate=config.learning_rate if learning_rate is None else learning_rate,
            n_steps=config.steps,
            batch_size=min(config.batch_size, config.envs * config.steps),
            n_epochs=config.epochs,
            gamma=1.0,
            gae_lambda=config.gae_lambda,
            clip_range=config.clip_range,
            ent_coef=config.entropy,
            vf_coef=config.value,
            target_kl=config.target_kl,
            policy_kwargs={"config": self.network.config, "tensors": self.network.tensors()},
            rollout_buffer_class=_Rollout,
            seed=seed,
            device="cpu",
        )
        model.set_logger(Logger(folder=None, output_formats=[]))
        policy = model.policy
        assert isinstance(policy, PlacementActorCritic)
        if self.optimizer_state is not None:
            policy.optimizer.load_state_dict(dict(self.optimizer_state))
        watch = _Watch(self, policy)
        model.learn(config.chunk_steps, callback=watch, log_interval=NEVER)
        watch.finish()
        self.network.load_tensors(policy.network.tensors())
        self.optimizer_state = policy.optimizer.state_dict()

    def close(self) -> None:
        """Close the environments."""
        self._envs.close()


class _Rollout(MaskableRolloutBuffer):
    """stable-baselines3's buffer, its minibatches by number of devices and without a second copy of each."""

    _present: NDArray[np.int64] | None = None

    def reset(self) -> None:
        """Forget what was collected."""
        super().reset()
        self._present = None

    def _get_samples(  # type: ignore[override]
        self, batch_inds: NDArray[np.int64], env: VecNormalize | None = None
    ) -> MaskableRolloutBufferSamples:
        if self._present is None:
            self._present = (self.observations[:, :, 0] > 0.5).sum(axis=1)
        # The order within a minibatch means nothing to the loss; this one spares the network a copy.
        return super()._get_samples(batch_inds[np.argsort(self._present[batch_inds], kind="stable")], env)

    def to_torch(self, array: np.ndarray, copy: bool = True) -> torch.Tensor:
        """Return a tensor over the array, which indexing has copied already."""
        return torch.from_numpy(array)


class _Watch(BaseCallback):
    """Collects episodes, holds the actor still while the critic warms up, and reports every update."""

    def __init__(self, trainer: PpoTrainer, policy: PlacementActorCritic) -> None:
        super().__init__()
        self._trainer = trainer
        self._policy = policy
        self._rewards: list[float] = []
        self._infeasible = 0
        self._metrics: dict[str, float] = {}

    def _on_rollout_start(self) -> None:
        self.finish()
        trainer = self._trainer
        warming = trainer.updates < trainer.config.warmup_updates
        for parameter in self._policy.network.actor_parameters():
            parameter.requires_grad_(not warming)

    def _on_step(self) -> bool:
        for index in np.flatnonzero(self.locals["dones"]):
            info = self.locals["infos"][index]
            self._rewards.append(info["log_ratio"])
            self._infeasible += not info["feasible"]
            if self._trainer._on_episode is not None:
                self._trainer._on_episode(info)
        return True

    def _on_rollout_end(self) -> None:
        self._trainer.updates += 1
        self._metrics = {"ppo/episodes": float(len(self._rewards))}
        if self._rewards:
            self._metrics["ppo/reward"] = float(np.mean(self._rewards))
            self._metrics["ppo/infeasible"] = self._infeasible / len(self._rewards)
        self._rewards, self._infeasible = [], 0

    def finish(self) -> None:
        """Report the last update, with what its gradient steps logged."""
        if not self._metrics or self._trainer._report is None:
            self._metrics = {}
            return
        logged = self.model.logger.name_to_value
        names = ("entropy_loss", "value_loss", "approx_kl", "clip_fraction", "explained_variance")
        self._metrics |= {f"ppo/{n}": float(logged[f"train/{n}"]) for n in names if f"train/{n}" in logged}
        self._trainer._report({k: v for k, v in self._metrics.items() if np.isfinite(v)})
        self._metrics = {}


def single_thread() -> None:
    """Hold torch to one thread: a network this small is many times slower on two."""
    torch.set_num_threads(1)
