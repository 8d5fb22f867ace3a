"""`PlacementActorCritic`: the policy network behind stable-baselines3's face, for MaskablePPO.

The actor is the very network that ships: its scores are the logits. Observations are features as `PlacementEnv` gives
them; no feature extractor stands before the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sb3_contrib.common.maskable.distributions import MaskableDistribution
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule

from autoplace.policy.network import PolicyConfig, PolicyNetwork

__all__ = ["PlacementActorCritic"]


class PlacementActorCritic(MaskableActorCriticPolicy):
    """Actor and critic in one `PolicyNetwork`."""

    def __init__(
        self,
        *args: Any,
        config: PolicyConfig | None = None,
        tensors: Mapping[str, NDArray[np.float32]] | None = None,
        network_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        """Build the network.

        Args:
            *args: Spaces and learning rate, from MaskablePPO.
            config: Shape of the network; None = the default.
            tensors: Weights to start from; None = fresh ones.
            network_seed: Of fresh weights.
            **kwargs: Passed on.
        """
        self._config, self._tensors, self._network_seed = config, tensors, network_seed
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        """Create the network and its optimizer, in place of stable-baselines3's MLPs."""
        self.network = PolicyNetwork(self._config, seed=self._network_seed)
        if self._tensors is not None:
            self.network.load_tensors(dict(self._tensors))
        self.optimizer = self.optimizer_class(
            self.parameters(),
            lr=lr_schedule(1),  # type: ignore[call-arg]
            **self.optimizer_kwargs,
        )

    def forward(
        self, obs: torch.Tensor, deterministic: bool = False, action_masks: np.ndarray | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return actions int64[B], values float32[B, 1] and log probabilities float32[B]."""
        scores, values = self.network(obs)
        distribution = self._masked(scores, action_masks)
        actions = distribution.get_actions(deterministic=deterministic)
        return actions, values.unsqueeze(-1), distribution.log_prob(actions)

    def evaluate_actions(
        self, obs: torch.Tensor, actions: torch.Tensor, action_masks: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return values float32[B, 1], log probabilities float32[B] and entropies float32[B] of given actions."""
        scores, values = self.network(obs)
        distribution = self._masked(scores, action_masks)
        return values.unsqueeze(-1), distribution.log_prob(actions), distribution.entropy()

    def get_distribution(self, obs: PyTorchObs, action_masks: np.ndarray | None = None) -> MaskableDistribution:
        """Return the masked distribution over devices."""
        assert isinstance(obs, torch.Tensor)
        embeddings, pooled = self.network.embed(obs)
        return self._masked(self.network.scores(embeddings, pooled), action_masks)

    def predict_values(self, obs: PyTorchObs) -> torch.Tensor:
        """Return the values of states, float32[B, 1]."""
        assert isinstance(obs, torch.Tensor)
        return self.network.value(self.network.embed(obs)[1]).unsqueeze(-1)

    def _masked(self, scores: torch.Tensor, action_masks: Any) -> MaskableDistribution:
        distribution = self.action_dist.proba_distribution(action_logits=scores)
        if action_masks is not None:
            distribution.apply_masking(action_masks)
        return distribution
