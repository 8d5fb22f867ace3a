"""Choose the executor for a plan."""

from __future__ import annotations

import torch

from autoplace.hardware.cluster import Cluster
from autoplace.plan import Plan

from ._base import Executor
from .identity import Identity
from .replicas import Replicas
from .single import SingleDevice
from .stages import Stages

__all__ = ["build_executor"]

_EXECUTORS: dict[str, type[Executor]] = {
    shape: executor for executor in (Identity, Replicas, SingleDevice, Stages) for shape in executor.shapes
}


def build_executor(model: torch.nn.Module, plan: Plan, cluster: Cluster) -> Executor:
    """Return an executor that runs the model under the plan.

    Args:
        model: The model; it is used, not copied.
        plan: Any plan for this model and cluster.
        cluster: Where the plan's devices are described.

    Raises:
        ExecutionError: If the plan names a module or device that does not exist, or asks for what cannot run here.
    """
    return _EXECUTORS[plan.shape](model, plan, cluster)
