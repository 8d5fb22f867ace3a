"""The null executor: the model as PyTorch runs it, in the caller's thread, with the process's threads.

With `compiled`, `channels_last` or a lower `precision` in the plan it is plain PyTorch with that knob.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from autoplace.hardware.cluster import Cluster
from autoplace.plan import Plan

from ._base import Executor
from .compiling import Compiler
from .layout import call_channels_last
from .sites import autocast_dtype

__all__ = ["Identity"]


class Identity(Executor):
    """Calls the model. Counts no busy time: it does not know which devices the model uses."""

    shapes: ClassVar[tuple[str, ...]] = ("plain",)

    def __init__(self, model: torch.nn.Module, plan: Plan, cluster: Cluster) -> None:
        super().__init__(model, plan, cluster)
        self._dtype = autocast_dtype(plan.precision)
        self._compiler = Compiler(cpp_wrapper=plan.cpp_wrapper)
        self._call: Callable[..., Any] = self._compiler.wrap(model, whole=True) if plan.compiled else model
        self._plain = self._dtype is None and not plan.channels_last

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one pass."""
        if self._plain:
            return self._call(*args, **kwargs)
        first = next(self.model.parameters(), None)
        kind = "cpu" if first is None else first.device.type
        with torch.autocast(kind, dtype=self._dtype, enabled=self._dtype is not None):
            if self.plan.channels_last:
                return call_channels_last(self._call, args, kwargs)
            return self._call(*args, **kwargs)

    def compile_s(self) -> float:
        """Return the wall seconds that calls of this executor have spent in `torch.compile`."""
        return self._compiler.seconds
