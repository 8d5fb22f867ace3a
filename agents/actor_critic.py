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
from torch import nn

from autoplace.policy.network import PolicyConfig, PolicyNetwork

__all__ = ["PlacementActorCritic"]

ABSENT = -1e8
"""Score of devices that are masked or that do not exist: its exponential is 0, and products with it are finite."""
SMALLEST_GROUP = 128
"""States for which a pass of their own through the network is worth its calls."""


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
        scores, values = self._scores_and_values(obs)
        log_probs = _masked(scores, action_masks).log_softmax(dim=-1)
        # A race of exponential clocks draws from the softmax, as torch.multinomial does.
        race = log_probs if deterministic else log_probs.exp() / torch.empty_like(log_probs).exponential_()
        actions = race.argmax(dim=-1)
        return actions, values.unsqueeze(-1), log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)

    def evaluate_actions(
        self, obs: torch.Tensor, actions: torch.Tensor, action_masks: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return values float32[B, 1], log probabilities float32[B] and entropies float32[B] of given actions."""
        scores, values = self._scores_and_values(obs)
        log_probs = _masked(scores, action_masks).log_softmax(dim=-1)
        # A device that is masked has probability 0, and 0 times its log is 0, for that is finite.
        entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
        return values.unsqueeze(-1), log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1), entropy

    def get_distribution(self, obs: PyTorchObs, action_masks: np.ndarray | None = None) -> MaskableDistribution:
        """Return the masked distribution over devices."""
        assert isinstance(obs, torch.Tensor)
        distribution: MaskableDistribution = self.action_dist.proba_distribution(
            action_logits=self._scores_and_values(obs)[0]
        )
        if action_masks is not None:
            distribution.apply_masking(action_masks)
        return distribution

    def predict_values(self, obs: PyTorchObs) -> torch.Tensor:
        """Return the values of states, float32[B, 1]."""
        assert isinstance(obs, torch.Tensor)
        return self._scores_and_values(obs)[1].unsqueeze(-1)

    def _scores_and_values(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores, float32[B, D], and values, float32[B], without computing the rows of most of the padding.

        States go through the network in groups of similar numbers of devices; those that come in ascending order of it
        need no copy. Absent devices score `ABSENT`.
        """
        present = (obs[..., 0] > 0.5).sum(dim=-1).clamp(min=1)
        if len(obs) < 2 * SMALLEST_GROUP:
            return self._group(obs, int(present.max()))
        ordered, order = present.sort(stable=True)
        if in_order := torch.equal(present, ordered):
            rows = obs
        else:
            rows = obs.index_select(0, order)
        found, first = [], 0
        while first < len(rows):
            last = _group_end(ordered, first)
            found.append(self._group(rows[first:last], int(ordered[last - 1])))
            first = last
        scores, values = (torch.cat(parts) for parts in zip(*found, strict=True))
        if in_order:
            return scores, values
        back = order.argsort()
        return scores[back], values[back]

    def _group(self, obs: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores and values of states with `width` devices at most."""
        scores, values = self.network(obs[:, :width])
        return nn.functional.pad(scores, (0, obs.shape[1] - width), value=ABSENT), values


def _masked(scores: torch.Tensor, masks: np.ndarray | torch.Tensor | None) -> torch.Tensor:
    """Return scores, float32[B, D], with those of masked devices at `ABSENT`."""
    if masks is None:
        return scores
    return scores.masked_fill(~torch.as_tensor(masks, dtype=torch.bool), ABSENT)


def _group_end(ordered: torch.Tensor, first: int) -> int:
    """Return where the group ends that begins at `first` of ascending numbers of devices, int64[B].

    A group's largest number is at most a third above its least, and a group has `SMALLEST_GROUP` states or more; the
    last takes what is left.
    """
    widest = max(int(ordered[first]) + 1, int(ordered[first]) * 4 // 3)
    last = int(torch.searchsorted(ordered, widest, right=True))
    last = max(last, first + SMALLEST_GROUP)
    if last < len(ordered):
        last = int(torch.searchsorted(ordered, int(ordered[last - 1]), right=True))
    return len(ordered) if len(ordered) - last < SMALLEST_GROUP else last
