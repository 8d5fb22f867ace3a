"""The null executor: the model as PyTorch runs it, in the caller's thread, with the process's threads.

With `compiled` or a lower `precision` in the plan it is plain `torch.compile` or plain autocast.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from autoplace.errors import ExecutionError
from autoplace.hardware.cluster import Cluster
from autoplace.plan import Plan

from ._base import Executor
from .sites import PRECISIONS

__all__ = ["Identity"]


class Identity(Executor):
    """Calls the model. Counts no busy time: it does not know which devices the model uses."""

    shapes: ClassVar[tuple[str, ...]] = ("plain",)

    def __init__(self, model: torch.nn.Module, plan: Plan, cluster: Cluster) -> None:
        super().__init__(model, plan, cluster)
        if plan.precision not in PRECISIONS:
            raise ExecutionError(f"precision {plan.precision!r} is unknown; use one of {', '.join(PRECISIONS)}")
        self._dtype = PRECISIONS[plan.precision]
        self._call = torch.compile(model) if plan.compiled else model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one pass."""
        if self._dtype is None:
            return self._call(*args, **kwargs)
        first = next(self.model.parameters(), None)
        with torch.autocast("cpu" if first is None else first.device.type, dtype=self._dtype):
            return self._call(*args, **kwargs)
