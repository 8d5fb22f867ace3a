"""Data parallelism as a strategy: whole copies of the model on several devices, each with its share of the batch.

The shares make all devices finish together under the affine cost of `Problem`: device d takes
fixed_d + share_d * scaling_d, with fixed and scaling summed over the ops. The k fastest devices that can run every op
are tried for k = 2 … D, with those shares and, where they differ, with equal ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autoplace.plan import Plan, Replica
from autoplace.problem import Problem
from autoplace.strategies._base import Budget, Strategy

__all__ = ["ReplicasStrategy", "balanced_shares"]


class ReplicasStrategy(Strategy):
    """Propose one replica of the whole model per device, with balanced and with equal shares."""

    name = "replicas"

    def propose(self, problem: Problem, *, budget: Budget, seed: int = 0) -> list[Plan]:
        """Return data-parallel plans, most devices first; none when the batch has a single sample."""
        able = np.flatnonzero(problem.can_run.all(axis=0))
        total = problem.latency_ms.sum(axis=0)
        fixed = np.zeros_like(total) if problem.overhead_ms is None else problem.overhead_ms.sum(axis=0)
        ranked = sorted((int(d) for d in able), key=lambda d: (total[d], d))
        plans = []
        for count in range(min(len(ranked), problem.batch_size), 1, -1):
            chosen = ranked[:count]
            balanced = _whole_samples(balanced_shares(fixed[chosen], total[chosen] - fixed[chosen]), problem.batch_size)
            equal = _whole_samples(np.full(count, 1.0 / count), problem.batch_size)
            for shares in dict.fromkeys((balanced, equal)):
                if min(shares) > 0:
                    plans.append(self._plan(problem, chosen, shares))
        return plans

    def _plan(self, problem: Problem, devices: Sequence[int], shares: Sequence[float]) -> Plan:
        names = [d.name for d in problem.cluster.devices]
        replicas = tuple(
            Replica(assignment=dict.fromkeys(problem.graph.names, names[d]), share=share)
            for d, share in zip(devices, shares, strict=True)
        )
        return Plan(
            replicas=replicas,
            strategy=self.name,
            graph_fingerprint=problem.graph.fingerprint,
            cluster_fingerprint=problem.cluster.fingerprint,
        )


def balanced_shares(fixed_ms: NDArray[np.float64], scaling_ms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the shares of the batch with which all devices finish at the same time.

    Solves fixed_d + share_d * scaling_d = T for all d with the shares summing to 1. A device whose fixed part alone
    exceeds T gets 0.

    Args:
        fixed_ms: float64[K], the part that a smaller batch does not save.
        scaling_ms: float64[K], the part that scales with the share.

    Returns:
        float64[K] shares >= 0 that sum to 1.
    """
    scaling = np.maximum(scaling_ms, 1e-9)
    active = np.ones(len(fixed_ms), bool)
    while True:
        finish = (1.0 + (fixed_ms[active] / scaling[active]).sum()) / (1.0 / scaling[active]).sum()
        late = active & (fixed_ms >= finish)
        if not late.any() or active.sum() == 1:
            break
        active &= ~late
    shares = np.where(active, (finish - fixed_ms) / scaling, 0.0)
    shares = np.maximum(shares, 0.0)
    return shares / shares.sum()


def _whole_samples(shares: NDArray[np.float64], batch_size: int) -> tuple[float, ...]:
    """Round shares to whole samples by largest remainder, as the executors split."""
    exact = shares * batch_size
    counts = np.floor(exact + 1e-9)
    order = np.argsort(-(exact - counts), kind="stable")
    counts[order[: int(batch_size - counts.sum())]] += 1
    return tuple(float(c) / batch_size for c in counts)
