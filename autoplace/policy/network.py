"""`PolicyNetwork`: one scorer shared by all devices, in torch, for training. `policy.rollout` runs the same weights.

    embedding_d = relu(W2 relu(W1 features_d + b1) + b2)
    pooled      = mean and max of the embeddings over the devices that exist
    score_d     = w4 . relu(W3 [embedding_d, pooled] + b3)
    value       = v2 . relu(V1 pooled + c1) + c2

Deep sets (Zaheer et al. 2017): permuting the devices permutes the scores and leaves the value alone, and any number of
devices goes through the same weights. Knows nothing of problems or masks; those are features and the caller's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from autoplace.errors import PolicyError
from autoplace.policy.columns import FEATURE_VERSION, MESSAGE_COLUMNS, NUM_FEATURES

__all__ = ["PolicyConfig", "PolicyNetwork", "parameter_shapes", "silenced"]


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Shape of the network and the features it was trained on."""

    hidden: int = 32
    """Width of every layer."""
    num_features: int = NUM_FEATURES
    """F of `policy.features`."""
    feature_version: int = FEATURE_VERSION
    """Version of the features' meaning; a policy of another version is refused."""

    message_passing: bool = True
    """Whether the network sees the columns that are propagated over the graph; False = they weigh nothing."""
    masks: bool = True
    """Whether placements by the policy keep to the hard mask; False = only to devices that can run the op."""

    def __post_init__(self) -> None:
        if self.feature_version != FEATURE_VERSION or self.num_features != NUM_FEATURES:
            raise PolicyError(
                f"the policy was trained on features of version {self.feature_version} ({self.num_features} of them) "
                f"and this autoplace has version {FEATURE_VERSION} ({NUM_FEATURES}); train it again"
            )
        if not isinstance(self.message_passing, bool) or not isinstance(self.masks, bool):
            raise PolicyError("message_passing and masks of a policy are true or false; correct its config.json")
        if not 1 <= self.hidden <= 1024:
            raise PolicyError(f"a policy with hidden width {self.hidden} cannot be built; use 1 to 1024")


def parameter_shapes(config: PolicyConfig) -> dict[str, tuple[int, ...]]:
    """Return name to shape of every tensor that a policy of this configuration holds."""
    hidden = config.hidden
    return {
        "embed1.weight": (hidden, config.num_features),
        "embed1.bias": (hidden,),
        "embed2.weight": (hidden, hidden),
        "embed2.bias": (hidden,),
        "score1.weight": (hidden, 3 * hidden),
        "score1.bias": (hidden,),
        "score2.weight": (1, hidden),
        "value1.weight": (hidden, 2 * hidden),
        "value1.bias": (hidden,),
        "value2.weight": (1, hidden),
        "value2.bias": (1,),
    }


def silenced(config: PolicyConfig, tensors: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """Return the weights of a policy, those of columns that its configuration switches off at zero."""
    found = {name: np.array(value, np.float32) for name, value in tensors.items()}
    if not config.message_passing:
        found["embed1.weight"][:, MESSAGE_COLUMNS] = 0.0
    return found


class PolicyNetwork(nn.Module):
    """Scores devices and values the state."""

    seen: torch.Tensor | None

    def __init__(self, config: PolicyConfig | None = None, *, seed: int = 0) -> None:
        """Initialise the weights.

        Args:
            config: Shape; None = the default.
            seed: Of the initial weights; torch's global generator is left alone.
        """
        super().__init__()
        self.config = config or PolicyConfig()
        hidden = self.config.hidden
        self.embed1 = nn.Linear(self.config.num_features, hidden)
        self.embed2 = nn.Linear(hidden, hidden)
        self.score1 = nn.Linear(3 * hidden, hidden)
        self.score2 = nn.Linear(hidden, 1, bias=False)
        self.value1 = nn.Linear(2 * hidden, hidden)
        self.value2 = nn.Linear(hidden, 1)
        self.register_buffer("seen", self._seen(), persistent=False)
        self._initialise(seed)

    def _seen(self) -> torch.Tensor | None:
        """Return float32[F], 0 for the columns that are switched off; None when there are none."""
        if self.config.message_passing:
            return None
        seen = torch.ones(self.config.num_features)
        seen[list(MESSAGE_COLUMNS)] = 0.0
        return seen

    def _initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        gains = {"score2": 0.1, "value2": 0.1}
        for name, layer in self.named_children():
            assert isinstance(layer, nn.Linear)
            nn.init.orthogonal_(layer.weight, gain=gains.get(name, 2.0**0.5), generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def embed(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the embeddings, float32[B, D, H], and what is pooled from them, float32[B, 2 H].

        Args:
            features: float32[B, D, F]; rows whose first feature is 0 are padding.
        """
        if self.seen is not None:
            features = features * self.seen
        hidden = torch.relu(self.embed2(torch.relu(self.embed1(features))))
        exists = (features[..., :1] > 0.5).to(hidden.dtype)
        hidden = hidden * exists
        mean = hidden.sum(dim=-2) / exists.sum(dim=-2).clamp(min=1.0)
        # Embeddings are 0 or more, so that the zeros of padding never win the maximum.
        return hidden, torch.cat([mean, hidden.amax(dim=-2)], dim=-1)

    def scores(self, embeddings: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """Return the score of every device, float32[B, D], from what → `embed` returned."""
        everywhere = pooled.unsqueeze(-2).expand(*embeddings.shape[:-1], pooled.shape[-1])
        return self.score2(torch.relu(self.score1(torch.cat([embeddings, everywhere], dim=-1)))).squeeze(-1)

    def value(self, pooled: torch.Tensor) -> torch.Tensor:
        """Return the value of the state, float32[B]."""
        return self.value2(torch.relu(self.value1(pooled))).squeeze(-1)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores, float32[B, D], and value, float32[B], of features, float32[B, D, F]."""
        embeddings, pooled = self.embed(features)
        return self.scores(embeddings, pooled), self.value(pooled)

    def soften(self, temperature: float) -> None:
        """Divide all scores by a temperature: greedy placements stay, samples differ more from each other."""
        with torch.no_grad():
            self.score2.weight /= temperature

    def actor_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the scores depend on."""
        return [p for name, p in self.named_parameters() if not name.startswith("value")]

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """Return a copy of all weights, name to array."""
        return silenced(self.config, {name: value.detach().cpu().numpy() for name, value in self.state_dict().items()})

    def load_tensors(self, tensors: Mapping[str, NDArray[np.float32]]) -> None:
        """Copy weights in; the reverse of → `tensors`."""
        self.load_state_dict({name: torch.from_numpy(value) for name, value in silenced(self.config, tensors).items()})
