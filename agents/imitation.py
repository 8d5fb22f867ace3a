"""Imitation: the best plans that search knows (→ `teachers`), replayed decision by decision, then masked cross-entropy.

Behaviour cloning alone, no queries of the teacher on the student's own mistakes: the next stage, PPO, walks those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from autoplace.errors import InputError
from autoplace.policy.features import NUM_FEATURES, PartialPlacement
from autoplace.policy.network import PolicyNetwork
from autoplace.problem import Problem

__all__ = ["Demonstrations", "clone_epoch", "demonstrate"]


@dataclass(frozen=True, kw_only=True)
class Demonstrations:
    """Decisions of teachers."""

    features: NDArray[np.float32]
    """float32[S, D, F], padded with rows of zeros."""
    masks: NDArray[np.bool_]
    """bool[S, D]."""
    actions: NDArray[np.int64]
    """int64[S]."""

    def __len__(self) -> int:
        return len(self.actions)


def demonstrate(
    problems: Sequence[Problem],
    teachers: Sequence[NDArray[np.int32] | None],
    *,
    max_devices: int,
    hard_masks: bool = True,
) -> Demonstrations:
    """Replay teachers' placements and record every decision that had a choice.

    A placement is left out from the decision on that the mask forbids.

    Args:
        problems: Problems.
        teachers: int32[N] for each, or None.
        max_devices: Rows of the recorded features.
        hard_masks: See `PartialPlacement`.

    Raises:
        InputError: If nothing is left to learn from.
    """
    features, masks, actions = [], [], []
    for problem, teacher in zip(problems, teachers, strict=True):
        if teacher is None:
            continue
        placement = PartialPlacement(problem, masks=hard_masks)
        for action in placement.actions(teacher):
            if placement.done or not placement.mask[action]:
                break
            if placement.mask.sum() > 1:
                padded = np.zeros((max_devices, NUM_FEATURES), np.float32)
                padded[: len(placement.mask)] = placement.features
                mask = np.zeros(max_devices, np.bool_)
                mask[: len(placement.mask)] = placement.mask
                features.append(padded)
                masks.append(mask)
                actions.append(int(action))
            placement.place(int(action))
    if not actions:
        raise InputError("no teacher's placement has a decision to learn from; use more problems or more devices")
    return Demonstrations(features=np.stack(features), masks=np.stack(masks), actions=np.asarray(actions, np.int64))


def clone_epoch(
    network: PolicyNetwork,
    optimizer: torch.optim.Optimizer,
    data: Demonstrations,
    *,
    seed: int,
    batch_size: int = 512,
    schedule: Callable[[float], float] | None = None,
) -> dict[str, float]:
    """Train for one pass over the demonstrations.

    Args:
        network: Changed in place.
        optimizer: Of its parameters.
        data: Decisions.
        seed: Of the order.
        batch_size: Decisions in one update.
        schedule: Part of the epoch done, in [0, 1), to learning rate; None = leave it.

    Returns:
        `imitate/loss` (nats) and `imitate/accuracy`, means over the epoch.
    """
    order = np.random.default_rng(seed).permutation(len(data))
    losses, hits = [], 0
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        if schedule is not None:
            for group in optimizer.param_groups:
                group["lr"] = schedule(start / len(order))
        features, masks = torch.from_numpy(data.features[rows]), torch.from_numpy(data.masks[rows])
        actions = torch.from_numpy(data.actions[rows])
        embeddings, pooled = network.embed(features)
        scores = network.scores(embeddings, pooled).masked_fill(~masks, -1e8)
        loss = torch.nn.functional.cross_entropy(scores, actions)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item() * len(rows))
        hits += int((scores.argmax(dim=1) == actions).sum())
    return {"imitate/loss": sum(losses) / len(order), "imitate/accuracy": hits / len(order)}
