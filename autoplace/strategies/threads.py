"""The whole model on one CPU device with each measured number of intra-op threads."""

from __future__ import annotations

import numpy as np

from autoplace.plan import Plan
from autoplace.problem import Problem
from autoplace.strategies._base import Budget, Strategy

__all__ = ["ThreadsStrategy"]


class ThreadsStrategy(Strategy):
    """Propose single-device plans for every thread count in `Problem.thread_scale`."""

    name = "threads"

    def propose(self, problem: Problem, *, budget: Budget, seed: int = 0) -> list[Plan]:
        """Return one plan per thread count, fastest by the measured scale first; the best CPU device runs it."""
        total = np.where(problem.can_run.all(axis=0), problem.latency_ms.sum(axis=0), np.inf)
        best: dict[int, tuple[float, int]] = {}
        for device, scales in problem.thread_scale.items():
            index = problem.cluster.index[device]
            for threads, scale in scales.items():
                offer = (float(total[index] * scale), index)
                best[threads] = min(best.get(threads, (np.inf, -1)), offer)
        ranked = sorted((time, threads, index) for threads, (time, index) in best.items() if np.isfinite(time))
        devices = problem.cluster.devices
        return [
            Plan.from_assignment(
                problem,
                np.full(problem.num_ops, index),
                strategy=self.name,
                threads={devices[index].name: threads},
                microbatches=1,
            )
            for _, threads, index in ranked
        ]
