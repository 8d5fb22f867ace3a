"""`sittings`: which plans can be measured beside each other: those that wait keep buckets and buffers of their own.

A plan runs in its device's memory beside what the others keep between their steps (→ `holdings`):

    max over plans (memory - kept)  +  Σ kept  ≤  memory of the device
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autoplace.plan import Plan
from autoplace.simulate.collectives import ClusterEvaluator

__all__ = ["sittings"]


def sittings(evaluator: ClusterEvaluator, plans: Sequence[Plan]) -> list[list[int]]:
    """Return the plans' positions, divided, in their order, into as few lots as memory allows; one where all fit.

    Args:
        evaluator: Knows the devices' memory and what plans hold.
        plans: Each of which fits alone.
    """
    most = np.asarray([d.memory_bytes for d in evaluator.problem.cluster.devices])
    lots: list[list[int]] = []
    running = waiting = np.zeros(len(most))
    for i, plan in enumerate(plans):
        held, kept = evaluator.memory_bytes(plan)
        if lots and (np.maximum(running, held - kept) + waiting + kept <= most).all():
            lots[-1].append(i)
            running, waiting = np.maximum(running, held - kept), waiting + kept
        else:
            lots.append([i])
            running, waiting = held - kept, kept
    return lots
