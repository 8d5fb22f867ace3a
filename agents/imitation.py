"""Imitation: the best plans that search knows (→ `teachers`), replayed decision by decision, then masked cross-entropy.

Behaviour cloning alone, no queries of the teacher on the student's own mistakes: the next stage, PPO, walks those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from autoplace.errors import InputError
from autoplace.policy.features import NUM_FEATURES, PartialPlacement
from autoplace.policy.network import PolicyNetwork
from autoplace.problem import Problem

__all__ = ["Decisions", "Demonstrations", "clone_epoch", "demonstrate"]

_WIDTHS = (2, 3, 4, 5, 6, 8, 10, 13, 16)
"""Numbers of rows that decisions are padded to."""


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """Decisions among up to D devices."""

    features: NDArray[np.float32]
    """float32[S, D, F], padded with rows of zeros."""
    masks: NDArray[np.bool_]
    """bool[S, D]."""
    actions: NDArray[np.int64]
    """int64[S]."""


@dataclass(frozen=True, kw_only=True)
class Demonstrations:
    """Decisions of teachers, those with similar numbers of devices together: padding costs memory and time."""

    groups: tuple[Decisions, ...]

    def __len__(self) -> int:
        return sum(len(group.actions) for group in self.groups)


def demonstrate(
    problems: Sequence[Problem], teachers: Sequence[NDArray[np.int32] | None], *, hard_masks: bool = True
) -> Demonstrations:
    """Replay teachers' placements and record every decision that had a choice.

    A placement is left out from the decision on that the mask forbids.

    Args:
        problems: Problems.
        teachers: int32[N] for each, or None.
        hard_masks: See `PartialPlacement`.

    Raises:
        InputError: If nothing is left to learn from.
    """
    found: dict[int, list[tuple[NDArray[np.float32], NDArray[np.bool_], int]]] = {}
    for problem, teacher in zip(problems, teachers, strict=True):
        if teacher is None:
            continue
        kept = found.setdefault(_width(problem.num_devices), [])
        placement = PartialPlacement(problem, masks=hard_masks)
        for action in placement.actions(teacher):
            if placement.done or not placement.mask[action]:
                break
            if placement.mask.sum() > 1:
                kept.append((placement.features.copy(), placement.mask.copy(), int(action)))
            placement.place(int(action))
    if not any(found.values()):
        raise InputError("no teacher's placement has a decision to learn from; use more problems or more devices")
    return Demonstrations(groups=tuple(_stack(found.pop(width), width) for width in sorted(found) if found[width]))


def _width(devices: int) -> int:
    """Return the number of rows for a number of devices: it, or up to a third more."""
    return next((width for width in _WIDTHS if width >= devices), devices)


def _stack(kept: list[tuple[NDArray[np.float32], NDArray[np.bool_], int]], width: int) -> Decisions:
    features = np.zeros((len(kept), width, NUM_FEATURES), np.float32)
    masks = np.zeros((len(kept), width), np.bool_)
    for row, (seen, mask, _) in enumerate(kept):
        features[row, : len(mask)] = seen
        masks[row, : len(mask)] = mask
    return Decisions(features=features, masks=masks, actions=np.asarray([action for *_, action in kept], np.int64))


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
    total, hits = 0.0, 0
    for start in range(0, len(order), batch_size):
        rows = np.sort(order[start : start + batch_size])
        if schedule is not None:
            for group in optimizer.param_groups:
                group["lr"] = schedule(start / len(order))
        optimizer.zero_grad()
        for part in _parts(data, rows):
            scores = _scores(network, part)
            actions = torch.from_numpy(part.actions)
            loss = torch.nn.functional.cross_entropy(scores, actions, reduction="sum")
            (loss / len(rows)).backward()
            total += loss.item()
            hits += int((scores.argmax(dim=1) == actions).sum())
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    return {"imitate/loss": total / len(order), "imitate/accuracy": hits / len(order)}


def _parts(data: Demonstrations, rows: NDArray[np.int64]) -> Iterator[Decisions]:
    """Yield what each group has of some decisions, counted through all groups, in ascending order."""
    first = 0
    for group in data.groups:
        end = first + len(group.actions)
        inside = rows[np.searchsorted(rows, first) : np.searchsorted(rows, end)] - first
        first = end
        if len(inside):
            yield Decisions(features=group.features[inside], masks=group.masks[inside], actions=group.actions[inside])


def _scores(network: PolicyNetwork, part: Decisions) -> torch.Tensor:
    embeddings, pooled = network.embed(torch.from_numpy(part.features))
    return network.scores(embeddings, pooled).masked_fill(~torch.from_numpy(part.masks), -1e8)
