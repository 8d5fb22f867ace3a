"""Placement problems to train on, and others that training never sees. The split is this file.

A problem is a graph on a cluster and draws of everything else. The graph is of a synthetic family (→ `synthetic`) or
captured from a model (→ `captured_problems`). Families, cluster families and models named `HELD_OUT_...` are kept out
of training; `held_out_problems` draws from held-out families and models alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autoplace.problem import Problem

from .captured import MODELS
from .captured_problems import draw_captured_problem
from .families import FAMILIES
from .synthetic import CLUSTERS, draw_problem

__all__ = [
    "HELD_OUT_CLUSTERS",
    "HELD_OUT_FAMILIES",
    "HELD_OUT_MODELS",
    "TRAIN_CLUSTERS",
    "TRAIN_FAMILIES",
    "TRAIN_MODELS",
    "draw_problem",
    "held_out_problems",
    "training_problems",
]

HELD_OUT_FAMILIES = ("diamond", "multi_tower", "tensor_parallel")
"""Graph families that training never sees."""
TRAIN_FAMILIES = tuple(name for name in FAMILIES if name not in HELD_OUT_FAMILIES)
"""Graph families that training draws from."""
HELD_OUT_CLUSTERS = ("hosts",)
"""Cluster families that training never sees."""
TRAIN_CLUSTERS = tuple(name for name in CLUSTERS if name not in HELD_OUT_CLUSTERS)
"""Cluster families that training draws from."""


HELD_OUT_MODELS = ("mistral", "qwen2", "whisper", "clip", "deberta", "swin", "convnext")
"""Models that training never sees."""
TRAIN_MODELS = tuple(name for name in MODELS if name not in HELD_OUT_MODELS)
"""Models that training draws from."""


def training_problems(
    count: int, *, seed: int, max_ops: int = 300, max_devices: int = 16, captured: float = 0.0
) -> list[Problem]:
    """Draw problems of the training families, models and clusters.

    Args:
        count: How many.
        seed: The same seed gives the same problems, and the first ones do not depend on the count.
        max_ops: Largest number of ops, about.
        max_devices: Largest number of devices.
        captured: Share of the problems whose graph is a captured model's.

    Raises:
        InputError: If models are asked for and `transformers` is not installed.
    """
    split = _Split("train", TRAIN_FAMILIES, TRAIN_CLUSTERS, TRAIN_MODELS, max_ops, max_devices, captured)
    return [split.draw(seed, index) for index in range(count)]


def held_out_problems(
    count: int, *, seed: int, max_ops: int = 300, max_devices: int = 16, captured: float = 0.0
) -> list[Problem]:
    """Draw problems that training cannot have seen: held-out families and models on held-out and on known clusters.

    Args:
        count, seed, max_ops, max_devices, captured: As in → `training_problems`.
    """
    clusters = HELD_OUT_CLUSTERS + TRAIN_CLUSTERS
    split = _Split("held-out", HELD_OUT_FAMILIES, clusters, HELD_OUT_MODELS, max_ops, max_devices, captured)
    return [split.draw(seed, index) for index in range(count)]


@dataclass(frozen=True)
class _Split:
    """What one side of the split draws from."""

    name: str
    families: Sequence[str]
    clusters: Sequence[str]
    models: Sequence[str]
    max_ops: int
    max_devices: int
    captured: float

    def draw(self, seed: int, index: int) -> Problem:
        """Draw problem number `index`."""
        random = np.random.default_rng([seed, sum(self.name.encode()), index])
        name = f"{self.name}-{seed}-{index}"
        if self.captured > 0.0 and random.random() < self.captured:
            training = bool(random.random() < 0.5)
            return draw_captured_problem(
                random,
                str(random.choice(self.models)),
                str(random.choice(self.clusters)),
                name=name,
                training=training,
                max_ops=self.max_ops,
                max_devices=self.max_devices,
                in_order=bool(random.random() < 0.25),
            )
        family = self.families[index % len(self.families)]
        cluster = self.clusters[index // len(self.families) % len(self.clusters)]
        return draw_problem(random, family, cluster, name=name, max_ops=self.max_ops, max_devices=self.max_devices)
