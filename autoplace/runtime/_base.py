"""The contract of an executor: runs a model under a Plan, in place of `model(*args, **kwargs)`.

Original modules run; nothing of the model is copied where its parameters can be shared. A call with gradients enabled
returns outputs whose `backward()` (or `torch.autograd.grad`) gives every parameter and input the gradient that plain
PyTorch gives, summed over replicas, microbatches and ties.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from autoplace.hardware.cluster import Cluster
from autoplace.outcome import Span
from autoplace.plan import Plan

__all__ = ["Executor"]


class Executor(ABC):
    """Runs a model under a plan."""

    shapes: ClassVar[tuple[str, ...]]
    """The values of `Plan.shape` that this executor runs."""

    def __init__(self, model: torch.nn.Module, plan: Plan, cluster: Cluster) -> None:
        self.model = model
        self.plan = plan
        self.cluster = cluster

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one pass and return what the model returns.

        Raises:
            ExecutionError: If the batch cannot be split or the outputs cannot be merged as the plan asks.
            Exception: Whatever the model raises, with its own traceback.
        """

    def busy_ms(self) -> dict[str, float]:
        """Return device name to busy milliseconds since the last call of this method."""
        return {}

    def timeline(self) -> tuple[Span, ...]:
        """Return what ran when since the last call of this method; empty where that is not known."""
        return ()

    def compile_s(self) -> float:
        """Return the wall seconds that calls of this executor have spent in `torch.compile`; 0 without it."""
        return 0.0

    def close(self) -> None:  # noqa: B027 - an executor without threads has nothing to end
        """End the executor's threads and undo its hooks; calling it twice does nothing more."""

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
