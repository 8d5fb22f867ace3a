"""Choose the executor for a plan: by its shape, its engine, and whether it needs threads of its own."""

from __future__ import annotations

from importlib import import_module

import torch

from autoplace.errors import ExecutionError
from autoplace.hardware.cluster import Cluster
from autoplace.plan import Plan

from ._base import Executor
from .identity import Identity
from .inline import InlineDevice, runs_inline
from .replicas import Replicas
from .single import SingleDevice
from .stages import Stages

__all__ = ["build_executor"]

_THREADS: dict[str, type[Executor]] = {
    shape: executor for executor in (Identity, Replicas, SingleDevice, Stages) for shape in executor.shapes
}
_ENGINES = {"processes": ("processes", "ProcessReplicas"), "graph": ("stage_graph", "StageGraph")}
"""Engine to module and class; imported when first used, as most programs never do."""


def build_executor(model: torch.nn.Module, plan: Plan, cluster: Cluster) -> Executor:
    """Return an executor that runs the model under the plan.

    Args:
        model: The model; it is used, not copied.
        plan: Any plan for this model and cluster.
        cluster: Where the plan's devices are described.

    Raises:
        ExecutionError: If the plan names a module or device that does not exist, or asks for what cannot run here.
    """
    if plan.engine in _ENGINES:
        return _other_engine(plan)(model, plan, cluster)
    if runs_inline(model, plan, cluster):
        return InlineDevice(model, plan, cluster)
    return _THREADS[plan.shape](model, plan, cluster)


def _other_engine(plan: Plan) -> type[Executor]:
    module, name = _ENGINES[plan.engine]
    executor: type[Executor] = getattr(import_module(f"{__package__}.{module}"), name)
    if plan.shape not in executor.shapes:
        raise ExecutionError(
            f"the engine {plan.engine!r} runs plans of shape {', '.join(executor.shapes)}, not {plan.shape!r}; "
            "use the engine 'threads'"
        )
    return executor
