"""Placement problems to train on, and others that training never sees. The split is this file.

A problem is a graph on a cluster: a synthetic family (→ `synthetic`) or a model's captured graph (→ `captured`), and
draws of everything else. Families, cluster families and models named `HELD_OUT_...` are kept out of training;
`held_out_problems` draws from held-out families and models alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autoplace.problem import Problem

from .families import FAMILIES
from .synthetic import CLUSTERS, draw_problem

__all__ = [
    "HELD_OUT_CLUSTERS",
    "HELD_OUT_FAMILIES",
    "TRAIN_CLUSTERS",
    "TRAIN_FAMILIES",
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


def training_problems(count: int, *, seed: int, max_ops: int = 300, max_devices: int = 16) -> list[Problem]:
    """Draw problems of the training families and clusters.

    Args:
        count: How many.
        seed: The same seed gives the same problems, and the first ones do not depend on the count.
        max_ops: Largest number of ops, about.
        max_devices: Largest number of devices.
    """
    return _draw(count, seed, "train", TRAIN_FAMILIES, TRAIN_CLUSTERS, max_ops, max_devices)


def held_out_problems(count: int, *, seed: int, max_ops: int = 300, max_devices: int = 16) -> list[Problem]:
    """Draw problems that training cannot have seen: held-out families on held-out and on known clusters.

    Args:
        count, seed, max_ops, max_devices: As in → `training_problems`.
    """
    clusters = HELD_OUT_CLUSTERS + TRAIN_CLUSTERS
    return _draw(count, seed, "held-out", HELD_OUT_FAMILIES, clusters, max_ops, max_devices)


def _draw(
    count: int, seed: int, split: str, families: Sequence[str], clusters: Sequence[str], max_ops: int, max_devices: int
) -> list[Problem]:
    salt = sum(split.encode())
    problems = []
    for index in range(count):
        random = np.random.default_rng([seed, salt, index])
        name = f"{split}-{seed}-{index}"
        family, cluster = families[index % len(families)], clusters[index // len(families) % len(clusters)]
        problems.append(draw_problem(random, family, cluster, name=name, max_ops=max_ops, max_devices=max_devices))
    return problems
