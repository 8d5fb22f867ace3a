"""Executors by plan, kept between measurements: compiling, and starting threads and processes, takes seconds.

An idle executor's threads wait without work, and its gates let calls through that are not its own.
"""

from __future__ import annotations

import json

import torch

from autoplace.hardware.cluster import Cluster
from autoplace.plan import Plan
from autoplace.runtime import Executor, build_executor

__all__ = ["ExecutorPool", "plan_key"]


def plan_key(plan: Plan) -> str:
    """Return what tells plans apart, whoever proposed them."""
    return json.dumps({**plan.to_json(), "strategy": ""}, sort_keys=True)


class ExecutorPool:
    """Builds the executor of a plan once.

    Args:
        model: What they run.
        cluster: The devices that plans name.
        keep: How many may wait for their next use; those used longest ago are closed first.
    """

    def __init__(self, model: torch.nn.Module, cluster: Cluster, keep: int) -> None:
        self._model, self._cluster, self._keep = model, cluster, keep
        self._executors: dict[str, Executor] = {}

    def __len__(self) -> int:
        return len(self._executors)

    def take(self, plan: Plan) -> Executor:
        """Return the plan's executor, built if there is none yet.

        Raises:
            ExecutionError: If the plan does not fit model, cluster or machine.
        """
        key = plan_key(plan)
        executor = self._executors.pop(key, None)
        if executor is None:
            executor = build_executor(self._model, plan, self._cluster)
        self._executors[key] = executor  # last in order: used last
        return executor

    def drop(self, plan: Plan) -> None:
        """Close the plan's executor, after a failure, and forget it."""
        executor = self._executors.pop(plan_key(plan), None)
        if executor is not None:
            executor.close()

    def trim(self) -> None:
        """Close what is more than may wait."""
        while len(self._executors) > self._keep:
            self._executors.pop(next(iter(self._executors))).close()

    def close(self) -> None:
        """Close all; the next `take` builds anew."""
        while self._executors:
            self._executors.popitem()[1].close()
